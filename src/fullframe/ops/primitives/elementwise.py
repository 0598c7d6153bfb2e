"""Pointwise ops: every output element reads the same element of each (broadcast) input.

Also here: ops that are pointwise but for one axis taken in full (softmax over channels), and ops
that make a tensor from nothing but its shape.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from fullframe.codegen import group
from fullframe.codegen.expressions import supports
from fullframe.ir import region as box
from fullframe.ir.graph import Kind, Link, Op, Ref, Value
from fullframe.ir.region import Region
from fullframe.ops.primitives.rule import BaseRule

DECIDING = frozenset(
    """
eq ne ge gt le lt sgn sign signbit heaviside ceil floor round trunc frac floor_divide fmod remainder logical_and
logical_not logical_or logical_xor threshold hardshrink threshold_backward leaky_relu_backward hardtanh_backward
elu_backward hardshrink_backward softshrink_backward hardsigmoid_backward hardswish_backward
""".split()  # noqa: SIM905
)
"""Pointwise ops whose output jumps somewhere: names without overload."""


PASSING = frozenset(
    """
maximum minimum fmax fmin clamp clamp_min clamp_max where masked_fill relu abs neg threshold hardtanh hardshrink
leaky_relu _prelu_kernel elu celu hardswish nan_to_num copysign
""".split()  # noqa: SIM905
)
"""Pointwise ops that may hand an input's number on as it is."""


class Pointwise(BaseRule):
    """Elementwise with broadcasting: axes align from the right, extent 1 is stretched."""

    kind: Kind = "pointwise"

    def passes(self, op: Op) -> bool:
        return op.target.split(".")[1] in PASSING

    def compares(self, op: Op) -> bool:
        return op.target.split(".")[1] in ("eq", "ne", "ge", "gt", "le", "lt") and len(op.inputs) == 2

    def opposes(self, op: Op) -> bool:
        name, two = op.target.split(".")[1], len(op.inputs) == 2
        less = name in ("sub", "rsub", "div") or (name == "add" and op.kwargs.get("alpha", 1) < 0)
        return self.compares(op) or (less and two)

    def decides(self, op: Op) -> bool:
        if not any(v.dtype.is_floating_point for v in op.inputs):
            return False
        name = op.target.split(".")[1]
        return name in DECIDING or (name == "_to_copy" and not op.output.dtype.is_floating_point)

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
        return [box.broadcast(region, v.shape) for v in op.inputs]

    def position(self, op: Op, region: Region) -> Hashable:
        return ()


class Table(Pointwise):
    """Pointwise, but the last input is a small table, taken in full."""

    def links(self, op: Op) -> Sequence[Link]:
        return [link for link in super().links(op) if link.input < len(op.inputs) - 1]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        reads = [box.broadcast(region, v.shape) for v in op.inputs[:-1]]
        return [*reads, box.full(op.inputs[-1].shape)]


class Along(BaseRule):
    """Pointwise but for one axis, which is read and made in full whatever its extents.

    The axis is the first number among the op's arguments. Inputs of another rank than the output
    are tables, taken in full.
    """

    kind: Kind = "pointwise"

    def axis(self, op: Op) -> int:
        number = next(a for a in op.args if isinstance(a, int))
        return number % max(1, len(op.output.shape))

    def links(self, op: Op) -> Sequence[Link]:
        out, axis = op.output.shape, self.axis(op)
        return [
            Link(i, a, a)
            for i, v in enumerate(op.inputs)
            for a, n in enumerate(v.shape)
            if len(v.shape) == len(out) and a != axis and n == out[a] > 1
        ]

    def grow(self, op: Op, region: Region) -> Region:
        axis = self.axis(op)
        return tuple((0, n) if a == axis else r for a, (r, n) in enumerate(zip(region, op.output.shape, strict=True)))

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        axis, rank = self.axis(op), len(region)
        return [
            tuple((0, n) if a == axis or n == 1 else region[a] for a, n in enumerate(v.shape))
            if len(v.shape) == rank
            else box.full(v.shape)
            for v in op.inputs
        ]

    position = Pointwise.position


class Constant(BaseRule):
    """A tensor filled with one number; reads nothing."""

    kind: Kind = "pointwise"

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.full(box.shape_of(region), op.args[0], **op.kwargs)

    position = Pointwise.position


class Line(BaseRule):
    """A short tensor made from numbers alone (``arange``, ``linspace``): made whole and cut."""

    kind: Kind = "pointwise"

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        return op.call(*op.args, **op.kwargs)[box.slices(region)]


class Iota(BaseRule):
    """``tile.iota(axis, device)``: the position along an axis."""

    kind: Kind = "pointwise"

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        axis, device = op.args
        return torch.arange(*region[axis], device=device).view(box.shape_of(region))


