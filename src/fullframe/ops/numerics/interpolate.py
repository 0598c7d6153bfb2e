"""Taps: every interpolation and mean as one sparse linear map per axis.

An output position reads a few input positions with fixed weights, computed from its global
position, so that a window gives the same numbers as the whole image. The gradient is the
transposed map. `taps_at` gives one output's taps as ATen defines them; tables of many positions
are cached as tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from math import floor
from struct import pack, unpack
from typing import NamedTuple

import torch

from fullframe.ops.numerics.table_cache import table


class Spec(NamedTuple):
    """One axis of a resampling.

    ``mode`` is nearest, nearest-exact, linear, cubic, linear-aa or cubic-aa (with align_corners and
    the scale the user gave, or None), average (with the window, and whether padding counts),
    adaptive, or reflect or replicate (with the padding before).
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


Taps = list[tuple[int, float]]


def single(x: float) -> float:
    """A number rounded to float32, as ATen does before it takes the pixel below a position, even in float64.

    But for one of its forward kernels for nearest neighbours: see `disputed`.
    """
    return unpack("f", pack("f", x))[0]


def nearest(spec: Spec, position: int, rate: float) -> int:
    """The input index of one output position."""
    at = position + 0.5 if spec.mode == "nearest-exact" else position
    return min(floor(single(at * rate)), spec.source - 1)


def settled(spec: Spec) -> Spec:
    """Without scale and alignment where ATen copies, or doubles, whatever was given."""
    copied = spec.mode in ("nearest", "linear") and spec.source == spec.target
    doubled = spec.mode == "nearest" and spec.target == 2 * spec.source
    return spec._replace(scale=None, align=False) if copied or doubled else spec


@lru_cache(maxsize=256)
def disputed(spec: Spec, wide: bool = True) -> tuple[int, int, int] | None:
    """The first output position that ATen takes from two places, if there is one, and those.

    The step from one to the next is in float64 in its general forward kernel for float64 (``wide``), and in float32
    in that for channels innermost, in that for small images, and in every gradient. A few sizes show it. And the
    general kernel alone minds a scale where the others copy or double (see `settled`).
    """
    rate, other = single(step(settled(spec))), step(spec) if wide else single(step(spec))
    for k in range(spec.target):
        both = nearest(spec, k, rate), nearest(spec, k, other)
        if both[0] != both[1]:
            return k, *both
    return None


def rescaled(spec: Spec) -> bool:
    """Whether the scale that was given makes something else than a copy of an axis that keeps its size."""
    return spec.source == spec.target > 1 and step(spec) != 1.0


def step(spec: Spec) -> float:
    """Input pixels per output pixel, as ATen computes it (``area_pixel_compute_scale``)."""
    if spec.align:
        return (spec.source - 1) / (spec.target - 1) if spec.target > 1 else 0.0
    return 1.0 / spec.scale if spec.scale else spec.source / spec.target


def taps_at(spec: Spec, position: int) -> Taps:
    """(input index, weight) pairs of one output position, indices ascending but for reflection."""
    n, last = spec.source, spec.source - 1
    if spec.mode in MEANS:
        return _mean_taps(spec, position)
    if spec.mode in ("reflect", "replicate"):
        at = position - spec.padding
        if spec.mode == "reflect":
            at = -at if at < 0 else (2 * last - at if at > last else at)
        return [(min(max(at, 0), last), 1.0)]
    if spec.mode == "linear" and n == spec.target:
        return [(position, 1.0), (position, 0.0)]  # so ATen copies: what is infinite is no number then
    rate = step(spec)
    if spec.mode.startswith("nearest"):
        return [(nearest(spec, position, single(rate)), 1.0)]
    if spec.mode.endswith("-aa"):
        return _antialiased_taps(spec, position, rate)
    centre = position * rate if spec.align else (position + 0.5) * rate - 0.5
    if spec.mode == "linear":
        centre = max(centre, 0.0)
        low = min(floor(single(centre)), last)
        part = min(max(centre - low, 0.0), 1.0)
        return [(low, 1.0 - part), (min(low + 1, last), part)]
    low = floor(single(centre))
    t = min(max(centre - low, 0.0), 1.0)
    weights = (_cubic(t + 1), _cubic(t), _cubic(1 - t), _cubic(2 - t))
    return [(min(max(low - 1 + k, 0), n - 1), w) for k, w in enumerate(weights)]


