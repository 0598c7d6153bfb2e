"""Which values are stored, and which are pinned because a decision must fall the same way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from fullframe.ir.graph import Graph, Op, Value, walked
from fullframe.partition.tile_axes import TileAxes, sums_tiles, tiled

FAN_IN = 3  # a value recomputed from more stored maps than this is stored itself


DEPTH = 48  # and so is one recomputed by more ops than this


@dataclass
class SavedValues:
    """What is stored, and what recomputing any value would take."""

    tile_axes: TileAxes
    stored: set[Value]
    maker: dict[Value, Op]
    reducing: set[Op]
    late: set[Value] = field(default_factory=set)  # what depends on inputs that arrive late
    pinned: set[Value] = field(default_factory=set)  # pinned: never recomputed: see `pinned_values`

    def walked(self, value: Value) -> Value:
        """The value whose tiles make a stored one: of a sum over tiles, what is summed."""
        op = self.maker[value]
        return walked(op) if op in self.reducing else value

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


def choose_saved_values(graph: Graph, tile_axes: TileAxes) -> SavedValues:
    """The values to store if memory were no concern: what is expensive to recompute.

    Outputs of heavy ops (convolutions), reductions, whatever is untiled, outputs of the graph, and
    the inputs of ops that run whole. Everything else is recomputed in each section that needs it,
    unless that would load more than FAN_IN maps.
    """
    maker = {op.output: op for op in graph.ops}
    reducing = {op for op in graph.ops if sums_tiles(op, tile_axes)}
    pinned = pinned_values(graph, tile_axes)
    stored = pinned | {v for v in graph.outputs if v is not None and v in maker}
    leaves: dict[Value, frozenset[Value]] = {}
    depth: dict[Value, int] = {}
    for op in graph.ops:
        out = op.output
        if op.rule.kind == "whole":
            stored.update(v for v in op.inputs if v in maker)
        if not tiled(out, tile_axes) or op in reducing or op.rule.heavy:
            stored.add(out)
        under: frozenset[Value] = frozenset()
        deep = 1
        for read in op.inputs:
            if read in stored or read not in maker:
                under |= {read} if tiled(read, tile_axes) else frozenset()
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
    saved = SavedValues(tile_axes, stored, maker, reducing, late, pinned)
    for op in graph.ops:
        if tiled(op.output, tile_axes) and op.rule.decides(op):
            _settle(saved, op)
    return saved


def _settle(saved: SavedValues, op: Op) -> None:
    """Where a decision reads a stored value, and beside it what that has numbers of as they are, store this too.

    ``h == h.clamp(min=0)`` with the clamped map stored and ``h`` recomputed would compare two makings of ``h``. A
    comparison of two maps is taken at its word whatever lies between: a convolution may be a shift.
    """
    anyhow = op.rule.compares(op)
    while True:
        ops, loads = saved.slice_of(op.output, saved.stored)
        beside = {o.output for o in ops} | loads
        found = {v for s in loads for v in _handed_on(s, beside, saved.maker, anyhow) if tiled(v, saved.tile_axes)}
        if found <= saved.pinned:
            return
        saved.pinned |= found
        saved.stored |= found


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


def pinned_values(graph: Graph, tile_axes: TileAxes) -> set[Value]:
    """Tiled values that all tiles must see alike, to the last bit: decisions, and what is compared with its extremum.

    A value recomputed on another window may differ in its last bit, since libraries work in vectors of several
    lengths: then nothing reaches its maximum any more, and the maximum's gradient is lost. So a value is stored, and
    loaded by all that read it, where something decides (a comparison, the bend of an activation) between it and what
    was selected from it (a maximum, a pooled map). Both may have gone through pointwise ops and views before. So are
    two values that the same function made of two images, where something decides between them: where the images are
    alike, so must the values be (`_twins`).
    """
    found = {op.output for op in graph.ops if op.rule.pinned}
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
    return {v for v in found if v in maker and tiled(v, tile_axes)}


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
    numbers: dict[object, int] = {}
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
