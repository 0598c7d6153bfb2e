"""The work on a tile as one call: what ATen and the kernels did once, written down and run again without Python.

While a tile runs in Python, a `Tape` notes the kernels and the ATen calls: padding, copies and sums of two windows,
which are loops of our own, and any op that makes new tensors of tensors, which the library's dispatcher is asked for.
Views are places in memory by then, and nothing else of Python is left; so the tape runs outside of Python's lock, and
workers no longer wait for each other there. A tile with any other call (one that draws, or takes a number of Python's
as a tensor) is refused, and goes on in Python. What is called, and with which numbers, is the same.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import local
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import compiler
from .call import Call
from .geometry import contiguous, merged
from .kernel import HostCall, Kernel, Plain

ENTRY = "fullframe_tape"
END, KERNEL, NEW, DROP, CALL, COPY, ADD, WEIGHT_GRAD = range(8)
PLAIN, TENSOR, LIST, OPTIONAL, STRING = range(5)  # what an argument of a call is
MOST, AXES, ARGUMENTS = 64, 8, 16  # tensors of a kernel, axes of a copy, arguments of a call, as the source has them
SMALL = 1024  # numbers of a partial result
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ATEN: Any = torch.ops.aten
MADE = {ATEN.empty.memory_format: 0, ATEN.empty_strided.default: 0, ATEN.new_empty.default: 0,
        ATEN.new_empty_strided.default: 0, ATEN.empty_like.default: 0, ATEN.new_zeros.default: 1,
        ATEN.zeros.default: 1, ATEN.zeros_like.default: 1}  # fmt: skip
_CURRENT = local()


class Result(NamedTuple):
    """A partial result: how it lies among all of a tile, and from which of its numbers on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int


class Taped:
    """A tape that is done. Threads may run it at the same time."""

    def __init__(self, words: Sequence[int], slots: int, nbytes: int, results: Sequence[Result], held: Any):
        self._words = (ctypes.c_int64 * len(words))(*words)
        self._slots, self._size, self._held = slots, nbytes // 8, held
        self._results = results

    def run(self, bases: Sequence[int]) -> list[torch.Tensor] | None:
        """The partial results, of a tile whose arrays are at these addresses; None where the library failed."""
        made = torch.zeros(self._size, dtype=torch.float64)
        small = made.numel() > SMALL
        places = (ctypes.c_void_p * (len(bases) + 1))(*bases, made.data_ptr())
        run, library = _entry() or (None, None)
        if run is None or run(self._words, places, len(places), self._slots, library):
            return None
        found = [made.view(dtype).as_strided(shape, stride, at) for dtype, shape, stride, at in self._results]
        # Small ones wait to be added up, and would keep the memory of large ones beside them.
        return [t.clone() if small and t.numel() <= SMALL else t for t in found]


