"""Pooling that picks elements: max pooling, its gradient and indices, unpooling, adaptive max.

The argmax is always recomputed from the input, so no index into a whole image needs to be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from fullframe import region as box
from fullframe.graph import Kind, Link, Op
from fullframe.ops.rule import BaseRule
from fullframe.ops.taps import Spec, readers, reads
from fullframe.ops.window import Axis, outside, pad_window, spread
from fullframe.region import Interval, Region


def geometry(args: Sequence[Any]) -> list[Axis]:
    """Axes of a pooling from its (kernel, stride, padding, dilation)."""
    n = len(args[0])
    return [Axis(*a) for a in zip(*(spread(v, n) for v in args), strict=True)]


def lowest(dtype: torch.dtype) -> float:
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


class Pool(BaseRule):
    """``tile.max_pool(x, kernel, stride, padding, dilation)``; ceil mode is in the output's extent."""

    kind: Kind = "window"

    def axes(self, op: Op) -> list[Axis]:
        return geometry(op.args[1:5])

    def lead(self, op: Op) -> int:
        """Number of axes before the spatial ones."""
        return len(op.output.shape) - len(op.args[1])

    def links(self, op: Op) -> Sequence[Link]:
        return [Link(0, a, a) for a in range(len(op.output.shape))]

    def reads(self, op: Op, region: Region) -> list[Interval]:
        spatial = region[self.lead(op) :]
        return [box.window_reads(r, *a) for r, a in zip(spatial, self.axes(op), strict=True)]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        lead = self.lead(op)
        spans = zip(self.reads(op, region), op.inputs[0].shape[lead:], strict=True)
        return [(*region[:lead], *(box.clip(r, n) for r, n in spans))]

    def run(self, op: Op, region: Region, windows: Sequence[Any]) -> Any:
        axes = self.axes(op)
        pads = outside(self.reads(op, region), op.inputs[0].shape[self.lead(op) :])
        x = pad_window(windows[0], pads, lowest(windows[0].dtype))
        kernel, stride, dilation = ([a[k] for a in axes] for k in (0, 1, 3))
        return self.pooled(op, region, _POOLS[len(axes)](x, kernel, stride, 0, dilation, False))

    def pooled(self, op: Op, region: Region, made: Sequence[torch.Tensor]) -> torch.Tensor:
        return made[0]

    def cost(self, op: Op, elements: int) -> int:
        return elements * prod(a.kernel for a in self.axes(op))


class PoolIndices(Pool):
    """``tile.max_pool_indices``: where each maximum is in the whole plane, row by row."""

    def pooled(self, op: Op, region: Region, made: Sequence[torch.Tensor]) -> torch.Tensor:
        span = self.reads(op, region)
        extents = op.inputs[0].shape[self.lead(op) :]
        return moved(made[1], box.shape_of(tuple(span)), [-low for low, _ in span], extents)


def moved(flat: torch.Tensor, extents: Sequence[int], shift: Sequence[int], wanted: Sequence[int]) -> torch.Tensor:
    """Flat positions in one plane, counted in another whose corner is ``shift`` before."""
    found = torch.zeros_like(flat)
    inner = 1
    for extent, by, other in reversed(list(zip(extents, shift, wanted, strict=True))):
        found += (flat % extent - by) * inner
        flat, inner = flat // extent, inner * other
    return found


_POOLS = {2: torch.ops.aten.max_pool2d_with_indices, 3: torch.ops.aten.max_pool3d_with_indices}
_POOL_GRADS = {
    2: torch.ops.aten.max_pool2d_with_indices_backward,
    3: torch.ops.aten.max_pool3d_with_indices_backward,
}


