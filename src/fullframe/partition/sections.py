"""Sections: which values are cuts, and the slices of the graph between them.

A *label* is a tileable axis followed through the whole graph (batch, rows, columns, ...): axes
that a rule links carry the same label. A value with no labelled axis is *untiled* and made whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from fullframe.ir.graph import Graph, Op, Value
from fullframe.partition.saved_values import Cuts
from fullframe.partition.tile_axes import tiled

ALONE = 800  # operations per byte read, from which on a sum is made by itself


APART = 1 << 16  # bytes of an untiled value of inputs alone, from which on it is made just before its first reader


@dataclass(frozen=True, eq=False)
class Section:
    """A slice of the graph: per tile, from windows of ``loads`` to tiles of ``saves`` and to sums.

    ``ops`` are in runnable order; ``saves`` are stored tile by tile; ``sums`` are reductions over
    the tiles. A section of untiled values has one tile.
    """

    ops: tuple[Op, ...]
    loads: tuple[Value, ...]
    saves: tuple[Value, ...]
    sums: tuple[Op, ...]
    clone: bool = False

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (*self.saves, *(op.output for op in self.sums))

    def __repr__(self) -> str:
        return f"Section({', '.join(v.name for v in self.outputs)})"


@dataclass(eq=False)
class _Draft:
    """A section being put together."""

    ops: set[Op]
    loads: set[Value]
    outputs: list[Value]
    before: int = 0  # bit set of drafts that must run earlier


@dataclass
class Grouping:
    """Drafts so far; ``alike`` finds the latest untiled one by what it waits for."""

    cuts: Cuts
    drafts: list[_Draft] = field(default_factory=list)
    home: dict[Value, int] = field(default_factory=dict)
    users: dict[Op, list[int]] = field(default_factory=dict)
    alike: dict[tuple[bool, int], int] = field(default_factory=dict)


def build_sections(graph: Graph, cuts: Cuts) -> list[Section]:
    """Group the stored values into sections: what shares work or reads what was just made."""
    state = Grouping(cuts)
    for op in graph.ops:
        if op.output in cuts.stored:
            _place(state, op.output)
    order = {op: k for k, op in enumerate(graph.ops)}
    return [finish_section(d.ops, d.loads, d.outputs, cuts, order) for d in state.drafts if d.outputs]


def finish_section(ops: set[Op], loads: set[Value], outputs: Iterable[Value], cuts: Cuts, order: dict[Op, int],
                   clone: bool = False) -> Section:  # fmt: skip
    made = {op.output for op in ops}
    sums = tuple(cuts.maker[v] for v in outputs if cuts.maker[v] in cuts.reducing)
    saves = tuple(v for v in outputs if cuts.maker[v] not in cuts.reducing)
    ordered = tuple(sorted(ops, key=order.__getitem__))
    return Section(ordered, tuple(v for v in loads if v not in made), saves, sums, clone)


def _place(state: Grouping, value: Value) -> None:
    cuts = state.cuts
    ops, loads = cuts.slice_of(value, cuts.stored)
    before, apart = 0, False
    for read in loads:
        if read in state.home:
            home = state.home[read]
            before |= 1 << home | state.drafts[home].before
    if tiled(value, cuts.labels) or cuts.maker[value] in cuts.reducing:
        joins = (k for k in _candidates(state, ops, loads) if _can_join(state, k, value, ops, loads))
        target = next(joins, None)
    else:
        apart = not before and value.nbytes > APART
        target = None if apart else _waits_alike(state, value, loads, before)
    if target is None:
        target = len(state.drafts)
        state.drafts.append(_Draft(set(), set(), []))
        if not apart and not tiled(value, cuts.labels) and cuts.maker[value] not in cuts.reducing:
            state.alike[value in cuts.late, before] = target
    draft = state.drafts[target]
    draft.ops |= ops
    draft.loads |= loads
    draft.outputs.append(value)
    gained = before & ~(1 << target) & ~draft.before
    if gained:
        draft.before |= gained
        for other in state.drafts:
            if other.before >> target & 1:
                other.before |= gained
    state.home[value] = target
    for op in ops:
        state.users.setdefault(op, []).append(target)


def _waits_alike(state: Grouping, value: Value, loads: set[Value], before: int) -> int | None:
    """An untiled draft that waits for all that an untiled value needs, so that joining delays nothing."""
    late = value in state.cuts.late
    found = {state.home[v] for v in loads if v in state.home}
    found |= {state.alike[late, before]} if (late, before) in state.alike else set()
    for k in sorted(found, reverse=True):
        first = state.drafts[k].outputs[0]
        untiled = not tiled(first, state.cuts.labels) and state.cuts.maker[first] not in state.cuts.reducing
        if untiled and (first in state.cuts.late) == late and not before & ~(1 << k) & ~state.drafts[k].before:
            return k
    return None


def _candidates(state: Grouping, ops: set[Op], loads: set[Value]) -> list[int]:
    """Drafts that share an op with the slice or make what it loads, newest first."""
    found = {k for op in ops for k in state.users.get(op, ())}
    found |= {state.home[v] for v in loads if v in state.home}
    return sorted(found, reverse=True)


def _can_join(state: Grouping, k: int, value: Value, ops: set[Op], loads: set[Value]) -> bool:
    cuts, draft = state.cuts, state.drafts[k]
    if (value in cuts.late) != (draft.outputs[0] in cuts.late):
        return False
    if _tiled_along(cuts, value) != _tiled_along(cuts, draft.outputs[0]):
        return False  # one would be made, or counted, once for each tile of the other
    if not any(tiled(v, cuts.labels) or cuts.maker[v] in cuts.reducing for v in draft.outputs):
        return False
    for read in loads:
        home = state.home.get(read)
        if home is None:
            continue
        if home == k:
            # Made in the same pass: allowed where the pass has it at hand, that is not for sums
            # (complete only at its end) nor for what is dear to make again on a halo.
            if cuts.maker[read] in cuts.reducing or not tiled(read, cuts.labels) or read in cuts.exact:
                return False
            if cuts.maker[read].rule.heavy and not _aligned(cuts, value, read, ops):
                return False
        elif state.drafts[home].before >> k & 1:
            return False
    return _shares_maps(cuts, draft, loads) and _worth_joining(cuts, draft, value, ops)


def _tiled_along(cuts: Cuts, value: Value) -> set[int]:
    """Labels whose tiles a stored value is cut into; for a sum, those of what is summed."""
    op = cuts.maker[value]
    through = op.inputs[op.rule.driver] if op in cuts.reducing else value  # type: ignore[attr-defined]
    return {label for label in cuts.labels[through] if label is not None}


def _shares_maps(cuts: Cuts, draft: _Draft, loads: set[Value]) -> bool:
    """Whether most of the bytes a slice loads are at hand in the draft.

    Maps made by the step decide; sharing only an input (the labels of all planes) would tie
    branches together that could otherwise finish one after the other.
    """
    maps = [v for v in loads if tiled(v, cuts.labels)]
    maps = [v for v in maps if v in cuts.maker] or maps
    at_hand = sum(v.nbytes for v in maps if v in draft.loads or v in draft.outputs)
    return not maps or 2 * at_hand >= sum(v.nbytes for v in maps)


def _aligned(cuts: Cuts, value: Value, read: Value, ops: set[Op]) -> bool:
    """Whether the slice reads only a tile's own region of ``read``."""
    return all(op.rule.kind in ("pointwise", "reduce") and not op.rule.heavy for op in ops)


