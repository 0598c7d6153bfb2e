"""Boxes: the half-open integer boxes that name a part of a value, and the interval maps of windows.

A region has one ``(low, high)`` pair per tensor axis. Everything here is arithmetic on Python
integers; nothing imports torch.
"""

from __future__ import annotations

from math import prod

Interval = tuple[int, int]
Region = tuple[Interval, ...]


def full(shape: tuple[int, ...]) -> Region:
    """The region that covers all of a value of this shape."""
    return tuple((0, extent) for extent in shape)


def shape_of(region: Region) -> tuple[int, ...]:
    """Extents of the box."""
    return tuple(high - low for low, high in region)


def size(region: Region) -> int:
    """Number of elements in the box."""
    return prod(max(0, high - low) for low, high in region)


def is_empty(region: Region) -> bool:
    return any(high <= low for low, high in region)


def clip(interval: Interval, extent: int) -> Interval:
    """The part of an interval inside ``[0, extent)``; an empty one stays inside the extent."""
    low = min(max(interval[0], 0), extent)
    return low, max(low, min(interval[1], extent))


def union(a: Region, b: Region) -> Region:
    """The smallest box that holds both; an empty box adds nothing."""
    if is_empty(a):
        return b
    if is_empty(b):
        return a
    return tuple((min(p[0], q[0]), max(p[1], q[1])) for p, q in zip(a, b, strict=True))


def overlap(a: Region, b: Region) -> bool:
    """Whether two regions of one map have an element in common."""
    return all(low < stop and start < high for (low, high), (start, stop) in zip(a, b, strict=True))


def contains(outer: Region, inner: Region) -> bool:
    """Whether ``outer`` holds ``inner``; an empty ``inner`` is held by anything."""
    if is_empty(inner):
        return True
    return all(o[0] <= i[0] and i[1] <= o[1] for o, i in zip(outer, inner, strict=True))


def slices(region: Region, origin: Region | None = None) -> tuple[slice, ...]:
    """Python slices that cut ``region`` out of a tensor whose first element is ``origin``'s corner."""
    if origin is None:
        return tuple(slice(low, high) for low, high in region)
    return tuple(slice(r[0] - o[0], r[1] - o[0]) for r, o in zip(region, origin, strict=True))


def window_reads(out: Interval, kernel: int, stride: int, padding: int, dilation: int) -> Interval:
    """Input interval read by outputs ``out`` of a window op, before clipping to the image."""
    if out[1] <= out[0]:
        return 0, 0
    low = out[0] * stride - padding
    return low, (out[1] - 1) * stride - padding + dilation * (kernel - 1) + 1


def window_writes(inp: Interval, kernel: int, stride: int, padding: int, dilation: int) -> Interval:
    """Outputs whose window touches any of the inputs ``inp``, before clipping.

    The transpose of `window_reads`: it is what an input gradient, or a transposed convolution,
    reads. Output ``o`` touches inputs ``o*stride - padding + dilation*j`` for ``j < kernel``.
    """
    if inp[1] <= inp[0]:
        return 0, 0
    low = -((dilation * (kernel - 1) - inp[0] - padding) // stride)
    high = (inp[1] - 1 + padding) // stride + 1
    return low, max(low, high)


def scaled(boundary: int, extent: int, reference: int) -> int:
    """Where a boundary of an axis of ``reference`` pixels falls on one of ``extent`` pixels.

    Monotone, and maps 0 to 0 and ``reference`` to ``extent``: intervals between consecutive
    boundaries are a disjoint cover of the axis whatever the two sizes are.
    """
    return boundary * extent // reference


def broadcast(region: Region, shape: tuple[int, ...]) -> Region:
    """The part of a (right-aligned, broadcast) operand of this shape that a region reads."""
    shift = len(region) - len(shape)
    return tuple((0, 1) if extent == 1 else region[axis + shift] for axis, extent in enumerate(shape))
