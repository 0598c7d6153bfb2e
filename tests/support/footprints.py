"""The footprint proof of a rule: enough, no more than it needs, and partial results add up.

The ops are those of the networks in `usage_cases`, forward and backward, with the values they take there. `loose`
names the rules that may read more than an output needs, and says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import torch

from fullframe.ir import region as box
from fullframe.ir.graph import Graph, Op, Value
from fullframe.ops.numerics import interpolate as taps
from fullframe.ops.primitives.elementwise import Along, Pointwise
from fullframe.testing import combines, regions, sufficient, tight

WEIGHTED = (
    "tile.conv",
    "tile.conv_transpose",
    "tile.winograd",
)  # their weights are read in full, whatever the region


def loose(op: Op) -> str:
    """Why a rule may read a face that a region does not need, whatever the numbers; empty where it may not."""
    steps = op.target.removeprefix("tile.")
    if steps in ("conv", "conv_transpose", "conv_weight_grad", "max_pool", "max_pool_choice", "max_pool_grad"):
        axes = op.rule.axes(op)  # type: ignore[attr-defined]
        if any(a.dilation > 1 or a.stride > a.kernel for a in axes):
            return "pixels between the taps of a dilated kernel, or between strides, lie in its box"
    if steps == "resample_grad" and any(spec.mode in ("linear", "cubic") for spec in op.args[1]):
        return "an output that gives a pixel the weight zero is read"
    if steps in ("max_pool_choice", "adaptive_max_choice") and _lone(op):
        return "the number of a pixel that is alone in its window does not matter"
    if steps.startswith("max_unpool"):
        return "indices of other numbers would be no indices of a pooling"
    return ""


def _lone(op: Op) -> bool:
    """Whether some window of a pooling holds one pixel only."""
    rule: Any = op.rule
    if op.target == "tile.adaptive_max_choice":
        spans = [[taps.reads(spec, o, o + 1) for o in range(spec.target)] for spec in rule.specs(op)]
    else:
        lead = rule.lead(op)
        extents = zip(rule.axes(op), op.inputs[0].shape[lead:], op.output.shape[lead:], strict=True)
        spans = [[box.clip(box.window_reads((o, o + 1), *a), n) for o in range(m)] for a, n, m in extents]
    return all(any(high - low == 1 for low, high in axis) for axis in spans)


def evaluated(graph: Graph) -> Iterator[tuple[Op, list[torch.Tensor]]]:
    """Every op of a graph that a rule tiles, with values to run on."""
    known: dict[Value, torch.Tensor] = dict(graph.constants)
    for value in graph.inputs:
        known[value] = _filled(value)
    for op in graph.ops:
        rule: Any = op.rule
        tensors = [known[v] for v in op.inputs]
        whole = op.inputs[rule.driver].shape if rule.kind == "reduce" else op.output.shape
        reads = rule.footprint(op, box.full(whole))
        made = rule.run(op, box.full(whole), [t[box.slices(r)] for t, r in zip(tensors, reads, strict=True)])
        known[op.output] = rule.finish(op, made) if rule.kind == "reduce" else made
        assert (tuple(known[op.output].shape), known[op.output].dtype) == (op.output.shape, op.output.dtype), op
        if rule.kind != "whole" and 0 not in op.output.shape:
            yield op, tensors


def _filled(value: Value) -> torch.Tensor:
    torch.manual_seed(len(value.name) + sum(value.shape))
    if value.dtype.is_floating_point:
        made = torch.rand(value.shape, dtype=value.dtype)
        if value.name == "input1":  # a target may be a probability
            return made
        made = 2 * made - 1
        return made.abs() if "var" in value.name else made
    return torch.randint(0, 4, value.shape).to(value.dtype)


def signature(op: Op) -> str:
    return f"{op.target}{[tuple(v.shape) for v in op.inputs]}{op.args}{op.output.shape}{op.output.dtype}"


def prove(op: Op, tensors: list[torch.Tensor]) -> None:
    random, rule = Random(signature(op)), op.rule
    if rule.kind == "reduce":
        assert all(combines(op, tensors, random) for _ in range(2)), op
        driver: Any = rule
        _check_empty(op, op.inputs[driver.driver].shape)
        return
    _check_empty(op, op.output.shape)
    for region in regions(op.output.shape, random):
        assert sufficient(op, tensors, region), (op, region)
        if _masked(op):
            check_beside(op, region)
        elif not loose(op):
            idle = _idle(op, tensors, region)
            assert not idle, (op, region, idle)


def check_beside(op: Op, region: Any) -> None:
    """Tight where numbers may rightly not matter: each element read stands beside one that is made."""
    rule: Any = op.rule
    region = rule.grow(op, region)
    free = rule.axis(op) if isinstance(rule, Along) else None  # the axis taken in full
    for k, (value, read) in enumerate(zip(op.inputs, rule.footprint(op, region), strict=True)):
        if len(read) > len(region) or (isinstance(rule, Along) and len(read) != len(region)):
            continue  # stacked moments, a table
        if type(rule).__name__ == "Table" and k == len(op.inputs) - 1:
            continue
        shift = len(region) - len(read)
        for axis, own in enumerate(read):
            beside = (0, 1) if value.shape[axis] == 1 else region[axis + shift]
            assert own == beside or axis == free, (op, region, k, own)


def _check_empty(op: Op, shape: tuple[int, ...]) -> None:
    """Of an empty region, wherever it is, no rule reads beyond its inputs."""
    for axis, n in enumerate(shape):
        for at in {0, n // 2, n}:
            region = tuple((at, at) if a == axis else (0, m) for a, m in enumerate(shape))
            rule: Any = op.rule
            for value, read in zip(op.inputs, rule.footprint(op, rule.grow(op, region)), strict=True):
                assert box.contains(box.full(value.shape), read), (op, region, read)


def _idle(op: Op, tensors: list[torch.Tensor], region: Any) -> set[Any]:
    """The faces that reach the output for none of several draws of numbers."""
    idle = set(tight(op, tensors, region))
    if op.target in WEIGHTED:  # their weights are read in full, whatever the region
        idle = {face for face in idle if face[0] == 0}
    for k in range(DRAWS):
        if not idle:
            break
        generator = torch.Generator().manual_seed(k)
        drawn = [_drawn(op, t, k, generator, region) for t in tensors]
        if k % 2:  # let a choice fall on the region's own corner, however many others there are
            for t in drawn:
                if t.shape == op.output.shape and t.is_floating_point():
                    t[tuple(low for low, _ in region)] += 9
        idle &= set(tight(op, drawn, region))
    return idle


def _drawn(op: Op, t: torch.Tensor, k: int, generator: torch.Generator, region: Any) -> torch.Tensor:
    """Other numbers for an input; of whole numbers only choices among the elements of a window."""
    if t.is_floating_point():
        return torch.rand(t.shape, generator=generator, dtype=t.dtype) * (1 + k % 3) - k % 2
    corner = [low if k % 2 else high - 1 for low, high in region]  # every window that can chooses this pixel
    if op.target == "tile.max_pool_grad":
        axes, found = op.rule.axes(op), torch.zeros_like(t)  # type: ignore[attr-defined]
        for n, (axis, at) in enumerate(zip(axes, corner[-len(axes) :], strict=True)):
            starts = torch.arange(t.shape[n - len(axes)]) * axis.stride - axis.padding
            wanted = ((at - starts) // axis.dilation).clamp(0, axis.kernel - 1)
            found = found * axis.kernel + wanted.view(-1, *[1] * (len(axes) - n - 1)).to(t.dtype)
        return found
    if op.target == "tile.adaptive_max_grad":
        flat = 0
        for at, n in list(zip(corner, op.output.shape, strict=True))[-op.args[-1] :]:
            flat = flat * n + at
        return torch.full_like(t, flat)
    return t


DRAWS = 60  # a choice among the elements of a window falls on each of them before long


def _masked(op: Op) -> bool:
    """Whether elements may rightly not matter: a choice, a comparison, a product with zero."""
    return isinstance(op.rule, (Pointwise, Along)) and type(op.rule).__name__ != "Expand"
