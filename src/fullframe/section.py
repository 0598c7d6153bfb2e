"""Sections: which values are cuts, and the slices of the graph between them.

A *label* is a tileable axis followed through the whole graph (batch, rows, columns, ...): axes
that a rule links carry the same label. A value with no labelled axis is *untiled* and made whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from fullframe import region as box
from fullframe.graph import Graph, Op, Value
from fullframe.region import Region

ALONE = 800  # operations per byte read, from which on a sum is made by itself
FAN_IN = 3  # a value recomputed from more stored maps than this is stored itself
APART = 1 << 16  # bytes of an untiled value of inputs alone, from which on it is made just before its first reader
DEPTH = 48  # and so is one recomputed by more ops than this
Labels = dict[Value, tuple["int | None", ...]]


def label_axes(graph: Graph, roots: Sequence[tuple[Value, Sequence[int]]]) -> Labels:
    """Follow the given axes of the inputs through the graph.

    Axes contracted by a convolution are never tiled; nor is a label that one value carries twice
    (a map added to its own transpose), since a tile would then need two places at once.
    """
    parent: dict[tuple[Value, int], tuple[Value, int]] = {}

    def find(key: tuple[Value, int]) -> tuple[Value, int]:
        while (up := parent.get(key, key)) != key:
            parent[key] = parent.get(up, up)
            key = up
        return key

    channels: list[tuple[Value, int]] = []
    for op in graph.ops:
        for a, b in axis_pairs(op):
            parent[find(a)] = find(b)
        for i, axis in op.rule.channels(op):
            channels.append((op.output if i < 0 else op.inputs[i], axis))
    dead = {find(key) for key in channels}
    names: dict[tuple[Value, int], int] = {}
    for value, axes in roots:
        for axis in axes:
            key = find((value, axis))
            if key not in dead:
                names.setdefault(key, len(names))
    return _apply_names(graph, names, find)


def axis_pairs(op: Op) -> Iterable[tuple[tuple[Value, int], tuple[Value, int]]]:
    """Pairs of axes that run along each other in an op."""
    rule: Any = op.rule
    through = op.inputs[rule.driver] if rule.kind == "reduce" else op.output
    for link in rule.links(op):
        yield (op.inputs[link.input], link.axis), (through, link.out)
    if rule.kind == "reduce":
        for axis, out in rule.keeps(op):
            yield (through, axis), (op.output, out)


def _apply_names(graph: Graph, names: dict[tuple[Value, int], int], find: Any) -> Labels:
    values = [*graph.inputs, *graph.constants, *(op.output for op in graph.ops)]
    found: Labels = {}
    doubled: set[int] = set()
    for value in values:
        labels = tuple(names.get(find((value, a))) if n > 1 else None for a, n in enumerate(value.shape))
        used = [x for x in labels if x is not None]
        doubled |= {x for x in used if used.count(x) > 1}
        found[value] = labels
    if doubled:
        found = {v: tuple(None if x in doubled else x for x in ls) for v, ls in found.items()}
    return found


def tiled(value: Value, labels: Labels) -> bool:
    return any(x is not None for x in labels[value])


def sums_tiles(op: Op, labels: Labels) -> bool:
    """Whether the op adds up partial results of tiles (a reduction over a labelled axis)."""
    rule: Any = op.rule
    if rule.kind != "reduce":
        return False
    kept = {axis for axis, _ in rule.keeps(op)}
    return any(x is not None and a not in kept for a, x in enumerate(labels[op.inputs[rule.driver]]))


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


@dataclass
class Cuts:
    """What is stored, and what making any value again would take."""

    labels: Labels
    stored: set[Value]
    maker: dict[Value, Op]
    reducing: set[Op]
    late: set[Value] = field(default_factory=set)  # what depends on inputs that arrive late
    exact: set[Value] = field(default_factory=set)  # made once and never again: see `made_once`

    def slice_of(self, value: Value, stop: set[Value]) -> tuple[set[Op], set[Value]]:
        """Ops to make a value from the values in ``stop`` (inputs included), and those it loads."""
        ops: set[Op] = set()
        loads: set[Value] = set()
        stack = [self.maker[value]]
        while stack:
            op = stack.pop()
            if op in ops:
                continue
            ops.add(op)
            for read in op.inputs:
                if read in stop or read not in self.maker:
                    loads.add(read)
                else:
                    stack.append(self.maker[read])
        return ops, loads


def choose_cuts(graph: Graph, labels: Labels) -> Cuts:
    """The values to store if memory were no concern: what is dear to make again.

    Outputs of heavy ops (convolutions), reductions, whatever is untiled, outputs of the graph, and
    the inputs of ops that run whole. Everything else is recomputed in each section that needs it,
    unless that would load more than FAN_IN maps.
    """
    maker = {op.output: op for op in graph.ops}
    reducing = {op for op in graph.ops if sums_tiles(op, labels)}
    exact = made_once(graph, labels)
    stored = exact | {v for v in graph.outputs if v is not None and v in maker}
    leaves: dict[Value, frozenset[Value]] = {}
    depth: dict[Value, int] = {}
    for op in graph.ops:
        out = op.output
        if op.rule.kind == "whole":
            stored.update(v for v in op.inputs if v in maker)
        if not tiled(out, labels) or op in reducing or op.rule.heavy:
            stored.add(out)
        under: frozenset[Value] = frozenset()
        deep = 1
        for read in op.inputs:
            if read in stored or read not in maker:
                under |= {read} if tiled(read, labels) else frozenset()
            else:
                under |= leaves[read]
                deep += depth[read]
        leaves[out], depth[out] = under, deep
        if len(under) > FAN_IN or deep > DEPTH:
            stored.add(out)
    late = set(graph.late)
    for op in graph.ops:
        if any(v in late for v in op.inputs):
            late.add(op.output)
    cuts = Cuts(labels, stored, maker, reducing, late, exact)
    for op in graph.ops:
        if tiled(op.output, labels) and op.rule.decides(op):
            _settle(cuts, op)
    return cuts


def _settle(cuts: Cuts, op: Op) -> None:
    """Where a decision reads a stored value, and beside it what that has numbers of as they are, store this too.

    ``h == h.clamp(min=0)`` with the clamped map stored and ``h`` made again would compare two makings of ``h``. A
    comparison of two maps is taken at its word whatever lies between: a convolution may be a shift.
    """
    anyhow = op.rule.compares(op)
    while True:
        ops, loads = cuts.slice_of(op.output, cuts.stored)
        beside = {o.output for o in ops} | loads
        found = {v for s in loads for v in _handed_on(s, beside, cuts.maker, anyhow) if tiled(v, cuts.labels)}
        if found <= cuts.exact:
            return
        cuts.exact |= found
        cuts.stored |= found


def _handed_on(value: Value, beside: set[Value], maker: dict[Value, Op], anyhow: bool) -> Iterator[Value]:
    """The nearest values among ``beside`` whose numbers a value may have as they are, or any it is made from."""
    stack, seen = [value], {value}
    while stack:
        op = maker.get(stack.pop())
        if op is None or not (anyhow or op.rule.passes(op)):
            continue
        for read in op.inputs:
            if read in beside and read in maker:
                yield read
            elif read not in seen:
                seen.add(read)
                stack.append(read)


def made_once(graph: Graph, labels: Labels) -> set[Value]:
    """Tiled values that all tiles must see alike, to the last bit: decisions, and what is compared with its extremum.

    A value made again on another window may differ in its last bit, since libraries work in vectors of several
    lengths: then nothing reaches its maximum any more, and the maximum's gradient is lost. So a value is stored, and
    loaded by all that read it, where something decides (a comparison, the bend of an activation) between it and what
    was selected from it (a maximum, a pooled map). Both may have gone through pointwise ops and views before. So are
    two values that the same function made of two images, where something decides between them: where the images are
    alike, so must the values be (`_twins`).
    """
    found = {op.output for op in graph.ops if op.rule.once}
    maker = {op.output: op for op in graph.ops}
    selected: dict[Value, frozenset[Value]] = {}  # by value: selections it is made from, pointwise
    twins: dict[Value, frozenset[Value]] = {}  # by value: twins whose difference it is made of
    nothing: frozenset[Value] = frozenset()
    forms = _forms(graph)
    for op in graph.ops:
        apart = nothing.union(*(twins.get(v, nothing) for v in op.inputs))
        if op.rule.opposes(op):
            apart |= _twins(op, forms, maker)
        twins[op.output] = apart
        if op.rule.decides(op):
            found |= apart
        if op.rule.selects(op):
            selected[op.output] = frozenset([op.output])
        elif op.rule.kind in KEEPING:
            under = nothing.union(*(selected.get(v, nothing) for v in op.inputs))
            selected[op.output] = under
            if under and op.rule.decides(op):
                found |= _shared(op, under, maker)
    return {v for v in found if v in maker and tiled(v, labels)}


KEEPING = ("pointwise", "layout")  # ops that make an element of one element of each input


def _shared(op: Op, selections: Iterable[Value], maker: dict[Value, Op]) -> set[Value]:
    """The values nearest to what selections were made of that the op reads past the selections too."""
    here = _above(op.inputs, maker, _keeps)
    found: set[Value] = set()
    for selection in selections:
        origin = maker[selection].inputs[:1]
        past = _above(origin, maker, lambda above: above.output not in here and _passes(above))
        found |= past & here
    return found


def _forms(graph: Graph) -> dict[Value, int]:
    """By value a number that two have in common if they are made alike of tensors alike in shape and type.

    Of two parameters the numbers may be the same, too: a teacher begins as a copy of its student. And what is done to
    an image element by element, or which part of it is taken, tells nothing about the numbers.
    """
    numbers: dict[Any, int] = {}
    forms: dict[Value, int] = {}
    made = {op.output for op in graph.ops}
    given: set[Value] = set()
    for op in graph.ops:
        given.update(v for v in op.inputs if v not in made)
        out = op.output
        if op.rule.kind in KEEPING and given.issuperset(op.inputs):
            given.add(out)
        for v in (*op.inputs, out):
            if v in given and v not in forms:
                forms[v] = numbers.setdefault((v.shape, v.dtype), len(numbers))
        if out not in given:
            form = (op.target, str(op.args), str(op.kwargs), *(forms[v] for v in op.inputs))
            forms[out] = numbers.setdefault(form, len(numbers))
    return forms


def _twins(op: Op, forms: dict[Value, int], maker: dict[Value, Op]) -> frozenset[Value]:
    """The nearest values on either side of a comparison or difference that have one of their form on the other."""
    sides = [_above(op.inputs[k : k + 1], maker, _keeps) & maker.keys() for k in (0, 1)]
    both = Counter(forms[v] for v in sides[0] & sides[1])  # as where slices of a stack are compared
    found: set[Value] = set()
    for k in (0, 1):
        other = {forms[v] for v in sides[1 - k] - sides[k]}
        wanted = {forms[v] for v in sides[k] - sides[1 - k]} & other | {form for form, n in both.items() if n > 1}
        near = _above(
            op.inputs[k : k + 1],
            maker,
            lambda above, wanted=wanted: forms[above.output] not in wanted and _keeps(above),
        )
        found |= {v for v in near if v in maker and forms[v] in wanted}
    return frozenset(found)


def _keeps(op: Op) -> bool:
    return op.rule.kind in KEEPING


def _passes(op: Op) -> bool:
    return _keeps(op) or op.rule.selects(op)


def _above(values: Iterable[Value], maker: dict[Value, Op], beyond: Callable[[Op], bool]) -> set[Value]:
    """The values and what they are made from, going on past an op's output where ``beyond`` says so."""
    found: set[Value] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if value in found:
            continue
        found.add(value)
        if value in maker and beyond(maker[value]):
            stack += maker[value].inputs
    return found


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


# Tiles -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """The part ``[low, high)`` of a label whose axis has ``reference`` pixels where it is widest."""

    low: int
    high: int
    reference: int


Tile = dict[int, Span]


def own_region(value: Value, labels: Labels, tile: Tile) -> Region:
    """The tile's own part of a value; over all tiles a disjoint cover, whatever the sizes."""
    found = []
    for label, n in zip(labels[value], value.shape, strict=True):
        span = tile.get(label) if label is not None else None
        if span is None:
            found.append((0, n))
        else:
            found.append((box.scaled(span.low, n, span.reference), box.scaled(span.high, n, span.reference)))
    return tuple(found)
