"""Pointwise ops: every output element reads the same element of each (broadcast) input.

Also here: ops that are pointwise but for one axis taken in full (softmax over channels), and ops
that make a constant from nothing but a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fullframe import region as box
from fullframe.graph import Kind, Link, Op, arg
from fullframe.ops.rule import BaseRule
from fullframe.region import Region


class Pointwise(BaseRule):
    """Elementwise with broadcasting: axes align from the right, extent 1 is stretched."""

    kind: Kind = "pointwise"

    def links(self, op: Op) -> Sequence[Link]:
        out = op.output.shape
        found = []
        for i, value in enumerate(op.inputs):
            shift = len(out) - len(value.shape)
            for axis, extent in enumerate(value.shape):
                if extent == out[axis + shift] and extent > 1:
                    found.append(Link(i, axis, axis + shift))
        return found

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        return [broadcast_region(region, v.shape) for v in op.inputs]


def broadcast_region(region: Region, shape: Sequence[int]) -> Region:
    """The part of a (right-aligned, broadcast) operand that a region reads."""
    shift = len(region) - len(shape)
    return tuple(
        (0, 1) if extent == 1 else region[axis + shift] for axis, extent in enumerate(shape)
    )


class PointwiseWithTable(Pointwise):
    """Pointwise, but the last input is a small table, taken in full."""

    def links(self, op: Op) -> Sequence[Link]:
        return [link for link in super().links(op) if link.input < len(op.inputs) - 1]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        return [*super().footprint(op, region)[:-1], box.full(op.inputs[-1].shape)]


class Along(BaseRule):
    """Like pointwise, but one axis (softmax's ``dim``) is always taken in full."""

    kind: Kind = "pointwise"

    def __init__(self, position: int):
        self.position = position

    def axis(self, op: Op) -> int:
        return int(arg(op, self.position)) % max(1, len(op.output.shape))

    def links(self, op: Op) -> Sequence[Link]:
        rank, axis = len(op.output.shape), self.axis(op)
        return [
            Link(i, a, a)
            for i, v in enumerate(op.inputs)
            for a in range(rank)
            if len(v.shape) == rank and a != axis
        ]

    def channels(self, op: Op) -> Sequence[tuple[int, int]]:
        return ()

    def grow(self, op: Op, region: Region) -> Region:
        axis = self.axis(op)
        return tuple((0, n) if a == axis else r for a, (r, n) in enumerate(zip(region, op.output.shape, strict=True)))

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        return [region if len(v.shape) == len(region) else box.full(v.shape) for v in op.inputs]


class Constant(BaseRule):
    """A tensor filled with one number; reads nothing."""

    kind: Kind = "pointwise"

    def run(self, op: Op, region: Region, windows: Sequence[Any]) -> Any:
        return torch.full(box.shape_of(region), op.args[0], **op.kwargs)


class Pick(BaseRule):
    """Negative log likelihood per pixel and its gradient: axis 1 of the scores is taken in full.

    Inputs: scores (N, C, ...), target (N, ...), then class weights (C,) and scalars if any.
    ``scores_out`` says whether the output has the shape of the scores or of the target.
    """

    kind: Kind = "pointwise"

    def __init__(self, scores: int, target: int, scores_out: bool):
        self.scores, self.target, self.scores_out = scores, target, scores_out

    def _role(self, op: Op, index: int) -> str:
        shape = op.inputs[index].shape
        if index == self.scores:
            return "scores"
        return "target" if index == self.target or len(shape) == len(op.inputs[self.target].shape) > 0 and shape == op.inputs[self.target].shape else "small"

    def links(self, op: Op) -> Sequence[Link]:
        found = []
        for i, value in enumerate(op.inputs):
            role = self._role(op, i)
            if role == "small":
                continue
            for axis in range(len(value.shape)):
                pixel = axis if role == "target" else (0 if axis == 0 else axis - 1)
                if role == "scores" and axis == 1:
                    continue
                out = pixel if not self.scores_out else (0 if pixel == 0 else pixel + 1)
                found.append(Link(i, axis, out))
        return found

    def grow(self, op: Op, region: Region) -> Region:
        if not self.scores_out:
            return region
        return (region[0], (0, op.output.shape[1]), *region[2:])

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        pixels = (region[0], *region[2:]) if self.scores_out else region
        reads = []
        for i, value in enumerate(op.inputs):
            role = self._role(op, i)
            if role == "scores":
                reads.append((pixels[0], (0, value.shape[1]), *pixels[1:]))
            else:
                reads.append(pixels if role == "target" else box.full(value.shape))
        return reads


NAMES = """
abs acos acosh add.Tensor add.Scalar addcdiv addcmul asin asinh atan atan2 atanh bitwise_and.Tensor
bitwise_and.Scalar bitwise_not bitwise_or.Tensor bitwise_or.Scalar bitwise_xor.Tensor
bitwise_left_shift.Tensor bitwise_right_shift.Tensor ceil celu clamp clamp.Tensor clamp_max clamp_min
clamp_max.Tensor clamp_min.Tensor copysign.Tensor cos cosh div.Tensor div.Scalar div.Tensor_mode
div.Scalar_mode elu elu_backward eq.Tensor eq.Scalar erf erfc erfinv exp exp2 expm1 floor
floor_divide fmax fmin fmod.Tensor fmod.Scalar frac ge.Tensor ge.Scalar gelu gelu_backward
gt.Tensor gt.Scalar hardshrink hardshrink_backward hardsigmoid hardsigmoid_backward hardswish
hardswish_backward hardtanh hardtanh_backward hypot isinf isnan le.Tensor le.Scalar leaky_relu
leaky_relu_backward lerp.Tensor lerp.Scalar lgamma digamma log log10 log1p log2 log_sigmoid_forward
logaddexp logical_and logical_not logical_or logical_xor logit lt.Tensor lt.Scalar masked_fill.Scalar
masked_fill.Tensor maximum minimum mish mish_backward mul.Tensor mul.Scalar nan_to_num ne.Tensor
ne.Scalar neg pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar reciprocal relu remainder.Tensor
remainder.Scalar round rsqrt rsub.Tensor rsub.Scalar selu sigmoid sigmoid_backward sign silu
silu_backward sin sinh softplus softplus_backward softshrink softshrink_backward sqrt square
sub.Tensor sub.Scalar tan tanh tanh_backward threshold threshold_backward trunc where.self
where.ScalarSelf where.ScalarOther where.Scalar xlogy.Tensor _to_copy to.dtype sinc special_entr
""".split()

RULES: dict[str, BaseRule] = {
    f"aten.{name}" if "." in name else f"aten.{name}.default": Pointwise() for name in NAMES
}
RULES |= {
    "aten._softmax.default": Along(1),
    "aten._log_softmax.default": Along(1),
    "aten._softmax_backward_data.default": Along(2),
    "aten._log_softmax_backward_data.default": Along(2),
    "aten.cumsum.default": Along(1),
    "tile.full": Constant(),
    "aten.nll_loss2d_backward.default": Pick(1, 2, scores_out=True),
    "aten.nll_loss_backward.default": Pick(1, 2, scores_out=True),
}