def _worth_joining(cuts: Cuts, draft: _Draft, value: Value, ops: set[Op]) -> bool:
    """Sums join anything they share work with, if that is not nothing beside their own; two maps only where they
    share what is dear."""
    if any(_alone(cuts, v) for v in (value, *draft.outputs)):
        return False
    if cuts.maker[value] in cuts.reducing:
        return True
    maps = [v for v in draft.outputs if cuts.maker[v] not in cuts.reducing]
    if not maps:
        return True
    shared = ops & draft.ops
    made = set(draft.outputs)
    if any(op.rule.heavy for op in shared):
        return True
    reads_fresh = any(r in made for op in ops for r in op.inputs)
    return reads_fresh and len(maps) == 1 and not (cuts.maker[value].rule.heavy and cuts.maker[maps[0]].rule.heavy)


def _alone(cuts: Cuts, value: Value) -> bool:
    """Whether it is a sum beside whose cost it is nothing to load what it reads: by itself it is made at the same
    time as others, in one tile, and not once per tile."""
    op = cuts.maker[value]
    if op not in cuts.reducing or not op.rule.heavy:
        return False
    rule: Any = op.rule
    spent = rule.cost(op, prod(op.inputs[rule.driver].shape))
    return spent > ALONE * sum(v.nbytes for v in op.inputs)
