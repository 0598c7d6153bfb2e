"""Sections: which values are saved, and the slices of the graph between them.

A *tile axis* is a tileable axis followed through the whole graph (batch, rows, columns, ...): axes
that a rule links carry the same tile axis. A value with no tile axis is *untiled* and made whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from fullframe.ir.graph import Graph, Op, Value, walked
from fullframe.partition.saved_values import SavedValues
from fullframe.partition.tile_axes import tiled

STANDALONE = 800  # operations per byte read, from which on a sum is made by itself,
STANDALONE_CACHED = 100  # and where what it reads is in a cache,
CACHED = 2 << 20  # which is so many bytes or fewer

SEPARATE = 1 << 16  # bytes of an untiled value of inputs alone, from which on it is made just before its first reader


@dataclass(frozen=True, eq=False)
class Section:
    """A slice of the graph: per tile, from windows of ``loads`` to tiles of ``saves`` and to sums.

    ``ops`` are in runnable order; ``saves`` are stored tile by tile; ``sums`` are reductions over
    the tiles. A section of untiled values has one tile. A ``clone`` makes stored
    values again; ``recompute`` of a section's expensive ops have run before.
    """

    ops: tuple[Op, ...]
    loads: tuple[Value, ...]
    saves: tuple[Value, ...]
    sums: tuple[Op, ...]
    clone: bool = False
    recompute: int = 0

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
    """Drafts so far; ``same_dependencies`` finds the latest untiled one by what it waits for."""

    saved: SavedValues
    drafts: list[_Draft] = field(default_factory=list)
    owner: dict[Value, int] = field(default_factory=dict)
    users: dict[Op, list[int]] = field(default_factory=dict)
    same_dependencies: dict[tuple[bool, int], int] = field(default_factory=dict)


def build_sections(graph: Graph, saved: SavedValues) -> list[Section]:
    """Group the stored values into sections: what shares work or reads what was just made."""
    state = Grouping(saved)
    for op in graph.ops:
        if op.output in saved.stored:
            _place(state, op.output)
    order = {op: k for k, op in enumerate(graph.ops)}
    return [finish_section(d.ops, d.loads, d.outputs, saved, order) for d in state.drafts if d.outputs]


def finish_section(
    ops: set[Op],
    loads: set[Value],
    outputs: Iterable[Value],
    saved: SavedValues,
    order: dict[Op, int],
    clone: bool = False,
) -> Section:
    made = {op.output for op in ops}
    sums = tuple(saved.maker[v] for v in outputs if saved.maker[v] in saved.reducing)
    saves = tuple(v for v in outputs if saved.maker[v] not in saved.reducing)
    ordered = tuple(sorted(ops, key=order.__getitem__))
    read = dict.fromkeys(v for op in ordered for v in op.inputs if v in loads and v not in made)
    return Section(ordered, tuple(read), saves, sums, clone)


def _place(state: Grouping, value: Value) -> None:
    saved = state.saved
    ops, loads = saved.slice_of(value, saved.stored)
    before, separate = 0, False
    for read in loads:
        if read in state.owner:
            owner = state.owner[read]
            before |= 1 << owner | state.drafts[owner].before
    if tiled(value, saved.tile_axes) or saved.maker[value] in saved.reducing:
        joins = (k for k in _candidates(state, ops, loads) if _can_join(state, k, value, ops, loads))
        target = next(joins, None)
    else:
        separate = not before and value.nbytes > SEPARATE
        target = None if separate else _with_same_dependencies(state, value, loads, before)
    if target is None:
        target = len(state.drafts)
        state.drafts.append(_Draft(set(), set(), []))
        if not separate and not tiled(value, saved.tile_axes) and saved.maker[value] not in saved.reducing:
            state.same_dependencies[value in saved.late, before] = target
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
    state.owner[value] = target
    for op in ops:
        state.users.setdefault(op, []).append(target)


def _with_same_dependencies(state: Grouping, value: Value, loads: set[Value], before: int) -> int | None:
    """An untiled draft that waits for all that an untiled value needs, so that joining delays nothing."""
    late = value in state.saved.late
    found = {state.owner[v] for v in loads if v in state.owner}
    found |= {state.same_dependencies[late, before]} if (late, before) in state.same_dependencies else set()
    for k in sorted(found, reverse=True):
        first = state.drafts[k].outputs[0]
        untiled = not tiled(first, state.saved.tile_axes) and state.saved.maker[first] not in state.saved.reducing
        if untiled and (first in state.saved.late) == late and not before & ~(1 << k) & ~state.drafts[k].before:
            return k
    return None


def _candidates(state: Grouping, ops: set[Op], loads: set[Value]) -> list[int]:
    """Drafts that share an op with the slice or make what it loads, newest first."""
    found = {k for op in ops for k in state.users.get(op, ())}
    found |= {state.owner[v] for v in loads if v in state.owner}
    return sorted(found, reverse=True)


def _can_join(state: Grouping, k: int, value: Value, ops: set[Op], loads: set[Value]) -> bool:
    saved, draft = state.saved, state.drafts[k]
    if (value in saved.late) != (draft.outputs[0] in saved.late):
        return False
    if _tiled_along(saved, value) != _tiled_along(saved, draft.outputs[0]):
        return False  # one would be made, or counted, once for each tile of the other
    if not any(tiled(v, saved.tile_axes) or saved.maker[v] in saved.reducing for v in draft.outputs):
        return False
    for read in loads:
        owner = state.owner.get(read)
        if owner is None:
            continue
        if owner == k:
            # Made in the same pass: allowed where the pass has it at hand, that is not for sums
            # (complete only at its end) nor for what is expensive to recompute on a halo.
            if saved.maker[read] in saved.reducing or not tiled(read, saved.tile_axes) or read in saved.pinned:
                return False
            if saved.maker[read].rule.heavy and not _aligned(ops):
                return False
        elif state.drafts[owner].before >> k & 1:
            return False
    return _shares_maps(saved, draft, loads) and _worth_joining(saved, draft, value, ops)


def _tiled_along(saved: SavedValues, value: Value) -> set[int]:
    """Tile axes whose tiles a stored value is cut into; for a sum, those of what is summed."""
    return {tile_axis for tile_axis in saved.tile_axes[saved.walked(value)] if tile_axis is not None}


def _shares_maps(saved: SavedValues, draft: _Draft, loads: set[Value]) -> bool:
    """Whether most of the bytes a slice loads are at hand in the draft.

    Maps made by the step decide; sharing only an input (the target of all planes) would tie
    branches together that could otherwise finish one after the other.
    """
    maps = [v for v in loads if tiled(v, saved.tile_axes)]
    maps = [v for v in maps if v in saved.maker] or maps
    at_hand = sum(v.nbytes for v in maps if v in draft.loads or v in draft.outputs)
    return not maps or 2 * at_hand >= sum(v.nbytes for v in maps)


def _aligned(ops: set[Op]) -> bool:
    """Whether a slice of these ops reads only a tile's own region of what it loads."""
    return all(op.rule.kind in ("pointwise", "reduce") and not op.rule.heavy for op in ops)


