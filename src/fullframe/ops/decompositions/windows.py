"""Convolutions, pooling and interpolation in normal form."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from fullframe import torch_compat
from fullframe.device import CXX, device_of
from fullframe.errors import CaptureError
from fullframe.ir.graph import Op, Value
from fullframe.native.convolution import for_convolution, suits
from fullframe.native.winograd import for_winograd, suits_winograd
from fullframe.ops.builder.builder import Builder
from fullframe.ops.builder.registry import cast, decomposes
from fullframe.ops.builder.views import solid
from fullframe.ops.numerics.convolve import spread
from fullframe.ops.numerics.interpolate import Spec, disputed, rescaled, settled
from fullframe.ops.numerics.phases import by_kernel, taps_outermost
from fullframe.ops.primitives.pooling import choice_dtype

aten = torch.ops.aten


@decomposes("convolution", "_convolution")
def convolution(b: Builder, x: Value, w: Value, bias: Any, *geometry: Any) -> Value:
    stride, padding, dilation, transposed, _, groups = geometry[:6]
    geometry = (stride, padding, dilation, groups)
    dtype = multiplied(b, w.dtype)
    w, bias = cast(b, w, dtype), None if bias is None else cast(b, bias, dtype)
    if transposed:
        target, w = "tile.conv_transpose", _taps_outermost(b, w, geometry)
    else:
        target, w = _ordered(b, w, w.shape, geometry)
    if bias is None or not separate_bias(b.device):
        return b.emit(target, (x, w, bias), b.meta_shape, b.meta_dtype, args=geometry)
    made = b.emit(target, (x, w, None), b.meta_shape, b.meta_dtype, args=geometry)
    return b.aten(aten.add.Tensor, made, b.reshape(bias, (bias.shape[0], *[1] * (len(made.shape) - 2))))


def multiplied(b: Builder, dtype: torch.dtype) -> torch.dtype:
    """The type that products are made in: float32 for bfloat16, where the processor has no products of it.

    A weight is cast once then, each window of a picture before its products, and what they add up to is rounded once;
    the library's own way takes ten to thirty times as long.
    """
    lacks = dtype == torch.bfloat16 and device_of(b.device).on_host and not torch_compat.has_bfloat16()
    return torch.float32 if lacks else dtype


def _ordered(b: Builder, w: Value, shape: Sequence[int], geometry: Any, flipped: bool = False) -> tuple[str, Value]:
    """The op of a convolution, and its weight of this ``shape`` as a kernel wants it.

    ``flipped``: it is that of an input gradient.
    """
    stride, _, dilation, groups = geometry
    here = device_of(b.device).toolchain == CXX
    if here and suits_winograd(shape, w.dtype, groups, stride, dilation):
        return "tile.winograd", b.small(for_winograd, (w,), (*shape[:-1], shape[-1] + 1), w.dtype, flipped)
    if here and suits(shape, w.dtype, groups):
        return "tile.conv", b.small(for_convolution, (w,), shape, w.dtype, flipped)
    return "tile.conv", b.small(flip_weight, (w,), shape, w.dtype, groups) if flipped else w


def _taps_outermost(b: Builder, w: Value, geometry: Any) -> Value:
    """The weight of a transposed convolution as its parts are cut out of it, once for all tiles."""
    (stride, _, dilation), groups = (spread(n, len(w.shape) - 2) for n in geometry[:3]), geometry[3]
    if groups > 1 or w.dtype != torch.float32 or not device_of(b.device).on_host:
        return w
    return b.small(taps_outermost, (w,), w.shape, w.dtype, by_kernel(w.shape[2:], stride, dilation))


def separate_bias(device: torch.device) -> bool:
    """Whether the library would add the bias in a pass of its own; then it belongs to what follows."""
    return device_of(device).separate_bias


def flip_weight(w: torch.Tensor, groups: int) -> torch.Tensor:
    """Weight (out, in/groups, ...) to (in, out/groups, ...) with flipped kernel.

    The input gradient of a stride-1 convolution is a convolution with it.
    """
    out, per = w.shape[:2]
    w = w.reshape(groups, out // groups, per, *w.shape[2:]).transpose(1, 2)
    return w.reshape(groups * per, out // groups, *w.shape[3:]).flip(list(range(2, w.dim() - 1)))


@decomposes("convolution_backward")
def convolution_backward(b: Builder, g: Value, x: Value, w: Value, _: Any, *rest: Any) -> Any:
    mask = rest[6]
    return [
        conv_input_grad(b, g, x, w, rest[:6]) if mask[0] else None,
        conv_weight_grad(b, g, x, w, rest[:6]) if mask[1] else None,
        bias_grad(b, g, w.dtype) if mask[2] else None,
    ]


def bias_grad(b: Builder, g: Value, dtype: torch.dtype) -> Value:
    """Gradient of a convolution's bias: the sum of ``g`` over batch and pixels.

    A batch norm right after the convolution makes it zero, which need not be added up: 0 times a sum that is
    known, so that what is not finite stays so.
    """
    known = b.centred.get(g)
    if known is None:
        return b.sum(unrounded(b, g), (0, *range(2, len(g.shape))), False, dtype)
    return cast(b, b.aten(aten.mul.Scalar, b.reshape(known, (g.shape[1],)), 0.0), dtype)


def unrounded(b: Builder, g: Value) -> Value:
    """What a gradient was before it was rounded to fewer bits, if it was.

    Where terms cancel, a sum of rounded ones would be nothing but their rounding.
    """
    op = b.maker.get(g)
    if op is None or op.target != "aten._to_copy.default":
        return g
    kinds = (op.inputs[0].dtype, g.dtype)
    rounds = all(k.is_floating_point for k in kinds) and kinds[0].itemsize > kinds[1].itemsize
    return op.inputs[0] if rounds else g


def conv_input_grad(b: Builder, g: Value, x: Value, w: Value, geometry: Any) -> Value:
    stride, padding, dilation, transposed, _, groups = geometry
    n, w = len(w.shape) - 2, cast(b, w, multiplied(b, w.dtype))
    stride, padding, dilation = ([*v] * n if len(v) == 1 else [*v] for v in (stride, padding, dilation))
    if transposed:
        args = (None, stride, padding, dilation, groups)
        return b.emit("tile.conv", (g, w), x.shape, x.dtype, args=args)
    reach = [d * (k - 1) - p for d, k, p in zip(dilation, w.shape[2:], padding, strict=True)]
    if all(s == 1 for s in stride) and min(reach) >= 0:
        shape, geometry = (x.shape[1], w.shape[0] // groups, *w.shape[2:]), (stride, reach, dilation, groups)
        target, flipped = _ordered(b, w, shape, geometry, flipped=True)
        return b.emit(target, (g, flipped), x.shape, x.dtype, args=(None, *geometry))
    args = (None, stride, padding, dilation, groups)
    return b.emit("tile.conv_transpose", (g, _taps_outermost(b, w, args[1:])), x.shape, x.dtype, args=args)


def conv_weight_grad(b: Builder, g: Value, x: Value, w: Value, geometry: Any) -> Value:
    stride, padding, dilation, transposed, _, groups = geometry
    tensors = (x, g) if transposed else (g, x)
    args = (stride, padding, dilation, groups)
    made = b.emit("tile.conv_weight_grad", tensors, w.shape, multiplied(b, w.dtype), args=args)
    return cast(b, made, w.dtype)


@decomposes("max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool(
    b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, *_: Any
) -> Any:
    args = _pool_args(kernel, stride, padding, dilation)
    choice = b.emit("tile.max_pool_choice", (x,), b.meta_shape, choice_dtype(args[0]), args=args)
    plane = x.shape[len(x.shape) - len(args[0]) :]
    indices = b.emit("tile.max_pool_indices", (choice,), b.meta_shape, torch.int64, args=(*args, plane))
    return [b.emit("tile.max_pool", (x,), b.meta_shape, x.dtype, args=args), indices]


def _pool_args(kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[Any, ...]:
    n = len(kernel)
    lists = [[v] if isinstance(v, int) else list(v) for v in (kernel, stride, padding, dilation)]
    kernel, stride, padding, dilation = (v * n if len(v) == 1 else v for v in lists)
    return kernel, stride or kernel, padding, dilation


@decomposes("max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward")
def max_pool_backward(
    b: Builder, g: Value, x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any, _: Any, indices: Value
) -> Value:
    args = _pool_args(kernel, stride, padding, dilation)
    return b.emit("tile.max_pool_grad", (g, b.maker[indices].inputs[0]), x.shape, x.dtype, args=args)


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


@decomposes("avg_pool2d", "avg_pool3d")
def avg_pool(b: Builder, x: Value, kernel: Any, *rest: Any) -> Value:
    specs = _average_specs(x, b.meta_shape, kernel, rest)
    return b.emit("tile.resample", (x,), b.meta_shape, x.dtype, args=(specs,))


@decomposes("avg_pool2d_backward", "avg_pool3d_backward")
def avg_pool_backward(b: Builder, g: Value, x: Value, kernel: Any, *rest: Any) -> Value:
    specs = _average_specs(x, g.shape, kernel, rest)
    return b.emit("tile.resample_grad", (g,), x.shape, x.dtype, args=(specs,))


@decomposes("_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def adaptive_avg_pool(b: Builder, x: Value, size: Any) -> Value:
    n = len(size)
    specs = tuple(Spec("adaptive", s, t) for s, t in zip(x.shape[-n:], b.meta_shape[-n:], strict=True))
    return b.emit("tile.resample", (x,), b.meta_shape, x.dtype, args=(specs,))


@decomposes("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward")
def adaptive_avg_pool_backward(b: Builder, g: Value, x: Value) -> Value:
    n = 2 if "2d" in b.target else 3
    specs = tuple(Spec("adaptive", s, t) for s, t in zip(x.shape[-n:], g.shape[-n:], strict=True))
    return b.emit("tile.resample_grad", (g,), x.shape, x.dtype, args=(specs,))


def _plane(b: Builder, x: Value) -> tuple[int, ...]:
    """The spatial axes of a pooling's input."""
    rank = 2 if "2d" in b.target else 3
    return tuple(range(len(x.shape) - rank, len(x.shape)))