class Tape(TorchDispatchMode):
    """Notes what is done to some arrays, the ``bases``; ``refused`` says what it has no word for.

    One at a time in a process: torch keeps in one place that there is a mode, and what there was before.
    """

    def __init__(self, bases: Sequence[torch.Tensor]):
        super().__init__()
        self.refused = ""
        self._work: list[list[int]] = []
        self._used: list[list[int]] = []  # slots by instruction
        self._where: dict[int, int] = {}  # slot of each memory
        self._origin: dict[int, int] = {}  # address at which it begins
        self._results = len(bases)
        self._slots = self._results + 1
        self._size = 0
        self._partials: dict[int, int] = {}  # of the memory of a kernel's sums, where they begin in ours
        self._held: list[Any] = []
        for k, tensor in enumerate(bases):
            if _memory(tensor) in self._where:
                self.refused = "arrays that share memory"
            self._where[_memory(tensor)] = k
            self._origin[k] = tensor.data_ptr()

    def __enter__(self) -> Any:
        _CURRENT.tape = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _CURRENT.tape = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        with self._unless_refused():
            self._note(func, args, kwargs or {}, made)
        return made

    def _note(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        if func in MADE:
            self._new(made, MADE[func])
        elif func in CALLS:
            try:
                CALLS[func](self, made, *args, **kwargs)
            except _Unknown:
                raise
            except Exception as error:  # a number in place of a tensor, say; the call itself has gone well
                raise _Unknown(f"{func} called in another way") from error
        elif not _looks(func, args, made):
            self._called(func, args, kwargs, made)

    def kernel(self, call: Call, tensors: Sequence[torch.Tensor], places: Sequence[int],
               fresh: Sequence[torch.Tensor], sums: Sequence[torch.Tensor]) -> None:  # fmt: skip
        """Note a kernel that has run on tensors at these places, the ``fresh`` ones new, and added up ``sums``."""
        if not isinstance(call, HostCall):
            self.refused = "a kernel for a device"
            return
        with self._unless_refused():
            for tensor in fresh:
                self._new(tensor, 0)
            if 0 not in call.geometry.extents:
                self._kernel(call, tensors, places)
        for tensor in sums[:1]:  # the others lie behind it
            self._partials[_memory(tensor)] = self._size
        self._size += 8 * call.geometry.offsets[-1]

    def _kernel(self, call: HostCall, tensors: Sequence[torch.Tensor], places: Sequence[int]) -> None:
        if len(tensors) > MOST:
            raise _Unknown("a kernel of many tensors")
        slots = [self._slot(t) for t in tensors]
        words = [KERNEL, call.entry, ctypes.addressof(call.words), len(tensors)]
        for slot, place in zip(slots, places, strict=True):
            words += (slot, place - self._origin[slot])
        words += (1, self._results, self._size) if call.geometry.shapes else (0,)
        self._held.append(call)
        self._add(words, slots)

    def weight_grad(self, function: Any, words: Any, tensors: Sequence[torch.Tensor]) -> None:
        """Note our own weight gradient."""
        with self._unless_refused():
            places = [self._place(t) for t in tensors]
            entry = ctypes.cast(function, ctypes.c_void_p).value or 0
            self._held.append(words)
            flat = [n for place in places for n in place]
            self._add([WEIGHT_GRAD, entry, ctypes.addressof(words), *flat], [slot for slot, _ in places])

    @contextmanager
    def _unless_refused(self) -> Iterator[None]:
        """Inside, what has no instruction refuses the tape."""
        try:
            yield
        except _Unknown as error:
            self.refused = self.refused or str(error)

    def finish(self, made: Sequence[torch.Tensor]) -> Taped | None:
        """The tape, with these partial results to be handed out; None where it was refused."""
        results: list[Result] = []
        with self._unless_refused():
            results = [self._result(m) for m in made]
        if self.refused:
            return None
        last = {slot: k for k, slots in enumerate(self._used) for slot in slots if slot > self._results}
        words: list[int] = []
        for k, work in enumerate(self._work):
            words += work
            for slot in dict.fromkeys(self._used[k]):
                words += (DROP, slot) if last.get(slot) == k else ()
        return Taped([*words, END], self._slots, self._size, results, self._held)

    # What is noted of each call -------------------------------------------------------------------

    def _add(self, words: list[int], slots: Sequence[int]) -> None:
        self._work.append(words)
        self._used.append([*slots])

    def _slot(self, tensor: torch.Tensor) -> int:
        slot = self._where.get(_memory(tensor))
        if slot is None:
            raise _Unknown("a tensor from elsewhere")
        return slot

    def _place(self, tensor: torch.Tensor) -> tuple[int, int]:
        slot = self._slot(tensor)
        return slot, tensor.data_ptr() - self._origin[slot]

    def _view(self, tensor: torch.Tensor) -> tuple[int, ...]:
        if tensor.dtype not in TYPES or not tensor.numel():
            raise _Unknown(f"a convolution of {tensor.dtype} or of an empty tensor")
        return (*self._place(tensor), _codes()[tensor.dtype], tensor.dim(), *tensor.shape, *tensor.stride())

    def _make(self, tensor: torch.Tensor) -> int:
        slot, self._slots = self._slots, self._slots + 1
        self._partials.pop(_memory(tensor), None)  # of sums that nobody has kept
        self._where[_memory(tensor)] = slot
        self._origin[slot] = tensor.data_ptr()
        return slot

    def _new(self, made: torch.Tensor, zero: int) -> None:
        slot = self._make(made)
        self._add([NEW, slot, made.untyped_storage().nbytes(), zero], [slot])

    def _called(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Any) -> None:
        """Note a call of an op that makes tensors of tensors, whatever it is."""
        given = func._schema.arguments
        if len(given) > ARGUMENTS or not _pure(func):
            raise _Unknown(str(func))
        words, used = [CALL, _text(func._schema.name), _text(func._schema.overload_name), len(given)], []
        for k, argument in enumerate(given):
            value = args[k] if k < len(args) else kwargs.get(argument.name, argument.default_value)
            words += self._argument(argument.type, value, used)
        results = made if isinstance(made, (list, tuple)) else [made]
        words.append(len(results))
        for result in results:
            if result is None:
                words.append(-1)
                continue
            used.append(self._make(result))
            words += (used[-1], result.dim(), *result.stride())
        self._add(words, used)

    def _argument(self, kind: Any, value: Any, used: list[int]) -> list[int]:
        match kind.kind():
            case "OptionalType" if value is None:
                return [PLAIN, 0]
            case "OptionalType":
                return [OPTIONAL, *self._argument(kind.getElementType(), value, used)]
            case "ListType" if isinstance(value, (list, tuple)):
                parts = [self._argument(kind.getElementType(), v, used) for v in value]
                return [LIST, len(value), *(n for part in parts for n in part)]
            case "TensorType" if isinstance(value, torch.Tensor):
                used.append(self._slot(value))
                return [TENSOR, *self._view(value)]
            case "IntType" | "SymIntType" | "BoolType" if isinstance(value, int):
                return [PLAIN, int(value)]
            case "FloatType" if isinstance(value, (int, float)):
                return [PLAIN, *struct.unpack("q", struct.pack("d", value))]
            case "StringType":
                return [STRING, _text(value), len(value.encode())]
        raise _Unknown(f"an argument that is a {kind}")

    def _full(self, made: torch.Tensor, shape: Sequence[int], value: float, **_: Any) -> None:
        if value:
            raise _Unknown(f"a window full of {value}")
        self._new(made, 1)

    def _pad(self, made: torch.Tensor, x: torch.Tensor, pads: Sequence[int], value: float = 0.0) -> None:
        if value:
            raise _Unknown(f"padding with {value}")
        self._new(made, 1)
        to, read = made, x
        for k in range(len(pads) // 2):
            axis, (before, after) = x.dim() - 1 - k, pads[2 * k : 2 * k + 2]
            low = max(-before, 0)
            length = x.shape[axis] - low - max(-after, 0)
            to = to.narrow(axis, max(before, 0), length)
            read = read.narrow(axis, low, length)
        self._copy(to, to, read)

    def _clone(self, made: torch.Tensor, x: torch.Tensor, memory_format: Any = None) -> None:
        self._new(made, 0)
        self._copy(made, made, x)

    def _cat(self, made: torch.Tensor, parts: Sequence[torch.Tensor], dim: int = 0) -> None:
        if any(p.dim() != made.dim() for p in parts):
            raise _Unknown("empty parts of another rank")
        self._new(made, 0)
        at = 0
        for part in parts:
            if part.numel():
                to = made.narrow(dim, at, part.shape[dim])
                self._copy(to, to, part)
            at += part.shape[dim]

    def _copy(self, _: Any, to: torch.Tensor, x: torch.Tensor, non_blocking: bool = False) -> None:
        if to.dtype != x.dtype:
            raise _Unknown("a copy in another type")
        self._move([COPY, to.itemsize], to.shape, (self._place(to), to.stride()), x.expand_as(to))

    def _sum(self, _: Any, to: torch.Tensor, x: torch.Tensor, alpha: float = 1) -> None:
        if to.dtype != x.dtype or to.dtype not in (torch.float32, torch.float64) or alpha != 1:
            raise _Unknown("a sum of other types")
        self._move([ADD, to.itemsize], to.shape, (self._place(to), to.stride()), x.expand_as(to))

    def _move(self, code: list[int], shape: Sequence[int], to: tuple[tuple[int, int], Sequence[int]],
              x: torch.Tensor) -> None:  # fmt: skip
        if 0 in shape:
            return
        if x.is_conj() or x.is_neg():
            raise _Unknown("numbers that are not as they lie in memory")
        place, strides = to
        size = x.itemsize
        axes = [(n, a * size, b * size) for n, a, b in zip(shape, strides, x.stride(), strict=True) if n > 1]
        axes = merged(sorted(axes, key=lambda axis: -axis[1])) or [(1, size, size)]
        if len(axes) > AXES:
            raise _Unknown(f"a copy along {len(axes)} axes")
        columns = [n for column in zip(*axes, strict=True) for n in column]
        read = self._place(x)
        self._add([*code, len(axes), *columns, *place, *read], [place[0], read[0]])

    def _result(self, made: torch.Tensor) -> Result:
        if made.itemsize > 8:
            raise _Unknown(f"a sum of {made.dtype}")
        start = self._partials.get(_memory(made))
        if start is not None:
            at = start + made.data_ptr() - _memory(made)
            return Result(made.dtype, tuple(made.shape), made.stride(), at // made.itemsize)
        # In the layout it has, if that leaves no gaps: how it is added up depends on it.
        span = 1 + sum((n - 1) * step for n, step in zip(made.shape, made.stride(), strict=True))
        stride = made.stride() if span == made.numel() else contiguous(made.shape)
        result = Result(made.dtype, tuple(made.shape), stride, self._size // made.itemsize)
        self._move([COPY, made.itemsize], made.shape, ((self._results, self._size), stride), made)
        self._size += -(-made.numel() * made.itemsize // 8) * 8
        return result


def _looks(func: Any, args: Any, made: Any) -> bool:
    """Whether a call has made views of its first argument, and no copy, as some may of tensors of inference mode."""
    if not func.is_view or func is ATEN.lift_fresh.default or not isinstance(args[0], torch.Tensor):
        return False
    views = made if isinstance(made, (list, tuple)) else [made]
    return all(_memory(view) == _memory(args[0]) for view in views)


class _Unknown(Exception):
    """A call that has no instruction."""


TAGS = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _pure(func: Any) -> bool:
    """Whether an op does nothing but make new tensors of its arguments, always the same of the same."""
    fresh = all(r.alias_info is None and r.type.kind() == "TensorType" for r in func._schema.returns)
    return fresh and not func._schema.is_mutable and TAGS.isdisjoint(func.tags)


@cache
def _held(text: str) -> Any:
    return ctypes.create_string_buffer(text.encode())


def _text(text: str) -> int:
    """The address of a text that stays."""
    return ctypes.addressof(_held(text))


CALLS: dict[Any, Callable[..., None]] = {
    ATEN.full.default: Tape._full,
    ATEN.constant_pad_nd.default: Tape._pad,
    ATEN.cat.default: Tape._cat,
    ATEN.clone.default: Tape._clone,
    ATEN.copy_.default: Tape._copy,
    ATEN.add_.Tensor: Tape._sum,
}


def run(kernel: Kernel | Plain, operands: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    """Run a kernel without sums; it goes on the tape that is being written."""
    if isinstance(kernel, Plain):
        kernel.run(operands, outputs)
        return
    call, tensors, tape = kernel.call(operands, outputs), [*operands, *outputs], current()
    places = [t.data_ptr() for t in tensors]
    call(places)
    if tape is not None:
        tape.kernel(call, tensors, places, (), ())


def current() -> Tape | None:
    """The tape of this thread that is being written."""
    return getattr(_CURRENT, "tape", None)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# The library's functions ---------------------------------------------------------------------------


def taping() -> bool:
    """Whether tapes can be run: there is a compiler, and this PyTorch has the functions."""
    return _entry() is not None


@cache
def _entry() -> tuple[Callable[..., int], Any] | None:
    try:
        run = compiler.load(Path(__file__).with_suffix(".cpp").read_text(), ENTRY)
        named = [getattr(_torch(), name) for name in FUNCTIONS]
    except (compiler.BuildError, OSError, AttributeError):
        return None
    return run, (ctypes.c_void_p * len(named))(*(ctypes.cast(f, ctypes.c_void_p) for f in named))


FUNCTIONS = ("aoti_torch_create_tensor_from_blob", "aoti_torch_delete_tensor_object", "aoti_torch_get_data_ptr",
             "aoti_torch_get_strides", "torch_new_list_reserve_size", "torch_list_push_back",
             "torch_new_stable_ivalue", "torch_new_string_handle", "aoti_torch_call_dispatcher")  # fmt: skip


def _torch() -> ctypes.CDLL:
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))


@cache
def _codes() -> dict[torch.dtype, int]:
    return {t: getattr(_torch(), f"aoti_torch_dtype_{str(t).removeprefix('torch.')}")() for t in TYPES}
