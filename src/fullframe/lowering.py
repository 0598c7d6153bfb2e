"""From the fused units of a plan to kernels: the same ops in the words of the kernel generator."""

from __future__ import annotations

from typing import Any

import torch

from fullframe import kernels
from fullframe.fusion import Unit
from fullframe.graph import Op, Ref, Value
from fullframe.ops.pointwise import Pointwise
from fullframe.plan import Plan

SUMS = {"tile.sum": "sum", "tile.moments": "moments"}


def fusable(op: Op) -> bool:
    """Whether an op has a place in a fused unit."""
    if op.target in SUMS:
        return op.inputs[0].dtype.is_floating_point and bool(op.args[1])
    if type(op.rule) is not Pointwise or not op.inputs or len(op.output.shape) == 0:
        return False
    dtypes = [*(v.dtype for v in op.inputs), op.output.dtype]
    return not _nested(op) and kernels.supports(op.target, tuple(_ref(a) for a in op.args), dtypes)


def _nested(op: Op) -> bool:
    return any(isinstance(a, (list, tuple)) for a in op.args) or any(isinstance(v, Value) for v in op.kwargs.values())


def _ref(argument: Any) -> Any:
    return kernels.Ref(argument.index) if isinstance(argument, Ref) else argument


def group_of(unit: Unit) -> kernels.Group:
    """The kernel generator's form of a fused unit."""
    assert unit.loop is not None
    rank = len(unit.loop.shape)
    number = {value: kernels.Ref(k) for k, value in enumerate(unit.reads)}
    operands = tuple(kernels.Operand(v.dtype, _broadcast(v, unit.loop)) for v in unit.reads)
    nodes = []
    for op in unit.ops:
        args = tuple(number[op.inputs[a.index]] if isinstance(a, Ref) else a for a in op.args)
        nodes.append(kernels.Node(op.target, args, op.output.dtype, tuple(sorted(op.kwargs.items()))))
        number[op.output] = kernels.Ref(len(number))
    outputs = dict.fromkeys((*unit.saves, *unit.makes))
    sums = tuple(
        kernels.Reduction(number[op.inputs[0]], SUMS[op.target], tuple(op.args[1]))  # type: ignore[arg-type]
        for op in unit.sums
    )
    return kernels.Group(rank, operands, tuple(nodes), tuple(number[v] for v in outputs), sums)


def _broadcast(value: Value, loop: Value) -> tuple[bool, ...]:
    if not value.shape:
        return ()
    missing = len(loop.shape) - len(value.shape)
    ones = (True,) * missing
    return ones + tuple(n == 1 for n in value.shape)


def build(
    plan: Plan, device: torch.device, *, compile: bool = True
) -> dict[Unit, kernels.Kernel | kernels.DeviceKernel | kernels.Plain]:
    """A kernel for every fused unit of a plan; units of one form share their code."""
    units = [u for step in plan.steps for u in step.units if u.fused]
    made = kernels.build_many([group_of(u) for u in units], compile=compile, device=device)
    return dict(zip(units, made, strict=True))