@decomposes("adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(b: Builder, x: Value, size: Any) -> list[Value]:
    axes = _plane(b, x)
    if all(b.meta_shape[a] == 1 for a in axes):
        best = b.reduce("tile.amax", x, axes, True, x.dtype)
        return [best, _first_of(b, x, best, axes)]
    args = (len(axes),)
    choice = b.emit("tile.adaptive_max_choice", (x,), b.meta_shape, torch.int64, args=args)
    return [b.emit("tile.adaptive_max", (x,), b.meta_shape, x.dtype, args=args), choice]


@decomposes("adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward")
def adaptive_max_pool_backward(b: Builder, g: Value, x: Value, indices: Value) -> Value:
    axes = _plane(b, x)
    if not all(g.shape[a] == 1 for a in axes):
        return b.emit("tile.adaptive_max_grad", (g, indices), x.shape, x.dtype, args=(len(axes),))
    first = _first_of(b, x, b.reduce("tile.amax", x, axes, True, x.dtype), axes)
    here = b.aten(aten.eq.Tensor, _positions(b, x, axes), first)
    return b.aten(aten.where.self, here, g, b.full((), 0, g.dtype))


def _positions(b: Builder, x: Value, axes: Sequence[int]) -> Value:
    """Flat positions within the plane of ``axes``."""
    found = b.iota(x.shape, axes[0])
    for axis in axes[1:]:
        found = b.aten(aten.mul.Scalar, found, x.shape[axis])
        found = b.aten(aten.add.Tensor, found, b.iota(x.shape, axis))
    return found


def _first_of(b: Builder, x: Value, best: Value, axes: Sequence[int]) -> Value:
    """The first position in the plane where x is its maximum (or NaN)."""
    found = b.aten(aten.logical_or.default, b.aten(aten.eq.Tensor, x, best), b.aten(aten.isnan.default, x))
    nowhere = b.full((), 2**62, torch.int64)
    return b.reduce(
        "tile.amin", b.aten(aten.where.self, found, _positions(b, x, axes), nowhere), axes, True, torch.int64
    )


def _indices_of(b: Builder, indices: Value) -> Op | None:
    """The indices of a pooling in this step, if its windows do not overlap."""
    op = b.maker.get(indices)
    while op is not None and op.target == "tile.reshape":
        op = b.maker.get(op.inputs[0])
    if op is None or op.target != "tile.max_pool_indices":
        return None
    return op if all(k <= s and d == 1 for k, s, _, d in zip(*op.args[1:5], strict=True)) else None


def _pooled_shape(indices: Op) -> tuple[int, ...]:
    """The shape of what was pooled."""
    plane = indices.args[5]
    return (*indices.output.shape[: -len(plane)], *plane)


@decomposes("max_unpool2d", "max_unpool3d")
def max_unpool(b: Builder, x: Value, indices: Value, *_: Any) -> Value:
    """Tiled where the plane is the one that was pooled, axes of extent 1 aside."""
    op = _indices_of(b, indices)
    if op is None or solid(_pooled_shape(op)) != solid(b.meta_shape):
        return b.recorded()[0]  # type: ignore[return-value]
    pooled, plane = op.output, _pooled_shape(op)
    tensors = (b.reshape(x, pooled.shape), pooled)
    return b.reshape(b.emit("tile.max_unpool", tensors, plane, x.dtype, args=op.args[1:5]), b.meta_shape)


def unpool_gradient(b: Builder, g: Value, indices: Value) -> Value | None:
    """``gather`` from flat planes by indices of a pooling: the gradient of unpooling."""
    op = _indices_of(b, indices)
    if op is None:
        return None
    pooled, plane = op.output, _pooled_shape(op)
    if g.shape[-1] != prod(plane[-len(op.args[1]) :]) or prod(g.shape) != prod(plane):
        return None
    tensors = (b.reshape(g, plane), pooled)
    return b.reshape(b.emit("tile.max_unpool_grad", tensors, pooled.shape, g.dtype, args=op.args[1:5]), indices.shape)


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
    "_upsample_bilinear2d_aa": ("linear-aa", 2),
    "_upsample_bicubic2d_aa": ("cubic-aa", 2),
}


