"""Pooling that picks elements: max pooling, its gradient and indices, unpooling, adaptive max.

Which element of its window a maximum is gets decided once, in the forward pass, and is stored in a byte. Two tiles
that share a window and each decided again could disagree on two elements that are equal but for the last bit: the
gradient would go to neither, or to both.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import product
from math import prod

import torch

from fullframe.device import CXX, device_of
from fullframe.ir import region as box
from fullframe.ir.graph import Kind, Op
from fullframe.ir.region import Interval, Region
from fullframe.ops.numerics import pool_kernels
from fullframe.ops.numerics.convolve import Axis, geometry, pad_window
from fullframe.ops.numerics.interpolate import Spec, readers, reads
from fullframe.ops.numerics.table_cache import table
from fullframe.ops.primitives.convolution import outside
from fullframe.ops.primitives.rule import Aligned, BaseRule


def lowest(dtype: torch.dtype) -> float:
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def _small(x: torch.Tensor, axes: Sequence[Axis]) -> bool:
    """Whether windows are better pooled by our own kernels."""
    few = prod(a.kernel for a in axes) <= pool_kernels.MOST
    return few and x.dtype.is_floating_point and device_of(x.device).toolchain == CXX and bool(x.numel())


class Pool(Aligned):
    """``tile.max_pool(x, kernel, stride, padding, dilation)``; ceil mode is in the output's extent."""

    kind: Kind = "window"

    def selects(self, op: Op) -> bool:
        return not self.pinned

    def axes(self, op: Op) -> list[Axis]:
        return geometry(op.args[1:5])

    def lead(self, op: Op) -> int:
        """Number of axes before the spatial ones."""
        return len(op.output.shape) - len(op.args[1])

    def reads(self, op: Op, region: Region) -> list[Interval]:
        spatial = region[self.lead(op) :]
        return [box.window_reads(r, *a) for r, a in zip(spatial, self.axes(op), strict=True)]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        lead = self.lead(op)
        spans = zip(self.reads(op, region), op.inputs[0].shape[lead:], strict=True)
        return [(*region[:lead], *(box.clip(r, n) for r, n in spans))]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        axes, lead = self.axes(op), self.lead(op)
        pads = outside(self.reads(op, region), op.inputs[0].shape[lead:])
        if _small(windows[0], axes) and not any(n for pair in pads for n in pair):
            parts = pool_kernels.taps(windows[0], axes, box.shape_of(region[lead:]))
            return pool_kernels.maximum(parts, op.output.dtype if self.pinned else None)
        x = pad_window(windows[0], pads, lowest(windows[0].dtype))
        kernel, stride, dilation = ([a[k] for a in axes] for k in (0, 1, 3))
        rank = len(axes)
        made = _POOLS[rank](x if lead != 1 else x[None], kernel, stride, 0, dilation, False)
        return self.pooled(op, region, made if lead != 1 else [m[0] for m in made])

    def pooled(self, op: Op, region: Region, made: Sequence[torch.Tensor]) -> torch.Tensor:
        return made[0]

    def position(self, op: Op, region: Region) -> Hashable:
        return tuple(outside(self.reads(op, region), op.inputs[0].shape[self.lead(op) :]))

    def cost(self, op: Op, elements: int) -> int:
        return elements * prod(a.kernel for a in self.axes(op))


