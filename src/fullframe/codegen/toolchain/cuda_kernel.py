"""Groups compiled for CUDA devices."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from threading import Lock
from typing import Protocol

import torch

from fullframe.codegen import cuda as cuda_source
from fullframe.codegen import cuda_launch as grid
from fullframe.codegen.cuda_launch import Launch
from fullframe.codegen.group import Call, Group, Reduction
from fullframe.codegen.loop_layout import contiguous, device, loop
from fullframe.codegen.toolchain import cuda_driver as driver
from fullframe.codegen.toolchain import nvrtc
from fullframe.codegen.toolchain.cuda_driver import Start
from fullframe.codegen.toolchain.cxx import BuildError
from fullframe.device import NVRTC, device_of

THREADS = 256
"""Of a block."""

_REMEMBERED = 256  # calls per kernel: a plan has few classes of tiles
_MOST_WORDS = 480  # of a geometry: with the addresses, parameters have 4096 bytes


class Functions(Protocol):
    """The functions of a compiled source."""

    def bound(self, entry: str, blocks: tuple[int, int]) -> Start:
        """What starts one of them on so many blocks."""
        ...


class Loader(Protocol):
    """Where a kernel runs."""

    threads: int

    def accepts(self, place: torch.device) -> bool:
        """Whether tensors there can be used."""
        ...

    def processors(self, place: torch.device) -> int:
        """The multiprocessors of a device."""
        ...

    def load(self, source: str, place: torch.device) -> Functions:
        """A compiled source. Raises BuildError or DriverError."""
        ...


class Loaded:
    """The functions of a module on one device."""

    def __init__(self, machine: driver.Device, code: bytes) -> None:
        self._machine = machine
        self._module = machine.load(code)

    def bound(self, entry: str, blocks: tuple[int, int]) -> Start:
        """What starts one of them on the current stream."""
        return self._machine.bound(self._machine.function(self._module, entry), blocks, THREADS)


class Cuda:
    """CUDA devices. What is loaded stays so: kernels of one form share it."""

    threads = THREADS

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, int], Loaded] = {}
        self._lock = Lock()

    def accepts(self, place: torch.device) -> bool:
        """Whether it is a CUDA device."""
        return device_of(place).toolchain == NVRTC

    def processors(self, place: torch.device) -> int:
        """The multiprocessors of a device."""
        return driver.device(_index(place)).processors

    def load(self, source: str, place: torch.device) -> Loaded:
        """A source, compiled unless it has been. Raises BuildError or DriverError."""
        key = (source, _index(place))
        made = self._loaded.get(key)
        if made is None:
            machine = driver.device(key[1])
            code = nvrtc.build(source, machine.architecture)
            with self._lock:
                made = self._loaded.get(key) or Loaded(machine, code)
                self._loaded[key] = made
        return made


def _index(place: torch.device) -> int:
    return torch.cuda.current_device() if place.index is None else place.index


CUDA = Cuda()


class _Prepared:
    """A launch with its geometry in memory."""

    __slots__ = ("address", "join", "launch", "start", "words")

    def __init__(self, launch: Launch, functions: Functions) -> None:
        kind = ctypes.c_uint64 if launch.wide else ctypes.c_uint32
        self.launch = launch
        self.start = functions.bound(launch.entry, launch.grid)
        self.join = functions.bound(cuda_source.JOIN, (launch.joining, 1)) if launch.joining else None
        self.words = (kind * len(launch.words))(*launch.words)
        self.address = ctypes.addressof(self.words)


_Arguments = ctypes.c_void_p * 2


class _Results:
    """Shapes of the partial results of a call, and how they lie in the one tensor that a kernel fills."""

    __slots__ = ("final", "further", "made", "sums")

    def __init__(self, group: Group, inner: Group, extents: Sequence[int]) -> None:
        self.final = [_shape(reduction, extents) for reduction in group.reductions]
        self.sums = [reduction.kind == "sum" for reduction in group.reductions]
        self.made: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
        self.further: list[tuple[int, ...]] = []  # axes of what is made over which it is reduced after
        start = 0
        for reduction, part in zip(group.reductions, inner.reductions, strict=True):
            shape = _shape(part, extents)
            self.made.append((shape, contiguous(shape), start))
            start += prod(shape)
            kept = [axis for axis in range(group.rank) if axis not in part.axes]
            self.further.append(tuple(i for i, axis in enumerate(kept) if axis in reduction.axes))

    def zeros(self, place: torch.device) -> list[torch.Tensor]:
        """Those of no elements."""
        return [torch.zeros(shape, dtype=torch.float64, device=place) for shape in self.final]

    def of(self, result: torch.Tensor) -> list[torch.Tensor]:
        """Those in a filled tensor."""
        parts = [result.as_strided(shape, stride, start) for shape, stride, start in self.made]
        for i, axes in enumerate(self.further):
            if axes:
                parts[i] = parts[i].sum(axes) if self.sums[i] else _joined(parts[i], axes)
        return parts


def _joined(moments: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """Moments over some more of the axes that they keep, none of which is of extent 0."""
    count, mean, spread = moments
    all = count.sum(axes, keepdim=True)
    first = mean[tuple(slice(0, 1) if a in axes else slice(None) for a in range(mean.dim()))]
    # About one of them, so that the mean of equal ones is that one; unless that one is not finite.
    first = first.nan_to_num(0.0, 0.0, 0.0)
    middle = first + (count * (mean - first)).sum(axes, keepdim=True) / all
    spread = (spread + count * (mean - middle).square()).sum(axes)
    return torch.stack([all.reshape(spread.shape), middle.reshape(spread.shape), spread])


def _shape(reduction: Reduction, extents: Sequence[int]) -> tuple[int, ...]:
    kept = tuple(n for axis, n in enumerate(extents) if axis not in reduction.axes)
    return kept if reduction.kind == "sum" else (3, *kept)


class DeviceCall(Call):
    """A device kernel on tensors of known layout."""

    __slots__ = ("_held", "_place", "_pointers", "_prepared", "_results")

    def __init__(self, prepared: Sequence[_Prepared], held: Sequence[tuple[int, int]], place: torch.device,
                 results: _Results, tensors: int) -> None:  # fmt: skip
        """`prepared`, the best first, is empty when there is nothing to do; `held` are the numbers on the CPU, each
        by operand and size in bytes."""
        self._prepared, self._held, self._place, self._results = tuple(prepared), tuple(held), place, results
        self._pointers = ctypes.c_void_p * (tensors + 2)

    def __call__(self, places: Sequence[int]) -> list[torch.Tensor]:
        """As `Call`; the results are on the device, where they will be when its current stream has come so far."""
        if not self._prepared:
            return self._results.zeros(self._place)
        if self._held:
            places = list(places)
            for i, size in self._held:
                places[i] = int.from_bytes(ctypes.string_at(places[i], size), "little")
        made = self._fitting(places)
        launch = made.launch
        if not launch.result:
            pointers = self._pointers(*places)
            made.start(_Arguments(made.address, ctypes.addressof(pointers)))
            return []
        result = torch.empty(launch.result, dtype=torch.float64, device=self._place)
        work = torch.empty(launch.work, dtype=torch.float64, device=self._place) if launch.work else result
        pointers = self._pointers(*places, result.data_ptr(), work.data_ptr())
        arguments = _Arguments(made.address, ctypes.addressof(pointers))
        made.start(arguments)
        if made.join:
            made.join(arguments)
        return self._results.of(result)

    def _fitting(self, places: Sequence[int]) -> _Prepared:
        """The best way for tensors at these addresses."""
        for made in self._prepared[:-1]:
            for place, bits in zip(places, made.launch.aligned, strict=True):
                if place & bits:
                    break
            else:
                return made
        return self._prepared[-1]


class DeviceKernel:
    """A group compiled for CUDA devices. Threads may run it at the same time."""

    compiled, reason = True, ""

    def __init__(self, group: Group, loader: Loader = CUDA) -> None:
        self.group = group
        self._inner = common(group)
        self._loader = loader
        self._calls: dict[tuple[object, ...], DeviceCall] = {}

    def call(self, operands: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor] = ()) -> DeviceCall:
        """The call for tensors of these layouts. Raises ValueError when they are not those of the group."""
        key = (len(operands), *((t.dtype, t.shape, t.stride(), t.device) for t in (*operands, *outputs)))
        call = self._calls.get(key)
        if call is None:
            call = self._prepare(operands, outputs)
            if len(self._calls) >= _REMEMBERED:
                self._calls.clear()
            self._calls[key] = call
        return call

    def run(self, operands: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """Run the group once, on PyTorch's current stream of the tensors' device.

        Args:
            operands: as for `Kernel.run`, on one CUDA device; a zero-dimensional one may be on the CPU.
            outputs: as for `Kernel.run`, on that device.

        Returns:
            As `Kernel.run`, on that device. The same in every run with the same device and layouts.

        Raises:
            ValueError: the tensors are not those of the group, or not on a CUDA device.
            BuildError: it cannot be compiled for counting with 64 bits, which large tensors need.
            RuntimeError: the device could not be told to run it.
        """
        return self.call(operands, outputs)([t.data_ptr() for t in (*operands, *outputs)])

    def source(self, *, wide: bool = False) -> str:
        """Its source; `wide`, for counting with 64 bits."""
        return cuda_source.generate(self._inner, wide=wide, threads=self._loader.threads)

    def _prepare(self, operands: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> DeviceCall:
        group, tensors = self.group, (*operands, *outputs)
        place = device(tensors)
        if not self._loader.accepts(place):
            raise ValueError(f"the kernel is for CUDA devices, the tensors are on {place}")
        extents, strides = loop(group, operands, outputs)
        results = _Results(group, self._inner, extents)
        if 0 in extents:
            return DeviceCall((), (), place, results, len(tensors))
        held = [t.dim() == 0 and device_of(t.device).on_host and not device_of(place).on_host for t in tensors]
        machine = grid.Device(self._loader.processors(place), self._loader.threads)
        ways = grid.launches(self._inner, extents, strides, [t.dtype for t in tensors], held, machine)
        prepared = [_Prepared(way, self._loader.load(self.source(wide=way.wide), place)) for way in ways]
        numbers = [(i, tensors[i].element_size()) for i, number in enumerate(held) if number]
        return DeviceCall(prepared, numbers, place, results, len(tensors))


def common(group: Group) -> Group:
    """The group with reductions over the axes that all of them reduce: the others are few numbers then."""
    if not group.reductions:
        return group
    axes = set.intersection(*(set(reduction.axes) for reduction in group.reductions))
    parts = tuple(replace(reduction, axes=tuple(sorted(axes))) for reduction in group.reductions)
    return replace(group, reductions=parts)


def unsupported(group: Group) -> str:
    """Why a group that could be compiled for the CPU cannot be for a device; '' when it can."""
    inner = common(group)
    if any(reduction.axes for reduction in group.reductions) and not inner.reductions[0].axes:
        return "no kernels for reductions over different axes"
    if not group.operands and not group.outputs:
        return "no kernels for nothing read or written"
    if grid.words(inner) > _MOST_WORDS - len(group.operands) - len(group.outputs):
        return f"no kernels for {len(group.operands) + len(group.outputs)} tensors of {group.rank} axes"
    return ""


def prepare(groups: Sequence[Group], place: torch.device) -> list[str]:
    """Compile groups that are supported, several at the same time; per group, why it cannot be, or ''."""
    sources = [cuda_source.generate(common(group), threads=THREADS) for group in groups]
    distinct = list(dict.fromkeys(sources))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        reasons = dict(zip(distinct, pool.map(lambda text: _failure(text, place), distinct), strict=True))
    return [reasons[text] for text in sources]


def _failure(source: str, place: torch.device) -> str:
    """Compile and load; why that cannot be, or ''."""
    try:
        CUDA.load(source, place)
    except (BuildError, driver.DriverError) as error:
        return str(error)
    return ""
