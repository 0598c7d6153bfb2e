"""The graph: values, ops and the contract of a rule.

A graph is a flat list of ops in an order that can be run. Every op makes one value; no two values
share memory; buffers that a module updates are outputs. The module runs without torch, whose types it names for
the type checker alone; arguments of ATen's ops are kept as they were recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard

from fullframe.ir.region import Region

if TYPE_CHECKING:
    import torch

Kind = Literal["pointwise", "window", "resample", "layout", "reduce", "whole"]


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor of the step: ``shape`` (elements per axis), ``dtype``, bytes per element."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    itemsize: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}:{dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Ref:
    """Stands in ``Op.args`` for the tensor ``Op.inputs[index]``."""

    index: int


@dataclass(frozen=True)
class Link:
    """Axis ``axis`` of input ``input`` runs along axis ``out`` of the output.

    For a reduction ``out`` is an axis of the driver, the input whose elements are summed.
    """

    input: int
    axis: int
    out: int


class Rule(Protocol):
    """What the engine knows of an op: where a region of the output comes from, and how to run it.

    ``kind``        the family, for printing and for the planner.
    ``heavy``       True where recomputing an element costs much more than loading it.
    ``links``       which axes of inputs and output run along each other (tiles follow them).
    ``channels``    (input, axis) pairs contracted in full whatever the region: never tiled.
    ``grow``        the smallest region the op can make that holds the wanted one.
    ``footprint``   for a (grown) region, the region read of each input, clipped to it.
    ``run``         the window of the region from windows cut exactly to the footprint.
    ``position``    what `run` sees of where a region lies: on regions of one shape with equal positions, and windows
                    of equal shapes, it makes the same calls with the same numbers.
    ``cost``        floating point operations to make this many output elements.
    ``scratch``     bytes that `run` takes for a (grown) region beside what it reads and the output that it makes.
    ``pinned``        True where all tiles must see the same decision (which of two equal numbers is the maximum):
                    the output is stored, and never recomputed.
    ``selects``     True where the output's elements are elements of its input (a maximum), to the last bit.
    ``passes``      True where elements of the output may be elements of an input, to the last bit.
    ``decides``     True where the last bit of an input can change the output by much: comparisons, bends, steps.
    ``compares``    True where it compares the elements of two inputs.
    ``opposes``     True where it compares or subtracts them.
    ``calls``       True where the library runs it, whose calls take a while to begin, however small the window.
    """

    kind: Kind
    heavy: bool
    pinned: bool

    def links(self, op: Op) -> Sequence[Link]: ...

    def channels(self, op: Op) -> Sequence[tuple[int, int]]: ...

    def grow(self, op: Op, region: Region) -> Region: ...

    def footprint(self, op: Op, region: Region) -> Sequence[Region]: ...

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor: ...

    def position(self, op: Op, region: Region) -> Hashable: ...

    def cost(self, op: Op, elements: int) -> int: ...

    def scratch(self, op: Op, region: Region) -> int: ...

    def selects(self, op: Op) -> bool: ...

    def decides(self, op: Op) -> bool: ...

    def passes(self, op: Op) -> bool: ...

    def compares(self, op: Op) -> bool: ...

    def opposes(self, op: Op) -> bool: ...

    def calls(self, op: Op) -> bool: ...


class Reduction(Rule, Protocol):
    """What the engine knows of a sum over tiles, or of another op whose partial results can be combined.

    Its ``grow`` and ``footprint`` take a region of the driver, and ``run`` returns a partial result, in memory of its
    own or in that of what it read.

    ``driver``       the input whose own regions, a disjoint cover, are summed.
    ``keeps``        pairs (axis of the driver, axis of the output) that are not summed.
    ``out_region``   the part of the output that a region of the driver adds to.
    ``driver_region``  the part of the driver that adds to a region of the output.
    ``accumulator``  the type in which partial results are combined; they may come in a narrower one.
    ``start``        what adds nothing, of a shape.
    ``combine``      puts two partial results together, in the memory of the first, the one that comes first in the
                     image. More axes may follow theirs, along which there are others.
    ``finish``       the value of the op from the result of all.
    """

    driver: int

    def keeps(self, op: Op) -> Sequence[tuple[int, int]]: ...

    def out_region(self, op: Op, driver: Region) -> Region: ...

    def driver_region(self, op: Op, out: Region) -> Region: ...

    def accumulator(self, op: Op) -> torch.dtype: ...

    def start(self, op: Op, shape: Sequence[int], device: torch.device) -> torch.Tensor: ...

    def combine(self, op: Op, total: torch.Tensor, partial: torch.Tensor) -> None: ...

    def finish(self, op: Op, total: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Op:
    """One operation: ``output = target(*args, **kwargs)`` with tensors in ``args`` as `Ref`."""

    target: str
    inputs: tuple[Value, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Value
    rule: Rule
    call: Callable[..., Any]
    path: str = ""

    def bind(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Positional arguments with the tensors in place of their `Ref`."""
        return tuple(_fill(a, tensors) for a in self.args)

    def __repr__(self) -> str:
        shown = ", ".join(_show(a, self.inputs) for a in self.args)
        return f"{self.output!r} = {self.target}({shown})"


