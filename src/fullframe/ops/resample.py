"""Resampling: every interpolation and its gradient as one sparse linear map per axis.

An output position reads a few input positions with fixed weights (taps), computed from the global
position, so a window gives the same numbers as the whole image. The gradient is the transposed
map. ATen's own interpolation cannot be called on windows: it clamps at the window's edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import floor
from typing import Any, NamedTuple

import torch

from fullframe import region as box
from fullframe.graph import Kind, Link, Op
from fullframe.ops.rule import BaseRule
from fullframe.region import Region


class Spec(NamedTuple):
    """One axis of a resampling.

    ``mode`` is nearest, nearest-exact, linear, cubic (with align_corners and the scale the user
    gave, or None), average (with the window, and whether padding counts) or adaptive.
    """

    mode: str
    source: int
    target: int
    align: bool = False
    scale: float | None = None
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    counted: bool = True
    divisor: int = 0


class Taps(NamedTuple):
    """``index[k][i]`` and ``weight[k][i]``: output i is the sum over k of weight * input[index]."""

    index: tuple[tuple[int, ...], ...]
    weight: tuple[tuple[float, ...], ...]


def step(spec: Spec) -> float:
    """Input pixels per output pixel, as ATen computes it (``area_pixel_compute_scale``)."""
    if spec.align:
        return (spec.source - 1) / (spec.target - 1) if spec.target > 1 else 0.0
    return 1.0 / spec.scale if spec.scale else spec.source / spec.target


def taps_at(spec: Spec, position: int) -> list[tuple[int, float]]:
    """(input index, weight) pairs of one output position, following ATen's definitions."""
    if spec.mode in ("average", "adaptive"):
        return _mean_taps(spec, position)
    rate, last = step(spec), spec.source - 1
    if spec.mode == "nearest":
        return [(min(floor(position * rate), last), 1.0)]
    if spec.mode == "nearest-exact":
        return [(min(floor((position + 0.5) * rate), last), 1.0)]
    centre = position * rate if spec.align else (position + 0.5) * rate - 0.5
    if spec.mode == "linear":
        centre = max(centre, 0.0)
        low = min(floor(centre), last)
        part = min(max(centre - low, 0.0), 1.0)
        return [(low, 1.0 - part), (min(low + 1, last), part)]
    low = floor(centre)
    t = min(max(centre - low, 0.0), 1.0)
    weights = (_far(t + 1), _near(t), _near(1 - t), _far(2 - t))
    return [(min(max(low - 1 + k, 0), last), w) for k, w in enumerate(weights)]


def _mean_taps(spec: Spec, position: int) -> list[tuple[int, float]]:
    """Equal weights over a pooling window; ATen's divisor is a product of one count per axis."""
    n = spec.source
    if spec.mode == "adaptive":
        start, stop = position * n // spec.target, -(-(position + 1) * n // spec.target)
        return [(i, 1.0 / (stop - start)) for i in range(start, stop)]
    start = position * spec.stride - spec.padding
    stop = min(start + spec.kernel, n + spec.padding)
    inside = range(max(start, 0), min(stop, n))
    count = spec.divisor or (stop - start if spec.counted else len(inside))
    return [(i, 1.0 / count) for i in inside]