def _specs(mode: str, rank: int, source: Any, target: Any, rest: Sequence[Any]) -> tuple[Spec, ...]:
    """One for each axis, with the scales as they were given."""
    aligned = "nearest" not in mode and bool(rest[0])
    scales = list(rest[0 if "nearest" in mode else 1 :]) + [None] * rank
    axes = zip(source[-rank:], target[-rank:], scales, strict=False)
    return tuple(Spec(mode, s, t, align=aligned, scale=f) for s, t, f in axes)


def upsample(b: Builder, x: Value, size: Any, *rest: Any) -> Value:
    mode, rank = MODES[b.target.split(".")[1]]
    specs = _specs(mode, rank, x.shape, b.meta_shape, rest)
    if mode.startswith("nearest"):
        _refuse_disputed(b, specs, x.dtype == torch.float64)
    _refuse_scale(b, specs)
    _refuse_column(b, specs)
    return b.emit("tile.resample", (x,), b.meta_shape, x.dtype, args=(tuple(map(settled, specs)),))


SMALL_PLANE = 128  # sum of the extents of a plane, up to which ATen has one way only


def _refuse_disputed(b: Builder, specs: Sequence[Spec], wide: bool) -> None:
    """Refuse nearest neighbours for which plain PyTorch has two answers."""
    if len(specs) == 2 and sum(s.target for s in specs) <= SMALL_PLANE:
        return
    for spec in specs:
        found = disputed(spec, wide)
        if found is not None:
            other = "float32, " if disputed(spec, False) is None else ""
            raise _refusal(
                b,
                spec,
                f"{' in float64' if wide else ''}: plain PyTorch takes pixel {found[0]} from {found[1]} in its "
                f"gradient and from {found[2]} in its forward of contiguous memory; use {other}"
                "recompute_scale_factor=True, or a size or scale_factor without such a pixel",
            )