def _fill(arg: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if type(arg) is Ref:
        return tensors[arg.index]
    if type(arg) in (list, tuple):
        return [_fill(a, tensors) for a in arg]
    return arg


def _show(arg: Any, inputs: Sequence[Value]) -> str:
    if isinstance(arg, Ref):
        return "%" + inputs[arg.index].name
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(_show(a, inputs) for a in arg) + "]"
    return str(arg)


def reduces(rule: Rule) -> TypeGuard[Reduction]:
    """Whether partial results of an op with this rule can be combined."""
    return rule.kind == "reduce"


def reduction_of(op: Op) -> Reduction:
    """The rule of an op whose partial results can be combined."""
    assert reduces(op.rule), f"{op!r} is no reduction"
    return op.rule


def walked(op: Op) -> Value:
    """The value whose elements an op goes through: the driver of a reduction, else what it makes."""
    return op.inputs[op.rule.driver] if reduces(op.rule) else op.output


def arg(op: Op, position: int, default: Any = None) -> Any:
    """Argument at a position, or the default that ATen's schema gives it."""
    return op.args[position] if position < len(op.args) else default


@dataclass(frozen=True)
class GraphSignature:
    """What the outputs of a graph are: so many of each kind, in this order.

    ``handed_out``   what the caller gets: the tensors of the call's own output, then those that it leaves behind.
    ``repeated``     of those left behind, what takes the place of a former call's in the arithmetic.
    ``conditions``   what the recording has assumed to hold or not.
    ``contents``     the new contents of each tensor of the call.
    ``gradients``    those of the tensors that want one.
    """

    handed_out: int = 0
    repeated: int = 0
    conditions: int = 0
    contents: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        return self.first_content + self.contents + self.gradients

    @property
    def first_content(self) -> int:
        return self.handed_out + self.repeated + self.conditions


@dataclass
class Graph:
    """Inputs, ops in runnable order, and outputs (``None`` where one has no tensor), which ``signature`` tells apart.

    Inputs in ``late`` are the gradients of outputs: a tiled module hands out its outputs before it is given them.
    """

    inputs: list[Value]
    ops: list[Op]
    outputs: list[Value | None]
    signature: GraphSignature = GraphSignature()
    late: frozenset[Value] = frozenset()
    constants: dict[Value, torch.Tensor] = field(default_factory=dict)
    seed: Value | None = None  # the input that random numbers follow from; the last of the inputs
    strides: dict[Value, tuple[int, ...]] = field(default_factory=dict)  # of outputs, as their caller expects them

    @property
    def handed_out(self) -> list[Value | None]:
        return self.outputs[: self.signature.handed_out]

    @property
    def flags(self) -> list[Value | None]:
        """The truth of each condition."""
        end = self.signature.first_content
        return self.outputs[end - self.signature.conditions : end]

    @property
    def contents(self) -> list[Value | None]:
        first = self.signature.first_content
        return self.outputs[first : first + self.signature.contents]

    @property
    def gradients(self) -> list[Value | None]:
        return self.outputs[len(self.outputs) - self.signature.gradients :]

    @property
    def early(self) -> list[Value | None]:
        """The outputs that must be ready before the gradients of any arrive."""
        return self.outputs[: len(self.outputs) - self.signature.gradients] if self.late else []

    def __str__(self) -> str:
        head = f"graph({', '.join(map(repr, self.inputs))})"
        body = "\n".join(f"  {op!r}" for op in self.ops)
        tail = ", ".join("None" if v is None else "%" + v.name for v in self.outputs)
        return f"{head}\n{body}\n  return {tail}"


def verify(graph: Graph) -> None:
    """Assert that every op reads values made before it, that no value is made twice, and that all outputs are told
    apart."""
    known: set[Value] = set(graph.inputs) | set(graph.constants)
    for op in graph.ops:
        assert all(v in known for v in op.inputs), f"{op!r} reads a value not made yet"
        assert op.output not in known, f"{op!r} makes a value twice"
        known.add(op.output)
    assert all(v is None or v in known for v in graph.outputs), "an output is never made"
    assert graph.signature.total == len(graph.outputs), f"{len(graph.outputs)} outputs are not {graph.signature}"


def live_ops(ops: Iterable[Op], wanted: Iterable[Value]) -> list[Op]:
    """The ops that the wanted values need, in order."""
    need = set(wanted)
    kept = []
    for op in reversed(list(ops)):
        if op.output in need:
            kept.append(op)
            need.update(op.inputs)
    return kept[::-1]


def followers(ops: Iterable[Op], values: Iterable[Value]) -> set[Value]:
    """The values and all that is made from them."""
    found = set(values)
    for op in ops:
        if not found.isdisjoint(op.inputs):
            found.add(op.output)
    return found