NAMES = """
abs acos acosh add.Tensor add.Scalar addcdiv addcmul asin asinh atan atan2 atanh bitwise_and.Tensor
bitwise_and.Scalar bitwise_not bitwise_or.Tensor bitwise_or.Scalar bitwise_xor.Tensor
bitwise_xor.Scalar bitwise_left_shift.Tensor bitwise_right_shift.Tensor ceil celu clamp clamp.Tensor
clamp_max clamp_min clamp_max.Tensor clamp_min.Tensor copysign.Tensor cos cosh deg2rad div.Tensor
div.Scalar div.Tensor_mode div.Scalar_mode elu elu_backward eq.Tensor eq.Scalar erf erfc erfinv exp
exp2 expm1 floor floor_divide fmax fmin fmod.Tensor fmod.Scalar frac ge.Tensor ge.Scalar gelu
gelu_backward gt.Tensor gt.Scalar hardshrink hardshrink_backward hardsigmoid hardsigmoid_backward
hardswish hardswish_backward hardtanh hardtanh_backward heaviside hypot isinf isnan isposinf isneginf
le.Tensor le.Scalar leaky_relu leaky_relu_backward lerp.Tensor lerp.Scalar lgamma digamma log log10
log1p log2 log_sigmoid_backward logaddexp logaddexp2 logical_and logical_not logical_or logical_xor
logit logit_backward lt.Tensor lt.Scalar masked_fill.Scalar masked_fill.Tensor maximum minimum mish
mish_backward mul.Tensor mul.Scalar nan_to_num ne.Tensor ne.Scalar neg pow.Tensor_Scalar
pow.Tensor_Tensor pow.Scalar reciprocal relu remainder.Tensor remainder.Scalar round round.decimals
rsqrt rsub.Tensor rsub.Scalar selu sgn sigmoid sigmoid_backward sign signbit silu silu_backward sin
sinh softplus softplus_backward softshrink softshrink_backward special_entr special_expit
special_log_ndtr sqrt square sub.Tensor sub.Scalar tan tanh tanh_backward threshold
threshold_backward trunc where.self where.ScalarSelf where.ScalarOther where.Scalar xlogy.Tensor
xlogy.Scalar_Other xlogy.Scalar_Self special_xlog1py _to_copy sinc rad2deg
_prelu_kernel
""".split()  # noqa: SIM905  (a table of names reads best as words)

RULES: dict[str, BaseRule] = {
    f"aten.{name}" if "." in name else f"aten.{name}.default": Pointwise() for name in NAMES
}
RULES |= {
    "aten._softmax.default": Along(),
    "aten._log_softmax.default": Along(),
    "aten._softmax_backward_data.default": Along(),
    "aten._log_softmax_backward_data.default": Along(),
    "tile.full": Constant(),
    "tile.iota": Iota(),
}
RULES |= {
    f"aten.{name}": Line() for name in ("arange.default", "arange.start", "arange.start_step", "linspace.default")
}


def copied(value: Value, to: Value) -> Op:
    """The op that makes a value of the numbers of another one."""
    return Op("aten.clone.default", (value,), (Ref(0),), {}, to, RULES["aten._to_copy.default"],
              torch.ops.aten.clone.default)  # fmt: skip


SUMS = {"tile.sum": "sum", "tile.moments": "moments"}


def fusable(op: Op) -> bool:
    """Whether an op has a place in a fusion group."""
    if op.target in SUMS:
        return op.inputs[0].dtype.is_floating_point and bool(op.args[1])
    if type(op.rule) is not Pointwise or not op.inputs or len(op.output.shape) == 0:
        return False
    dtypes = [*(v.dtype for v in op.inputs), op.output.dtype]
    return not _nested(op) and supports(op.target, tuple(_ref(a) for a in op.args), dtypes)


def _nested(op: Op) -> bool:
    return any(isinstance(a, (list, tuple)) for a in op.args) or any(isinstance(v, Value) for v in op.kwargs.values())


def _ref(argument: object) -> object:
    return group.Ref(argument.index) if isinstance(argument, Ref) else argument


class Stacked(Pointwise):
    """Pointwise, but the first input has one leading axis more, taken in full."""

    def links(self, op: Op) -> Sequence[Link]:
        shape = op.inputs[0].shape
        return [Link(0, a + 1, a) for a in range(len(op.output.shape)) if shape[a + 1] > 1] + [
            link for link in super().links(op) if link.input > 0
        ]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        rest = [box.broadcast(region, v.shape) for v in op.inputs[1:]]
        return [((0, 3), *region), *rest]


STACKED = Stacked()
