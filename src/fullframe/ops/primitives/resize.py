"""Resampling: interpolation, averages, reflecting and replicating pads, and their gradients.

All are linear maps of taps per axis (see `interpolate`). Where ATen's own kernel on a window with its halo
gives the same numbers (whole factors), it is called and its result cropped: it is faster.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import product
from math import prod

import torch
import torch.nn.functional as F

from fullframe import torch_compat
from fullframe.device import device_of
from fullframe.ir import region as box
from fullframe.ir.graph import Kind, Op
from fullframe.ir.region import Interval, Region
from fullframe.ops.numerics import interpolate
from fullframe.ops.numerics.interpolate import Spec, readers, reads
from fullframe.ops.primitives.rule import Aligned, BaseRule, made_of, nbytes_of

TENSOR = 900  # bytes of a tensor's own, about, with what holds it
TAP = 100  # and of the taps of what is read by few, with those in the making: places and weights
COPIES = 16  # of each pixel, up to which they are made one by one
NO_CHANGE = ("nearest", "nearest-exact", "adaptive")  # others multiply by 0, which shows where numbers are infinite


def unchanged(spec: Spec) -> bool:
    """Whether the map along this axis is the identity."""
    if spec.mode == "average":
        return (spec.kernel, spec.stride, spec.padding, spec.divisor) in ((1, 1, 0, 0), (1, 1, 0, 1))
    return spec.mode in NO_CHANGE and spec.source == spec.target and spec.scale in (None, 1.0)


def copied(spec: Spec) -> bool:
    """Whether the forward leaves this axis alone: ATen's antialiasing does so, though its gradient does not."""
    return unchanged(spec) or (spec.mode.endswith("-aa") and spec.source == spec.target)


def sources(spec: Spec, low: int, high: int) -> Interval:
    """Inputs that these outputs are windows of."""
    return (low, high) if copied(spec) else reads(spec, low, high)


def users(spec: Spec, low: int, high: int) -> Interval:
    """Outputs whose gradients these inputs' gradients are windows of."""
    return (low, high) if unchanged(spec) else readers(spec, low, high)


def factor(spec: Spec) -> int:
    """n where output pixels are the input's, each stretched n times; else 0."""
    if spec.mode not in ("nearest", "linear") or spec.align or spec.target % spec.source:
        return 0
    n = spec.target // spec.source
    return n if spec.scale in (None, float(n)) else 0


def blocks(spec: Spec) -> int:
    """n where every output is the mean of n inputs of its own; else 0."""
    whole = spec.kernel == spec.stride and spec.padding == 0 and spec.target * spec.kernel <= spec.source
    return spec.kernel if spec.mode == "average" and whole and spec.divisor in (0, 1) else 0


def _some(low: int, high: int) -> range:
    """A few positions from the middle of an interval."""
    middle = (low + high) // 2
    return range(middle, min(middle + 8, high))


