"""Normal form: recorded ATen calls become ops with one output each, in terms the rules know.

Aliases vanish, views become reshapes, norms and losses fall apart into reductions (the barriers)
and pointwise parts, gradients of windows into input, weight and bias gradients.
Each function takes the builder and the call's arguments and returns the value(s) of its outputs.
"""

from __future__ import annotations

from typing import Any

import torch

from fullframe.ir.graph import Value
from fullframe.ops.builder.builder import RULES, Builder
from fullframe.ops.builder.registry import cast, decomposes
from fullframe.ops.decompositions.random import aten, stretched


@decomposes("detach", "clone", "alias", "lift_fresh_copy")
def identity(b: Builder, x: Value, *_: Any, **__: Any) -> Value:
    return x


@decomposes("_to_copy")
def to_copy(b: Builder, x: Any, **kwargs: Any) -> Value:
    if not isinstance(x, Value):  # a number, which autograd has as a tensor
        return b.full(b.meta_shape, x, b.meta_dtype)
    return cast(b, x, **kwargs)


@decomposes("copy")
def copy(b: Builder, x: Value, source: Value, *_: Any) -> Value:
    return b.expand(cast(b, source, x.dtype), x.shape)


# Activations -------------------------------------------------------------------------------------


@decomposes("leaky_relu")
def leaky_relu(b: Builder, x: Value, slope: float = 0.01) -> Value:
    made = b.aten(torch.ops.aten.leaky_relu.default, x, slope)
    b.activated[x, slope] = made
    return made


@decomposes("leaky_relu_backward")
def leaky_relu_backward(b: Builder, g: Value, x: Value, slope: float, of_result: bool) -> Value:
    """By the sign of the result, which is that of ``x``: then ``x`` need not be kept besides."""
    made = None if of_result or slope <= 0 else b.activated.get((x, slope))
    x, of_result = (x, of_result) if made is None else (made, True)
    return b.aten(torch.ops.aten.leaky_relu_backward.default, g, x, slope, of_result)


# Constants ---------------------------------------------------------------------------------------


@decomposes("full_like", "full", "new_full")
def full_like(b: Builder, *args: Any, **kwargs: Any) -> Value:
    return b.full(b.meta_shape, args[-1], b.meta_dtype)


@decomposes("zeros_like", "new_zeros", "zeros", "new_empty", "empty_like", "empty.memory_format")
@decomposes("new_empty_strided", "empty_strided")
def zeros(b: Builder, *_: Any, **__: Any) -> Value:
    return b.full(b.meta_shape, 0, b.meta_dtype)


@decomposes("zero")
def zero(b: Builder, x: Value) -> Value:
    return b.full(x.shape, 0, x.dtype)


@decomposes("ones_like", "new_ones", "ones")
def ones(b: Builder, *_: Any, **__: Any) -> Value:
    return b.full(b.meta_shape, 1, b.meta_dtype)


@decomposes("scalar_tensor")
def scalar_tensor(b: Builder, number: Any, **_: Any) -> Value:
    return b.full((), number, b.meta_dtype)


@decomposes("fill.Scalar", "fill.Tensor")
def fill(b: Builder, x: Value, number: Any) -> Value:
    if isinstance(number, Value):
        return b.expand(cast(b, number, x.dtype), x.shape)
    return b.full(x.shape, number, x.dtype)


# Lines and masks ---------------------------------------------------------------------------------


def _line(b: Builder, *args: Any, **kwargs: Any) -> Value:
    kwargs = {"dtype": b.meta_dtype, "device": b.device}
    return b.record(b.target, args, kwargs, (b.meta_shape, b.meta_dtype), b.call, RULES[b.target])


for _name in ("arange", "arange.start", "arange.start_step", "linspace"):
    decomposes(_name)(_line)


