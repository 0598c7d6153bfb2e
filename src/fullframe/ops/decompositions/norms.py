"""Norms in normal form: reductions (the barriers) and pointwise parts.

The mathematics of batch norm's backward is Ioffe and Szegedy (2015), section 3: with
x^ = (x - mean) * invstd, dx = scale * (dy - mean(dy) - x^ * mean(dy * x^)).
Statistics and the coefficients made of them are float64.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch

from fullframe.ir.graph import Value
from fullframe.ops.builder.builder import Builder
from fullframe.ops.builder.registry import cast, decomposes, wide
from fullframe.ops.decompositions.reductions import average, variance
from fullframe.ops.primitives.reductions import about

aten = torch.ops.aten


def inverse_std(m: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(biased variance + eps)."""
    return torch.rsqrt(m[2] / m[0] + eps)


def eval_inverse_std(var: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(var.to(torch.float64) + eps)


def scale_of(invstd: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return invstd * weight


def per_element(total: torch.Tensor, count: int) -> torch.Tensor:
    """Mean from a sum."""
    return total / count


def projection(total: torch.Tensor, invstd: torch.Tensor, count: int) -> torch.Tensor:
    """Coefficient of (x - mean) in the gradient: invstd^2 * mean(dy * (x - mean))."""
    return total * invstd * invstd / count


def running(old: torch.Tensor, new: torch.Tensor, momentum: float) -> torch.Tensor:
    """Exponential moving average of a buffer."""
    return (old + momentum * (new.to(torch.float64) - old)).to(old.dtype)


def row(b: Builder, v: Value, rank: int, axis: int = 1) -> Value:
    """A per-channel vector shaped to broadcast along ``axis`` of ``rank`` axes."""
    return b.reshape(v, tuple(v.shape[0] if a == axis else 1 for a in range(rank)))


def product(b: Builder, x: Value, y: Value) -> Value:
    shape = torch.broadcast_shapes(x.shape, y.shape)
    return b.point(scale_of, (x, y), shape, torch.float64)


def statistics(b: Builder, x: Value, axes: tuple[int, ...], eps: float) -> tuple[Value, Value, Value]:
    """Moments, mean and inverse standard deviation (float64, reduced axes of extent 1)."""
    m = b.moments(x, axes)
    return m, b.stacked(average, m), b.stacked(inverse_std, m, eps)


def normalise(b: Builder, x: Value, mean: Value, invstd: Value, weight: Any, bias: Any) -> Value:
    """(x - mean) * (invstd * weight) + bias, in the wide dtype, rounded once to x's."""
    kind = wide(x.dtype)
    scale = invstd if weight is None else product(b, invstd, weight)
    y = b.aten(aten.sub.Tensor, cast(b, x, kind), cast(b, mean, kind))
    y = b.aten(aten.mul.Tensor, y, cast(b, scale, kind))
    if bias is not None:
        y = b.aten(aten.add.Tensor, y, cast(b, bias, kind))
    return cast(b, y, x.dtype)


def normalise_backward(b: Builder, dy: Value, x: Value, mean: Value, invstd: Value, weight: Any,
                       axes: tuple[int, ...]) -> tuple[Value, Value, Value]:  # fmt: skip
    """Gradient of `normalise` with its own statistics; also sum(dy) and sum(dy * (x - mean)).

    ``weight`` is constant over ``axes``, or None where dy already holds it.
    """
    kind, f64 = wide(x.dtype), torch.float64
    count = prod(x.shape[a] for a in axes)
    g, xc = cast(b, dy, kind), b.aten(aten.sub.Tensor, cast(b, x, kind), cast(b, mean, kind))
    first = b.sum(g, axes, True, f64)
    second = b.sum(b.aten(aten.mul.Tensor, g, xc), axes, True, f64)
    shift = b.point(per_element, (first,), first.shape, f64, count)
    slope = b.point(projection, (second, invstd), second.shape, f64, count)
    scale = invstd if weight is None else product(b, invstd, weight)
    dx = b.aten(aten.sub.Tensor, g, cast(b, shift, kind))
    dx = b.aten(aten.sub.Tensor, dx, b.aten(aten.mul.Tensor, xc, cast(b, slope, kind)))
    dx = b.aten(aten.mul.Tensor, dx, cast(b, scale, kind))
    return cast(b, dx, x.dtype), first, second


def batch_norm(b: Builder, x: Value, w: Any, bias: Any, stats: tuple[Any, Any], training: bool,
               momentum: float, eps: float) -> list[Value]:  # fmt: skip
    """y, mean and inverse standard deviation per channel, new running mean and variance."""
    rank, channels = len(x.shape), (x.shape[1],)
    mean, var = stats
    weights = [None if v is None else row(b, v, rank) for v in (w, bias)]
    if not training:
        invstd = b.point(eval_inverse_std, (var,), channels, torch.float64, eps)
        y = normalise(b, x, row(b, mean, rank), row(b, invstd, rank), *weights)
        nothing = b.full((0,), 0, torch.float64)  # nor has plain PyTorch statistics then
        return [y, nothing, nothing, mean, var]
    axes = (0, *range(2, rank))
    m, centre, invstd = statistics(b, x, axes, eps)
    y = normalise(b, x, centre, invstd, *weights)
    flat = [b.reshape(v, channels) for v in (centre, invstd)]
    b.mean_of[flat[0]] = x
    if mean is None:
        return [y, *flat]
    unbiased = b.reshape(b.stacked(variance, m, 1.0), channels)
    new_mean = b.point(running, (mean, flat[0]), channels, mean.dtype, momentum)
    new_var = b.point(running, (var, unbiased), channels, var.dtype, momentum)
    return [y, *flat, new_mean, new_var]


@decomposes("_native_batch_norm_legit_functional")
def batch_norm_functional(b: Builder, x: Value, w: Any, bias: Any, mean: Any, var: Any,
                          training: bool, momentum: float, eps: float) -> list[Value]:  # fmt: skip
    return batch_norm(b, x, w, bias, (mean, var), training, momentum, eps)


@decomposes("native_batch_norm")
def native_batch_norm(b: Builder, x: Value, w: Any, bias: Any, mean: Any, var: Any,
                      training: bool, momentum: float, eps: float) -> list[Value]:  # fmt: skip
    return batch_norm(b, x, w, bias, (mean, var), training, momentum, eps)[:3]


@decomposes("_native_batch_norm_legit.no_stats")
def batch_norm_no_stats(
    b: Builder, x: Value, w: Any, bias: Any, training: bool, momentum: float, eps: float
) -> list[Value]:
    return batch_norm(b, x, w, bias, (None, None), True, momentum, eps)


@decomposes("_native_batch_norm_legit_no_training")
def batch_norm_eval(
    b: Builder, x: Value, w: Any, bias: Any, mean: Value, var: Value, momentum: float, eps: float
) -> list[Value]:
    return batch_norm(b, x, w, bias, (mean, var), False, momentum, eps)[:3]


@decomposes("native_batch_norm_backward")
def batch_norm_backward(b: Builder, dy: Value, x: Value, w: Any, mean: Any, var: Any, save_mean: Any,
                        save_invstd: Any, training: bool, eps: float, mask: Any) -> list[Value]:  # fmt: skip
    rank, channels = len(x.shape), (x.shape[1],)
    axes = (0, *range(2, rank))
    weight = None if w is None else row(b, w, rank)
    if training:
        centre, invstd = row(b, save_mean, rank), row(b, save_invstd, rank)
        dx, first, second = normalise_backward(b, dy, x, centre, invstd, weight, axes)
        if b.mean_of.get(save_mean) is x:
            b.centred[dx] = first  # the mean of dy is taken away, and x - mean has none
    else:
        kind = wide(x.dtype)
        centre = row(b, mean, rank)
        invstd = row(b, b.point(eval_inverse_std, (var,), channels, torch.float64, eps), rank)
        scale = invstd if weight is None else product(b, invstd, weight)
        g, xc = cast(b, dy, kind), b.aten(aten.sub.Tensor, cast(b, x, kind), cast(b, centre, kind))
        first = b.sum(g, axes, True, torch.float64)
        second = b.sum(b.aten(aten.mul.Tensor, g, xc), axes, True, torch.float64)
        dx = cast(b, b.aten(aten.mul.Tensor, g, cast(b, scale, kind)), x.dtype)
    kind = wide(x.dtype) if w is None else w.dtype
    dw = cast(b, b.reshape(product(b, second, invstd), channels), kind)
    return [dx, dw, cast(b, b.reshape(first, channels), kind)]


class Groups(NamedTuple):
    """A map (batch, channels, ...) whose channels are normalised in so many ``groups``.

    What is made of the map is made channel by channel, and put together from small tensors: in memory the channels of
    a group are a short run between those of others, along which no kernel is fast.
    """

    b: Builder
    x: Value
    groups: int

    @property
    def axes(self) -> tuple[int, ...]:
        """Those of the pixels."""
        return tuple(range(2, len(self.x.shape)))

    @property
    def ones(self) -> list[int]:
        return [1] * len(self.axes)

    def spread(self, v: Value) -> Value:
        """A number for each group for each of its channels (batch, channels, 1, ...)."""
        n, c = self.x.shape[:2]
        v = self.b.reshape(v, (n, self.groups, *self.ones))
        return self.b.along(repeated, (v,), ((n, c, *self.ones), v.dtype), 1, c // self.groups)

    def total(self, v: Value) -> Value:
        """Numbers for each channel (batch, channels, 1, ...) added up by groups (batch, groups, 1, ...)."""
        shape = (v.shape[0], self.groups, *self.ones)
        return self.b.along(added, (v,), (shape, torch.float64), 1, self.groups)

    def statistics(self, eps: float) -> tuple[Value, Value]:
        """Mean and inverse standard deviation of each group (batch, groups, 1, ...)."""
        m = self.b.moments(self.x, self.axes)
        mean, square = self.b.stacked(average, m), self.b.stacked(squares, m)
        made = (self.x.shape[0], self.groups, *self.ones), torch.float64
        count = prod(self.x.shape[2:])
        centre = self.b.along(centres, (mean,), made, 1, self.groups)
        return centre, self.b.along(inverse_stds, (mean, square), made, 1, self.groups, count, eps)

    def weight(self, w: Value) -> Value:
        """A number for each channel (1, channels, 1, ...)."""
        return row(self.b, w, len(self.x.shape))


def repeated(v: torch.Tensor, axis: int, times: int) -> torch.Tensor:
    """Each number so many times, side by side."""
    return v.unsqueeze(axis + 1).expand(*v.shape[: axis + 1], times, *v.shape[axis + 1 :]).flatten(axis, axis + 1)


def added(v: torch.Tensor, axis: int, groups: int) -> torch.Tensor:
    """The sum of each of so many equal runs along an axis."""
    return v.unflatten(axis, (groups, -1)).sum(axis + 1)


def squares(m: torch.Tensor) -> torch.Tensor:
    return m[2]


def centres(mean: torch.Tensor, axis: int, groups: int) -> torch.Tensor:
    """The mean of each of so many equal runs along an axis, from those of its parts, which are of equal size."""
    runs = mean.unflatten(axis, (groups, -1))
    first = runs.narrow(axis + 1, 0, 1)
    return about(runs, first, lambda d: d.mean(axis + 1, keepdim=True)).squeeze(axis + 1)


def inverse_stds(
    mean: torch.Tensor, square: torch.Tensor, axis: int, groups: int, count: int, eps: float
) -> torch.Tensor:
    """1 / sqrt(biased variance + eps) of each run, from means and sums of squares of its parts, each of ``count``
    numbers (Chan, Golub and LeVeque, 1979)."""
    apart = mean.unflatten(axis, (groups, -1)) - centres(mean, axis, groups).unsqueeze(axis + 1)
    whole = square.unflatten(axis, (groups, -1)) + count * apart * apart
    return torch.rsqrt(whole.mean(axis + 1) / count + eps)


@decomposes("native_group_norm")
def group_norm(
    b: Builder, x: Value, w: Any, bias: Any, n: int, c: int, size: int, groups: int, eps: float
) -> list[Value]:
    parts = Groups(b, x, groups)
    centre, invstd = parts.statistics(eps)
    weights = [None if v is None else parts.weight(v) for v in (w, bias)]
    y = normalise(b, x, parts.spread(centre), parts.spread(invstd), *weights)
    return [y, b.reshape(centre, (n, groups)), b.reshape(invstd, (n, groups))]


@decomposes("native_group_norm_backward")
def group_norm_backward(b: Builder, dy: Value, x: Value, mean: Value, rstd: Value, w: Any, n: int, c: int,
                        size: int, groups: int, mask: Any) -> list[Value]:  # fmt: skip
    parts, kind, f64 = Groups(b, x, groups), wide(x.dtype), torch.float64
    invstd = b.reshape(rstd, (n, groups, *parts.ones))
    scale = parts.spread(invstd)
    g = cast(b, dy, kind)
    xc = b.aten(aten.sub.Tensor, cast(b, x, kind), cast(b, parts.spread(mean), kind))
    sums = [b.sum(v, parts.axes, True, f64) for v in (g, b.aten(aten.mul.Tensor, g, xc))]
    weighted = [v if w is None else product(b, v, parts.weight(w)) for v in sums]
    first, second = (parts.total(v) for v in weighted)
    count = prod(x.shape[1:]) // groups
    shift = parts.spread(b.point(per_element, (first,), first.shape, f64, count))
    slope = parts.spread(b.point(projection, (second, invstd), second.shape, f64, count))
    dx = g if w is None else b.aten(aten.mul.Tensor, g, cast(b, parts.weight(w), kind))
    dx = b.aten(aten.sub.Tensor, dx, cast(b, shift, kind))
    dx = b.aten(aten.sub.Tensor, dx, b.aten(aten.mul.Tensor, xc, cast(b, slope, kind)))
    dx = cast(b, b.aten(aten.mul.Tensor, dx, cast(b, scale, kind)), x.dtype)
    found = [b.sum(v, (0,), False, f64) for v in (product(b, sums[1], scale), sums[0])]
    return [dx, *(cast(b, b.reshape(v, (c,)), kind if w is None else w.dtype) for v in found)]


def _affine_grads(b: Builder, g: Value, x: Value, centre: Value, invstd: Value, axes: tuple[int, ...],
                  shape: tuple[int, ...], w: Any) -> list[Value]:  # fmt: skip
    """Gradients of a norm's weight and bias: sums of dy * x^ and dy over ``axes``."""
    kind = wide(x.dtype)
    g = cast(b, g, kind)
    hat = b.aten(aten.sub.Tensor, cast(b, x, kind), cast(b, centre, kind))
    hat = b.aten(aten.mul.Tensor, hat, cast(b, invstd, kind))
    dw = b.sum(b.aten(aten.mul.Tensor, g, hat), axes, False, torch.float64)
    db = b.sum(g, axes, False, torch.float64)
    out = kind if w is None else w.dtype
    return [cast(b, b.reshape(v, shape), out) for v in (dw, db)]


@decomposes("native_layer_norm")
def layer_norm(b: Builder, x: Value, shape: Any, w: Any, bias: Any, eps: float) -> list[Value]:
    rank = len(x.shape)
    axes = tuple(range(rank - len(shape), rank))
    _, centre, invstd = statistics(b, x, axes, eps)
    return [normalise(b, x, centre, invstd, w, bias), centre, invstd]


@decomposes("native_layer_norm_backward")
def layer_norm_backward(b: Builder, dy: Value, x: Value, shape: Any, centre: Value, invstd: Value, w: Any,
                        bias: Any, mask: Any) -> list[Value]:  # fmt: skip
    rank = len(x.shape)
    cut = rank - len(shape)
    axes = tuple(range(cut, rank))
    weighted = dy if w is None else b.aten(aten.mul.Tensor, dy, w)
    dx, _, _ = normalise_backward(b, weighted, x, centre, invstd, None, axes)
    return [cast(b, dx, x.dtype), *_affine_grads(b, dy, x, centre, invstd, tuple(range(cut)), tuple(shape), w)]


@decomposes("_fused_rms_norm")
def rms_norm(b: Builder, x: Value, shape: Any, w: Any, eps: Any) -> list[Value]:
    rank = len(x.shape)
    axes, kind = tuple(range(rank - len(shape), rank)), wide(x.dtype)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = cast(b, x, kind)
    total = b.sum(b.aten(aten.mul.Tensor, y, y), axes, True, torch.float64)
    inverse = b.point(inverse_root, (total,), total.shape, torch.float64, prod(shape), eps)
    y = b.aten(aten.mul.Tensor, y, cast(b, inverse, kind))
    if w is not None:
        y = b.aten(aten.mul.Tensor, y, cast(b, w, kind))
    return [cast(b, y, x.dtype), inverse]


def inverse_root(total: torch.Tensor, count: int, eps: float) -> torch.Tensor:
    return torch.rsqrt(total / count + eps)


@decomposes("_fused_rms_norm_backward")
def rms_norm_backward(b: Builder, dy: Value, x: Value, shape: Any, inverse: Value, w: Any, mask: Any) -> list[Any]:
    rank = len(x.shape)
    axes, kind = tuple(range(rank - len(shape), rank)), wide(x.dtype)
    g = cast(b, dy, kind)
    hat = b.aten(aten.mul.Tensor, cast(b, x, kind), cast(b, inverse, kind))
    weighted = g if w is None else b.aten(aten.mul.Tensor, g, cast(b, w, kind))
    total = b.sum(b.aten(aten.mul.Tensor, weighted, hat), axes, True, torch.float64)
    mean = cast(b, b.point(per_element, (total,), total.shape, torch.float64, prod(shape)), kind)
    dx = b.aten(aten.sub.Tensor, weighted, b.aten(aten.mul.Tensor, hat, mean))
    dx = cast(b, b.aten(aten.mul.Tensor, dx, cast(b, inverse, kind)), x.dtype)
    if w is None:
        return [dx, None]
    dw = b.sum(b.aten(aten.mul.Tensor, g, hat), tuple(range(rank - len(shape))), False, torch.float64)
    return [dx, cast(b, b.reshape(dw, tuple(shape)), w.dtype)]
