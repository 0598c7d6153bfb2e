"""Layout in normal form: views, slices, cats, flips, pads and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from fullframe.ir.graph import Value
from fullframe.ops.builder.builder import Builder
from fullframe.ops.builder.registry import cast, decomposes
from fullframe.ops.numerics.interpolate import Spec

aten = torch.ops.aten


@decomposes("view", "_unsafe_view", "_reshape_alias", "squeeze", "squeeze.dim", "squeeze.dims", "unsqueeze")
def reshape(b: Builder, x: Value, *_: Any) -> Value:
    return b.reshape(x, b.meta_shape)


@decomposes("expand")
def expand(b: Builder, x: Value, *_: Any, **__: Any) -> Value:
    return b.expand(x, b.meta_shape)


@decomposes("slice.Tensor")
def slice_(b: Builder, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    dim, extent = dim % len(x.shape), x.shape[dim]
    start = 0 if start is None else min(max(start + extent if start < 0 else start, 0), extent)
    return b.slice(x, dim, start, b.meta_shape[dim], step)


@decomposes("select.int")
def select(b: Builder, x: Value, dim: int, index: int) -> Value:
    dim = dim % len(x.shape)
    part = b.slice(x, dim, index % x.shape[dim], 1)
    return b.reshape(part, (*x.shape[:dim], *x.shape[dim + 1 :]))


@decomposes("split.Tensor", "split_with_sizes", "unsafe_split.Tensor", "unsafe_split_with_sizes")
def split(b: Builder, x: Value, sizes: Any, dim: int = 0) -> list[Value]:
    dim = dim % len(x.shape)
    if isinstance(sizes, int):
        whole = x.shape[dim]
        sizes = [min(sizes, whole - at) for at in range(0, max(whole, 1), sizes)]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [b.slice(x, dim, start, size) for start, size in zip(starts, sizes, strict=True)]


@decomposes("unbind.int")
def unbind(b: Builder, x: Value, dim: int = 0) -> list[Value]:
    return [select(b, x, dim, k) for k in range(x.shape[dim])]


@decomposes("cat")
def cat(b: Builder, xs: Sequence[Value], dim: int = 0) -> Value:
    rank = len(b.meta_shape)
    xs = [cast(b, x, b.meta_dtype) for x in xs if len(x.shape) == rank and 0 not in x.shape]
    return b.cat(xs, dim % rank)


@decomposes("stack")
def stack(b: Builder, xs: Sequence[Value], dim: int = 0) -> Value:
    dim = dim % len(b.meta_shape)
    xs = [cast(b, x, b.meta_dtype) for x in xs]
    return b.cat([b.reshape(x, (*x.shape[:dim], 1, *x.shape[dim:])) for x in xs], dim)


@decomposes("slice_backward")
def slice_backward(b: Builder, g: Value, sizes: Any, dim: int, start: int, end: int, step: int) -> Value:
    dim = dim % len(sizes)
    start = start + sizes[dim] if start < 0 else start
    return b.embed(g, dim, start, sizes[dim], step)


@decomposes("select_backward")
def select_backward(b: Builder, g: Value, sizes: Any, dim: int, index: int) -> Value:
    dim = dim % len(sizes)
    g = b.reshape(g, (*sizes[:dim], 1, *sizes[dim + 1 :]))
    return b.embed(g, dim, index % sizes[dim], sizes[dim])


@decomposes("slice_scatter")
def slice_scatter(
    b: Builder, x: Value, source: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    dim, extent = dim % len(x.shape), x.shape[dim]
    start = 0 if start is None else min(max(start + extent if start < 0 else start, 0), extent)
    length = source.shape[dim]
    if step != 1:
        mask = b.embed(b.full(source.shape, True, torch.bool), dim, start, extent, step)
        return b.aten(torch.ops.aten.where.self, mask, b.embed(source, dim, start, extent, step), x)
    before = [b.slice(x, dim, 0, start)] if start else []
    after = extent - start - length
    return b.cat([*before, source, *([b.slice(x, dim, start + length, after)] if after else [])], dim)


@decomposes("select_scatter")
def select_scatter(b: Builder, x: Value, source: Value, dim: int, index: int) -> Value:
    dim = dim % len(x.shape)
    source = b.reshape(source, (*x.shape[:dim], 1, *x.shape[dim + 1 :]))
    return slice_scatter(b, x, source, dim, index % x.shape[dim])


@decomposes("roll")
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


@decomposes("flip")
def flip(b: Builder, x: Value, dims: Any) -> Value:
    return b.flip(x, [d % len(x.shape) for d in dims])


@decomposes("rot90")
def rot90(b: Builder, x: Value, turns: int = 1, dims: Any = (0, 1)) -> Value:
    first, second = (d % len(x.shape) for d in dims)
    order = list(range(len(x.shape)))
    order[first], order[second] = second, first
    if turns % 4 == 1:
        return b.permute(b.flip(x, [second]), order)
    if turns % 4 == 3:
        return b.flip(b.permute(x, order), [second])
    return b.flip(x, [first, second]) if turns % 4 else x


@decomposes("permute")
def permute(b: Builder, x: Value, dims: Any) -> Value:
    return b.permute(x, [d % len(x.shape) for d in dims])


@decomposes("transpose.int", "t")
def transpose(b: Builder, x: Value, first: int = -1, second: int = -2) -> Value:
    order = list(range(len(x.shape)))
    if len(order) > 1:
        order[first], order[second] = order[second], order[first]
    return b.permute(x, order)


@decomposes("repeat")
def repeat(b: Builder, x: Value, times: Any) -> Value:
    x = b.reshape(x, (*[1] * (len(times) - len(x.shape)), *x.shape))
    for axis, n in enumerate(times):
        if n == 0:
            x = b.slice(x, axis, 0, 0)
        elif x.shape[axis] == 1:
            x = b.expand(x, (*x.shape[:axis], n, *x.shape[axis + 1 :]))
        elif n > 1:
            x = b.cat([x] * n, axis)
    return x


@decomposes("constant_pad_nd")
def constant_pad(b: Builder, x: Value, pads: Any, number: Any = 0) -> Value:
    rank = len(x.shape)
    axes = [rank - 1 - k for k in range(len(pads) // 2) if tuple(pads[2 * k : 2 * k + 2]) != (0, 0)]
    y, where = b.unmerged_except(x, axes)
    flat = [0] * (2 * len(y.shape))
    for axis, at in zip(axes, where, strict=True):
        k, new = rank - 1 - axis, len(y.shape) - 1 - at
        flat[2 * new : 2 * new + 2] = pads[2 * k : 2 * k + 2]
    made = b.aten(aten.constant_pad_nd.default, y, flat, number)
    return b.reshape(made, b.meta_shape)


def _edge_specs(name: str, source: Sequence[int], pads: Sequence[int]) -> tuple[Spec, ...]:
    """Reflecting and replicating pads; pads come in pairs from the last axis back."""
    mode = "reflect" if "reflection" in name else "replicate"
    rank = len(pads) // 2
    pairs = [pads[2 * k : 2 * k + 2] for k in reversed(range(rank))]
    return tuple(Spec(mode, n, n + a + z, padding=a) for n, (a, z) in zip(source[-rank:], pairs, strict=True))


def edge_pad(b: Builder, x: Value, pads: Any) -> Value:
    specs = _edge_specs(b.target, x.shape, pads)
    return b.emit("tile.resample", (x,), b.meta_shape, x.dtype, args=(specs,))


def edge_pad_backward(b: Builder, g: Value, x: Value, pads: Any) -> Value:
    specs = _edge_specs(b.target, x.shape, pads)
    return b.emit("tile.resample_grad", (g,), x.shape, x.dtype, args=(specs,))


for _rank in (1, 2, 3):
    for _mode in ("reflection", "replication"):
        decomposes(f"{_mode}_pad{_rank}d")(edge_pad)
        decomposes(f"{_mode}_pad{_rank}d_backward")(edge_pad_backward)


@decomposes("pixel_shuffle")
def pixel_shuffle(b: Builder, x: Value, r: int) -> Value:
    *lead, c, h, w = x.shape
    n = len(lead)
    y = b.reshape(x, (*lead, c // (r * r), r, r, h, w))
    return b.reshape(b.permute(y, (*range(n), n, n + 3, n + 1, n + 4, n + 2)), b.meta_shape)


@decomposes("pixel_unshuffle")
def pixel_unshuffle(b: Builder, x: Value, r: int) -> Value:
    *lead, c, h, w = x.shape
    n = len(lead)
    y = b.reshape(x, (*lead, c, h // r, r, w // r, r))
    return b.reshape(b.permute(y, (*range(n), n, n + 2, n + 4, n + 1, n + 3)), b.meta_shape)


@decomposes("channel_shuffle")
def channel_shuffle(b: Builder, x: Value, groups: int) -> Value:
    n, c, *rest = x.shape
    y = b.permute(b.reshape(x, (n, groups, c // groups, *rest)), (0, 2, 1, *range(3, 3 + len(rest))))
    return b.reshape(y, x.shape)


# Sliding windows ---------------------------------------------------------------------------------


@decomposes("unfold")
def unfold(b: Builder, x: Value, dim: int, size: int, step: int) -> Value:
    if not x.shape:  # a single number
        return b.reshape(x, b.meta_shape) if size else b.full(b.meta_shape, 0, x.dtype)
    dim, count = dim % len(x.shape), b.meta_shape[dim % len(x.shape)]
    parts = [b.slice(x, dim, k, count, step) for k in range(size)]
    return b.cat([b.reshape(p, (*p.shape, 1)) for p in parts], len(x.shape))


@decomposes("unfold_backward")
def unfold_backward(b: Builder, g: Value, sizes: Any, dim: int, size: int, step: int) -> Value:
    if not sizes:
        return b.sum(g, (0,), False, b.meta_dtype)
    dim, last = dim % len(sizes), len(sizes)
    parts = [b.reshape(b.slice(g, last, k, 1), g.shape[:-1]) for k in range(size)]
    return added(b, [b.embed(p, dim, k, sizes[dim], step) for k, p in enumerate(parts)])


def added(b: Builder, xs: Sequence[Value]) -> Value:
    total = xs[0]
    for x in xs[1:]:
        total = b.aten(aten.add.Tensor, total, x)
    return total


def _places(kernel: Any, dilation: Any) -> list[tuple[int, int]]:
    return [(i * dilation[0], j * dilation[1]) for i in range(kernel[0]) for j in range(kernel[1])]


def _counts(size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> list[int]:
    axes = zip(size, kernel, dilation, padding, stride, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in axes]


@decomposes("im2col")
def im2col(b: Builder, x: Value, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Value:
    counts = _counts(x.shape[-2:], kernel, dilation, padding, stride)
    x = b.reshape(x, (prod(x.shape[:-3]), *x.shape[-3:]))
    if any(padding):
        x = b.aten(aten.constant_pad_nd.default, x, [padding[1], padding[1], padding[0], padding[0]])
    parts = [
        b.slice(b.slice(x, 2, i, counts[0], stride[0]), 3, j, counts[1], stride[1])
        for i, j in _places(kernel, dilation)
    ]
    return b.reshape(b.cat([b.reshape(p, (*p.shape[:2], 1, *p.shape[2:])) for p in parts], 2), b.meta_shape)


@decomposes("col2im")
def col2im(b: Builder, g: Value, size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Value:
    counts, places = _counts(size, kernel, dilation, padding, stride), _places(kernel, dilation)
    extents = [n + 2 * p for n, p in zip(size, padding, strict=True)]
    channels = g.shape[-2] // len(places)
    g = b.reshape(g, (prod(g.shape[:-2]), channels, len(places), *counts))
    parts = []
    for k, (i, j) in enumerate(places):
        part = b.reshape(b.slice(g, 2, k, 1), (*g.shape[:2], *counts))
        parts.append(b.embed(b.embed(part, 3, j, extents[1], stride[1]), 2, i, extents[0], stride[0]))
    whole = added(b, parts)
    for axis, n, p in zip((2, 3), size, padding, strict=True):
        whole = b.slice(whole, axis, p, n)
    return b.reshape(whole, b.meta_shape)
