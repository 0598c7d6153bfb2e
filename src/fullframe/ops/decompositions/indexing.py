"""Positions in normal form: argmax, gather and scatter, tables of weights, sorts and scans."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from fullframe.ir.graph import Value
from fullframe.ops.builder.builder import Builder
from fullframe.ops.builder.registry import cast, decomposes
from fullframe.ops.decompositions.windows import unpool_gradient

aten = torch.ops.aten


def _without(shape: tuple[int, ...], axis: int, keepdim: bool) -> list[int]:
    return [1 if a == axis else n for a, n in enumerate(shape) if keepdim or a != axis]


# Extremes with their positions. The first position wins, as in ATen's own kernels on the CPU. -------


def first_position(b: Builder, x: Value, best: Value, axis: int) -> Value:
    """Where along an axis its extreme (or NaN) is first met; ``best`` keeps the axis."""
    met = b.aten(aten.eq.Tensor, x, best)
    if x.dtype.is_floating_point:
        met = b.aten(aten.logical_or.default, met, b.aten(aten.isnan.default, x))
    where = b.aten(aten.where.self, met, b.iota(x.shape, axis), b.full((), x.shape[axis], torch.int64))
    return b.reduce("tile.amin", where, (axis,), True, torch.int64)


@decomposes("max.dim", "min.dim")
def extreme(b: Builder, x: Value, dim: int, keepdim: bool = False) -> list[Value]:
    axis = dim % max(1, len(x.shape))
    if not x.shape:
        return [x, b.full((), 0, torch.int64)]
    best = b.reduce("tile.amax" if ".max." in b.target else "tile.amin", x, (axis,), True, x.dtype)
    where = first_position(b, x, best, axis)
    return [b.reshape(v, _without(x.shape, axis, keepdim)) for v in (best, where)]


@decomposes("argmax", "argmin")
def position(b: Builder, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    if dim is None or not x.shape:
        x, dim = b.reshape(x, (x_size(x),)), 0
    axis = dim % len(x.shape)
    if b.merged(x) and len(b.factors(x)[axis]) > 1:
        return b.reshape(_flat_position(b, x, axis), b.meta_shape)
    best = b.reduce("tile.amax" if "argmax" in b.target else "tile.amin", x, (axis,), True, x.dtype)
    return b.reshape(first_position(b, x, best, axis), b.meta_shape)


def x_size(x: Value) -> int:
    return x.nbytes // x.itemsize


def _flat_position(b: Builder, x: Value, axis: int) -> Value:
    """`first_position` along a merged axis, counted on its factors."""
    y, where = b.unmerged(x)
    axes = where[axis]
    best = b.reduce("tile.amax" if "argmax" in b.target else "tile.amin", y, axes, True, y.dtype)
    met = b.aten(aten.eq.Tensor, y, best)
    if y.dtype.is_floating_point:
        met = b.aten(aten.logical_or.default, met, b.aten(aten.isnan.default, y))
    flat = b.iota(y.shape, axes[0])
    for a in axes[1:]:
        flat = b.aten(aten.add.Tensor, b.aten(aten.mul.Scalar, flat, y.shape[a]), b.iota(y.shape, a))
    flat = b.aten(aten.where.self, met, flat, b.full((), x.shape[axis], torch.int64))
    return b.reduce("tile.amin", flat, axes, True, torch.int64)


# Gather and scatter. With one position per line they are comparisons and work on any axis. ----------


def gathered(x: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    return x.gather(axis, index)


def placed(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor, axis: int) -> torch.Tensor:
    return x.scatter(axis, index, source.expand(index.shape))


def placed_and_added(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor, axis: int) -> torch.Tensor:
    return x.scatter_add(axis, index, source.expand(index.shape))


def _cut(b: Builder, x: Value, index: Value, axis: int) -> Value:
    """The part of x that an index of smaller extents refers to."""
    for a, n in enumerate(index.shape):
        x = x if a == axis else b.slice(x, a, 0, n)
    return x


@decomposes("gather")
def gather(b: Builder, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    axis = dim % max(1, len(x.shape))
    unpooled = unpool_gradient(b, x, index) if len(x.shape) == 3 and axis == 2 else None
    if unpooled is not None:
        return unpooled
    if not x.shape or not index.shape:  # one of them is a single number
        line = x if x.shape else b.reshape(x, (1,))
        found = gather(b, line, 0, index if index.shape else b.reshape(index, (1,)))
        return b.reshape(found, index.shape)
    x = _cut(b, x, index, axis)
    if index.shape[axis] == 1 and (axis != 1 or b.merged(x)):
        zero = b.full((), 0, x.dtype)
        here = b.aten(aten.where.self, b.aten(aten.eq.Tensor, b.iota(x.shape, axis), index), x, zero)
        return b.sum(here, (axis,), True, x.dtype)
    return b.along(gathered, (x, index), (index.shape, x.dtype), axis)


@decomposes("scatter.src", "scatter.value", "scatter_add")
def scatter(b: Builder, x: Value, dim: int, index: Value, source: Any) -> Value:
    axis = dim % max(1, len(x.shape))
    if (
        not x.shape
        or len(x.shape) != len(index.shape)
        or any(n != m for a, (n, m) in enumerate(zip(x.shape, index.shape, strict=True)) if a != axis)
    ):
        return b.recorded()[0]  # type: ignore[return-value]
    if not isinstance(source, Value):
        source = b.full([1] * len(x.shape), source, x.dtype)
    else:
        source = _cut(b, b.slice(source, axis, 0, index.shape[axis]), index, axis)
    if index.shape[axis] == 1 and (axis != 1 or b.merged(x) or b.merged(index)):
        here = b.aten(aten.eq.Tensor, b.iota(x.shape, axis), index)
        new = b.aten(aten.add.Tensor, x, source) if "add" in b.target else source
        return b.aten(aten.where.self, here, new, x)
    function = placed_and_added if "add" in b.target else placed
    return b.along(function, (x, index, source), (x.shape, x.dtype), axis)


# Tables: values looked up by an index that is a map, or channels picked by a short list. ------------


def looked_up(index: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table[index]


def picked(x: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    return x.index_select(axis, torch.where(index < 0, index + x.shape[axis], index))


def put(x: torch.Tensor, values: torch.Tensor, index: torch.Tensor, axis: int, add: bool) -> torch.Tensor:
    index = torch.where(index < 0, index + x.shape[axis], index)
    values = values.expand([len(index) if a == axis else n for a, n in enumerate(x.shape)])
    return x.index_add(axis, index, values) if add else x.index_copy(axis, index, values)


def row_of(index: torch.Tensor, table: torch.Tensor, axis: int) -> torch.Tensor:
    """Rows of a table, laid along ``axis``, where the index has extent 1."""
    return table[index.squeeze(axis)]


def searched(x: torch.Tensor, edges: torch.Tensor, *how: Any) -> torch.Tensor:
    return torch.bucketize(x, edges, right=how[0])


def member(x: torch.Tensor, table: torch.Tensor, invert: bool) -> torch.Tensor:
    return torch.isin(x, table, invert=invert)


def _rows(b: Builder, table: Value, index: Value) -> Value | None:
    """Rows of a matrix picked by a map of indices, a new last axis; None for other shapes."""
    axis = len(index.shape)
    if len(table.shape) != 2 or axis < 2 or index.dtype not in (torch.int64, torch.int32):
        return None
    lines = b.reshape(index, (*index.shape, 1))
    return b.along(row_of, (lines, table), ((*index.shape, table.shape[1]), table.dtype), axis)


def _row_sums(b: Builder, g: Value, index: Value, shape: Sequence[int], dtype: torch.dtype) -> Value:
    """Rows of g added up by index: the gradient of picking rows of a table."""
    y, factors = index, b.aligned([index], index.shape)
    if b.merged(g) or b.merged(index):
        whole = b.aligned([g, b.reshape(index, (*index.shape, *[1] * (len(g.shape) - len(index.shape))))], g.shape)
        if whole is not None:
            factors = whole[: len(index.shape)]
            g, y = b.refactored(g, whole), b.refactored(index, factors)
    return b.emit("tile.scatter_sum", (g, y), shape, dtype)


@decomposes("embedding")
def embedding(b: Builder, table: Value, index: Value, *_: Any) -> Value:
    made = _rows(b, table, index)
    return b.recorded()[0] if made is None else made  # type: ignore[return-value]


@decomposes("embedding_dense_backward")
def embedding_backward(b: Builder, g: Value, index: Value, rows: int, padding: int, by_frequency: bool) -> Value:
    if by_frequency:
        return b.recorded()[0]  # type: ignore[return-value]
    if padding >= 0:
        minus = b.full((), -1, index.dtype)
        index = b.aten(aten.where.self, b.aten(aten.eq.Scalar, index, padding), minus, index)
    return _row_sums(b, g, index, b.meta_shape, b.meta_dtype)


@decomposes("bucketize.Tensor")
def bucketize(b: Builder, x: Value, edges: Value, *, out_int32: bool = False, right: bool = False) -> Value:
    return cast(b, b.table(searched, (x, edges), x.shape, torch.int64, right), b.meta_dtype)


@decomposes("searchsorted.Tensor")
def searchsorted(b: Builder, edges: Value, x: Value, *, right: bool = False, side: Any = None, **rest: Any) -> Value:
    if len(edges.shape) != 1 or rest.get("sorter") is not None:
        return b.recorded()[0]  # type: ignore[return-value]
    return cast(b, b.table(searched, (x, edges), x.shape, torch.int64, right or side == "right"), b.meta_dtype)


@decomposes("isin.Tensor_Tensor")
def isin(b: Builder, x: Value, table: Value, *, assume_unique: bool = False, invert: bool = False) -> Value:
    return b.table(member, (x, table), x.shape, torch.bool, invert)


# Masks: elements chosen by a map of truth values --------------------------------------------------------


def _mask_of(b: Builder, x: Value, indices: Any) -> Value | None:
    """A single truth map among indices, shaped to broadcast to x; None for any other indexing."""
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(given) != 1 or given[0][1].dtype != torch.bool:
        return None
    axis, mask = given[0]
    after = len(x.shape) - axis - len(mask.shape)
    return b.reshape(mask, (*[1] * axis, *mask.shape, *[1] * after))


def _one_list(x: Value, indices: Any) -> int | None:
    """The axis that a single one-dimensional index picks from; None for any other indexing."""
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(given) != 1 or len(given[0][1].shape) != 1 or given[0][1].dtype == torch.bool or len(x.shape) < 2:
        return None
    return given[0][0]


@decomposes("index.Tensor", "_unsafe_index.Tensor")
def index_tensor(b: Builder, x: Value, indices: Any) -> Value:
    given = [i for i in indices if i is not None]
    if len(x.shape) == 1 and len(given) == 1 and given[0].dtype in (torch.int64, torch.int32):
        return b.table(looked_up, (given[0], x), given[0].shape, x.dtype)
    axis = _one_list(x, indices)
    if axis is None:
        rows = _rows(b, x, given[0]) if len(given) == 1 and indices[0] is not None else None
        return b.recorded()[0] if rows is None else rows  # type: ignore[return-value]
    return b.along(picked, (x, given[0]), (b.meta_shape, x.dtype), axis)


@decomposes("index_select")
def index_select(b: Builder, x: Value, dim: int, index: Value) -> Value:
    if len(x.shape) < 2 or not index.shape:
        return b.recorded()[0]  # type: ignore[return-value]
    return b.along(picked, (x, index), (b.meta_shape, x.dtype), dim % len(x.shape))


@decomposes("index_put", "_unsafe_index_put")
def index_put(b: Builder, x: Value, indices: Any, values: Value, accumulate: bool = False) -> Value:
    mask = _mask_of(b, x, indices)
    if mask is not None and x_size(values) == 1:
        new = b.aten(aten.add.Tensor, x, b.reshape(values, ())) if accumulate else b.reshape(values, ())
        return b.aten(aten.where.self, mask, new, x)
    sums = _table_sums(b, x, indices, values) if accumulate else None
    if sums is not None:
        return sums
    axis = _one_list(x, indices)
    if axis is None or len(values.shape) != len(x.shape):
        return b.recorded()[0]  # type: ignore[return-value]
    index = next(i for i in indices if i is not None)
    return b.along(put, (x, values, index), (x.shape, x.dtype), axis, bool(accumulate))


def _table_sums(b: Builder, x: Value, indices: Any, values: Value) -> Value | None:
    """The gradient of a table whose first axis was looked up by a map of indices; None for other uses."""
    index = indices[0] if len(indices) == 1 else None
    if index is None or len(index.shape) < 2 or index.dtype not in (torch.int64, torch.int32):
        return None
    if values.shape != (*index.shape, *x.shape[1:]):
        return None
    rows = b.full((), x.shape[0], index.dtype)
    wrapped = b.aten(aten.add.Tensor, index, rows)
    index = b.aten(aten.where.self, b.aten(aten.lt.Scalar, index, 0), wrapped, index)
    return b.aten(aten.add.Tensor, x, _row_sums(b, values, index, x.shape, x.dtype))


@decomposes("index_copy", "index_fill.int_Scalar", "index_fill.int_Tensor")
def index_copy(b: Builder, x: Value, dim: int, index: Value, values: Any) -> Value:
    if len(x.shape) < 2 or len(index.shape) != 1:
        return b.recorded()[0]  # type: ignore[return-value]
    axis = dim % len(x.shape)
    shape = [index.shape[0] if a == axis and "fill" not in b.target else 1 for a in range(len(x.shape))]
    if not isinstance(values, Value):
        values = b.full(shape, values, x.dtype)
    elif "fill" in b.target:
        values = b.reshape(values, shape)
    return b.along(put, (x, cast(b, values, x.dtype), index), (x.shape, x.dtype), axis, False)


@decomposes("index_add")
def index_add(b: Builder, x: Value, dim: int, index: Value, values: Value, *, alpha: float = 1) -> Value:
    if len(x.shape) < 2 or alpha != 1:
        return b.recorded()[0]  # type: ignore[return-value]
    return b.along(put, (x, values, index), (x.shape, x.dtype), dim % len(x.shape), True)


# Sorts and scans take their axis in full. -----------------------------------------------------------


class Picked:
    """One output of an ATen op that works along an axis, called with the axis in its place."""

    def __init__(self, name: str, output: int, before: int):
        self.call, self.output, self.before = getattr(aten, name), output, before
        self.__name__ = f"{name}_{output}"

    def __call__(self, x: torch.Tensor, axis: int, *rest: Any) -> torch.Tensor:
        return self.call(x, *rest[: self.before], axis, *rest[self.before :])[self.output]


_SORTS = [Picked("sort", k, 0) for k in (0, 1)]
_TOPS = [Picked("topk", k, 1) for k in (0, 1)]


def _pair(b: Builder, functions: Any, x: Value, axis: int, *rest: Any) -> list[Value]:
    shape = b.meta_shape
    return [b.along(f, (x,), (shape, t), axis, *rest) for f, t in zip(functions, (x.dtype, torch.int64), strict=True)]


@decomposes("cummax", "cummin", "median.dim", "nanmedian.dim", "mode")
def along_axis(b: Builder, x: Value, dim: int = -1, keepdim: bool = False) -> list[Value]:
    axis, name = dim % max(1, len(x.shape)), b.target.split(".")[1]
    if "cum" in name:
        return _pair(b, _functions(name), x, axis)
    return [b.reshape(v, b.meta_shape) for v in _kept(b, _functions(name), x, axis, True)]


@decomposes("kthvalue")
def kthvalue(b: Builder, x: Value, k: int, dim: int = -1, keepdim: bool = False) -> list[Value]:
    made = _kept(b, _functions("kthvalue", 1), x, dim % max(1, len(x.shape)), k, True)
    return [b.reshape(v, b.meta_shape) for v in made]


@cache
def _functions(name: str, before: int = 0) -> list[Picked]:
    return [Picked(name, k, before) for k in (0, 1)]


def _kept(b: Builder, functions: Any, x: Value, axis: int, *rest: Any) -> list[Value]:
    shape = [1 if a == axis else n for a, n in enumerate(x.shape)]
    return [b.along(f, (x,), (shape, t), axis, *rest) for f, t in zip(functions, (x.dtype, torch.int64), strict=True)]


@decomposes("sort", "sort.stable")
def sort(b: Builder, x: Value, dim: int = -1, descending: bool = False, **kwargs: Any) -> list[Value]:
    dim, descending = kwargs.get("dim", dim), kwargs.get("descending", descending)
    return _pair(b, _SORTS, x, dim % max(1, len(x.shape)), descending)


@decomposes("topk")
def topk(b: Builder, x: Value, k: int, dim: int = -1, largest: bool = True, ordered: bool = True) -> list[Value]:
    return _pair(b, _TOPS, x, dim % max(1, len(x.shape)), k, largest, ordered)


def summed(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x.cumsum(axis)


def multiplied(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x.cumprod(axis)


def log_summed(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x.logcumsumexp(axis)


_SCANS = {"cumsum": summed, "cumprod": multiplied, "logcumsumexp": log_summed}


@decomposes(*_SCANS)
def scan(b: Builder, x: Value, dim: int, dtype: Any = None) -> Value:
    x = cast(b, x, b.meta_dtype)
    return b.along(_SCANS[b.target.split(".")[1]], (x,), (x.shape, x.dtype), dim % max(1, len(x.shape)))