class Resample(Aligned):
    """``tile.resample(x, specs)``: one `Spec` per spatial axis."""

    kind: Kind = "resample"

    def selects(self, op: Op) -> bool:
        return all(spec.mode.startswith("nearest") for spec in op.args[1])

    def lead(self, op: Op) -> int:
        return len(op.output.shape) - len(op.args[1])

    def interval(self, spec: Spec, low: int, high: int) -> Interval:
        return sources(spec, low, high)

    def skips(self, spec: Spec) -> bool:
        return copied(spec)

    def wide(self, spec: Spec) -> bool:
        """Whether few are sums of many."""
        return interpolate.wide(spec)

    def table(
        self, spec: Spec, region: Interval, dtype: torch.dtype, device: torch.device
    ) -> interpolate.Table | interpolate.Windows:
        return interpolate.forward_table(spec, *region, dtype, device)

    def quick(self, x: torch.Tensor, specs: Sequence[Spec], region: Sequence[Interval]) -> torch.Tensor | None:
        """The window by ATen's own kernel, where that gives the same numbers."""
        return enlarged(x, specs, region) if all(map(factor, specs)) else averaged(x, specs)

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        lead = self.lead(op)
        spatial = (self.interval(s, *r) for s, r in zip(op.args[1], region[lead:], strict=True))
        return [(*region[:lead], *spatial)]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        lead, specs = self.lead(op), op.args[1]
        if windows[0].numel() == 0:
            return windows[0].new_zeros(box.shape_of(region))
        made = self.quick(windows[0], specs, region[lead:])
        return self.by_taps(op, region, windows[0]) if made is None else made

    def position(self, op: Op, region: Region) -> Hashable:
        """Where ATen's own kernel is called: how far from a whole input the region begins."""
        specs, spatial = op.args[1], region[self.lead(op) :]
        if all(map(factor, specs)) and _kernel(specs) is not None:
            return tuple(r[0] - self.interval(s, *r)[0] * factor(s) for s, r in zip(specs, spatial, strict=True))
        return () if all(map(blocks, specs)) and len(specs) > 1 else region

    def by_kernel(self, op: Op) -> bool:
        """Whether ATen's own kernel makes it, and no table is needed."""
        specs = op.args[1]
        stretched = all(map(factor, specs)) and _kernel(specs) is not None
        return stretched or (all(map(blocks, specs)) and len(specs) > 1)

    def by_taps(self, op: Op, region: Region, x: torch.Tensor) -> torch.Tensor:
        """The window axis by axis, the one that shrinks most first."""
        lead, specs = self.lead(op), op.args[1]
        wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        y = self.before(x.to(wide), specs, region[lead:])
        axes = [a for a in range(lead, len(region)) if not self.skips(specs[a - lead])]
        growth = {a: (region[a][1] - region[a][0]) / x.shape[a] for a in axes}
        for axis in sorted(axes, key=growth.__getitem__):
            table = self.table(specs[axis - lead], region[axis], wide, x.device)
            y = interpolate.apply(y, axis, table, region[axis][1] - region[axis][0])
        return self.after(y, specs, region[lead:]).to(x.dtype)

    def before(self, x: torch.Tensor, specs: Sequence[Spec], region: Sequence[Interval]) -> torch.Tensor:
        return x

    def after(self, y: torch.Tensor, specs: Sequence[Spec], region: Sequence[Interval]) -> torch.Tensor:
        return interpolate.divided(y, specs, region)

    def taps(self, spec: Spec, low: int, high: int) -> int:
        """Of all outputs in an interval: each has room for as many as one that has the most."""
        if self.wide(spec):
            return 0
        return (high - low) * max(len(interpolate.taps_at(spec, k)) for k in _some(low, high))

    def kept(self, op: Op, region: Region, pieces: Sequence[int]) -> Mapping[Hashable, int]:
        found: dict[Hashable, int] = {}
        item = 8 + max(4, op.inputs[0].itemsize)  # of a place and a weight
        if self.by_kernel(op):
            return found
        for axis, spec in enumerate(op.args[1], self.lead(op)):
            low, high = region[axis]
            if high > low and not self.skips(spec):
                nbytes = pieces[axis] * (item * self.taps(spec, low, high) + TENSOR)
                found[op.target, spec, high - low, pieces[axis], item] = nbytes
        return found

    def cost(self, op: Op, elements: int) -> int:
        return 8 * elements

    def scratch(self, op: Op, region: Region) -> int:
        """What it reads in a wider type, sums in the making, and a table of each axis: taps with their weights."""
        read, lead = self.footprint(op, region)[0], self.lead(op)
        tables = 0
        for spec, (low, high), (first, last) in zip(op.args[1], region[lead:], read[lead:], strict=True):
            if self.wide(spec):
                tables += TAP * (last - first)
            elif not self.skips(spec) and high > low:
                tables += (2 + (last - first) // (high - low)) * 2 * (TENSOR + 8 * (high - low))
        return 2 * (nbytes_of(op, [read]) + made_of(op, region)) + tables


class ResampleGrad(Resample):
    """``tile.resample_grad(g, specs)``: the transposed map."""

    def selects(self, op: Op) -> bool:
        return False

    def interval(self, spec: Spec, low: int, high: int) -> Interval:
        """Outputs to read: all that belong to whole inputs, where ATen's kernel takes only such (see `reduced`)."""
        first, last = users(spec, low, high)
        n = max(1, factor(spec))
        return first - first % n, last + -last % n

    def before(self, x: torch.Tensor, specs: Sequence[Spec], region: Sequence[Interval]) -> torch.Tensor:
        read = [users(s, *r) for s, r in zip(specs, region, strict=True)]
        for k, (spec, (low, high)) in enumerate(zip(specs, region, strict=True), x.dim() - len(specs)):
            first, last = read[k - x.dim()]
            x = x.narrow(k, first - self.interval(spec, low, high)[0], last - first)
        return interpolate.divided(x, specs, read)

    def after(self, y: torch.Tensor, specs: Sequence[Spec], region: Sequence[Interval]) -> torch.Tensor:
        return y

    def skips(self, spec: Spec) -> bool:
        return unchanged(spec)

    def wide(self, spec: Spec) -> bool:
        return interpolate.widely_read(spec)

    def by_kernel(self, op: Op) -> bool:
        specs = op.args[1]
        whole = all(s.target * blocks(s) >= s.source for s in specs)
        return (all(map(factor, specs)) and _kernel(specs) is not None) or (super().by_kernel(op) and whole)

    def taps(self, spec: Spec, low: int, high: int) -> int:
        first, last = users(spec, low, high)
        if self.wide(spec):
            return 2 * (last - first)
        found = (users(spec, k, k + 1) for k in _some(low, high))
        return (high - low) * max(last - first for first, last in found)

    def table(
        self, spec: Spec, region: Interval, dtype: torch.dtype, device: torch.device
    ) -> interpolate.Table | interpolate.Windows:
        return interpolate.backward_table(spec, *region, dtype, device)

    def position(self, op: Op, region: Region) -> Hashable:
        specs, spatial = op.args[1], region[self.lead(op) :]
        pairs = [*zip(specs, spatial, strict=True)]
        if all(map(factor, specs)) and _kernel(specs) is not None:
            reads = (self.interval(s, *r)[0] for s, r in pairs)
            return tuple((r[0] - n // factor(s), r[0] - users(s, *r)[0] // factor(s))
                         for (s, r), n in zip(pairs, reads, strict=True))  # fmt: skip
        if all(map(blocks, specs)) and len(specs) > 1 and all(s.target * blocks(s) >= s.source for s in specs):
            return tuple(r[0] % blocks(s) for s, r in pairs)
        return region

    def quick(self, x: torch.Tensor, specs: Sequence[Spec], region: Sequence[Interval]) -> torch.Tensor | None:
        return reduced(x, specs, region) if all(map(factor, specs)) else spread_out(x, specs, region)


_KINDS = {
    ("nearest", 2): ("upsample_nearest2d", ()), ("nearest", 3): ("upsample_nearest3d", ()),
    ("linear", 2): ("upsample_bilinear2d", (False,)), ("linear", 3): ("upsample_trilinear3d", (False,)),
}  # fmt: skip


def _kernel(specs: Sequence[Spec], suffix: str = "") -> tuple[torch_compat.OpOverload, tuple[bool, ...]] | None:
    """ATen's kernel for these axes, and its argument for aligned corners where it has one."""
    found = _KINDS.get((specs[0].mode, len(specs)))
    if found is None or len({s.mode for s in specs}) > 1:
        return None
    return getattr(torch.ops.aten, found[0] + suffix).default, found[1]


def batched(x: torch.Tensor, rank: int) -> torch.Tensor:
    """With a batch axis before channels and ``rank`` spatial axes: some of ATen's kernels want one."""
    return x[None] if x.dim() == rank + 1 else x


def packed(x: torch.Tensor) -> torch.Tensor:
    """A window with neighbouring channels as a tensor of its own: part of one, ATen copies to its other layout."""
    innermost = x.dim() in (4, 5) and x.stride(1) == 1 < x.shape[1]
    form = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=form) if innermost else x


def enlarged(x: torch.Tensor, specs: Sequence[Spec], region: Sequence[Interval]) -> torch.Tensor | None:
    """Whole-factor enlargement of a window: beyond its edges are only outputs not asked for."""
    kernel = _kernel(specs)
    if kernel is None:
        return None
    call, rest = kernel
    factors = [factor(s) for s in specs]
    lead = x.dim() - len(specs)
    made = repeated(x, factors) if specs[0].mode == "nearest" else None
    if made is None:
        sizes = [n * f for n, f in zip(x.shape[lead:], factors, strict=True)]
        made = call(packed(x), sizes, *rest, *map(float, factors))
    for k, (spec, f, (low, high)) in enumerate(zip(specs, factors, region, strict=True)):
        start = low - sources(spec, low, high)[0] * f
        made = made.narrow(lead + k, start, high - low)
    return made


def repeated(x: torch.Tensor, factors: Sequence[int]) -> torch.Tensor | None:
    """A window with neighbouring channels, each pixel as often as the factors say along the last axes; None where
    ATen's kernel is to do that: it goes pixel by pixel, of which a copy for each place of a repetition is faster."""
    some = x.dim() == len(factors) + 2 and x.stride(1) == 1 < x.shape[1] and prod(factors) <= COPIES
    if not some or not device_of(x.device).on_host:
        return None
    shape = [n * f for n, f in zip(x.shape[2:], factors, strict=True)]
    made = x.new_empty((x.shape[0], *shape, x.shape[1])).movedim(-1, 1)
    for place in product(*map(range, factors)):
        made[(..., *(slice(k, None, f) for k, f in zip(place, factors, strict=True)))].copy_(x)
    return made


def reduced(g: torch.Tensor, specs: Sequence[Spec], region: Sequence[Interval]) -> torch.Tensor | None:
    """Gradient of `enlarged`, from a window of whole input pixels; of those at its edges, nothing is asked."""
    kernel = _kernel(specs, "_backward")
    if kernel is None:
        return None
    call, rest = kernel
    lead = g.dim() - len(specs)
    factors = [factor(s) for s in specs]
    sizes = [n // f for n, f in zip(g.shape[lead:], factors, strict=True)]
    g = packed(g)
    made = call(g, list(g.shape[lead:]), [*g.shape[:lead], *sizes], *rest, *map(float, factors))
    for k, (spec, f, (low, high)) in enumerate(zip(specs, factors, region, strict=True)):
        made = made.narrow(lead + k, low - users(spec, low, high)[0] // f, high - low)
    return made


def averaged(x: torch.Tensor, specs: Sequence[Spec]) -> torch.Tensor | None:
    """Means of blocks that do not overlap."""
    sizes = [blocks(s) for s in specs]
    if not all(sizes) or len(specs) == 1:
        return None
    call = F.avg_pool2d if len(specs) == 2 else F.avg_pool3d
    divisor = prod(s.divisor or n for s, n in zip(specs, sizes, strict=True))
    made = call(packed(batched(x, len(specs))), sizes, divisor_override=divisor)
    return made if made.dim() == x.dim() else made[0]


def spread_out(g: torch.Tensor, specs: Sequence[Spec], region: Sequence[Interval]) -> torch.Tensor | None:
    """Gradient of `averaged`."""
    sizes = [blocks(s) for s in specs]
    if not all(sizes) or len(specs) == 1 or any(s.target * n < s.source for s, n in zip(specs, sizes, strict=True)):
        return None
    divisor = prod(s.divisor or n for s, n in zip(specs, sizes, strict=True))
    call = torch.ops.aten.upsample_nearest2d if len(specs) == 2 else torch.ops.aten.upsample_nearest3d
    lead, each = g.dim() - len(specs), batched(g / divisor, len(specs))
    made = repeated(each, sizes)
    if made is None:
        made = call.default(packed(each), [n * f for n, f in zip(g.shape[lead:], sizes, strict=True)])
    made = made if made.dim() == g.dim() else made[0]
    for k, (n, (low, high)) in enumerate(zip(sizes, region, strict=True)):
        made = made.narrow(lead + k, low % n, high - low)
    return made


RULES: dict[str, BaseRule] = {
    "tile.resample": Resample(),
    "tile.resample_grad": ResampleGrad(),
}
