"""Calls whose meaning hangs on how tensors lie in memory, in terms of their elements alone.

Windows lie in memory as they please. So a call that names strides is made on the elements in the order
in which they lay when it was recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from fullframe.errors import CaptureError
from fullframe.ir.graph import Value
from fullframe.ops.builder.builder import Builder
from fullframe.ops.builder.registry import decomposes

aten = torch.ops.aten


# Strides ------------------------------------------------------------------------------------------


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> list[int] | None:
    """The axes from the slowest to the fastest in memory; None where the elements are not packed."""
    order = sorted(range(len(shape)), key=lambda a: (-stride[a], shape[a] == 1, a))
    step = 1
    for axis in reversed(order):
        if shape[axis] != 1 and stride[axis] != step:
            return None
        step *= shape[axis]
    return order


def strided(x: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> torch.Tensor:
    """Elements of a line by strides."""
    return x.contiguous().as_strided(size, stride, x.contiguous().storage_offset() + offset).clone()


def strided_scatter(
    x: torch.Tensor, source: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int
) -> torch.Tensor:
    """A line with some of its elements, named by strides, replaced."""
    made = x.clone(memory_format=torch.contiguous_format)
    made.as_strided(size, stride, offset).copy_(source)
    return made


def _line(b: Builder, x: Value, size: Any, stride: Any, offset: Any) -> tuple[Value, list[int], int]:
    """A value as a line in the order of memory, the order of its axes there, and the offset within it."""
    steps, first = b.layouts[0] or (torch.empty(x.shape, device="meta").stride(), 0)
    order = memory_order(x.shape, steps)
    start = 0 if offset is None else offset - first
    last = start + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if order is None or start < 0 or last >= prod(x.shape):
        raise CaptureError(
            f"in {b.path or 'the step'}, as_strided (or a function that uses it) reads memory outside its tensor of "
            f"shape {x.shape}; use slices, or clone the tensor first"
        )
    return b.reshape(b.permute(x, order), (prod(x.shape),)), order, start


def _in_order(line: Value, size: Any, stride: Any) -> bool:
    """Whether strides walk through all elements of a line in their order."""
    step = 1
    for n, s in zip(reversed(size), reversed(stride), strict=True):
        if n not in (1, 0) and s != step:
            return False
        step *= n
    return step == prod(line.shape)


def _placed(b: Builder, line: Value, shape: Sequence[int], order: list[int]) -> Value:
    """A line in the order of memory as a value of a shape."""
    back = [order.index(a) for a in range(len(order))]
    return b.permute(b.reshape(line, [shape[a] for a in order]), back)


@decomposes("as_strided")
def as_strided(b: Builder, x: Value, size: Any, stride: Any, offset: Any = None) -> Any:
    """A reshape where all elements come in their order (pooling to one pixel rewrites strides); else made whole."""
    line, _, start = _line(b, x, size, stride, offset)
    if _in_order(line, size, stride):
        return b.reshape(line, tuple(size))
    return b.small(strided, (line,), size, x.dtype, tuple(size), tuple(stride), start)


@decomposes("as_strided_scatter")
def as_strided_scatter(b: Builder, x: Value, source: Value, size: Any, stride: Any, offset: Any = None) -> Any:
    """All elements replaced in their order (the gradient of the above); else made whole."""
    line, order, start = _line(b, x, size, stride, offset)
    if _in_order(line, size, stride):
        return _placed(b, b.reshape(source, line.shape), x.shape, order)
    made = b.small(strided_scatter, (line, source), line.shape, x.dtype, tuple(size), tuple(stride), start)
    return _placed(b, made, x.shape, order)


def retyped(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same bits as numbers of another kind."""
    return x.contiguous().view(dtype)


@decomposes("view.dtype")
def view_dtype(b: Builder, x: Value, dtype: torch.dtype) -> Value:
    if dtype.itemsize == x.dtype.itemsize:
        return b.point(retyped, (x,), x.shape, dtype, dtype)
    return b.small(retyped, (x,), b.meta_shape, dtype, dtype)


# Complex numbers ------------------------------------------------------------------------------------


def real_part(x: torch.Tensor) -> torch.Tensor:
    return x.real


def imaginary_part(x: torch.Tensor) -> torch.Tensor:
    return x.imag


def conjugated(x: torch.Tensor) -> torch.Tensor:
    return x.conj_physical()


@decomposes("complex")
def complex_(b: Builder, re: Value, im: Value) -> Value:
    return b.point(torch.complex, (re, im), b.meta_shape, b.meta_dtype)


@decomposes("view_as_complex")
def view_as_complex(b: Builder, x: Value) -> Value:
    last = len(x.shape) - 1
    parts = [b.reshape(b.slice(x, last, k, 1), x.shape[:-1]) for k in (0, 1)]
    return b.point(torch.complex, parts, b.meta_shape, b.meta_dtype)


@decomposes("view_as_real")
def view_as_real(b: Builder, x: Value) -> Value:
    parts = [b.point(f, (x,), x.shape, b.meta_dtype) for f in (real_part, imaginary_part)]
    return b.cat([b.reshape(p, (*x.shape, 1)) for p in parts], len(x.shape))


@decomposes("_conj", "_conj_physical")
def conjugate(b: Builder, x: Any) -> Any:
    if not isinstance(x, Value):
        return x.conjugate()  # a number
    return b.point(conjugated, (x,), x.shape, x.dtype) if x.dtype.is_complex else x


@decomposes("_neg_view")
def negated(b: Builder, x: Value) -> Value:
    return b.aten(aten.neg.default, x)
