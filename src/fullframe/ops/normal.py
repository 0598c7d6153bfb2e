"""Normal form: recorded ATen calls become ops with one output each, in terms the rules know.

Aliases vanish, views become reshapes, norms and losses fall apart into reductions (the barriers)
and pointwise parts, gradients of windows into input, weight and bias gradients.
Each function takes the builder and the call's arguments and returns the value(s) of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from fullframe.graph import Value
from fullframe.ops.build import Builder
from fullframe.ops.resample import Spec

Lowering = Callable[..., Any]
LOWERINGS: dict[str, Lowering] = {}


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Register a lowering for ATen overloads (``.default`` is implied)."""

    def register(function: Lowering) -> Lowering:
        for name in names:
            LOWERINGS[f"aten.{name}" if "." in name else f"aten.{name}.default"] = function
        return function

    return register


def dims_of(x: Value, dims: Any) -> tuple[int, ...]:
    """Sorted non-negative axes; None or an empty list means all."""
    rank = len(x.shape)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return tuple(range(rank))
    dims = [dims] if isinstance(dims, int) else dims
    return tuple(sorted(d % max(rank, 1) for d in dims)) if rank else ()


@lowers("detach", "clone", "alias", "lift_fresh_copy", "contiguous", "lift_fresh", "positive")
def identity(b: Builder, x: Value, *_: Any, **__: Any) -> Value:
    return x


@lowers("_to_copy", "to.dtype")
def cast(b: Builder, x: Value, dtype: Any = None, **_: Any) -> Value:
    return x if dtype in (None, x.dtype) else b.aten(torch.ops.aten._to_copy.default, x, dtype=dtype)


@lowers("copy")
def copy(b: Builder, x: Value, source: Value, *_: Any) -> Value:
    return b.expand(cast(b, source, x.dtype), x.shape)


# Constants ---------------------------------------------------------------------------------------


@lowers("full_like", "full", "new_full")
def full_like(b: Builder, *args: Any, **kwargs: Any) -> Value:
    number = args[2] if len(args) > 2 else args[1]
    return b.full(b.meta_shape, number, b.meta_dtype)


@lowers("zeros_like", "new_zeros", "zeros", "new_empty", "empty_like", "empty.memory_format")
@lowers("new_empty_strided", "empty_strided")
def zeros(b: Builder, *_: Any, **__: Any) -> Value:
    return b.full(b.meta_shape, 0, b.meta_dtype)


@lowers("ones_like", "new_ones", "ones")
def ones(b: Builder, *_: Any, **__: Any) -> Value:
    return b.full(b.meta_shape, 1, b.meta_dtype)


@lowers("scalar_tensor")
def scalar_tensor(b: Builder, number: Any, **_: Any) -> Value:
    return b.full((), number, b.meta_dtype)


@lowers("fill.Scalar", "fill.Tensor")
def fill(b: Builder, x: Value, number: Any) -> Value:
    if isinstance(number, Value):
        return b.expand(cast(b, number, x.dtype), x.shape)
    return b.full(x.shape, number, x.dtype)


# Layout ------------------------------------------------------------------------------------------


@lowers("view", "_unsafe_view", "reshape", "squeeze", "squeeze.dim", "squeeze.dims", "unsqueeze")
@lowers("_reshape_alias", "flatten.using_ints", "unflatten.int", "_reshape_copy", "view_copy")
def reshape(b: Builder, x: Value, *_: Any) -> Value:
    return b.reshape(x, b.meta_shape)


@lowers("expand")
def expand(b: Builder, x: Value, *_: Any, **__: Any) -> Value:
    return b.expand(x, b.meta_shape)


