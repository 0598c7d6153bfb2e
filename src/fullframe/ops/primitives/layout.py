"""Layout ops: elements move, none is computed. Cat, slice, pad, flip, permute, reshape and kin."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import prod

import torch
import torch.nn.functional as F

from fullframe.ir import region as box
from fullframe.ir.graph import Kind, Link, Op, arg
from fullframe.ir.region import Interval, Region
from fullframe.ops.primitives.elementwise import Pointwise
from fullframe.ops.primitives.rule import Aligned, BaseRule


class Layout(Aligned):
    kind: Kind = "layout"


class Permute(Layout):
    """``aten.permute(x, dims)``."""

    def links(self, op: Op) -> Sequence[Link]:
        return [Link(0, axis, out) for out, axis in enumerate(op.args[1])]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        read: list[Interval] = [(0, 0)] * len(region)
        for out, axis in enumerate(op.args[1]):
            read[axis] = region[out]
        return [tuple(read)]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        return windows[0].permute(op.args[1])

    position = Pointwise.position


class Slice(Layout):
    """``tile.slice(x, axis, start, step)``: the output's extent says where it ends."""

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        _, axis, start, step = op.args
        low, high = region[axis]
        read = (start + low * step, start + (high - 1) * step + 1) if high > low else (0, 0)
        return [(*region[:axis], read, *region[axis + 1 :])]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        _, axis, _, step = op.args
        cut = [slice(None)] * len(region)
        cut[axis] = slice(None, None, step)
        return windows[0][tuple(cut)]

    position = Pointwise.position


