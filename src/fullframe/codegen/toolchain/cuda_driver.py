"""Loading and launching machine code on a CUDA device, through the driver's library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from threading import Lock

import torch

from fullframe.codegen.toolchain.cxx import BuildError
from fullframe.torch_compat import current_cuda_stream

Start = Callable[[ctypes.Array[ctypes.c_void_p]], None]
"""Starts a function with these addresses of its parameters. Raises DriverError where it cannot be started."""


class DriverError(RuntimeError):
    """A call of the driver failed."""


@cache
def _library() -> ctypes.CDLL:
    """The driver's library. Raises BuildError when there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BuildError(f"no CUDA driver: {error}") from error
    word, pointer = ctypes.c_uint, ctypes.c_void_p
    library.cuLaunchKernel.argtypes = [pointer, *(word,) * 7, pointer, pointer, pointer]
    library.cuCtxGetCurrent.argtypes = [pointer]
    return library


def _checked(name: str, *arguments: object) -> None:
    code = getattr(_library(), name)(*arguments)
    if code:
        raise DriverError(f"{name} failed: {_meaning(code)}")


def _meaning(code: int) -> str:
    text = ctypes.c_char_p()
    _library().cuGetErrorString(code, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} (code {code})"


class Device:
    """One CUDA device: the context that PyTorch uses there, and functions loaded into it."""

    def __init__(self, index: int) -> None:
        torch.cuda.init()
        self.index = index
        properties = torch.cuda.get_device_properties(index)
        self.processors: int = properties.multi_processor_count
        self.architecture = f"sm_{properties.major}{properties.minor}"
        self._context = ctypes.c_void_p()
        number = ctypes.c_int()
        _checked("cuInit", 0)
        _checked("cuDeviceGet", ctypes.byref(number), index)  # both number the devices that are visible
        _checked("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), number)
        self._launch: Callable[..., int] = _library().cuLaunchKernel
        self._current: Callable[..., int] = _library().cuCtxGetCurrent

    def load(self, code: bytes) -> ctypes.c_void_p:
        """The module of some machine code. Raises DriverError."""
        module = ctypes.c_void_p()
        self._in_context(lambda: _checked("cuModuleLoadData", ctypes.byref(module), code))
        return module

    def function(self, module: ctypes.c_void_p, name: str) -> int:
        """The handle of a function of a module. Raises DriverError."""
        found = ctypes.c_void_p()
        self._in_context(lambda: _checked("cuModuleGetFunction", ctypes.byref(found), module, name.encode()))
        return found.value or 0

    def _in_context(self, action: Callable[[], None]) -> None:
        """Do something in the device's context, which need not be that of this thread."""
        _checked("cuCtxPushCurrent_v2", self._context)
        try:
            action()
        finally:
            _checked("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def bound(self, function: int, grid: tuple[int, int], threads: int) -> Start:
        """What starts a function on so many blocks, on PyTorch's current stream."""
        launch, current, context, index = self._launch, self._current, self._context.value, self.index
        across, down = grid

        def start(arguments: ctypes.Array[ctypes.c_void_p]) -> None:
            found = ctypes.c_void_p()
            current(ctypes.byref(found))
            words = (function, across, down, 1, threads, 1, 1, 0, current_cuda_stream(index), arguments, None)
            if found.value != context:  # a thread that has not used the device yet, or uses another one
                self._in_context(lambda: _checked("cuLaunchKernel", *words))
                return
            code = launch(*words)
            if code:
                raise DriverError(f"cuLaunchKernel failed: {_meaning(code)}")

        return start


_devices: dict[int, Device] = {}
_lock = Lock()


def device(index: int) -> Device:
    """The device of this number. Raises BuildError or DriverError."""
    found = _devices.get(index)
    if found is None:
        with _lock:
            found = _devices.get(index) or Device(index)
            _devices[index] = found
    return found
