"""Reductions in normal form: sums, means, extremes, moments, norms, softmax over any axis."""

from __future__ import annotations

from math import inf, prod
from typing import Any

import torch

from fullframe.ir.graph import Value
from fullframe.ops.builder.builder import Builder
from fullframe.ops.builder.registry import cast, decomposes, dims_of, wide

aten = torch.ops.aten


@decomposes("sum", "sum.dim_IntList")
def sum_(b: Builder, x: Value, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return b.sum(x, dims_of(x, dims), keepdim, b.meta_dtype)


@decomposes("mean", "mean.dim")
def mean(b: Builder, x: Value, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    axes = dims_of(x, dims)
    count = prod(x.shape[a] for a in axes)
    total = b.sum(x, axes, keepdim, wide(b.meta_dtype))
    return cast(b, b.aten(aten.div.Scalar, total, count), b.meta_dtype)


@decomposes("amax", "max")
def amax(b: Builder, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    return b.reduce("tile.amax", x, dims_of(x, dims), keepdim, x.dtype)


@decomposes("amin", "min")
def amin(b: Builder, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    return b.reduce("tile.amin", x, dims_of(x, dims), keepdim, x.dtype)


def _spread_of(b: Builder, x: Value, dims: Any, correction: Any, keepdim: bool) -> tuple[Value, Value]:
    axes = dims_of(x, dims)
    m = b.moments(x, axes)
    kept = [1 if a in axes else n for a, n in enumerate(x.shape) if keepdim or a not in axes]
    var = b.stacked(variance, m, 1.0 if correction is None else float(correction))
    return b.reshape(var, kept), b.reshape(b.stacked(average, m), kept)


def variance(m: torch.Tensor, correction: float) -> torch.Tensor:
    """Variance from moments (3, ...); NaN or infinity as in PyTorch where too few elements."""
    return m[2] / (m[0] - correction).clamp(min=m.new_zeros(()))


def average(m: torch.Tensor) -> torch.Tensor:
    """Mean from moments."""
    return m[1].clone()


@decomposes("var.correction")
def var(b: Builder, x: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    return cast(b, _spread_of(b, x, dims, correction, keepdim)[0], x.dtype)


@decomposes("std.correction")
def std(b: Builder, x: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    spread = _spread_of(b, x, dims, correction, keepdim)[0]
    return cast(b, b.aten(aten.sqrt.default, spread), x.dtype)


@decomposes("var_mean.correction")
def var_mean(b: Builder, x: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return [cast(b, v, x.dtype) for v in _spread_of(b, x, dims, correction, keepdim)]


@decomposes("std_mean.correction")
def std_mean(b: Builder, x: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    spread, mean = _spread_of(b, x, dims, correction, keepdim)
    return [cast(b, b.aten(aten.sqrt.default, spread), x.dtype), cast(b, mean, x.dtype)]


@decomposes("any", "any.dim", "any.dims", "all", "all.dim", "all.dims")
def any_all(b: Builder, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    target = "tile.amax" if ".any." in b.target else "tile.amin"
    holds = cast(b, x, torch.bool)
    if ".dims" in b.target and dims is not None and not dims:  # of no axis, where other reductions take all
        return cast(b, holds, b.meta_dtype)
    return cast(b, b.reduce(target, holds, dims_of(x, dims), keepdim, torch.bool), b.meta_dtype)


@decomposes("prod", "prod.dim_int")
def product(b: Builder, x: Value, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return b.reduce("tile.prod", cast(b, x, b.meta_dtype), dims_of(x, dims), keepdim, b.meta_dtype)


@decomposes("linalg_vector_norm")
def vector_norm(
    b: Builder, x: Value, order: float = 2, dims: Any = None, keepdim: bool = False, dtype: Any = None
) -> Value:
    axes, kind = dims_of(x, dims), b.meta_dtype
    x = cast(b, x, kind)
    if order in (inf, -inf):
        return b.reduce("tile.amax" if order > 0 else "tile.amin", b.aten(aten.abs.default, x), axes, keepdim, kind)
    if order == 0:
        return cast(b, b.sum(cast(b, b.aten(aten.ne.Scalar, x, 0), kind), axes, keepdim, kind), kind)
    size = b.aten(aten.mul.Tensor, x, x) if order == 2 else b.aten(aten.abs.default, x)
    if order not in (1, 2):
        size = b.aten(aten.pow.Tensor_Scalar, size, order)
    total = b.sum(size, axes, keepdim, wide(kind))
    if order == 2:
        total = b.aten(aten.sqrt.default, total)
    elif order != 1:
        total = b.aten(aten.pow.Tensor_Scalar, total, 1 / order)
    return cast(b, total, kind)


@decomposes("norm.Scalar", "norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype", "norm.ScalarOpt_dtype")
def norm(b: Builder, x: Value, order: Any = 2, dims: Any = None, keepdim: bool = False, **_: Any) -> Value:
    return vector_norm(b, x, 2 if order is None else order, dims, keepdim)


@decomposes("aminmax")
def aminmax(b: Builder, x: Value, *, dim: Any = None, keepdim: bool = False) -> list[Value]:
    return [b.reduce(t, x, dims_of(x, dim), keepdim, x.dtype) for t in ("tile.amin", "tile.amax")]


@decomposes("nansum")
def nansum(b: Builder, x: Value, dims: Any = None, keepdim: bool = False, **_: Any) -> Value:
    x = b.aten(aten.where.self, b.aten(aten.isnan.default, x), b.full((), 0, x.dtype), x)
    return b.sum(cast(b, x, b.meta_dtype), dims_of(x, dims), keepdim, b.meta_dtype)


@decomposes("count_nonzero", "count_nonzero.dim_IntList")
def count_nonzero(b: Builder, x: Value, dims: Any = None) -> Value:
    return b.sum(b.aten(aten.ne.Scalar, x, 0), dims_of(x, dims), False, torch.int64)


def finite_or_zero(x: torch.Tensor) -> torch.Tensor:
    """A maximum fit to be subtracted: an infinite one would make NaN."""
    return torch.where(x.isinf(), 0, x)


@decomposes("logsumexp")
def logsumexp(b: Builder, x: Value, dims: Any, keepdim: bool = False) -> Value:
    axes = dims_of(x, dims)
    top = b.reduce("tile.amax", x, axes, True, x.dtype)
    top = b.point(finite_or_zero, (top,), top.shape, x.dtype)
    total = b.sum(b.aten(aten.exp.default, b.aten(aten.sub.Tensor, x, top)), axes, True, x.dtype)
    return b.reshape(b.aten(aten.add.Tensor, b.aten(aten.log.default, total), top), b.meta_shape)


# Softmax over channels keeps ATen's kernel; over any other axis it is made of reductions, which are
# barriers where that axis is tiled.


@decomposes("_softmax", "_log_softmax")
def softmax(b: Builder, x: Value, dim: int, half_to_float: bool) -> Value:
    x, back = _line(b, x), x.shape
    return b.reshape(_softmax(b, x, dim % len(x.shape)), back)


def _line(b: Builder, x: Value) -> Value:
    """A single number as a line of one."""
    return x if x.shape else b.reshape(x, (1,))


def _softmax(b: Builder, x: Value, axis: int) -> Value:
    if axis == 1 and len(x.shape) > 2 and not b.merged(x):
        return b.recorded()[0]  # type: ignore[return-value]
    y = cast(b, x, wide(b.meta_dtype))
    y = b.aten(aten.sub.Tensor, y, b.reduce("tile.amax", y, (axis,), True, y.dtype))
    powers = b.aten(aten.exp.default, y)
    total = b.sum(powers, (axis,), True, y.dtype)
    if "log" in b.target:
        made = b.aten(aten.sub.Tensor, y, b.aten(aten.log.default, total))
    else:
        made = b.aten(aten.div.Tensor, powers, total)
    return cast(b, made, b.meta_dtype)


@decomposes("_safe_softmax")
def safe_softmax(b: Builder, x: Value, dim: int, dtype: Any = None) -> Value:
    """Softmax along an axis; zero where all of it is minus infinity."""
    x, back = _line(b, x), x.shape
    axis = dim % len(x.shape)
    y = cast(b, x, wide(b.meta_dtype))
    top = b.reduce("tile.amax", y, (axis,), True, y.dtype)
    top = b.point(finite_or_zero, (top,), top.shape, y.dtype)
    powers = b.aten(aten.exp.default, b.aten(aten.sub.Tensor, y, top))
    total = b.sum(powers, (axis,), True, y.dtype)
    nothing = b.aten(aten.eq.Scalar, total, 0)
    total = b.aten(aten.where.self, nothing, b.full((), 1, y.dtype), total)
    return b.reshape(cast(b, b.aten(aten.div.Tensor, powers, total), b.meta_dtype), back)


@decomposes("_softmax_backward_data", "_log_softmax_backward_data")
def softmax_backward(b: Builder, g: Value, out: Value, dim: int, dtype: torch.dtype) -> Value:
    g, out, back = _line(b, g), _line(b, out), g.shape
    return b.reshape(_softmax_backward(b, g, out, dim % len(g.shape)), back)


def _softmax_backward(b: Builder, g: Value, out: Value, axis: int) -> Value:
    if axis == 1 and len(g.shape) > 2 and not b.merged(g) and not b.merged(out):
        return b.recorded()[0]  # type: ignore[return-value]
    kind = wide(g.dtype)
    g, y = cast(b, g, kind), cast(b, out, kind)
    if "log" in b.target:
        total = b.sum(g, (axis,), True, kind)
        made = b.aten(aten.sub.Tensor, g, b.aten(aten.mul.Tensor, b.aten(aten.exp.default, y), total))
    else:
        each = b.aten(aten.mul.Tensor, g, y)
        made = b.aten(aten.sub.Tensor, each, b.aten(aten.mul.Tensor, y, b.sum(each, (axis,), True, kind)))
    return cast(b, made, b.meta_dtype)