class PoolGrad(BaseRule):
    """``tile.max_pool_grad(g, x, kernel, stride, padding, dilation)``."""

    kind: Kind = "window"

    def axes(self, op: Op) -> list[Axis]:
        return geometry(op.args[2:6])

    def lead(self, op: Op) -> int:
        return len(op.output.shape) - len(op.args[2])

    def links(self, op: Op) -> Sequence[Link]:
        return [Link(i, a, a) for i in (0, 1) for a in range(len(op.output.shape))]

    def touched(self, op: Op, region: Region) -> list[Interval]:
        """The pooled pixels whose window touches the region."""
        lead = self.lead(op)
        axes = zip(region[lead:], self.axes(op), op.inputs[0].shape[lead:], strict=True)
        return [box.clip(box.window_writes(r, *a), n) for r, a, n in axes]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        lead, outs = self.lead(op), self.touched(op, region)
        axes = zip(outs, self.axes(op), op.inputs[1].shape[lead:], strict=True)
        spans = [box.clip(box.window_reads(o, *a), n) for o, a, n in axes]
        return [(*region[:lead], *outs), (*region[:lead], *spans)]

    def run(self, op: Op, region: Region, windows: Sequence[Any]) -> Any:
        axes, lead, outs = self.axes(op), self.lead(op), self.touched(op, region)
        g, x = windows
        if any(high <= low for low, high in outs):
            return g.new_zeros(box.shape_of(region))
        spans = [box.window_reads(o, *a) for o, a in zip(outs, axes, strict=True)]
        x = pad_window(x, outside(spans, op.inputs[1].shape[lead:]), lowest(x.dtype))
        kernel, stride, dilation = ([a[k] for a in axes] for k in (0, 1, 3))
        _, indices = _POOLS[len(axes)](x, kernel, stride, 0, dilation, False)
        made = _POOL_GRADS[len(axes)](g, x, kernel, stride, [0], dilation, False, indices)
        return pad_window(made, [(r[0] - w[0], w[1] - r[1]) for w, r in zip(region[lead:], spans, strict=True)])

    def cost(self, op: Op, elements: int) -> int:
        return elements * prod(a.kernel for a in self.axes(op))


def scattered(
    values: torch.Tensor, indices: torch.Tensor, extents: Sequence[int], region: Sequence[Interval]
) -> torch.Tensor:
    """Values added at their flat positions in a plane, cut to a region of it."""
    lead = values.shape[: values.dim() - len(extents)]
    outside_it = torch.zeros_like(indices, dtype=torch.bool)
    rest = indices
    for extent, (low, high) in reversed(list(zip(extents, region, strict=True))):
        outside_it |= (rest % extent < low) | (rest % extent >= high)
        rest = rest // extent
    shape = [high - low for low, high in region]
    where = moved(indices, extents, [low for low, _ in region], shape).masked_fill_(outside_it, prod(shape))
    out = values.new_zeros(*lead, prod(shape) + 1)
    out.scatter_add_(-1, where.flatten(len(lead)), values.flatten(len(lead)))
    return out[..., :-1].reshape(*lead, *shape)


class Unpool(BaseRule):
    """``tile.max_unpool(x, indices, kernel, stride, padding, dilation)``: indices of that pooling.

    The windows of the pooling must not overlap.
    """

    kind: Kind = "window"

    axes = PoolGrad.axes
    lead = PoolGrad.lead
    links = PoolGrad.links
    touched = PoolGrad.touched

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        lead = self.lead(op)
        return [(*region[:lead], *self.touched(op, region))] * 2

    def run(self, op: Op, region: Region, windows: Sequence[Any]) -> Any:
        lead = self.lead(op)
        return scattered(windows[0], windows[1], op.output.shape[lead:], region[lead:])


class UnpoolGrad(BaseRule):
    """``tile.max_unpool_grad(g, indices, kernel, stride, padding, dilation)``: picks from g."""

    kind: Kind = "window"

    axes = PoolGrad.axes
    lead = PoolGrad.lead
    links = PoolGrad.links

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        lead = self.lead(op)
        axes = zip(region[lead:], self.axes(op), op.inputs[0].shape[lead:], strict=True)
        return [(*region[:lead], *(box.clip(box.window_reads(r, *a), n) for r, a, n in axes)), region]

    def run(self, op: Op, region: Region, windows: Sequence[Any]) -> Any:
        lead, (g, indices) = self.lead(op), windows
        read = self.footprint(op, region)[0][lead:]
        where = moved(indices, op.inputs[0].shape[lead:], [low for low, _ in read], g.shape[lead:])
        return g.flatten(lead).gather(-1, where.flatten(lead)).view(indices.shape)