MEANS = ("average", "adaptive")


def _mean_taps(spec: Spec, position: int) -> Taps:
    """A pooling window: its sum, to be divided once by all axes' counts, as ATen does.

    Weights of 1 / count would round alike everywhere, which differences of means (a variance) would show.
    """
    return [(i, 1.0) for i in _mean_window(spec, position)[0]]


def _mean_window(spec: Spec, position: int) -> tuple[range, int]:
    """What a mean adds up along one axis, and its part of the divisor."""
    n = spec.source
    if spec.mode == "adaptive":
        start, stop = position * n // spec.target, -(-(position + 1) * n // spec.target)
        return range(start, stop), stop - start
    start = position * spec.stride - spec.padding
    stop = min(start + spec.kernel, n + spec.padding)
    inside = range(max(start, 0), min(stop, n))
    return inside, spec.divisor or max(1, stop - start if spec.counted else len(inside))


@table
def counts(spec: Spec, low: int, high: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """What the sums of outputs ``[low, high)`` are divided by; None where it is one."""
    found = [_mean_window(spec, p)[1] for p in range(low, high)] if spec.mode in MEANS else []
    return torch.tensor(found, dtype=dtype, device=device) if any(n != 1 for n in found) else None


def divided(x: torch.Tensor, specs: Sequence[Spec], intervals: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Sums as means: of the outputs ``intervals`` along the last axes."""
    total: torch.Tensor | None = None
    for k, (spec, interval) in enumerate(zip(specs, intervals, strict=True)):
        found = counts(spec, *interval, x.dtype, x.device)
        if found is not None:
            found = found.view(-1, *[1] * (len(specs) - k - 1))
            total = found if total is None else total * found
    return x if total is None else x / total


def _antialiased_taps(spec: Spec, position: int, rate: float) -> Taps:
    """Weights of a filter widened by the step, as in Pillow and ATen."""
    linear, wide = spec.mode == "linear-aa", max(rate, 1.0)
    support, centre = (1.0 if linear else 2.0) * wide, rate * (position + 0.5)
    low = max(int(centre - support + 0.5), 0)
    high = min(int(centre + support + 0.5), spec.source)
    distances = [abs((i - centre + 0.5) / wide) for i in range(low, high)]
    weights = [max(0.0, 1.0 - d) if linear else _cubic(d, -0.5) for d in distances]
    total = sum(weights)
    return [(i, w / total) for i, w in zip(range(low, high), weights, strict=True)]


def _cubic(x: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel (IEEE ASSP-29, 1981), with ATen's a; zero from 2 on."""
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0


# Intervals ---------------------------------------------------------------------------------------


@lru_cache(maxsize=65536)
def reads(spec: Spec, low: int, high: int) -> tuple[int, int]:
    """Input interval that outputs ``[low, high)`` read."""
    if high <= low:
        return 0, 0
    if wide(spec):
        return _windows_within(spec, low, high)
    ends = [low, high - 1]
    if spec.mode == "reflect":  # the turning points decide as well
        ends += [p for p in (spec.padding, spec.padding + spec.source - 1) if low < p < high - 1]
    used = [i for p in ends for i, _ in taps_at(spec, p)]
    if not used:  # a pooling window all in the padding
        return _within(spec, low, high)
    return min(used), max(used) + 1


def _windows_within(spec: Spec, low: int, high: int) -> tuple[int, int]:
    """As `reads`, where the windows of a mean are too long to be listed."""
    windows = [w for p in range(low, high) if (w := _mean_window(spec, p)[0])]
    return (min(w.start for w in windows), max(w.stop for w in windows)) if windows else (0, 0)


def _within(spec: Spec, low: int, high: int) -> tuple[int, int]:
    used = [i for p in range(low, high) for i, _ in taps_at(spec, p)]
    return (min(used), max(used) + 1) if used else (0, 0)


def _edges(spec: Spec, position: int) -> tuple[int, int]:
    """The first and the last input that an output reads; where it would, if a window has none."""
    if spec.mode in MEANS:
        window = _mean_window(spec, position)[0]
        beside = position * spec.stride - spec.padding
        return (window[0], window[-1]) if window else (beside, beside)
    taps = taps_at(spec, position)
    return taps[0][0], taps[-1][0]


@lru_cache(maxsize=65536)
def readers(spec: Spec, low: int, high: int) -> tuple[int, int]:
    """Outputs that read inputs ``[low, high)``; by bisection where the taps are monotone."""
    if high <= low:
        return 0, 0
    if spec.mode == "reflect":
        return _reflected_readers(spec, low, high)

    def first(wanted: int, end: int) -> int:
        a, b = 0, spec.target
        while a < b:
            middle = (a + b) // 2
            edge = _edges(spec, middle)[end]
            a, b = (a, middle) if edge >= wanted else (middle + 1, b)
        return a

    start, stop = first(low, 1), first(high, 0)
    return start, max(start, stop)


def _reflected_readers(spec: Spec, low: int, high: int) -> tuple[int, int]:
    pad, last = spec.padding, spec.source - 1
    start, stop = low + pad, high + pad
    if low < pad + 1 and high > 1:  # mirrored before the first
        start = min(start, pad - min(high - 1, pad))
    after = spec.target - spec.source - pad
    if high > last - after and low < last:
        stop = max(stop, pad + 2 * last - max(low, last - after) + 1)
    return max(0, start), min(spec.target, stop)


# Tables ------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Output i is the sum over k of ``weight[k][i]`` times input ``where[k][i]``, counted from the
    first input read; ``weight[k]`` is None where all are 1, ``run[k]`` unless the indices are consecutive.
    The outputs ``spare[k]`` have no more inputs: what stands there for one adds nothing, infinite or not."""

    where: tuple[torch.Tensor, ...]
    weight: tuple[torch.Tensor | None, ...]
    run: tuple[int | None, ...]
    spare: tuple[torch.Tensor | None, ...]


class Window(NamedTuple):
    """The inputs that an output is the sum of: from ``first`` up to ``last``, counted from the first input read, or
    of these those at ``where``, some twice; times ``weight``, or 1."""

    first: int
    last: int
    where: torch.Tensor | None = None
    weight: torch.Tensor | None = None


Windows = tuple[Window, ...]
"""One for each output."""


def wide(spec: Spec) -> bool:
    """Whether outputs are sums of so many inputs that one after the other costs less than tap by tap.

    It depends on the whole axis alone, so that every tile adds up in the same order.
    """
    if spec.mode not in MEANS:
        return False
    return _few(spec.target, spec.kernel if spec.mode == "average" else spec.source // spec.target)


def widely_read(spec: Spec) -> bool:
    """The same of the transposed map, whose outputs are the inputs."""
    return _few(spec.source, spec.target // max(spec.source, 1))


def _few(sums: int, terms: int) -> bool:
    """Whether so many sums of so many terms are made by fewer calls one after the other, each by halves."""
    return sums * terms.bit_length() < terms


@table
def forward_table(spec: Spec, low: int, high: int, dtype: torch.dtype, device: torch.device) -> Table | Windows:
    """Taps of outputs ``[low, high)``."""
    if wide(spec):
        origin, windows = reads(spec, low, high)[0], [_mean_window(spec, p)[0] for p in range(low, high)]
        return tuple(Window(w.start - origin, max(w.start, w.stop) - origin) for w in windows)
    columns = _Columns(high - low)
    for position in range(low, high):
        for index, weight in taps_at(spec, position):
            columns.add(position - low, index, weight)
    return columns.table(reads(spec, low, high)[0], dtype, device)


@table
def backward_table(spec: Spec, low: int, high: int, dtype: torch.dtype, device: torch.device) -> Table | Windows:
    """Taps of the transposed map for inputs ``[low, high)``; the table reads outputs."""
    first, last = readers(spec, low, high)
    if widely_read(spec):
        return _windows(spec, (low, high), (first, last), dtype, device)
    columns = _Columns(high - low)
    for out in range(first, last):
        for index, weight in _taps_within(spec, out, low, high):
            columns.add(index - low, out, weight)
    return columns.table(first, dtype, device)


def _taps_within(spec: Spec, out: int, low: int, high: int) -> Taps:
    """The taps of an output on inputs ``[low, high)``."""
    if spec.mode in MEANS:
        window = _mean_window(spec, out)[0]
        return [(index, 1.0) for index in range(max(low, window.start), min(high, window.stop))]
    return [(index, weight) for index, weight in taps_at(spec, out) if low <= index < high]


def _windows(
    spec: Spec, inputs: tuple[int, int], outputs: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Windows:
    """The outputs that read each of these inputs; an output that reads one twice stands there twice."""
    (low, high), (first, last) = inputs, outputs
    rows = [(array("q"), array("d")) for _ in range(low, high)]
    for out in range(first, last):
        for index, weight in _taps_within(spec, out, low, high):
            rows[index - low][0].append(out - first)
            rows[index - low][1].append(weight)
    found = []
    for places, weights in rows:
        if not places:
            found.append(Window(0, 0))
            continue
        weight = torch.frombuffer(weights, dtype=torch.float64).to(device, dtype, copy=True)
        run = len(places) == places[-1] - places[0] + 1
        where = None if run else torch.frombuffer(places, dtype=torch.int64).to(device) - places[0]
        found.append(Window(places[0], places[-1] + 1, where, weight))
    return tuple(found)


class _Columns:
    """Taps as they come, the k-th of all outputs side by side: lists of Python's would take ten times the room."""

    def __init__(self, outputs: int):
        self.outputs, self.have = outputs, array("q", [0]) * outputs  # taps of each
        self.where: list[array[int]] = []
        self.weight: list[array[float]] = []

    def add(self, output: int, index: int, weight: float) -> None:
        k = self.have[output]
        if k == len(self.where):
            self.where.append(array("q", [0]) * self.outputs)
            self.weight.append(array("d", [1.0]) * self.outputs)
        self.where[k][output], self.weight[k][output], self.have[output] = index, weight, k + 1

    def table(self, origin: int, dtype: torch.dtype, device: torch.device) -> Table:
        """The table whose inputs are counted from ``origin``; the columns are used up."""
        index, weight, run, spare = [], [], [], []
        have = torch.frombuffer(self.have, dtype=torch.int64) if self.outputs else torch.empty(0, dtype=torch.int64)
        filler: int | None = None
        for k in range(len(self.where)):
            short = (have <= k).nonzero()[:, 0]
            where = torch.frombuffer(self.where.pop(0), dtype=torch.int64) - origin
            filler = int(where[have > 0].min()) if filler is None else filler
            where[short] = filler
            first = int(where[0])
            runs = not len(short) and bool((where == torch.arange(first, first + self.outputs)).all())
            factor = torch.frombuffer(self.weight.pop(0), dtype=torch.float64)
            index.append(where.to(device))
            run.append(first if runs else None)
            weight.append(None if bool((factor == 1).all()) else factor.to(device, dtype, copy=True))
            spare.append(short.to(device) if len(short) else None)
        return Table(tuple(index), tuple(weight), tuple(run), tuple(spare))


def _added(x: torch.Tensor, axis: int, window: Window) -> torch.Tensor:
    """The sum over a window of an axis, which stays with one element.

    Halves are added until one element is left: a library's sum would take an order that depends on where the elements
    lie, and equal windows must give equal sums.
    """
    if window.first == window.last:
        return torch.zeros_like(x.narrow(axis, 0, 1))
    x, rest = x.narrow(axis, window.first, window.last - window.first), None
    if window.where is not None:
        x = x.index_select(axis, window.where)
    if window.weight is not None:
        x = x * window.weight.view(-1, *[1] * (x.dim() - axis - 1))
    while (n := x.shape[axis]) > 1:
        if n % 2:
            odd = x.narrow(axis, n - 1, 1)
            rest = odd if rest is None else rest + odd
        x = x.narrow(axis, 0, n // 2) + x.narrow(axis, n // 2, n // 2)
    return x if rest is None else x + rest


def apply(x: torch.Tensor, axis: int, table: Table | Windows, length: int) -> torch.Tensor:
    """Sum of weighted gathers along one axis of a window cut to what the table reads."""
    if not isinstance(table, Table):
        return torch.cat([_added(x, axis, window) for window in table], axis)
    if axis > 1 and x.dim() in (4, 5) and x.stride(1) == 1:  # index_select would move the channels outwards
        return apply(x.movedim(1, -1), axis - 1, table, length).movedim(-1, 1)
    shape = [1] * x.dim()
    shape[axis] = -1
    out: torch.Tensor | None = None
    for index, weight, start, spare in zip(*table, strict=True):
        part = x.index_select(axis, index) if start is None else x.narrow(axis, start, len(index))
        if weight is not None:
            part = part * weight.view(shape)
        if spare is not None:  # not a run, so this is memory of its own
            part.index_fill_(axis, spare, 0)
        out = part if out is None else out + part
    return x.new_zeros([*x.shape[:axis], length, *x.shape[axis + 1 :]]) if out is None else out
