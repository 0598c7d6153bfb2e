"""Whether a step that was recorded without some leaves of its arguments is the one that it is with them.

What is asked of a leaf in whose place something else stands is noted, but for its class: ``type(x) is float``. So the
step is recorded with the leaves too, and has to come out the same. The class of a leaf is part of the key.
"""

from __future__ import annotations

import torch

from fullframe.capture.joint import JointFunction
from fullframe.frontend.outputs import Copy, HandedOn, Tree
from fullframe.ir.graph import Graph

Recorded = tuple[JointFunction, Graph]


def same_step(known: Recorded, blind: Recorded) -> bool:
    """Whether a step recorded with all leaves, and without some, has the same ops, constants, answers and result."""
    (one, graph), (other, without) = known, blind
    if str(graph) != str(without) or [op.kwargs for op in graph.ops] != [op.kwargs for op in without.ops]:
        return False
    constants = zip(graph.constants.values(), without.constants.values(), strict=True)
    if not all(torch.equal(a, b) for a, b in constants):
        return False
    answers = ([c.answer for c in joint.conditions.noted] for joint in (one, other))
    return next(answers) == next(answers) and _same(one.returned, other.returned)


def _same(known: object, blind: object) -> bool:
    """The same for how the result is made; where a leaf is handed on, what it is made of is the call's."""
    if isinstance(blind, HandedOn):
        return True
    if type(known) is not type(blind):
        return False
    if isinstance(known, Tree) and isinstance(blind, Tree):
        pairs = list(zip(known.parts, blind.parts, strict=False))
        return known.spec == blind.spec and len(known.parts) == len(blind.parts) and all(_same(*p) for p in pairs)
    if isinstance(known, Copy) and isinstance(blind, Copy):
        fields = zip(known.fields, blind.fields, strict=False)
        whole = (known.kind, known.base, [k for k, _ in known.fields]) == (
            blind.kind, blind.base, [k for k, _ in blind.fields]
        )  # fmt: skip
        return whole and _same(known.items, blind.items) and all(_same(a, b) for (_, a), (_, b) in fields)
    return bool(known == blind)