class Embed(Layout):
    """``tile.embed(x, axis, start, step, extent)``: x set into zeros; the gradient of `Slice`.

    Output position ``start + step*i`` of the axis holds element i; all others are zero.
    """

    def _inside(self, op: Op, region: Region) -> Interval:
        _, axis, start, step, _ = op.args
        low, high = region[axis]
        extent = op.inputs[0].shape[axis]
        return box.clip((-((start - low) // step), (high - 1 - start) // step + 1), extent)

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        axis = op.args[1]
        return [(*region[:axis], self._inside(op, region), *region[axis + 1 :])]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        _, axis, start, step, _ = op.args
        inside = self._inside(op, region)
        if step == 1 and box.shape_of(region) == tuple(windows[0].shape):
            return windows[0]
        out = zeros_like_layout(windows[0], box.shape_of(region))
        if inside[1] > inside[0]:
            cut = [slice(None)] * len(region)
            first = start + inside[0] * step - region[axis][0]
            cut[axis] = slice(first, first + (inside[1] - inside[0] - 1) * step + 1, step)
            out[tuple(cut)] = windows[0]
        return out

    def position(self, op: Op, region: Region) -> Hashable:
        _, axis, start, step, _ = op.args
        low, high = self._inside(op, region)
        return high - low, start + low * step - region[axis][0]


def zeros_like_layout(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Zeros of a shape, channels innermost where the given tensor has them so."""
    if like.dim() in (4, 5) and like.stride(1) == 1:
        inner = [shape[0], *shape[2:], shape[1]]
        return like.new_zeros(inner).movedim(-1, 1)
    return like.new_zeros(list(shape))


class Expand(Pointwise):
    kind: Kind = "layout"

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        return windows[0].expand(box.shape_of(region))


class Cat(Layout):
    """``tile.cat(*xs, axis)``: inputs side by side along one axis."""

    def _parts(self, op: Op, region: Region) -> list[Interval]:
        axis = op.args[-1]
        parts, start = [], 0
        for value in op.inputs:
            extent = value.shape[axis]
            low, high = region[axis][0] - start, region[axis][1] - start
            parts.append(box.clip((low, high), extent))
            start += extent
        return parts

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        axis = op.args[-1]
        return [(*region[:axis], part, *region[axis + 1 :]) for part in self._parts(op, region)]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        axis = op.args[-1]
        used = [w for w in windows if w.shape[axis] > 0]
        return used[0] if len(used) == 1 else torch.cat(used or list(windows), axis)

    position = Pointwise.position  # which parts are empty shows in the windows' shapes


class Flip(Layout):
    def links(self, op: Op) -> Sequence[Link]:
        # A flipped axis is not linked: its tiles run against those of the input.
        rank = len(op.output.shape)
        flipped = {d % rank for d in op.args[1]}
        return [Link(0, a, a) for a in range(rank) if a not in flipped]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        flipped = {d % len(region) for d in op.args[1]}
        shape = op.output.shape
        return [
            tuple(
                (shape[a] - high, shape[a] - low) if a in flipped else (low, high)
                for a, (low, high) in enumerate(region)
            )
        ]

    position = Pointwise.position


class ConstantPad(Layout):
    """``constant_pad_nd``: pairs from the last axis back; a negative pad crops."""

    def _pads(self, op: Op) -> list[Interval]:
        pads = [(0, 0)] * len(op.output.shape)
        flat = list(op.args[1])
        for k in range(len(flat) // 2):
            pads[-1 - k] = (flat[2 * k], flat[2 * k + 1])
        return pads

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        shape = op.inputs[0].shape
        return [
            tuple(
                box.clip((low - pad[0], high - pad[0]), extent)
                for (low, high), pad, extent in zip(region, self._pads(op), shape, strict=True)
            )
        ]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        flat = self.position(op, region)
        return F.pad(windows[0], flat, value=arg(op, 2, 0)) if any(flat) else windows[0]

    def position(self, op: Op, region: Region) -> tuple[int, ...]:
        """What is to be padded around the window of a region, from the last axis back."""
        flat: list[int] = []
        reads = zip(region, self._pads(op), op.inputs[0].shape, self.footprint(op, region)[0], strict=True)
        for (low, high), (before, _), extent, (first, last) in reversed([*reads]):
            if first == last:
                flat += [high - low, 0]
            else:
                flat += [max(0, before - low), max(0, high - before - extent)]
        return tuple(flat)


class Reshape(Layout):
    """``tile.reshape(x)`` to the output's shape.

    Axes fall into groups of equal products. Where axes are split or merged, the outermost of them
    runs along the one they are split from or merged into, in whole rows of the others.
    """

    def links(self, op: Op) -> Sequence[Link]:
        found = []
        for ins, outs in groups(op.inputs[0].shape, op.output.shape):
            if min(len(ins), len(outs)) == 1:
                found.append(Link(0, ins[0], outs[0]))
        return found

    def grow(self, op: Op, region: Region) -> Region:
        if box.is_empty(region):
            return region
        grown = region
        while True:
            read = self._mapped(op.output.shape, op.inputs[0].shape, grown)
            again = self._mapped(op.inputs[0].shape, op.output.shape, read)
            if again == grown:
                return grown
            grown = again

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        return [self._mapped(op.output.shape, op.inputs[0].shape, region)]

    def _mapped(self, shape: Sequence[int], other: Sequence[int], region: Region) -> Region:
        """The smallest box of another shape that holds the elements of a box."""
        if box.is_empty(region):
            return tuple((0, 0) for _ in other)
        read: list[Interval] = [(0, n) for n in other]
        for ins, outs in groups(shape, other):
            flat = _flatten([shape[a] for a in ins], [region[a] for a in ins])
            for a, interval in zip(outs, _unflatten([other[a] for a in outs], flat), strict=True):
                read[a] = interval
        return tuple(read)

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        return windows[0].reshape(box.shape_of(region))

    position = Pointwise.position


def groups(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes (but those of extent 1) of two shapes of one size, in the finest groups of equal products."""
    found: list[tuple[list[int], list[int]]] = []
    left, right = ([k for k, n in enumerate(shape) if n != 1] for shape in (a, b))
    if 0 in a:
        return [(left, right)]
    while left:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while (p := prod(a[k] for k in ins)) != (q := prod(b[k] for k in outs)):
            if p < q:
                ins.append(left.pop(0))
            else:
                outs.append(right.pop(0))
        found.append((ins, outs))
    return found


def _flatten(shape: Sequence[int], region: Sequence[Interval]) -> Interval:
    """The interval of flat positions that a box spans."""
    low = high = 0
    for extent, (a, b) in zip(shape, region, strict=True):
        low, high = low * extent + a, high * extent + b - 1
    return (low, high + 1) if shape else (0, 1)


def _unflatten(shape: Sequence[int], flat: Interval) -> list[Interval]:
    """The smallest box that holds an interval of flat positions."""
    low, high = flat[0], flat[1] - 1
    box_: list[Interval] = []
    for k in range(len(shape)):
        inner = prod(shape[k + 1 :])
        a, b = low // inner, high // inner
        box_.append((a, b + 1))
        if a != b:
            return box_ + [(0, n) for n in shape[k + 1 :]]
        low, high = low - a * inner, high - b * inner
    return box_


RULES: dict[str, BaseRule] = {
    "aten.permute.default": Permute(),
    "tile.slice": Slice(),
    "tile.embed": Embed(),
    "tile.cat": Cat(),
    "tile.reshape": Reshape(),
    "aten.expand.default": Expand(),
    "aten.flip.default": Flip(),
    "aten.constant_pad_nd.default": ConstantPad(),
}
