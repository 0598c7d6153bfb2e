"""From all that a call could have read to what it has read: a recording's numbers and places in the terms of its key.

A recording is made of everything in reach, and numbers the tensors and places that it found there. Later calls look
only at what it has read, and find fewer of them, in another order.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from fullframe.frontend.guards import GuardSnapshot
from fullframe.frontend.inputs import Call
from fullframe.frontend.outputs import Tree, renumbered
from fullframe.frontend.reads import Reads
from fullframe.frontend.sources import Given, Holder, Made, SideEffect, viewed
from fullframe.ir.graph import Graph


@dataclass(frozen=True)
class Terms:
    """What a recording says by number or place.

    ``wanted``: tensors whose gradients are outputs, in their order. ``alive``: tensors that have a graph in the end,
    and the outputs that bring it. ``numbers``: tensors whose numbers were read. ``unused``: tensors met and not read.
    """

    wanted: tuple[int, ...]
    alive: dict[int, int]
    numbers: tuple[int, ...]
    unused: frozenset[int]
    effects: tuple[SideEffect, ...]
    returned: Tree


def narrowed(
    call: Call, snapshot: GuardSnapshot, reads: Reads, terms: Terms, needed: Collection[int]
) -> tuple[Terms, list[int]]:
    """A recording's terms for a call that is looked at by ``reads``, and the former numbers of its tensors in order.

    ``needed`` are the former numbers that must be among them. Raises `LookupError` where something is not found, and
    leaves the call as it was.
    """
    old, before = call.tensors, call.snapshot
    fixed, given = len(call.parameters) + len(call.buffers), len(call.inputs)
    known = {id(t): fixed + k for k, t in enumerate(call.others)}
    call.take_snapshot(reads, snapshot)
    try:
        order = [*range(fixed), *(known[id(t)] for t in call.others), *range(len(old) - given, len(old))]
        new = {k: number for number, k in enumerate(order)}
        found = Terms(
            tuple(new[k] for k in terms.wanted), {new[k]: v for k, v in terms.alive.items()},
            tuple(new[k] for k in terms.numbers), frozenset(new[k] for k in terms.unused if k in new),
            tuple(_effect(p, before, snapshot, new) for p in terms.effects),
            renumbered(terms.returned, lambda k: _index(before.holders[k], snapshot.holders)),
        )  # fmt: skip
        if not new.keys() >= set(needed):
            raise LookupError("a tensor was read in a way that nobody has seen")
    except LookupError:
        call.take_snapshot(reads, before)
        raise
    return found, order


def reorder(graph: Graph, order: list[int]) -> None:
    """Put a graph's inputs for the call's tensors, and their new contents, in order."""
    first, count, contents = graph.signature.first_content, graph.signature.contents, graph.contents
    graph.inputs[:count] = [graph.inputs[k] for k in order]
    graph.outputs[first : first + count] = [contents[k] for k in order]
    graph.signature = replace(graph.signature, contents=len(order))


def _effect(effect: SideEffect, old: GuardSnapshot, new: GuardSnapshot, numbers: dict[int, int]) -> SideEffect:
    kind, number, name = effect.source
    source = kind, _position(kind, number, old, new), name
    return SideEffect(source, _recipe(effect.key, old, new, numbers), _recipe(effect.recipe, old, new, numbers))


def _position(kind: str, number: int, old: GuardSnapshot, new: GuardSnapshot) -> int:
    """Where the new snapshot has what the old one has at this position."""
    if kind == "container":
        thing: Any = old.containers[number]
        return _index(thing, new.containers)
    if kind == "holder":
        return _index(old.holders[number], new.holders)
    if kind == "scope":
        space, names = old.scopes[number]
        for k, (other, others) in enumerate(new.scopes):
            if other is space and (others is names or others == names):
                return k
        raise LookupError("a global that is not read")
    return _index(viewed(old)[kind][number], viewed(new)[kind])


def _index(thing: Any, things: list[Any]) -> int:
    for k, other in enumerate(things):
        if other is thing:
            return k
    raise LookupError("a place that is not read")


def _recipe(recipe: Any, old: GuardSnapshot, new: GuardSnapshot, numbers: dict[int, int]) -> Any:
    if isinstance(recipe, Given):
        return Given(numbers[recipe.number])
    if isinstance(recipe, Holder):
        return Holder(_index(old.holders[recipe.number], new.holders))
    if isinstance(recipe, Made):
        return replace(recipe, parts=tuple(_recipe(p, old, new, numbers) for p in recipe.parts))
    return tuple(_recipe(p, old, new, numbers) for p in recipe) if type(recipe) is tuple else recipe
