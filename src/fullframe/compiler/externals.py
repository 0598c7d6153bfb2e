"""What of a graph lives in objects of the caller's: inputs that are read there, and outputs that are written there.

A run fetches regions of the former and puts regions of the latter, and neither is ever there as a whole. So an output
that is written is a value that nothing reads, and what is only read is no output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from fullframe import torch_compat
from fullframe.errors import CaptureError
from fullframe.frontend.inputs import Call
from fullframe.frontend.sources import Given, Made, Result, SideEffect
from fullframe.ir.graph import Graph, Op, Ref, Value, verify
from fullframe.ops.builder.builder import RULES
from fullframe.storage.external import Sink
from fullframe.storage.protocol import StoredMap


def sources_of(call: Call, graph: Graph) -> dict[Value, StoredMap]:
    """The values of a graph that are read from the caller's objects."""
    first = len(call.tensors) - len(call.inputs)
    return {graph.inputs[first + k]: source for k, source in call.sources.items()}


def refuse_misuse(
    call: Call, changed: Collection[int], effects: Sequence[SideEffect], sinks: Mapping[int, Sink]
) -> None:
    """Refuse a step that changes in place what it can only read by regions, or keeps that or what goes elsewhere."""
    first = len(call.tensors) - len(call.inputs)
    parts = [part for effect in effects for part in _parts(effect.recipe)]
    kept = {part.number for part in parts if isinstance(part, Given)}
    for k, source in call.sources.items():
        if first + k in changed:
            raise CaptureError(
                f"the step changes {source.name} in place, which is an object that is only read; clone it first"
            )
        if first + k in kept:
            raise CaptureError(
                f"the step keeps {source.name}, which is an object that is read by regions and no tensor, in an "
                "attribute or the like; let it keep what it makes of it"
            )
    for part in parts:
        if isinstance(part, Result) and part.number in sinks:
            raise CaptureError(
                f"the step keeps the output that goes to {sinks[part.number].name} in an attribute or the like too; "
                "let it keep a clone, which then is there whole"
            )


def _parts(recipe: object) -> Iterator[object]:
    """What a place is made again of."""
    yield recipe
    for part in recipe.parts if isinstance(recipe, Made) else recipe if isinstance(recipe, tuple) else ():
        yield from _parts(part)


def set_apart(graph: Graph, sources: Collection[Value], written: Collection[int]) -> Graph:
    """The graph with copies, tile by tile, in the place of outputs: of those that are ``written``, by number, where
    something else needs them too, and of what is handed out as it was read."""
    outputs, ops = list(graph.outputs), list(graph.ops)
    read = {v for op in ops for v in op.inputs} | {*graph.inputs} | graph.constants.keys()
    signature = graph.signature
    own = {*range(signature.handed_out), *range(len(outputs) - signature.gradients, len(outputs))}
    for k in sorted(own):
        value = outputs[k]
        if value is None:
            continue
        needed = value in read or outputs.count(value) > 1
        if value in sources or (k in written and needed):
            outputs[k] = Value(f"{value.name}.copy{k}", value.shape, value.dtype, value.itemsize)
            ops.append(_copy(value, outputs[k]))
    if outputs == graph.outputs:
        return graph
    made = replace(graph, ops=ops, outputs=outputs)
    verify(made)
    return made


def _copy(value: Value, copy: Value | None) -> Op:
    assert copy is not None
    call = torch_compat.to_copy
    return Op(str(call), (value,), (Ref(0),), {"dtype": value.dtype}, copy, RULES[str(call)], call)