def _worth_joining(saved: SavedValues, draft: _Draft, value: Value, ops: set[Op]) -> bool:
    """Sums join anything they share work with, if that is not nothing beside their own; two maps only where they
    share what is expensive."""
    if any(_standalone(saved, v) for v in (value, *draft.outputs)):
        return False
    if saved.maker[value] in saved.reducing:
        return True
    maps = [v for v in draft.outputs if saved.maker[v] not in saved.reducing]
    if not maps:
        return True
    shared = ops & draft.ops
    made = set(draft.outputs)
    if any(op.rule.heavy for op in shared):
        return True
    reads_fresh = any(r in made for op in ops for r in op.inputs)
    return reads_fresh and len(maps) == 1 and not (saved.maker[value].rule.heavy and saved.maker[maps[0]].rule.heavy)


def _standalone(saved: SavedValues, value: Value) -> bool:
    """Whether it is a sum beside whose cost it is nothing to load what it reads: by itself it is made at the same
    time as others, in one tile, and not once per tile."""
    op = saved.maker[value]
    if op not in saved.reducing or not op.rule.heavy:
        return False
    read = sum(v.nbytes for v in op.inputs)
    least = STANDALONE if read > CACHED else STANDALONE_CACHED
    return op.rule.cost(op, prod(walked(op).shape)) > least * read