class PoolChoice(Pool):
    """``tile.max_pool_choice``: which position of its window each maximum is at, counted row by row."""

    pinned = True

    def pooled(self, op: Op, region: Region, made: Sequence[torch.Tensor]) -> torch.Tensor:
        lead, axes, spans = self.lead(op), self.axes(op), self.reads(op, region)
        inner = [prod(stop - start for start, stop in spans[k + 1 :]) for k in range(len(axes))]
        beyond = made[1]
        first = beyond.new_zeros(())
        for k, (axis, (low, high)) in enumerate(zip(axes, region[lead:], strict=True)):
            corners = torch.arange(high - low, device=beyond.device) * (-axis.stride * inner[k])
            beyond += along(corners, lead + k, beyond)
            # Where all of a window is as low as its padding, the first position inside the image is meant.
            within = [max(0, -((o * axis.stride - axis.padding) // axis.dilation)) for o in range(low, high)]
            if any(within):
                weight = prod(a.kernel for a in axes[k + 1 :])
                first = first + along(numbers(tuple(within), beyond.dtype, beyond.device), lead + k, beyond) * weight
        taps = product(*(range(a.kernel) for a in axes))
        steps = [sum(t * a.dilation * n for t, a, n in zip(tap, axes, inner, strict=True)) for tap in taps]
        found = passed(beyond, steps[1:], op.output.dtype)
        return found.maximum(first.to(found.dtype)) if first.dim() else found


FEW = 24  # numbers that are better compared one by one


def passed(values: torch.Tensor, steps: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """How many of the ascending ``steps`` each value has reached; no division, which is slow for integers."""
    if len(steps) > FEW:
        return torch.bucketize(values, numbers(tuple(steps), values.dtype, values.device), right=True).to(dtype)
    found = torch.zeros_like(values, dtype=dtype)
    for step in steps:
        found += values >= step
    return found


@table
def numbers(found: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A list of numbers."""
    return torch.tensor(found, dtype=dtype, device=device)


def along(values: torch.Tensor, axis: int, like: torch.Tensor) -> torch.Tensor:
    """A list of numbers laid along one axis of a tensor."""
    return values.view(-1, *[1] * (like.dim() - axis - 1))


def choice_dtype(kernel: Sequence[int]) -> torch.dtype:
    """The smallest in which the positions of a window can be counted."""
    return torch.uint8 if prod(kernel) <= 256 else torch.int32


class PoolIndices(Aligned):
    """``tile.max_pool_indices(choice, kernel, stride, padding, dilation, extents)``: positions in the whole plane."""

    kind: Kind = "pointwise"

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        return [region]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        extents, rest = op.args[5], windows[0].to(torch.int64)
        lead = len(region) - len(extents)
        found, inner = torch.zeros_like(rest), 1
        for k, axis in reversed(list(enumerate(geometry(op.args[1:5])))):
            start = torch.arange(*region[lead + k], device=rest.device) * axis.stride - axis.padding
            found += (rest % axis.kernel * axis.dilation + along(start, lead + k, rest)) * inner
            rest, inner = rest // axis.kernel, inner * extents[k]
        return found


def moved(flat: torch.Tensor, extents: Sequence[int], shift: Sequence[int], wanted: Sequence[int]) -> torch.Tensor:
    """Flat positions in one plane, counted in another whose corner is ``shift`` before."""
    found = torch.zeros_like(flat)
    inner = 1
    for extent, by, other in reversed(list(zip(extents, shift, wanted, strict=True))):
        found += (flat % extent - by) * inner
        flat, inner = flat // extent, inner * other
    return found


_POOLS = {2: torch.ops.aten.max_pool2d_with_indices, 3: torch.ops.aten.max_pool3d_with_indices}


class PoolGrad(Aligned):
    """``tile.max_pool_grad(g, choice, kernel, stride, padding, dilation)``."""

    kind: Kind = "window"
    cost = Pool.cost

    def axes(self, op: Op) -> list[Axis]:
        return geometry(op.args[2:6])

    def lead(self, op: Op) -> int:
        return len(op.output.shape) - len(op.args[2])

    def touched(self, op: Op, region: Region) -> list[Interval]:
        """The pooled pixels whose window touches the region."""
        lead = self.lead(op)
        axes = zip(region[lead:], self.axes(op), op.inputs[0].shape[lead:], strict=True)
        return [box.clip(box.window_writes(r, *a), n) for r, a, n in axes]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        return [(*region[: self.lead(op)], *self.touched(op, region))] * 2

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        axes, lead, outs = self.axes(op), self.lead(op), self.touched(op, region)
        g, choice = windows
        if any(high <= low for low, high in outs):
            return g.new_zeros(box.shape_of(region))
        spans = [box.window_reads(o, *a) for o, a in zip(outs, axes, strict=True)]
        tiles = all(a.kernel == a.stride and a.dilation == 1 for a in axes)  # no pixel is in two windows, or in none
        if tiles and spans == [*region[lead:]] and _small(g, axes):
            made = g.new_empty((*g.shape[: lead - 1], *box.shape_of(region[lead:]), g.shape[lead - 1]))
            made = made.movedim(-1, lead - 1)
            pool_kernels.chosen(g, choice, pool_kernels.taps(made, axes, g.shape[lead:]))
            return made
        made = picked(g, choice, axes, box.shape_of(tuple(spans)))
        return pad_window(made, [(r[0] - w[0], w[1] - r[1]) for w, r in zip(region[lead:], spans, strict=True)])

    def position(self, op: Op, region: Region) -> Hashable:
        outs = self.touched(op, region)
        if any(high <= low for low, high in outs):
            return None
        spans = [box.window_reads(o, *a) for o, a in zip(outs, self.axes(op), strict=True)]
        return tuple((r[0] - w[0], w[1] - r[1]) for w, r in zip(region[self.lead(op) :], spans, strict=True))


def picked(g: torch.Tensor, choice: torch.Tensor, axes: Sequence[Axis], extents: Sequence[int]) -> torch.Tensor:
    """Each number of ``g`` added where its window chose, one position of the windows after another."""
    lead = g.dim() - len(axes)
    wide = torch.float32 if g.dtype.itemsize == 2 else g.dtype
    made = g.new_zeros((*g.shape[: lead - 1], *extents, g.shape[lead - 1]), dtype=wide).movedim(-1, lead - 1)
    nothing = g.new_zeros(())
    for k, taps in enumerate(product(*(range(a.kernel) for a in axes))):
        starts = [tap * a.dilation for tap, a in zip(taps, axes, strict=True)]
        ends = [s + (n - 1) * a.stride + 1 for s, n, a in zip(starts, g.shape[lead:], axes, strict=True)]
        part = tuple(slice(s, e, a.stride) for s, e, a in zip(starts, ends, axes, strict=True))
        made[(..., *part)].add_(torch.where(choice == k, g, nothing))
    return made.to(g.dtype)


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


class Unpool(PoolGrad):
    """``tile.max_unpool(x, indices, kernel, stride, padding, dilation)``: indices of that pooling.

    The windows of the pooling must not overlap.
    """

    cost = BaseRule.cost

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        lead = self.lead(op)
        return scattered(windows[0], windows[1], op.output.shape[lead:], region[lead:])


class UnpoolGrad(PoolGrad):
    """``tile.max_unpool_grad(g, indices, kernel, stride, padding, dilation)``: picks from g."""

    cost = BaseRule.cost

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        lead = self.lead(op)
        axes = zip(region[lead:], self.axes(op), op.inputs[0].shape[lead:], strict=True)
        return [(*region[:lead], *(box.clip(box.window_reads(r, *a), n) for r, a, n in axes)), region]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        lead, (g, indices) = self.lead(op), windows
        read = self.footprint(op, region)[0][lead:]
        where = moved(indices, op.inputs[0].shape[lead:], [low for low, _ in read], g.shape[lead:])
        return g.flatten(lead).gather(-1, where.flatten(lead)).view(indices.shape)


class AdaptiveMax(Aligned):
    """``tile.adaptive_max(x)``: output i of an axis is the maximum of inputs floor(i*n/t) to ceil((i+1)*n/t)."""

    kind: Kind = "window"

    def selects(self, op: Op) -> bool:
        return not self.pinned

    def specs(self, op: Op) -> list[Spec]:
        rank = op.args[-1]
        return [
            Spec("adaptive", s, t) for s, t in zip(op.inputs[0].shape[-rank:], op.output.shape[-rank:], strict=True)
        ]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        lead = len(region) - op.args[-1]
        return [(*region[:lead], *(reads(s, *r) for s, r in zip(self.specs(op), region[lead:], strict=True)))]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        return adaptive_max(windows[0], self.specs(op), region[len(region) - op.args[-1] :])[0]


@table
def _cells(spec: Spec, low: int, high: int, device: torch.device) -> torch.Tensor:
    """What each of the outputs ``[low, high)`` looks at along one axis, its last position repeated."""
    spans = [reads(spec, i, i + 1) for i in range(low, high)]
    longest = max((b - a for a, b in spans), default=0)
    return torch.tensor([[min(a + j, b - 1) for j in range(longest)] for a, b in spans], device=device)


def adaptive_max(
    x: torch.Tensor, specs: Sequence[Spec], cells: Sequence[Interval]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima of the cells, and the flat position of the first of each in the whole plane."""
    rank = len(specs)
    lead = x.dim() - rank
    position = torch.zeros((), dtype=torch.int64, device=x.device)
    for k, (spec, (low, high)) in enumerate(zip(specs, cells, strict=True)):
        seen = _cells(spec, low, high, x.device)
        origin = reads(spec, low, high)[0]
        x = x.index_select(lead + k, seen.flatten() - origin)
        position = position * spec.source + seen.view(*seen.shape, *[1] * (2 * (rank - k - 1)))
    order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]
    x = x.reshape(*x.shape[:lead], *position.shape)
    x = x.permute(*range(lead), *(lead + a for a in order)).flatten(lead + rank)
    position = position.permute(order).flatten(rank)
    best, where = x.max(-1)
    if x.is_floating_point():  # of several NaN, ATen takes the last
        last = x.shape[-1] - 1 - x.isnan().flip(-1).to(torch.uint8).argmax(-1)
        where = torch.where(best.isnan(), last, where)
    return best, position.expand(x.shape).gather(-1, where.unsqueeze(-1)).squeeze(-1)


class AdaptiveMaxChoice(AdaptiveMax):
    """``tile.adaptive_max_choice(x)``: the flat position of the first maximum of each cell in the whole plane."""

    pinned = True

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        return adaptive_max(windows[0], self.specs(op), region[len(region) - op.args[-1] :])[1]


class AdaptiveMaxGrad(Aligned):
    """``tile.adaptive_max_grad(g, choice)``."""

    kind: Kind = "window"

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        rank = op.args[-1]
        lead = len(region) - rank
        axes = zip(region[lead:], op.output.shape[lead:], op.inputs[0].shape[lead:], strict=True)
        return [(*region[:lead], *(readers(Spec("adaptive", s, t), *r) for r, s, t in axes))] * 2

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        lead = len(region) - op.args[-1]
        return scattered(windows[0], windows[1], op.output.shape[lead:], region[lead:])


RULES: dict[str, BaseRule] = {
    "tile.max_pool": Pool(),
    "tile.max_pool_choice": PoolChoice(),
    "tile.max_pool_indices": PoolIndices(),
    "tile.max_pool_grad": PoolGrad(),
    "tile.max_unpool": Unpool(),
    "tile.max_unpool_grad": UnpoolGrad(),
    "tile.adaptive_max": AdaptiveMax(),
    "tile.adaptive_max_choice": AdaptiveMaxChoice(),
    "tile.adaptive_max_grad": AdaptiveMaxGrad(),
}
