"""Which gradients a backward is asked for: a recorded graph without those that it is not.

A recording has the backward of every output, from gradients that arrive late. Autograd runs only what leads from the
outputs it is asked about, so neither does a tiled step: zeros in the place of the others would cost as much, and zero
times infinity is no number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch

from fullframe.errors import CaptureError
from fullframe.ir.graph import Graph, Op, Value, followers, live_ops, verify
from fullframe.ops.builder.builder import RULES

ADD = "aten.add.Tensor"


def sources(graph: Graph, values: Iterable[Value]) -> set[Value]:
    """The inputs and constants that values are made from."""
    found = set(values)
    for op in reversed(graph.ops):
        if op.output in found:
            found.update(op.inputs)
    return found - {op.output for op in graph.ops}


def restricted_to(graph: Graph, used: Collection[Value], device: torch.device, at_once: bool = False) -> Graph:
    """A graph that is given only the gradients ``used``; or, ``at_once``, none, for they are one.

    What follows from the other gradients alone is not made. Where autograd adds it to something, it is left out, and
    where an op takes it beside something, it is zeros.
    """
    there, gone = followers(graph.ops, used), followers(graph.ops, graph.late - set(used))
    absent = gone - there
    _refuse_early(graph, absent if at_once else gone | there)
    same: dict[Value, Value] = {}  # a sum of which one part is absent, and the other
    ops: list[Op] = []
    filled: dict[Value, Value] = {}
    begun = not at_once
    for op in graph.ops:
        if not begun and op.output in there:
            ops += [_full(value, 1, device) for value in graph.inputs if value in used]
            begun = True
        if op.output in absent:
            continue
        missing = [v for v in op.inputs if v in absent]
        kept = [v for v in op.inputs if v not in absent]
        if missing and _sums(op) and _alike(kept, op.output):
            same[op.output] = same.get(kept[0], kept[0])
            continue
        for value in missing:
            if value not in filled:
                filled[value] = Value(f"{value.name}.zeros", value.shape, value.dtype, value.itemsize)
                ops.append(_full(filled[value], 0, device))
        ops.append(replace(op, inputs=tuple(filled.get(v) or same.get(v, v) for v in op.inputs)))
    if not begun:
        ops += [_full(value, 1, device) for value in graph.inputs if value in used]
    outputs = [None if v is None or v in absent else same.get(v, v) for v in graph.outputs]
    late = frozenset() if at_once else frozenset(used)
    made = Graph(
        [v for v in graph.inputs if v not in graph.late or v in late],
        live_ops(ops, [v for v in outputs if v is not None]),
        outputs, graph.signature, late, graph.constants, graph.seed, graph.strides,
    )  # fmt: skip
    verify(made)
    return made


def backward_of(graph: Graph) -> Graph:
    """A graph that makes nothing but gradients."""
    outputs = [*(None for _ in graph.early), *graph.outputs[len(graph.early) :]]
    ops = live_ops(graph.ops, [v for v in outputs if v is not None])
    return replace(graph, ops=ops, outputs=outputs)


def _refuse_early(graph: Graph, missing: Collection[Value]) -> None:
    """Refuse what is to be handed on before the backward, and follows from these."""
    if any(v in missing for v in graph.early):
        raise CaptureError(
            "the backward changes a buffer or keeps a tensor, by a hook say, and its gradients are asked of several "
            "outputs of the step, or of another than its scalar loss, so that they are made later; return one loss, "
            "and detach what is only looked at (.detach())"
        )


def _sums(op: Op) -> bool:
    return op.target == ADD and len(op.inputs) == 2 and op.kwargs.get("alpha", 1) == 1


def _alike(kept: Sequence[Value], output: Value) -> bool:
    return len(kept) == 1 and (kept[0].shape, kept[0].dtype) == (output.shape, output.dtype)


def _full(value: Value, number: int, device: torch.device) -> Op:
    kwargs = {"dtype": value.dtype, "device": device}
    return Op("tile.full", (), (number,), kwargs, value, RULES["tile.full"], torch.full)
