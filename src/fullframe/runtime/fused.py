"""Fused jobs made ready: what a kernel needs of its tensors, found once and kept from step to step.

The shapes of a job's tensors follow from the plan; their layout hardly ever changes. So a job that has run once
knows the kernel's call and how far into each map its part begins, and has then only to look up where the maps are:
cutting parts out of tensors costs more than a small kernel, and the workers would wait for each other meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from fullframe.codegen import group
from fullframe.codegen.group import Call
from fullframe.codegen.kernel import Kernel, Plain, build_many
from fullframe.codegen.toolchain.cuda_kernel import DeviceKernel
from fullframe.ir.graph import Ref, Value
from fullframe.ops.primitives.elementwise import SUMS
from fullframe.partition.fusion import FusionGroup
from fullframe.runtime.tasks import Job
from fullframe.schedule.plan import Plan

Tensors = Mapping[Value, torch.Tensor]
Kernels = dict[FusionGroup, Kernel | DeviceKernel | Plain]


class OperandView(NamedTuple):
    """A part of a map or window that a kernel reads or writes: how it lies in memory, and where it starts."""

    value: Value
    window: bool
    stride: tuple[int, ...]  # of the whole map
    offset: int  # bytes


class NewWindow(NamedTuple):
    """A window that a kernel makes; ``keep`` it for other jobs."""

    value: Value
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    keep: bool


class BoundKernel(NamedTuple):
    """A fused job's kernel call and its tensors."""

    call: Call
    reads: tuple[OperandView, ...]
    targets: tuple[OperandView | NewWindow, ...]

    def places(self, values: Tensors, windows: dict[Value, torch.Tensor], made: dict[Value, torch.Tensor],
               device: torch.device) -> list[int] | None:  # fmt: skip
        """Addresses of the tensors, new windows among them; None where a layout has changed."""
        found = []
        for place in self.reads:
            tensor = windows[place.value] if place.window else values[place.value]
            if tensor.stride() != place.stride:
                return None
            found.append(tensor.data_ptr() + place.offset)
        for target in self.targets:
            if isinstance(target, OperandView):
                tensor = values[target.value]
                if tensor.stride() != target.stride:
                    return None
                found.append(tensor.data_ptr() + target.offset)
                continue
            tensor = torch.empty_strided(target.shape, target.stride, dtype=target.value.dtype, device=device)
            found.append(tensor.data_ptr())
            made[target.value] = tensor
            if target.keep:
                windows[target.value] = tensor
        return found


def bind(job: Job, call: Call, values: Tensors, windows: Tensors, parts: Sequence[torch.Tensor],
          made: Tensors) -> BoundKernel | None:  # fmt: skip
    """The job as it ran on these parts of maps and windows; None where one of them was a tensor of its own, or the
    call is good for these alone."""
    if not call.reusable:
        return None
    reads = []
    for read, part in zip(job.reads, parts, strict=True):
        if read.empty is not None:
            return None
        whole = windows[read.value] if read.window else values[read.value]
        reads.append(_view(read.value, read.window, whole, part))
    targets: list[OperandView | NewWindow] = []
    for target in job.targets:
        tensor = made[target.value]
        if target.shape is None and target.keep:  # a part of a map that is a window, too
            return None
        if target.shape is None:
            targets.append(_view(target.value, False, values[target.value], tensor))
        else:
            targets.append(NewWindow(target.value, target.shape, tensor.stride(), target.keep))
    return BoundKernel(call, tuple(reads), tuple(targets))


def _view(value: Value, window: bool, whole: torch.Tensor, part: torch.Tensor) -> OperandView:
    return OperandView(value, window, whole.stride(), part.data_ptr() - whole.data_ptr())


def group_of(fusion_group: FusionGroup) -> group.Group:
    """The kernel generator's form of a fusion group."""
    assert fusion_group.loop is not None
    rank = len(fusion_group.loop.shape)
    number = {value: group.Ref(k) for k, value in enumerate(fusion_group.reads)}
    operands = tuple(group.Operand(v.dtype, _broadcast(v, fusion_group.loop)) for v in fusion_group.reads)
    nodes = []
    for op in fusion_group.ops:
        args = tuple(number[op.inputs[a.index]] if isinstance(a, Ref) else a for a in op.args)
        nodes.append(group.Node(op.target, args, op.output.dtype, tuple(sorted(op.kwargs.items()))))
        number[op.output] = group.Ref(len(number))
    outputs = dict.fromkeys((*fusion_group.saves, *fusion_group.makes))
    sums = tuple(
        group.Reduction(number[op.inputs[0]], SUMS[op.target], tuple(op.args[1]))  # type: ignore[arg-type]
        for op in fusion_group.sums
    )
    return group.Group(rank, operands, tuple(nodes), tuple(number[v] for v in outputs), sums)


def _broadcast(value: Value, loop: Value) -> tuple[bool, ...]:
    if not value.shape:
        return ()
    missing = len(loop.shape) - len(value.shape)
    ones = (True,) * missing
    return ones + tuple(n == 1 for n in value.shape)


def build(plan: Plan, device: torch.device, *, compile: bool = True) -> Kernels:
    """A kernel for every fusion group of a plan; groups of one form share their code."""
    fusion_groups = [u for stage in plan.stages for u in stage.groups if u.fused]
    made = build_many([group_of(u) for u in fusion_groups], compile=compile, device=device)
    return dict(zip(fusion_groups, made, strict=True))
