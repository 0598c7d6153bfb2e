"""Normal form: recorded ATen calls become ops with one output each, in terms the rules know.

Aliases vanish, views become reshapes, norms and losses fall apart into reductions (the barriers)
and pointwise parts, gradients of windows into input, weight and bias gradients.
Each function takes the builder and the call's arguments and returns the value(s) of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fullframe.graph import Value
from fullframe.ops.build import RULES, Builder

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


@lowers("detach", "clone", "alias", "lift_fresh_copy")
def identity(b: Builder, x: Value, *_: Any, **__: Any) -> Value:
    return x


@lowers("_to_copy")
def to_copy(b: Builder, x: Any, **kwargs: Any) -> Value:
    if not isinstance(x, Value):  # a number, which autograd has as a tensor
        return b.full(b.meta_shape, x, b.meta_dtype)
    return cast(b, x, **kwargs)


def cast(b: Builder, x: Value, dtype: Any = None, **_: Any) -> Value:
    return x if dtype in (None, x.dtype) else b.aten(torch.ops.aten._to_copy.default, x, dtype=dtype)


@lowers("copy")
def copy(b: Builder, x: Value, source: Value, *_: Any) -> Value:
    return b.expand(cast(b, source, x.dtype), x.shape)


# Activations -------------------------------------------------------------------------------------


@lowers("leaky_relu")
def leaky_relu(b: Builder, x: Value, slope: float = 0.01) -> Value:
    made = b.aten(torch.ops.aten.leaky_relu.default, x, slope)
    b.activated[x, slope] = made
    return made


@lowers("leaky_relu_backward")
def leaky_relu_backward(b: Builder, g: Value, x: Value, slope: float, of_result: bool) -> Value:
    """By the sign of the result, which is that of ``x``: then ``x`` need not be kept besides."""
    made = None if of_result or slope <= 0 else b.activated.get((x, slope))
    x, of_result = (x, of_result) if made is None else (made, True)
    return b.aten(torch.ops.aten.leaky_relu_backward.default, g, x, slope, of_result)


# Constants ---------------------------------------------------------------------------------------


@lowers("full_like", "full", "new_full")
def full_like(b: Builder, *args: Any, **kwargs: Any) -> Value:
    return b.full(b.meta_shape, args[-1], b.meta_dtype)


@lowers("zeros_like", "new_zeros", "zeros", "new_empty", "empty_like", "empty.memory_format")
@lowers("new_empty_strided", "empty_strided")
def zeros(b: Builder, *_: Any, **__: Any) -> Value:
    return b.full(b.meta_shape, 0, b.meta_dtype)


@lowers("zero")
def zero(b: Builder, x: Value) -> Value:
    return b.full(x.shape, 0, x.dtype)


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


# Lines and masks ---------------------------------------------------------------------------------


def _line(b: Builder, *args: Any, **kwargs: Any) -> Value:
    kwargs = {"dtype": b.meta_dtype, "device": b.device}
    return b.record(b.target, args, kwargs, (b.meta_shape, b.meta_dtype), b.call, RULES[b.target])


for _name in ("arange", "arange.start", "arange.start_step", "linspace"):
    lowers(_name)(_line)


def _corner(b: Builder, shape: tuple[int, ...], diagonal: int, lower: bool) -> Value:
    """Whether the column is at most (or at least) the row plus ``diagonal``."""
    rows, columns = b.iota(shape, len(shape) - 2), b.iota(shape, len(shape) - 1)
    limit = b.aten(torch.ops.aten.add.Scalar, rows, diagonal)
    return b.aten(torch.ops.aten.le.Tensor if lower else torch.ops.aten.ge.Tensor, columns, limit)


@lowers("tril", "triu")
def triangle(b: Builder, x: Value, diagonal: int = 0) -> Value:
    keep = _corner(b, x.shape, diagonal, b.target == "aten.tril.default")
    return b.aten(torch.ops.aten.where.self, keep, x, b.full((), 0, x.dtype))


@lowers("eye", "eye.m")
def eye(b: Builder, *_: Any, **__: Any) -> Value:
    rows, columns = b.iota(b.meta_shape, 0), b.iota(b.meta_shape, 1)
    return cast(b, b.aten(torch.ops.aten.eq.Tensor, rows, columns), b.meta_dtype)