@lowers("slice.Tensor")
def slice_(b: Builder, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    dim, extent = dim % len(x.shape), x.shape[dim]
    start = 0 if start is None else min(max(start + extent if start < 0 else start, 0), extent)
    return b.slice(x, dim, start, b.meta_shape[dim], step)


@lowers("select.int")
def select(b: Builder, x: Value, dim: int, index: int) -> Value:
    dim = dim % len(x.shape)
    part = b.slice(x, dim, index % x.shape[dim], 1)
    return b.reshape(part, (*x.shape[:dim], *x.shape[dim + 1 :]))


@lowers("split.Tensor", "split_with_sizes", "unsafe_split.Tensor", "unsafe_split_with_sizes")
def split(b: Builder, x: Value, sizes: Any, dim: int = 0) -> list[Value]:
    dim = dim % len(x.shape)
    if isinstance(sizes, int):
        whole = x.shape[dim]
        sizes = [min(sizes, whole - at) for at in range(0, max(whole, 1), sizes)]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [b.slice(x, dim, start, size) for start, size in zip(starts, sizes, strict=True)]


@lowers("chunk", "unsafe_chunk")
def chunk(b: Builder, x: Value, chunks: int, dim: int = 0) -> list[Value]:
    return split(b, x, -(-x.shape[dim] // chunks), dim)


@lowers("unbind.int")
def unbind(b: Builder, x: Value, dim: int = 0) -> list[Value]:
    return [select(b, x, dim, k) for k in range(x.shape[dim])]


@lowers("cat")
def cat(b: Builder, xs: Sequence[Value], dim: int = 0) -> Value:
    rank = len(b.meta_shape)
    xs = [cast(b, x, b.meta_dtype) for x in xs if len(x.shape) == rank and 0 not in x.shape]
    return b.cat(xs, dim % rank)


@lowers("stack")
def stack(b: Builder, xs: Sequence[Value], dim: int = 0) -> Value:
    dim = dim % len(b.meta_shape)
    return b.cat([b.reshape(x, (*x.shape[:dim], 1, *x.shape[dim:])) for x in xs], dim)


@lowers("slice_backward")
def slice_backward(b: Builder, g: Value, sizes: Any, dim: int, start: int, end: int, step: int) -> Value:
    dim = dim % len(sizes)
    start = start + sizes[dim] if start < 0 else start
    return b.embed(g, dim, start, sizes[dim], step)


@lowers("select_backward")
def select_backward(b: Builder, g: Value, sizes: Any, dim: int, index: int) -> Value:
    dim = dim % len(sizes)
    g = b.reshape(g, (*sizes[:dim], 1, *sizes[dim + 1 :]))
    return b.embed(g, dim, index % sizes[dim], sizes[dim])


@lowers("slice_scatter")
def slice_scatter(
    b: Builder, x: Value, source: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    dim, extent = dim % len(x.shape), x.shape[dim]
    start = 0 if start is None else min(max(start + extent if start < 0 else start, 0), extent)
    length = source.shape[dim]
    if step != 1:
        mask = b.embed(b.full(source.shape, True, torch.bool), dim, start, extent, step)
        return b.aten(torch.ops.aten.where.self, mask, b.embed(source, dim, start, extent, step), x)
    parts = [b.slice(x, dim, 0, start), source, b.slice(x, dim, start + length, extent - start - length)]
    return b.cat([p for p in parts if 0 not in p.shape], dim)


@lowers("select_scatter")
def select_scatter(b: Builder, x: Value, source: Value, dim: int, index: int) -> Value:
    dim = dim % len(x.shape)
    source = b.reshape(source, (*x.shape[:dim], 1, *x.shape[dim + 1 :]))
    return slice_scatter(b, x, source, dim, index % x.shape[dim])


@lowers("roll")
def roll(b: Builder, x: Value, shifts: Any, dims: Any = ()) -> Value:
    shifts = [shifts] if isinstance(shifts, int) else shifts
    dims = [dims] if isinstance(dims, int) else dims
    shape = x.shape
    if not dims:
        x, dims = b.reshape(x, (prod(shape),)), [0]
    for shift, dim in zip(shifts, dims, strict=True):
        dim, extent = dim % len(x.shape), x.shape[dim % len(x.shape)]
        cut = -shift % extent
        if cut:
            x = b.cat([b.slice(x, dim, cut, extent - cut), b.slice(x, dim, 0, cut)], dim)
    return b.reshape(x, shape)


# Reductions --------------------------------------------------------------------------------------


@lowers("sum", "sum.dim_IntList")
def sum_(b: Builder, x: Value, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return b.sum(x, dims_of(x, dims), keepdim, b.meta_dtype)


@lowers("mean", "mean.dim")
def mean(b: Builder, x: Value, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    axes = dims_of(x, dims)
    count = prod(x.shape[a] for a in axes)
    total = b.sum(x, axes, keepdim, torch.promote_types(b.meta_dtype, torch.float32))
    return cast(b, b.aten(torch.ops.aten.div.Scalar, total, count), b.meta_dtype)


@lowers("amax", "max")
def amax(b: Builder, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    return b.reduce("tile.amax", x, dims_of(x, dims), keepdim, x.dtype)


@lowers("amin", "min")
def amin(b: Builder, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    return b.reduce("tile.amin", x, dims_of(x, dims), keepdim, x.dtype)


def _spread_of(b: Builder, x: Value, dims: Any, correction: Any, keepdim: bool) -> tuple[Value, Value]:
    axes = dims_of(x, dims)
    m = b.moments(x, axes)
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    kept = shape if keepdim else tuple(n for a, n in enumerate(x.shape) if a not in axes)
    correction = 1.0 if correction is None else float(correction)
    var = b.stacked(variance, (m,), shape, torch.float64, correction)
    return b.reshape(var, kept), b.reshape(b.stacked(average, (m,), shape, torch.float64), kept)


def variance(m: torch.Tensor, correction: float) -> torch.Tensor:
    """Variance from moments (3, ...); NaN or infinity as in PyTorch where too few elements."""
    return m[2] / (m[0] - correction).clamp(min=0)


def average(m: torch.Tensor) -> torch.Tensor:
    """Mean from moments."""
    return m[1].clone()


@lowers("var.correction")
def var(b: Builder, x: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    return cast(b, _spread_of(b, x, dims, correction, keepdim)[0], x.dtype)


@lowers("std.correction")
def std(b: Builder, x: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    spread = _spread_of(b, x, dims, correction, keepdim)[0]
    return cast(b, b.aten(torch.ops.aten.sqrt.default, spread), x.dtype)


@lowers("var_mean.correction")
def var_mean(b: Builder, x: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return [cast(b, v, x.dtype) for v in _spread_of(b, x, dims, correction, keepdim)]


# Convolutions and pooling ------------------------------------------------------------------------


@lowers("convolution")
def convolution(b: Builder, x: Value, w: Value, bias: Any, *geometry: Any) -> Value:
    stride, padding, dilation, transposed, _, groups = geometry
    target = "tile.conv_transpose" if transposed else "tile.conv"
    geometry = (stride, padding, dilation, groups)
    return b.emit(target, (x, w, bias), b.meta_shape, b.meta_dtype, args=geometry)


def flip_weight(w: torch.Tensor, groups: int) -> torch.Tensor:
    """Weight (out, in/groups, ...) to (in, out/groups, ...) with flipped kernel.

    The input gradient of a stride-1 convolution is a convolution with it.
    """
    out, per = w.shape[:2]
    w = w.reshape(groups, out // groups, per, *w.shape[2:]).transpose(1, 2)
    return w.reshape(groups * per, out // groups, *w.shape[3:]).flip(list(range(2, w.dim() - 1)))


@lowers("convolution_backward")
def convolution_backward(b: Builder, g: Value, x: Value, w: Value, _: Any, *rest: Any) -> Any:
    stride, padding, dilation, transposed, _, groups, mask = rest
    return [
        conv_input_grad(b, g, x, w, rest[:6]) if mask[0] else None,
        conv_weight_grad(b, g, x, w, rest[:6]) if mask[1] else None,
        b.sum(g, (0, *range(2, len(g.shape))), False, w.dtype) if mask[2] else None,
    ]


def conv_input_grad(b: Builder, g: Value, x: Value, w: Value, geometry: Any) -> Value:
    stride, padding, dilation, transposed, _, groups = geometry
    n = len(w.shape) - 2
    stride, padding, dilation = ([*v] * n if len(v) == 1 else [*v] for v in (stride, padding, dilation))
    if transposed:
        args = (None, stride, padding, dilation, groups)
        return b.emit("tile.conv", (g, w), x.shape, x.dtype, args=args)
    reach = [d * (k - 1) - p for d, k, p in zip(dilation, w.shape[2:], padding, strict=True)]
    if all(s == 1 for s in stride) and min(reach) >= 0:
        shape = (x.shape[1], w.shape[0] // groups, *w.shape[2:])
        flipped = b.small(flip_weight, (w,), shape, w.dtype, groups)
        args = (None, stride, reach, dilation, groups)
        return b.emit("tile.conv", (g, flipped), x.shape, x.dtype, args=args)
    args = (None, stride, padding, dilation, groups)
    return b.emit("tile.conv_transpose", (g, w), x.shape, x.dtype, args=args)


def conv_weight_grad(b: Builder, g: Value, x: Value, w: Value, geometry: Any) -> Value:
    stride, padding, dilation, transposed, _, groups = geometry
    tensors = (x, g) if transposed else (g, x)
    args = (stride, padding, dilation, groups)
    return b.emit("tile.conv_weight_grad", tensors, w.shape, w.dtype, args=args)


@lowers("max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool(b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, *_: Any) -> Any:
    args = _pool_args(kernel, stride, padding, dilation)
    indices = b.whole_output(1)
    return [b.emit("tile.max_pool", (x,), b.meta_shape, x.dtype, args=args), indices]


def _pool_args(kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[Any, ...]:
    n = len(kernel)
    lists = [[v] if isinstance(v, int) else list(v) for v in (kernel, stride, padding, dilation)]
    kernel, stride, padding, dilation = (v * n if len(v) == 1 else v for v in lists)
    return kernel, stride or kernel, padding, dilation


@lowers("max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward")
def max_pool_backward(b: Builder, g: Value, x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any, *_: Any) -> Value:
    args = _pool_args(kernel, stride, padding, dilation)
    return b.emit("tile.max_pool_grad", (g, x), x.shape, x.dtype, args=args)


def _average_specs(x: Value, out: Sequence[int], kernel: Any, rest: Sequence[Any]) -> tuple[Any, ...]:
    n = len(kernel)
    stride, padding, _, counted, divisor = [*rest, *(None,) * 5][:5] if len(rest) < 5 else rest
    kernel, stride, padding, _ = _pool_args(kernel, stride or (), padding or 0, 1)
    counted = True if counted is None else counted
    # A divisor override replaces the product of the counts: put all of it on the first axis.
    divisors = [divisor or 0] + [1 if divisor else 0] * (n - 1)
    axes = zip(x.shape[-n:], out[-n:], kernel, stride, padding, divisors, strict=True)
    return tuple(
        Spec("average", s, t, kernel=k, stride=st, padding=p, counted=counted, divisor=d)
        for s, t, k, st, p, d in axes
    )


@lowers("avg_pool2d", "avg_pool3d", "avg_pool1d")
def avg_pool(b: Builder, x: Value, kernel: Any, *rest: Any) -> Value:
    specs = _average_specs(x, b.meta_shape, kernel, rest)
    return b.emit("tile.resample", (x,), b.meta_shape, x.dtype, args=(specs,))


@lowers("avg_pool2d_backward", "avg_pool3d_backward")
def avg_pool_backward(b: Builder, g: Value, x: Value, kernel: Any, *rest: Any) -> Value:
    specs = _average_specs(x, g.shape, kernel, rest)
    return b.emit("tile.resample_grad", (g,), x.shape, x.dtype, args=(specs,))


@lowers("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d")
def adaptive_avg_pool(b: Builder, x: Value, size: Any) -> Value:
    n = len(size)
    specs = tuple(Spec("adaptive", s, t) for s, t in zip(x.shape[-n:], b.meta_shape[-n:], strict=True))
    return b.emit("tile.resample", (x,), b.meta_shape, x.dtype, args=(specs,))


@lowers("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward")
def adaptive_avg_pool_backward(b: Builder, g: Value, x: Value) -> Value:
    n = 2 if "2d" in b.target else 3
    specs = tuple(Spec("adaptive", s, t) for s, t in zip(x.shape[-n:], g.shape[-n:], strict=True))
    return b.emit("tile.resample_grad", (g,), x.shape, x.dtype, args=(specs,))


# Interpolation -----------------------------------------------------------------------------------

MODES = {
    "upsample_nearest1d": ("nearest", 1),
    "upsample_nearest2d": ("nearest", 2),
    "upsample_nearest3d": ("nearest", 3),
    "_upsample_nearest_exact1d": ("nearest-exact", 1),
    "_upsample_nearest_exact2d": ("nearest-exact", 2),
    "_upsample_nearest_exact3d": ("nearest-exact", 3),
    "upsample_linear1d": ("linear", 1),
    "upsample_bilinear2d": ("linear", 2),
    "upsample_trilinear3d": ("linear", 3),
    "upsample_bicubic2d": ("cubic", 2),
}


def _specs(mode: str, rank: int, source: Any, target: Any, rest: Sequence[Any]) -> tuple[Any, ...]:
    aligned = "nearest" not in mode and bool(rest[0])
    scales = list(rest[0 if "nearest" in mode else 1 :]) + [None] * rank
    axes = zip(source[-rank:], target[-rank:], scales, strict=False)
    return tuple(Spec(mode, s, t, align=aligned, scale=f) for s, t, f in axes)


def upsample(b: Builder, x: Value, size: Any, *rest: Any) -> Value:
    mode, rank = MODES[b.target.split(".")[1]]
    specs = _specs(mode, rank, x.shape, b.meta_shape, rest)
    return b.emit("tile.resample", (x,), b.meta_shape, x.dtype, args=(specs,))


def upsample_backward(b: Builder, g: Value, out_size: Any, in_size: Any, *rest: Any) -> Value:
    mode, rank = MODES[b.target.split(".")[1].removesuffix("_backward")]
    specs = _specs(mode, rank, in_size, g.shape, rest)
    return b.emit("tile.resample_grad", (g,), b.meta_shape, g.dtype, args=(specs,))


for _name in MODES:
    lowers(_name)(upsample)
    lowers(f"{_name}_backward")(upsample_backward)
