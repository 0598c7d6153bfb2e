"""What a fused pointwise group is: operands, nodes, outputs and reductions over one loop. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Ref:
    """A value of a group: operands are numbered first, from 0, then the nodes."""

    index: int


Argument = Ref | bool | int | float | complex | str | torch.dtype | torch.memory_format | None
"""Of a call: a value, or anything else as it is."""


@dataclass(frozen=True)
class Operand:
    """A tensor the group reads.

    Attributes:
        dtype: its element type.
        broadcast: per loop axis, True where its extent is 1 and it is repeated over the loop; `()` for a
            zero-dimensional tensor, which gives way in type promotion as it does in PyTorch.
    """

    dtype: torch.dtype
    broadcast: tuple[bool, ...]


@dataclass(frozen=True)
class Node:
    """One ATen call on earlier values.

    Attributes:
        target: the overload, as 'aten.mul.Tensor'.
        args: positional arguments: `Ref` for a value, anything else as it is.
        dtype: the element type of the result, as PyTorch gives it.
        kwargs: keyword arguments, as pairs.
    """

    target: str
    args: tuple[Argument, ...]
    dtype: torch.dtype
    kwargs: tuple[tuple[str, Argument], ...] = ()

    def refs(self) -> list[Ref]:
        """The values read, in the order of the arguments."""
        return [a for a in (*self.args, *(v for _, v in self.kwargs)) if isinstance(a, Ref)]


@dataclass(frozen=True)
class Reduction:
    """A partial result over the loop, made in the same pass, in float64.

    Attributes:
        value: what is reduced.
        kind: 'sum', or 'moments': element count, mean, and sum of squared deviations from that mean.
        axes: the loop axes reduced; the others are kept, in order.
    """

    value: Ref
    kind: Literal["sum", "moments"]
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Pointwise calls over one loop of `rank` axes. Raises ValueError when a part does not fit the others."""

    rank: int
    operands: tuple[Operand, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Ref, ...]
    reductions: tuple[Reduction, ...] = ()

    def __post_init__(self) -> None:
        for i, operand in enumerate(self.operands):
            if len(operand.broadcast) not in (0, self.rank):
                raise ValueError(f"operand {i}: broadcast names {len(operand.broadcast)} axes of {self.rank}")
        for i, node in enumerate(self.nodes):
            if any(not 0 <= ref.index < len(self.operands) + i for ref in node.refs()):
                raise ValueError(f"node {i}, {node.target}: reads a value that does not come before it")
        count = len(self.operands) + len(self.nodes)
        for ref in (*self.outputs, *(r.value for r in self.reductions)):
            if not 0 <= ref.index < count:
                raise ValueError(f"value {ref.index} is read, but there are {count}")
        for reduction in self.reductions:
            if reduction.kind not in ("sum", "moments"):
                raise ValueError(f"no reduction is called {reduction.kind!r}")
            if sorted(set(reduction.axes)) != sorted(reduction.axes) or any(
                not 0 <= axis < self.rank for axis in reduction.axes
            ):
                raise ValueError(f"cannot reduce axes {reduction.axes} of a loop of rank {self.rank}")

    def dtype(self, ref: Ref) -> torch.dtype:
        """The element type of a value."""
        i = ref.index - len(self.operands)
        return self.operands[ref.index].dtype if i < 0 else self.nodes[i].dtype

    def dimensioned(self) -> list[bool]:
        """Per value, whether it has axes, as opposed to being zero-dimensional (for type promotion)."""
        known = [bool(operand.broadcast) for operand in self.operands]
        for node in self.nodes:
            known.append(any(known[ref.index] for ref in node.refs()))
        return known


class Call:
    """A kernel on tensors of known layout: only their places in memory are still to come."""

    __slots__ = ()
    reusable = True  # with other places

    def __call__(self, places: Sequence[int]) -> list[torch.Tensor]:
        """Run it on the operands and outputs at these addresses; returns what `Kernel.run` does."""
        raise NotImplementedError