def _corner(b: Builder, shape: tuple[int, ...], diagonal: int, lower: bool) -> Value:
    """Whether the column is at most (or at least) the row plus ``diagonal``."""
    rows, columns = b.iota(shape, len(shape) - 2), b.iota(shape, len(shape) - 1)
    limit = b.aten(torch.ops.aten.add.Scalar, rows, diagonal)
    return b.aten(torch.ops.aten.le.Tensor if lower else torch.ops.aten.ge.Tensor, columns, limit)


@decomposes("tril", "triu")
def triangle(b: Builder, x: Value, diagonal: int = 0) -> Value:
    keep = _corner(b, x.shape, diagonal, b.target == "aten.tril.default")
    return b.aten(torch.ops.aten.where.self, keep, x, b.full((), 0, x.dtype))


@decomposes("eye", "eye.m")
def eye(b: Builder, *_: Any, **__: Any) -> Value:
    rows, columns = b.iota(b.meta_shape, 0), b.iota(b.meta_shape, 1)
    return cast(b, b.aten(torch.ops.aten.eq.Tensor, rows, columns), b.meta_dtype)


@decomposes("rrelu_with_noise_functional")
def rrelu(
    b: Builder, x: Value, noise: Value, low: float = 0.125, high: float = 1 / 3, training: bool = False, *_: Any
) -> list[Value]:
    """Leaky relu with a random slope per element; with the mean slope outside training."""
    if not training:
        return [b.aten(aten.leaky_relu.default, x, (low + high) / 2), noise]
    slope = stretched(b, b.draw(x.shape, x.dtype, "uniform"), low, high)
    slope = b.aten(aten.where.self, b.aten(aten.le.Scalar, x, 0), slope, b.full((), 1, x.dtype))
    return [b.aten(aten.mul.Tensor, x, slope), slope]


@decomposes("rrelu_with_noise_backward")
def rrelu_backward(
    b: Builder, g: Value, x: Value, noise: Value, low: float, high: float, training: bool, result: bool
) -> Value:
    if training and high - low > 1e-6:
        return b.aten(aten.mul.Tensor, g, noise)
    return b.aten(aten.leaky_relu_backward.default, g, x, (low + high) / 2, result)


@decomposes("_prelu_kernel_backward")
def prelu_backward(b: Builder, g: Value, x: Value, weight: Value) -> list[Value]:
    """Gradients of ``x > 0 ? x : weight * x``: of x, and of the weight element by element."""
    positive = b.aten(aten.gt.Scalar, x, 0)
    sloped, slope = b.aten(aten.mul.Tensor, weight, g), b.aten(aten.mul.Tensor, x, g)
    return [
        b.aten(aten.where.self, positive, g, sloped),
        b.aten(aten.where.self, positive, b.full((), 0, x.dtype), slope),
    ]


@decomposes("glu")
def glu(b: Builder, x: Value, dim: int = -1) -> Value:
    first, gate = _halves(b, x, dim % len(x.shape))
    return b.aten(aten.mul.Tensor, first, b.aten(aten.sigmoid.default, gate))


@decomposes("glu_backward")
def glu_backward(b: Builder, g: Value, x: Value, dim: int) -> Value:
    axis = dim % len(x.shape)
    first, gate = _halves(b, x, axis)
    gate = b.aten(aten.sigmoid.default, gate)
    inner = b.aten(aten.sigmoid_backward.default, b.aten(aten.mul.Tensor, g, first), gate)
    return b.cat([b.aten(aten.mul.Tensor, g, gate), inner], axis)


def _halves(b: Builder, x: Value, axis: int) -> list[Value]:
    half = x.shape[axis] // 2
    return [b.slice(x, axis, k * half, half) for k in (0, 1)]


@decomposes("log_sigmoid_forward")
def log_sigmoid(b: Builder, x: Value) -> list[Value]:
    """ATen's second output is a buffer that its backward may do without."""
    minus = b.aten(aten.neg.default, b.aten(aten.abs.default, x))
    low = b.aten(aten.clamp_max.default, x, 0)
    buffer = b.aten(aten.exp.default, minus)
    return [b.aten(aten.sub.Tensor, low, b.aten(aten.log1p.default, buffer)), buffer]
