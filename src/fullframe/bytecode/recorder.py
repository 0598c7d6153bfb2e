"""The work on a tile as one call: what ATen and the kernels did once, written down and run again without Python.

While a tile runs in Python, a `Recorder` notes the kernels and the ATen calls: padding, copies and sums of two
windows, which are loops of our own, and any op that makes new tensors of tensors or changes its first one, for which
the library's dispatcher is asked. Views are places in memory by then, and nothing else of Python is left; so the
bytecode runs outside of Python's lock. A tile with any other call (one that draws, or whose numbers the dispatcher
does not take) is refused, and goes on in Python. What is called, and with which numbers, is the same.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import local
from typing import Any

import torch

from fullframe import torch_compat
from fullframe.bytecode.calls import flat, looks, memory_of, plain
from fullframe.bytecode.copies import AXES, axes_of
from fullframe.bytecode.libtorch import FORMATS, codes
from fullframe.bytecode.program import Bytecode, Result
from fullframe.codegen.group import Call
from fullframe.codegen.kernel import HostCall, Kernel, Plain
from fullframe.codegen.loop_layout import contiguous
from fullframe.storage.arena import gapless
from fullframe.storage.packing import Piece, pack
from fullframe.torch_compat import TorchDispatchMode, pop_mode, push_mode, pytree

END, KERNEL, NEW, DROP, CALL, COPY, ADD, OWN, KEPT, PLUS, CLEAR, WORKSPACE = range(12)
PLAIN, TENSOR, LIST, OPTIONAL, STRING = range(5)  # what an argument of a call is
ALIGN = 64  # bytes of the widest vector
MOST, ARGUMENTS = 64, 16  # tensors of a kernel, arguments of a call, as the source has them
HELD = 1 << 16  # bytes of a constant
ATEN: Any = torch.ops.aten
MADE = {ATEN.empty.memory_format: None, ATEN.empty_strided.default: None, ATEN.new_empty.default: None,
        ATEN.new_empty_strided.default: None, ATEN.empty_like.default: None, ATEN.new_zeros.default: 0,
        ATEN.zeros.default: 0, ATEN.zeros_like.default: 0}  # fmt: skip
AS_TENSOR = {
    getattr(ATEN, n).Scalar: getattr(ATEN, n).Tensor for n in ("mul", "div", "eq", "ne", "lt", "le", "gt", "ge")
}
F32, F64, I64, BF16 = torch.float32, torch.float64, torch.int64, torch.bfloat16
# Types of a sum, to and from, as in the source.
ADDED = ((F32, F32), (F64, F64), (I64, I64), (F64, F32), (F64, BF16), (F32, BF16), (torch.uint8, torch.bool))
_CURRENT = local()


class Recorder(TorchDispatchMode):
    """Notes what is done to some arrays, the ``bases``; ``refused`` says what it has no word for.

    Each begins so many bytes (``starts``) behind where it is when the bytecode runs. The last ``owned`` are blocks
    that the bytecode gives back when nothing reads them any more.

    Threads may record at the same time: a recorder is put on its thread's stack of modes, and not announced to the
    whole process, as a mode that is entered in torch's own way is; nobody who would ask for it runs inside.
    """

    supports_higher_order_operators = True  # which have no instruction

    def __init__(self, bases: Sequence[torch.Tensor], starts: Sequence[int] = (), owned: int = 0):
        super().__init__()
        self.refused = ""
        self._work: list[list[int]] = []
        self._used: list[list[int]] = []  # slots by instruction
        self._where: dict[int, int] = {}  # slot of each memory
        self._origin: dict[int, int] = {}  # address at which it begins
        self._results = len(bases)
        self._first = self._results - owned  # slot that is given back
        self._slots = self._results + 1
        self._constants: set[int] = set()  # slots that nothing may write
        self._marks = [0]
        self._size = 0
        self._partials: dict[int, int] = {}  # of the memory of a kernel's sums, where they begin in ours
        self._held: list[Any] = []
        self.tables: Sequence[Any] = ()  # which may be read too, and are the same in every run
        for k, tensor in enumerate(bases):
            if memory_of(tensor) in self._where:
                self.refused = "arrays that share memory"
            self._where[memory_of(tensor)] = k
            self._origin[k] = tensor.data_ptr() - (starts[k] if starts else 0)

    def mark(self) -> None:
        """Let what follows be another part of the bytecode."""
        self._marks.append(len(self._work))

    def __enter__(self) -> Any:
        _CURRENT.recorder = self
        push_mode(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _CURRENT.recorder = None
        pop_mode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        with self._unless_refused():
            self._note(func, args, kwargs or {}, made)
        return made

    def _note(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        if not isinstance(func, torch_compat.OpOverload):
            raise _Unknown("an operator of another kind")
        if func in MADE:
            self._new(made, MADE[func])
        elif func in CALLS:
            CALLS[func](self, made, *args, **kwargs)
        elif not looks(func, args, made):
            self._called(func, args, kwargs, made)

    def kernel(self, call: Call, tensors: Sequence[torch.Tensor], places: Sequence[int],
               fresh: Sequence[torch.Tensor], sums: Sequence[torch.Tensor]) -> None:  # fmt: skip
        """Note a kernel that has run on tensors at these places, the ``fresh`` ones new, and added up ``sums``."""
        if not isinstance(call, HostCall):
            self.refused = "a kernel that is no machine code of this processor"
            return
        with self._unless_refused():
            for tensor in fresh:
                self._new(tensor)
            nbytes = 8 * call.geometry.offsets[-1]
            if nbytes:  # a kernel adds to what is there
                self._add([CLEAR, self._results, self._size, nbytes], ())
            if 0 not in call.geometry.extents:
                self._kernel(call, tensors, places)
        for tensor in sums[:1]:  # the others lie behind it
            self._partials[memory_of(tensor)] = self._size
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

    def own(self, function: Any, words: Any, tensors: Sequence[torch.Tensor | None]) -> None:
        """Note a function of our own; a tensor that is missing is one of the last."""
        with self._unless_refused():
            places = [self._place(t) for t in tensors if t is not None]
            if None in tensors[: len(places)]:
                raise _Unknown("a tensor that is missing")
            entry = ctypes.cast(function, ctypes.c_void_p).value or 0
            self._held.append(words)
            flat = [n for place in places for n in place]
            self._add([OWN, entry, ctypes.addressof(words), len(places), *flat], [slot for slot, _ in places])

    @contextmanager
    def _unless_refused(self) -> Iterator[None]:
        """Inside, what has no instruction refuses the bytecode; so does a call in another way than it is known, since
        the call itself has gone well."""
        try:
            yield
        except Exception as error:
            self.refused = self.refused or str(error) or repr(error)

    def finish(self, made: Sequence[torch.Tensor]) -> Bytecode | None:
        """The bytecode, with these partial results to be handed out; None where it was refused."""
        results: list[Result] = []
        with self._unless_refused():
            results = [self._result(m) for m in made]
        if self.refused:
            return None
        last = {slot: k for k, slots in enumerate(self._used) for slot in slots}
        words = self._workspace(last)
        marks = []
        for k in range(len(self._work) + 1):
            for _ in range(self._marks.count(k)):
                words += (END,) if marks else ()
                marks.append(len(words) if marks else 0)
            if k < len(self._work):
                words += self._work[k]
                for slot in dict.fromkeys(self._used[k]):
                    words += (DROP, slot) if last[slot] == k and self._gives_back(slot) else ()
        return Bytecode([*words, END], marks, self._slots, self._size, results, self._held)

    def _workspace(self, last: dict[int, int]) -> list[int]:
        """The instruction that takes a workspace for all that is new, whose places in it are noted; none where parts
        of the bytecode run one by one, and what is new lives from one to another."""
        made = {words[1]: k for k, words in enumerate(self._work) if words[0] == NEW and words[-1] < 0}
        if len(self._marks) > 1 or not made:
            return []
        sizes = {slot: -(-max(1, self._work[k][2]) // ALIGN) * ALIGN for slot, k in made.items()}
        offsets, nbytes = pack({slot: Piece(k, last[slot], sizes[slot]) for slot, k in made.items()})
        for slot, k in made.items():
            self._work[k][-1] = offsets[slot]
        return [WORKSPACE, nbytes]

    def _gives_back(self, slot: int) -> bool:
        return slot > self._results or self._first <= slot < self._results

    # What is noted of each call -------------------------------------------------------------------

    def _add(self, words: list[int], slots: Sequence[int]) -> None:
        self._work.append(words)
        self._used.append([*slots])

    def _slot(self, tensor: torch.Tensor) -> int:
        memory = memory_of(tensor)
        slot = self._where.get(memory)
        # A table is not noted, and may have been given the memory of what was. It lasts, so that memory is its own.
        tables = (t for t in pytree.tree_leaves(self.tables) if isinstance(t, torch.Tensor))
        found = next((t for t in tables if memory_of(t) == memory), None)
        if found is not None and slot not in self._constants:
            self._constant(found)
        elif slot is None:
            raise _Unknown("a tensor from elsewhere")
        return self._where[memory]

    def _place(self, tensor: torch.Tensor) -> tuple[int, int]:
        slot = self._slot(tensor)
        return slot, tensor.data_ptr() - self._origin[slot]

    def _view(self, tensor: torch.Tensor) -> tuple[int, ...]:
        if tensor.dtype not in codes() or not tensor.numel():
            raise _Unknown(f"an array of {tensor.dtype} or without elements")
        return (*self._place(tensor), codes()[tensor.dtype], tensor.dim(), *tensor.shape, *tensor.stride())

    def _make(self, tensor: torch.Tensor) -> int:
        slot, self._slots = self._slots, self._slots + 1
        self._partials.pop(memory_of(tensor), None)  # of sums that nobody has kept
        self._where[memory_of(tensor)] = slot
        self._origin[slot] = tensor.data_ptr()
        return slot

    def _new(self, made: torch.Tensor, value: Any = None) -> None:
        """Note an array, full of a value."""
        slot, size, pattern = self._make(made), 0, 0
        if value is not None:
            one = torch.full((1,), value, dtype=made.dtype).view(torch.uint8).tolist()
            size, pattern = len(one), int.from_bytes(one, "little", signed=True)
            if size > 8:
                raise _Unknown(f"numbers of {made.dtype}")
        self._add([NEW, slot, made.untyped_storage().nbytes(), size, pattern, -1, -1], [slot])

    def _constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that is the same whenever the bytecode runs."""
        slot = self._make(tensor)
        self._held.append(tensor)
        self._constants.add(slot)
        self._add([KEPT, slot, tensor.data_ptr()], [slot])
        return tensor

    def _called(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Any) -> None:
        """Note a call of an op that makes tensors of tensors, whatever it is."""
        func = AS_TENSOR.get(func, func)
        given = func._schema.arguments
        if len(given) > ARGUMENTS or not plain(func):
            raise _Unknown(str(func))
        if not any(isinstance(a, torch.Tensor) for a in flat(args)):
            if made.nbytes > HELD:
                raise _Unknown(f"{func}, a large constant")
            held = self._constant(made.clone())
            self._new(made)
            self._copy(made, made, held)
            return
        args = self._tensors(given, args)
        words, used = [CALL, _text(func._schema.name), _text(func._schema.overload_name), len(given)], []
        for k, argument in enumerate(given):
            value = args[k] if k < len(args) else kwargs.get(argument.name, argument.default_value)
            found = self._argument(argument.type, value, used)
            if found is None:
                raise _Unknown(f"{func} with a {argument.type}")
            words += found
        results = made if isinstance(made, (list, tuple)) else [made]
        given_memory = {memory_of(a) for a in flat(args) if isinstance(a, torch.Tensor)}
        if not func._schema.is_mutable and any(r is not None and memory_of(r) in given_memory for r in results):
            raise _Unknown(f"{func}, of whose results only some are new")
        if func._schema.is_mutable and used[0] in self._constants:
            raise _Unknown(f"{func} of a number")
        words.append(len(results))
        for result in results:
            if result is None or func._schema.is_mutable:
                words.append(-1)
                continue
            used.append(self._make(result))
            words += (used[-1], *_form(result))
        self._add(words, used)

    def _tensors(self, given: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Arguments, with tensors in place of numbers of Python's that stand for one and count as much."""
        beside = [a for a in args if isinstance(a, torch.Tensor)]
        found = list(args)
        for k, (argument, value) in enumerate(zip(given, args, strict=False)):
            if argument.type.kind() != "TensorType" or not isinstance(value, (bool, int, float)):
                continue
            dtype = F64 if isinstance(value, float) else None
            if all(t.dim() == 0 for t in beside):  # where any other number would count as much as they
                dtype = torch.result_type(beside[0], value)
            found[k] = torch.tensor(value, dtype=dtype)
            same = all(torch.result_type(t, found[k]) == torch.result_type(t, value) for t in beside)
            if not same or found[k].dtype in (torch.bfloat16, torch.float16):  # with which numbers are not rounded
                raise _Unknown(f"{value} beside {beside[0].dtype}")
            self._constant(found[k])
        return found

    def _plus(self, made: torch.Tensor, x: torch.Tensor, y: Any, *, alpha: float = 1, sign: float = 1) -> None:
        if made.dtype == torch.int64 and x.dtype == made.dtype and sign * alpha == 1:
            x, y = self._tensors(ATEN.add.Tensor._schema.arguments, [x, y])
            if y.dtype != made.dtype:
                raise _Unknown(f"a sum of {y.dtype} in {made.dtype}")
            self._new(made)
            self._copy(made, made, x)
            self._sum(made, made, y)
            return
        if not made.dtype.is_floating_point:
            raise _Unknown(f"a sum of {made.dtype}")
        x, y = self._tensors(ATEN.add.Tensor._schema.arguments, [x, y])
        views, used = [*self._view(x), *self._view(y)], [self._slot(x), self._slot(y)]
        factor = struct.unpack("q", struct.pack("d", sign * alpha))
        slot = self._make(made)
        self._add([PLUS, *factor, *views, slot, *_form(made)], [*used, slot])

    def _minus(self, made: torch.Tensor, x: torch.Tensor, y: Any, *, alpha: float = 1) -> None:
        self._plus(made, x, y, alpha=alpha, sign=-1)

    def _argument(self, kind: Any, value: Any, used: list[int]) -> list[int] | None:
        match kind.kind():
            case "OptionalType" if value is None:
                return [PLAIN, 0]
            case "OptionalType":
                held = self._argument(kind.getElementType(), value, used)
                return None if held is None else [OPTIONAL, *held]
            case "ListType" if isinstance(value, (list, tuple)):
                parts = [self._argument(kind.getElementType(), v, used) for v in value]
                whole = all(part is not None for part in parts)
                return [LIST, len(value), *(n for part in parts for n in part or ())] if whole else None
            case "TensorType" if isinstance(value, torch.Tensor):
                used.append(self._slot(value))
                return [TENSOR, *self._view(value)]
            case "IntType" | "SymIntType" | "BoolType" if isinstance(value, int):
                return [PLAIN, int(value)]
            case "IntType" if value in codes():
                return [PLAIN, codes()[value]]
            case "IntType" if value in FORMATS:
                return [PLAIN, FORMATS[value]]
            case "FloatType" if isinstance(value, (int, float)):
                return [PLAIN, *struct.unpack("q", struct.pack("d", value))]
            case "StringType":
                return [STRING, _text(value), len(value.encode())]
        return None

    def _full(self, made: torch.Tensor, _: Any, value: float, **__: Any) -> None:
        self._new(made, value)

    def _pad(self, made: torch.Tensor, x: torch.Tensor, pads: Sequence[int], value: float = 0.0) -> None:
        self._new(made)
        one = self._constant(torch.full((), value, dtype=made.dtype))
        to, read = made, x
        for k in range(len(pads) // 2):
            axis, (before, after) = x.dim() - 1 - k, pads[2 * k : 2 * k + 2]
            low = max(-before, 0)
            length = x.shape[axis] - low - max(-after, 0)
            before, after = max(before, 0), max(after, 0)
            for start, count in ((0, before), (before + length, after)):
                edge = to.narrow(axis, start, count)
                self._copy(edge, edge, one.expand_as(edge))
            to = to.narrow(axis, before, length)
            read = read.narrow(axis, low, length)
        self._copy(to, to, read)

    def _clone(self, made: torch.Tensor, x: torch.Tensor, memory_format: Any = None) -> None:
        self._new(made)
        self._copy(made, made, x)

    def _cat(self, made: torch.Tensor, parts: Sequence[torch.Tensor], dim: int = 0) -> None:
        if any(p.dim() != made.dim() for p in parts):
            raise _Unknown("empty parts of another rank")
        self._new(made)
        at = 0
        for part in parts:
            if part.numel():
                to = made.narrow(dim, at, part.shape[dim])
                self._copy(to, to, part)
            at += part.shape[dim]

    def _copy(self, _: Any, to: torch.Tensor, x: torch.Tensor, non_blocking: bool = False) -> None:
        if to.dtype != x.dtype:
            self._called(ATEN.copy_.default, [to, x], {}, to)
            return
        self._move([COPY, to.itemsize], to.shape, (self._place(to), to.stride()), x.expand_as(to))

    def _sum(self, _: Any, to: torch.Tensor, x: torch.Tensor, alpha: float = 1) -> None:
        kinds = (to.dtype, x.dtype)
        if kinds not in ADDED or alpha != 1:
            raise _Unknown(f"a sum of {x.dtype} in {to.dtype}")
        self._move([ADD, ADDED.index(kinds)], to.shape, (self._place(to), to.stride()), x.expand_as(to))

    def _move(self, code: list[int], shape: Sequence[int], to: tuple[tuple[int, int], Sequence[int]],
              x: torch.Tensor) -> None:  # fmt: skip
        if 0 in shape:
            return
        if x.is_conj() or x.is_neg():
            raise _Unknown("numbers that are not as they lie in memory")
        place, strides = to
        if place[0] in self._constants:
            raise _Unknown("a number that is written")
        wide, size = self._wide(code, x.itemsize), x.itemsize
        axes = axes_of(shape, strides, x.stride(), wide, size)
        if len(axes) > AXES:
            raise _Unknown(f"a copy along {len(axes)} axes")
        columns = [n for column in zip(*axes, strict=True) for n in column]
        read = self._place(x)
        self._add([*code, len(axes), *columns, *place, *read], [place[0], read[0]])

    @staticmethod
    def _wide(code: Sequence[int], size: int) -> int:
        """Bytes of an element that is written."""
        return ADDED[code[1]][0].itemsize if code[0] == ADD else size

    def _result(self, made: torch.Tensor) -> Result:
        if made.itemsize > 8:
            raise _Unknown(f"a sum of {made.dtype}")
        start = self._partials.get(memory_of(made))
        if start is not None:
            at = start + made.data_ptr() - memory_of(made)
            return Result(made.dtype, tuple(made.shape), made.stride(), at // made.itemsize)
        if (result := self._in_place(made)) is not None:
            return result
        # In the layout it has, if that leaves no gaps: how it is added up depends on it.
        span = 1 + sum((n - 1) * step for n, step in zip(made.shape, made.stride(), strict=True))
        stride = made.stride() if span == made.numel() else contiguous(made.shape)
        result = Result(made.dtype, tuple(made.shape), stride, self._size // made.itemsize)
        self._move([COPY, made.itemsize], made.shape, ((self._results, self._size), stride), made)
        self._size += -(-made.numel() * made.itemsize // 8) * 8
        return result

    def _in_place(self, made: torch.Tensor) -> Result | None:
        """A result that is made where it is wanted, if it is all of an array that is new."""
        slot = self._where.get(memory_of(made))
        new = next((words for words in self._work if words[0] == NEW and words[1] == slot and words[-1] < 0), None)
        plain = gapless(made) and not (made.is_conj() or made.is_neg())
        whole = plain and made.nbytes == made.untyped_storage().nbytes()
        if new is None or len(self._marks) > 1 or not whole or self._origin[new[1]] != made.data_ptr():
            return None
        self._size = -(-self._size // ALIGN) * ALIGN
        new[-2:] = self._results, self._size
        result = Result(made.dtype, tuple(made.shape), made.stride(), self._size // made.itemsize)
        self._size += -(-made.nbytes // 8) * 8
        return result


class _Unknown(Exception):
    """A call that has no instruction."""


def _form(made: torch.Tensor) -> tuple[int, ...]:
    """What the library must make again: type, axes, strides."""
    if made.dtype not in codes():
        raise _Unknown(f"an array of {made.dtype}")
    return (codes()[made.dtype], made.dim(), *made.stride())


@cache
def _held(text: str) -> Any:
    return ctypes.create_string_buffer(text.encode())


def _text(text: str) -> int:
    """The address of a text that stays."""
    return ctypes.addressof(_held(text))


CALLS: dict[Any, Callable[..., None]] = {
    ATEN.full.default: Recorder._full,
    ATEN.full_like.default: Recorder._full,
    ATEN.new_full.default: lambda recorder, made, _, *shape_and_value, **__: recorder._full(made, *shape_and_value),
    ATEN.add.Tensor: Recorder._plus,
    ATEN.sub.Tensor: Recorder._minus,
    ATEN.constant_pad_nd.default: Recorder._pad,
    ATEN.cat.default: Recorder._cat,
    ATEN.clone.default: Recorder._clone,
    ATEN.copy_.default: Recorder._copy,
    ATEN.add_.Tensor: Recorder._sum,
}


def run(kernel: Kernel | Plain, operands: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    """Run a kernel without sums; it is added to the bytecode that is being recorded."""
    if isinstance(kernel, Plain):
        kernel.run(operands, outputs)
        return
    call, tensors, recorder = kernel.call(operands, outputs), [*operands, *outputs], current()
    places = [t.data_ptr() for t in tensors]
    call(places)
    if recorder is not None:
        recorder.kernel(call, tensors, places, (), ())


def current() -> Recorder | None:
    """The recorder of this thread."""
    return getattr(_CURRENT, "recorder", None)
