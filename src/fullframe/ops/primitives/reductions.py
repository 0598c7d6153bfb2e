"""Reductions: partial results over tiles, combined in float64."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import prod

import torch

from fullframe.ir import region as box
from fullframe.ir.graph import Link, Op
from fullframe.ir.region import Region
from fullframe.native.moments import combine_moments
from fullframe.ops.primitives.rule import Reduction, made_of


class OverAxes(Reduction):
    """Over some axes of one input: ``tile.name(x, axes, keepdim)``."""

    def keeps(self, op: Op) -> Sequence[tuple[int, int]]:
        kept, out = [], 0
        for axis in range(len(op.inputs[0].shape)):
            if axis not in op.args[1]:
                kept.append((axis, axis if op.args[2] else out))
                out += 1
        return kept

    def links(self, op: Op) -> Sequence[Link]:
        return [Link(0, a, a) for a in range(len(op.inputs[0].shape))]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        return [region]

    def position(self, op: Op, region: Region) -> Hashable:
        return ()


class Sum(OverAxes):
    """``tile.sum(x, axes, keepdim)``."""

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        dtype = self.accumulator(op)
        return torch.sum(windows[0], op.args[1], op.args[2], dtype=dtype) if op.args[1] else windows[0].to(dtype)


class Extreme(OverAxes):
    """``tile.amax(x, axes, keepdim)`` and ``tile.amin``."""

    def __init__(self, largest: bool):
        self.largest = largest

    def selects(self, op: Op) -> bool:
        return True

    def accumulator(self, op: Op) -> torch.dtype:
        return op.output.dtype

    def start(self, op: Op, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        dtype = op.output.dtype
        if dtype == torch.bool:
            worst: float = not self.largest
        elif dtype.is_floating_point:
            worst = float("-inf") if self.largest else float("inf")
        else:
            limits = torch.iinfo(dtype)
            worst = limits.min if self.largest else limits.max
        return torch.full(list(shape), worst, dtype=dtype, device=device)

    def combine(self, op: Op, total: torch.Tensor, partial: torch.Tensor) -> None:
        total.copy_(torch.maximum(total, partial) if self.largest else torch.minimum(total, partial))

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        reduce = torch.amax if self.largest else torch.amin
        return reduce(windows[0], op.args[1], op.args[2]) if op.args[1] else windows[0]


class Moments(OverAxes):
    """``tile.moments(x, axes)``: count, mean and sum of squared deviations, stacked on a new axis 0.

    The reduced axes keep extent 1. Partials combine in pairs as by Chan, Golub and LeVeque (1979), which has no
    cancellation however large the mean is (`fullframe.native.moments`).
    """

    def keeps(self, op: Op) -> Sequence[tuple[int, int]]:
        return [(a, a + 1) for a in range(len(op.inputs[0].shape)) if a not in op.args[1]]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        axes = list(op.args[1])
        x = windows[0].to(torch.float64)
        count = 1
        for a in axes:
            count *= region[a][1] - region[a][0]
        first = x[tuple(slice(0, 1) if a in axes else slice(None) for a in range(x.dim()))]
        mean = about(x, first, lambda d: d.mean(axes, keepdim=True) if axes else d)
        square = (x - mean).square_()
        square = square.sum(axes, keepdim=True) if axes else square  # no axes are all axes to torch
        return torch.stack([torch.full_like(mean, count), mean, square])

    def scratch(self, op: Op, region: Region) -> int:
        """In float64 what it reads, and the distances from the mean."""
        return 16 * box.size(self.footprint(op, region)[0]) + 2 * made_of(op, region)

    def combine(self, op: Op, total: torch.Tensor, partial: torch.Tensor) -> None:
        combine_moments(total, partial)


def about(x: torch.Tensor, centre: torch.Tensor, average: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """An average taken about one of the numbers: of equal numbers it is that number, to the last bit.

    A norm then makes exact zeros of a constant map, and what follows (a ReLU) sees no sign of a rounding.
    """
    centre = torch.where(torch.eq(centre - centre, centre.new_zeros(())), centre, 0)  # of finite ones
    return centre + average(x - centre)


class Product(OverAxes):
    """``tile.prod(x, axes, keepdim)``."""

    def start(self, op: Op, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        return torch.ones(shape, dtype=self.accumulator(op), device=device)

    def combine(self, op: Op, total: torch.Tensor, partial: torch.Tensor) -> None:
        total.mul_(partial)

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        made = windows[0]
        for axis in sorted(op.args[1], reverse=True):
            made = torch.prod(made, axis, op.args[2], dtype=self.accumulator(op))
        return made


class ScatterSum(Reduction):
    """``tile.scatter_sum(g, index)``: row ``index`` of a table is the sum of the rows of g with that index.

    The first axes of g are the index's, the others those of a row; the output is (rows, *row). Rows
    of a negative index are left out.
    """

    def links(self, op: Op) -> Sequence[Link]:
        own = range(len(op.inputs[0].shape))
        return [Link(0, a, a) for a in own] + [Link(1, a, a) for a in range(len(op.inputs[1].shape))]

    def keeps(self, op: Op) -> Sequence[tuple[int, int]]:
        rank = len(op.inputs[1].shape)
        return [(a, a - rank + 1) for a in range(rank, len(op.inputs[0].shape))]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        return [region, region[: len(op.inputs[1].shape)]]

    position = OverAxes.position

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        g, index = windows
        row = g.shape[index.dim() :]
        total = torch.zeros(op.output.shape[0] + 1, *row, dtype=self.accumulator(op), device=g.device)
        index = torch.where(index < 0, op.output.shape[0], index).flatten()
        return total.index_add_(0, index, g.reshape(-1, *row).to(total.dtype))[:-1]


RULES: dict[str, Reduction] = {
    "tile.sum": Sum(),
    "tile.amax": Extreme(largest=True),
    "tile.amin": Extreme(largest=False),
    "tile.moments": Moments(),
    "tile.prod": Product(),
    "tile.scatter_sum": ScatterSum(),
}


class Contract(Reduction):
    """``tile.contract(x, y, equation)``, driven by x; axes that only y has are taken in full."""

    heavy = True

    def terms(self, op: Op) -> tuple[str, str, str]:
        operands, out = op.args[2].split("->")
        x, y = operands.split(",")
        return x, y, out

    def keeps(self, op: Op) -> Sequence[tuple[int, int]]:
        x, _, out = self.terms(op)
        return [(x.index(c), k) for k, c in enumerate(out) if c in x]

    def links(self, op: Op) -> Sequence[Link]:
        x, y, _ = self.terms(op)
        return [Link(0, a, a) for a in range(len(x))] + [Link(1, a, x.index(c)) for a, c in enumerate(y) if c in x]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        x, y, _ = self.terms(op)
        return [
            region,
            tuple(region[x.index(c)] if c in x else (0, n) for c, n in zip(y, op.inputs[1].shape, strict=True)),
        ]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.einsum(op.args[2], *windows)

    position = OverAxes.position

    def scratch(self, op: Op, region: Region) -> int:
        """The smaller operand may be laid out anew."""
        reads = zip(op.inputs, self.footprint(op, region), strict=True)
        return min(box.size(r) * v.itemsize for v, r in reads)

    def cost(self, op: Op, elements: int) -> int:
        x, _, out = self.terms(op)
        return 2 * elements * prod(n for c, n in zip(x, op.inputs[0].shape, strict=True) if c not in out)


CONTRACTIONS: dict[str, Reduction] = {"tile.contract": Contract()}