class AdaptiveMax(BaseRule):
    """``tile.adaptive_max(x)``: output i of an axis is the maximum of inputs floor(i*n/t) to ceil((i+1)*n/t)."""

    kind: Kind = "window"

    def specs(self, op: Op) -> list[Spec]:
        rank = op.args[-1]
        return [
            Spec("adaptive", s, t) for s, t in zip(op.inputs[0].shape[-rank:], op.output.shape[-rank:], strict=True)
        ]

    def links(self, op: Op) -> Sequence[Link]:
        return [Link(i, a, a) for i in range(len(op.inputs)) for a in range(len(op.output.shape))]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        lead = len(region) - op.args[-1]
        return [(*region[:lead], *(reads(s, *r) for s, r in zip(self.specs(op), region[lead:], strict=True)))]

    def run(self, op: Op, region: Region, windows: Sequence[Any]) -> Any:
        return adaptive_max(windows[0], self.specs(op), region[len(region) - op.args[-1] :])[0]


def adaptive_max(
    x: torch.Tensor, specs: Sequence[Spec], cells: Sequence[Interval]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima of the cells, and the flat position of the first of each in the whole plane."""
    rank = len(specs)
    lead = x.dim() - rank
    position = torch.zeros((), dtype=torch.int64, device=x.device)
    for k, (spec, (low, high)) in enumerate(zip(specs, cells, strict=True)):
        spans = [reads(spec, i, i + 1) for i in range(low, high)]
        longest = max((b - a for a, b in spans), default=0)
        table = torch.tensor([[min(a + j, b - 1) for j in range(longest)] for a, b in spans], device=x.device)
        origin = reads(spec, low, high)[0]
        x = x.index_select(lead + k, table.flatten() - origin)
        position = position * spec.source + table.view(*table.shape, *[1] * (2 * (rank - k - 1)))
    order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]
    x = x.reshape(*x.shape[:lead], *position.shape)
    x = x.permute(*range(lead), *(lead + a for a in order)).flatten(lead + rank)
    position = position.permute(order).flatten(rank)
    best, where = x.max(-1)
    return best, position.expand(x.shape).gather(-1, where.unsqueeze(-1)).squeeze(-1)


class AdaptiveMaxGrad(AdaptiveMax):
    """``tile.adaptive_max_grad(g, x)``."""

    def specs(self, op: Op) -> list[Spec]:
        rank = op.args[-1]
        return [
            Spec("adaptive", s, t)
            for s, t in zip(op.inputs[1].shape[-rank:], op.inputs[0].shape[-rank:], strict=True)
        ]

    def cells(self, op: Op, region: Region) -> list[Interval]:
        lead = len(region) - op.args[-1]
        return [readers(s, *r) for s, r in zip(self.specs(op), region[lead:], strict=True)]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        lead, cells = len(region) - op.args[-1], self.cells(op, region)
        spans = [reads(s, *c) for s, c in zip(self.specs(op), cells, strict=True)]
        return [(*region[:lead], *cells), (*region[:lead], *spans)]

    def run(self, op: Op, region: Region, windows: Sequence[Any]) -> Any:
        lead, cells = len(region) - op.args[-1], self.cells(op, region)
        if any(high <= low for low, high in cells):
            return windows[0].new_zeros(box.shape_of(region))
        _, where = adaptive_max(windows[1], self.specs(op), cells)
        return scattered(windows[0], where, op.output.shape[lead:], region[lead:])


RULES: dict[str, BaseRule] = {
    "tile.max_pool": Pool(),
    "tile.max_pool_indices": PoolIndices(),
    "tile.max_pool_grad": PoolGrad(),
    "tile.max_unpool": Unpool(),
    "tile.max_unpool_grad": UnpoolGrad(),
    "tile.adaptive_max": AdaptiveMax(),
    "tile.adaptive_max_grad": AdaptiveMaxGrad(),
}