def _near(x: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel for |x| <= 1 (IEEE ASSP-29, 1981) with ATen's a."""
    return ((a + 2) * x - (a + 3)) * x * x + 1


def _far(x: float, a: float = -0.75) -> float:
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a


@lru_cache(maxsize=4096)
def forward_taps(spec: Spec, low: int, high: int) -> Taps:
    """Taps of outputs ``[low, high)``."""
    return _table([taps_at(spec, position) for position in range(low, high)])


@lru_cache(maxsize=4096)
def backward_taps(spec: Spec, low: int, high: int) -> Taps:
    """Taps of the transposed map for inputs ``[low, high)``; the table reads outputs."""
    first, last = readers(spec, low, high)
    rows: list[list[tuple[int, float]]] = [[] for _ in range(low, high)]
    for out in range(first, last):
        for index, weight in taps_at(spec, out):
            if low <= index < high and weight != 0.0:
                rows[index - low].append((out, weight))
    return _table(rows)


def _table(rows: list[list[tuple[int, float]]]) -> Taps:
    most = max((len(r) for r in rows), default=0)
    filler = min((i for r in rows for i, _ in r), default=0)
    rows = [r + [(filler, 0.0)] * (most - len(r)) for r in rows]
    index = tuple(tuple(r[k][0] for r in rows) for k in range(most))
    weight = tuple(tuple(r[k][1] for r in rows) for k in range(most))
    return Taps(index, weight)


@lru_cache(maxsize=65536)
def reads(spec: Spec, low: int, high: int) -> tuple[int, int]:
    """Input interval that outputs ``[low, high)`` read (monotone, so the ends decide)."""
    if high <= low:
        return 0, 0
    ends = [i for p in (low, high - 1) for i, _ in taps_at(spec, p)]
    return min(ends), max(ends) + 1


@lru_cache(maxsize=65536)
def readers(spec: Spec, low: int, high: int) -> tuple[int, int]:
    """Outputs that may read inputs ``[low, high)``, by bisection on the monotone taps."""

    def first(wanted: int, end: int) -> int:
        a, b = 0, spec.target
        while a < b:
            middle = (a + b) // 2
            edge = (max if end else min)(i for i, _ in taps_at(spec, middle))
            a, b = (a, middle) if edge >= wanted else (middle + 1, b)
        return a

    start, stop = first(low, 1), first(high, 0)
    return (start, max(start, stop)) if high > low else (0, 0)


def apply_taps(x: torch.Tensor, axis: int, taps: Taps, origin: int, dtype: torch.dtype) -> torch.Tensor:
    """Sum of weighted gathers along one axis of a window whose first element is ``origin``."""
    shape = [1] * x.dim()
    shape[axis] = -1
    out: torch.Tensor | None = None
    for index, weight in zip(taps.index, taps.weight, strict=True):
        where = torch.tensor(index, device=x.device) - origin
        part = x.index_select(axis, where)
        if any(w != 1.0 for w in weight):
            part = part * torch.tensor(weight, dtype=dtype, device=x.device).view(shape)
        out = part if out is None else out.add_(part)
    if out is None:
        shape = list(x.shape)
        shape[axis] = len(taps.index[0]) if taps.index else 0
        return x.new_zeros(shape)
    return out


class Resample(BaseRule):
    """``tile.resample(x, specs)``: one `Spec` per spatial axis."""

    kind: Kind = "resample"

    def lead(self, op: Op) -> int:
        return len(op.output.shape) - len(op.args[1])

    def links(self, op: Op) -> Sequence[Link]:
        return [Link(0, a, a) for a in range(len(op.output.shape))]

    def interval(self, spec: Spec, low: int, high: int) -> tuple[int, int]:
        return reads(spec, low, high)

    def taps(self, spec: Spec, low: int, high: int) -> Taps:
        return forward_taps(spec, low, high)

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        lead = self.lead(op)
        spatial = (self.interval(s, *r) for s, r in zip(op.args[1], region[lead:], strict=True))
        return [(*region[:lead], *spatial)]

    def run(self, op: Op, region: Region, windows: Sequence[Any]) -> Any:
        x, lead = windows[0], self.lead(op)
        read = self.footprint(op, region)[0]
        wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        y = x.to(wide)
        for axis in range(lead, len(region)):
            spec = op.args[1][axis - lead]
            if spec.mode != "average" and spec.source == spec.target and spec.scale in (None, 1.0):
                continue
            if read[axis][1] <= read[axis][0]:
                return x.new_zeros(box.shape_of(region))
            y = apply_taps(y, axis, self.taps(spec, *region[axis]), read[axis][0], wide)
        return y.to(x.dtype)

    def cost(self, op: Op, elements: int) -> int:
        return 8 * elements


class ResampleGrad(Resample):
    """``tile.resample_grad(g, specs)``: the transposed map."""

    def interval(self, spec: Spec, low: int, high: int) -> tuple[int, int]:
        return readers(spec, low, high)

    def taps(self, spec: Spec, low: int, high: int) -> Taps:
        return backward_taps(spec, low, high)


RULES: dict[str, BaseRule] = {
    "tile.resample": Resample(),
    "tile.resample_grad": ResampleGrad(),
}