def _refuse_scale(b: Builder, specs: Sequence[Spec]) -> None:
    """Refuse a scale_factor that keeps the size, where plain PyTorch minds it one way only."""
    mode, whole = specs[0].mode, all(s.source == s.target for s in specs)
    if mode.endswith("-aa"):
        minds, copies = "gradient", "forward"
    elif mode == "cubic" and whole:
        minds, copies = "forward", "gradient"
    else:
        return
    for spec in filter(rescaled, specs):
        raise _refusal(
            b,
            spec,
            f" by scale_factor={spec.scale:g}: plain PyTorch's {minds} moves the pixels by that factor, its {copies} "
            "does not; use size=, recompute_scale_factor=True or another factor",
        )


def _refuse_column(b: Builder, specs: Sequence[Spec]) -> None:
    """Refuse antialiasing to one column: where memory is contiguous plain PyTorch weighs its rows wrongly."""
    rows = specs[0]
    if rows.mode.endswith("-aa") and specs[-1].target == 1 and 1 < rows.target != rows.source > 1:
        raise _refusal(
            b,
            rows,
            " rows and one column: plain PyTorch makes other numbers in contiguous memory than with channels "
            "innermost, and than its gradient is of; use antialias=False, or more columns",
        )


def _refusal(b: Builder, spec: Spec, why: str) -> CaptureError:
    return CaptureError(f"in {b.path or 'the step'}, {b.target} from {spec.source} to {spec.target}{why}")


def upsample_backward(b: Builder, g: Value, out_size: Any, in_size: Any, *rest: Any) -> Value:
    mode, rank = MODES[b.target.split(".")[1].removesuffix("_backward")]
    specs = _specs(mode, rank, in_size, g.shape, rest)
    if mode == "cubic" and all(s.source == s.target for s in specs):  # ATen copies, in this direction only
        specs = tuple(Spec("nearest", s.source, s.target) for s in specs)
    return b.emit("tile.resample_grad", (g,), b.meta_shape, g.dtype, args=(tuple(map(settled, specs)),))


for _name in MODES:
    decomposes(_name)(upsample)
    decomposes(f"{_name}_backward")(upsample_backward)
