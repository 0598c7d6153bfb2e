"""Window ops: convolutions and their gradients.

Padding is applied only where a window touches the border of the image, at every op. The geometry
of one spatial axis is (kernel, stride, padding, dilation).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod

import torch

from fullframe.bytecode.libtorch import bytecode_available
from fullframe.ir import region as box
from fullframe.ir.graph import Kind, Link, Op, Value
from fullframe.ir.region import Interval, Region
from fullframe.native.convolution import Axis as Placed
from fullframe.native.convolution import alone, convolution, suits
from fullframe.native.weight_gradient import suits_gradient, weight_grad
from fullframe.native.winograd import winograd
from fullframe.ops.numerics.convolve import DOT, EVEN, Axis, convolve, geometry, in_pieces, pad_window, spread
from fullframe.ops.primitives.rule import BaseRule, Reduction, made_of, nbytes_of


def outside(region: Sequence[Interval], extents: Sequence[int]) -> list[Interval]:
    """How much of each (unclipped) interval lies before and after its axis."""
    pairs = zip(region, extents, strict=True)
    return [(min(high, 0) - min(low, 0), max(high, n) - max(low, n)) for (low, high), n in pairs]


BLOCK = 16  # channels: the library's own layout has a multiple of so many
COLUMN = 17  # bytes that the library keeps for each column of a convolution's outputs, and as many if it has rows;
WIDTHS = 5  # for each size of window along an axis: at both ends, and of those between, which strides make unlike


def _library(op: Op, axes: Sequence[Axis], x: Region, g: Region, kernel: Sequence[int]) -> int:
    """Bytes that the library takes beside a map read in ``x`` and one at each of whose pixels ``g`` a window lies.

    In float32 and below these are copies in its own layout; what it makes by a matrix product, as float64 and weight
    gradients of small windows and batches, has a column for each pixel.
    """
    item = op.inputs[1].itemsize if op.rule.kind == "window" else op.output.itemsize
    sizes = [high - low for low, high in g]
    plain = all(a.stride == a.dilation == 1 for a in axes)
    small = op.rule.kind == "reduce" and max(kernel[-2:]) <= 3 and sizes[0] < 16 and plain
    products = item == 8 or small
    columns = blocked = 0
    if products and prod(kernel) > 1:
        deep = op.output.shape[1] if op.rule.kind == "reduce" else op.inputs[1].shape[1]
        columns = sizes[0] * prod(sizes[2:-1]) * (sizes[-1] + EVEN) * deep * prod(kernel) * item
    if item < 8:
        pixels = [(box.size(r) // max(1, r[1][1] - r[1][0]), r[1][1] - r[1][0]) for r in (x, g)]
        blocked = sum(n * -(-c // BLOCK) * BLOCK * 4 for n, c in pixels)
    return max(columns, blocked)


def widened(op: Op, products: Value, *regions: Region) -> int:
    """Bytes of regions cast to the type of the products, where that of the picture has fewer bits."""
    narrow = op.inputs[0].itemsize < products.itemsize
    return products.itemsize * sum(map(box.size, regions)) if narrow else 0


class Conv(BaseRule):
    """``tile.conv(x, weight, bias?, stride, padding, dilation, groups)``."""

    kind: Kind = "window"
    heavy = True

    def axes(self, op: Op) -> list[Axis]:
        return geometry([op.inputs[1].shape[2:], *op.args[3:6]])

    def links(self, op: Op) -> Sequence[Link]:
        return [Link(0, 0, 0)] + [Link(0, a, a) for a in range(2, len(op.output.shape))]

    def channels(self, op: Op) -> Sequence[tuple[int, int]]:
        return [(0, 1), (-1, 1)]

    def grow(self, op: Op, region: Region) -> Region:
        return (region[0], (0, op.output.shape[1]), *region[2:])

    def reads(self, op: Op, region: Region) -> list[Interval]:
        return [box.window_reads(r, *a) for r, a in zip(region[2:], self.axes(op), strict=True)]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        shape = op.inputs[0].shape
        spatial = [box.clip(r, n) for r, n in zip(self.reads(op, region), shape[2:], strict=True)]
        return [(region[0], (0, shape[1]), *spatial), *(box.full(v.shape) for v in op.inputs[1:])]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        """In the weight's type, which may have more bits than what is read and made."""
        x, weight = windows[0].to(windows[1].dtype), windows[1]
        made = self.convolved(op, region, x, weight, windows[2] if len(windows) > 2 else None)
        return made.to(op.output.dtype)

    def convolved(self, op: Op, region: Region, x: torch.Tensor, weight: torch.Tensor,
                  bias: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
        _, _, _, stride, _, dilation, groups = op.args
        pads, axes = self.placed(op, region)
        made = convolution(x, weight, bias, axes, groups)
        if made is not None:
            return made
        if all(before == after for before, after in pads):
            padding = [before for before, _ in pads]
        else:
            x, padding = pad_window(x, pads), [0]
        return convolve(x, weight, bias, stride, padding, dilation, False, [0], groups)

    def placed(self, op: Op, region: Region) -> tuple[list[Interval], list[Placed]]:
        """How much of what a region reads lies outside of the input, and how windows lie in the rest."""
        pads = outside(self.reads(op, region), op.inputs[0].shape[2:])
        sizes = zip(box.shape_of(region[2:]), self.axes(op), pads, strict=True)
        return pads, [Placed(n, a.stride, before, a.dilation) for n, a, (before, _) in sizes]

    def position(self, op: Op, region: Region) -> Hashable:
        return tuple(outside(self.reads(op, region), op.inputs[0].shape[2:]))

    def cost(self, op: Op, elements: int) -> int:
        return 2 * elements * prod(op.inputs[1].shape[1:])

    def scratch(self, op: Op, region: Region) -> int:
        read, weight = self.footprint(op, region)[0], op.inputs[1]
        cast = widened(op, weight, read, region)
        if not self.calls(op) and bytecode_available():
            both = (box.size(read) + prod(weight.shape)) // max(1, weight.shape[1]) * (weight.shape[1] + 1)
            return both * weight.itemsize if alone(weight.shape, weight.dtype) else cast
        copies = 2 * box.size(read) * weight.itemsize + made_of(op, region)  # padded, and in another layout
        return cast + copies + _library(op, self.axes(op), read, region, op.inputs[1].shape[2:])

    def calls(self, op: Op) -> bool:
        weight = op.inputs[1]
        return not suits(weight.shape, weight.dtype, op.args[6])

    def kept(self, op: Op, region: Region, pieces: Sequence[int]) -> Mapping[Hashable, int]:
        """What the library prepares once for each size of window, and remembers (measured of oneDNN 3.12)."""
        *rows, row = self.axes(op)
        if not self.calls(op) or op.inputs[0].itemsize == 8 or all(a.kernel == 1 for a in (*rows, row)):
            return {}
        unlike = [min(n, WIDTHS) for n in pieces[2:]]
        low, high = region[-1]
        nbytes = COLUMN * (high - low) * min(2, prod(a.kernel for a in rows)) * prod(unlike)
        shapes = (box.shape_of(region), op.inputs[1].shape, op.inputs[0].itemsize, *unlike)
        return {(self.kind, str(op.args), shapes): nbytes}


class Winograd(Conv):
    """``tile.winograd(x, weight, bias?, stride, padding, dilation, groups)``.

    `Conv` with rows of three taps, of which the weight has four sums (`for_winograd`).
    """

    def axes(self, op: Op) -> list[Axis]:
        *axes, row = super().axes(op)
        return [*axes, row._replace(kernel=row.kernel - 1)]

    def convolved(self, op: Op, region: Region, x: torch.Tensor, weight: torch.Tensor,
                  bias: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
        return winograd(x, weight, bias, self.placed(op, region)[1], region[-1][0])

    def position(self, op: Op, region: Region) -> Hashable:
        """With whether it begins at an even column: outputs are made in couples."""
        return super().position(op, region), region[-1][0] % 2

    def cost(self, op: Op, elements: int) -> int:
        return elements * prod(op.inputs[1].shape[1:])

    def calls(self, op: Op) -> bool:
        return False


class ConvTranspose(Conv):
    """``tile.conv_transpose(x, weight, bias?, stride, padding, dilation, groups)``.

    Also the input gradient of a strided convolution; the output's shape is the op's own, so that
    output padding and gradients of odd sizes need no argument.
    """

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        shape = op.inputs[0].shape
        spatial = [
            box.clip(box.window_writes(r, *a), n)
            for r, a, n in zip(region[2:], self.axes(op), shape[2:], strict=True)
        ]
        return [(region[0], (0, shape[1]), *spatial), *(box.full(v.shape) for v in op.inputs[1:])]

    def convolved(self, op: Op, region: Region, x: torch.Tensor, weight: torch.Tensor,
                  bias: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
        _, _, _, stride, _, dilation, groups = op.args
        read = self.footprint(op, region)[0]
        if box.is_empty(read):
            channels = op.output.shape[1]
            out = x.new_zeros([region[0][1] - region[0][0], channels, *box.shape_of(region[2:])])
            return out if bias is None else out + bias.view(-1, *[1] * (len(region) - 2))
        crops = self.crops(op, region)
        padding = [max(0, min(c)) for c in crops]
        crops = [(c[0] - p, c[1] - p) for c, p in zip(crops, padding, strict=True)]
        ragged = any(n < 0 for c in crops for n in c)
        out = convolve(x, weight, None if ragged else bias, stride, padding, dilation, True, [0], groups)
        if any(n for c in crops for n in c):
            out = pad_window(out, [(-before, -after) for before, after in crops])
        if ragged and bias is not None:
            out = out + bias.view(-1, *[1] * (len(region) - 2))
        return out

    def crops(self, op: Op, region: Region) -> list[Interval]:
        """How many of the outputs that a window makes lie before and behind those that are wanted; behind the last
        that it touches are outputs that are zero (plus bias)."""
        found = []
        read = self.footprint(op, region)[0]
        for r, a, want in zip(read[2:], self.axes(op), region[2:], strict=True):
            first = r[0] * a.stride - a.padding
            last = (r[1] - 1) * a.stride - a.padding + a.dilation * (a.kernel - 1) + 1
            found.append((want[0] - first, last - want[1]))
        return found

    def position(self, op: Op, region: Region) -> Hashable:
        return None if box.is_empty(self.footprint(op, region)[0]) else tuple(self.crops(op, region))

    def scratch(self, op: Op, region: Region) -> int:
        read = self.footprint(op, region)[0]
        pixels = prod(high - low for low, high in read[2:])
        columns = pixels * prod(op.inputs[1].shape[1:]) * 8 if op.inputs[0].itemsize == 8 else 0
        copies = 2 * (box.size(read) + box.size(region)) * op.inputs[1].itemsize
        return widened(op, op.inputs[1], read, region) + copies + columns

    def calls(self, op: Op) -> bool:
        return True

    def cost(self, op: Op, elements: int) -> int:
        weight = op.inputs[1].shape
        per = prod(weight[2:]) / prod(spread(op.args[3], len(weight) - 2))
        return int(2 * elements * weight[0] // op.args[6] * max(1, per))


def _overlooks_ends(x: torch.Tensor, axes: Sequence[Axis]) -> bool:
    """Whether the library cannot be left to pad for a weight gradient.

    In bfloat16, where an axis is shorter than the window, it leaves parts of the gradient as they lay in memory, or
    writes beyond it (oneDNN in torch 2.13; plain PyTorch has it too).
    """
    spans = zip(x.shape[2:], axes, strict=True)
    return x.dtype == torch.bfloat16 and any(n < (a.kernel - 1) * a.dilation + 1 for n, a in spans)


class ConvWeightGrad(Reduction):
    """``tile.conv_weight_grad(g, x, stride, padding, dilation, groups)``, driven by ``g``.

    ``transposed`` convolutions are the same sum with the roles of g and x swapped.
    """

    heavy = True
    reads = Conv.reads

    def axes(self, op: Op) -> list[Axis]:
        return geometry([op.output.shape[2:], *op.args[2:5]])

    def links(self, op: Op) -> Sequence[Link]:
        spatial = range(2, len(op.output.shape))
        return [Link(i, a, a) for i in (0, 1) for a in (0, *spatial)]

    def channels(self, op: Op) -> Sequence[tuple[int, int]]:
        return [(0, 1), (1, 1)]

    def grow(self, op: Op, region: Region) -> Region:
        return (region[0], (0, op.inputs[0].shape[1]), *region[2:])

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        shape = op.inputs[1].shape
        spatial = [box.clip(r, n) for r, n in zip(self.reads(op, region), shape[2:], strict=True)]
        return [region, (region[0], (0, shape[1]), *spatial)]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        g, x = (window.to(op.output.dtype) for window in windows)  # which may have more bits, as a weight
        stride, padding, dilation, groups = op.args[2:]
        pads = outside(self.reads(op, region), op.inputs[1].shape[2:])
        axes = self.axes(op)
        made = weight_grad(
            g, x, op.output.shape, [a.stride for a in axes], [before for before, _ in pads],
            [a.dilation for a in axes], groups,
        )  # fmt: skip
        if made is not None:
            return made
        if all(before == after for before, after in pads) and not _overlooks_ends(x, axes):
            padding = [before for before, _ in pads]
        else:
            x, padding = pad_window(x, pads), [0]
        shape, geometry = op.output.shape, (stride, padding, dilation, False, [0])
        if all(a.kernel == a.stride == 1 for a in axes) and not any(padding):
            pieces = in_pieces(g, x)
            if pieces is not None:
                (g, x), shape, geometry = pieces, (*shape[:2], 1, 1), DOT
        weight = g.new_empty(1).expand(shape)
        grads = torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, groups, [False, True, False])
        return grads[1].view(op.output.shape)

    def position(self, op: Op, region: Region) -> Hashable:
        return tuple(outside(self.reads(op, region), op.inputs[1].shape[2:]))

    def cost(self, op: Op, elements: int) -> int:
        return 2 * elements * prod(op.output.shape[1:])

    def scratch(self, op: Op, region: Region) -> int:
        g, x = self.footprint(op, region)
        cast = widened(op, op.output, g, x)
        if not self.calls(op) and bytecode_available():
            return cast
        return cast + nbytes_of(op, (g, x)) + _library(op, self.axes(op), x, g, op.output.shape[2:])

    def calls(self, op: Op) -> bool:
        return not suits_gradient(op.output.shape, op.output.dtype, op.args[5])


RULES: dict[str, BaseRule] = {
    "tile.conv": Conv(),
    "tile.conv_transpose": ConvTranspose(),
    "tile.conv_weight_grad": ConvWeightGrad(),
    "tile.winograd": Winograd(),
}
