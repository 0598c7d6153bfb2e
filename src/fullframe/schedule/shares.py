"""Shares: which rank makes which tiles, what each holds of every map, and what they exchange. Integers only.

An axis of the images is divided among ranks: each has an interval of its pixels. Of a stage that is tiled along that
axis a rank makes the tiles whose middle lies in its interval, and holds of what it made its own rows. A stage that is
not tiled along it, as all that is untiled, is made by every rank. Before a stage its ranks fetch the rows that they
read and do not hold yet from those that made them; rows once fetched stay until the map is freed.

All ranks find the same of the same plan. Rows stand for positions along the divided axis, whichever that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from weakref import WeakKeyDictionary

from fullframe.errors import UnsupportedOpError
from fullframe.ir import region as box
from fullframe.ir.graph import Graph, Value, walked
from fullframe.ir.region import Interval, Region
from fullframe.partition.fusion import work_of
from fullframe.partition.sections import Section
from fullframe.partition.tile_axes import TileAxes
from fullframe.schedule.meetings import meetings, sums_nbytes
from fullframe.schedule.plan import Grid, Plan, Stage
from fullframe.schedule.split import Exchange, Meeting, Piece, Share, Split

Bounds = tuple[int, ...]  # where the rows of each rank begin, and the end
Rows = list[Interval]  # disjoint, in order
Reads = list[dict[Value, Interval]]  # by the tile's place along the divided axis


@dataclass(eq=False)
class Shares:
    """What all ranks have of a plan. ``tiles``: by stage, which places along the divided axis are whose; None where
    every rank makes all. ``held``: the rows of a map that each rank has room for, ``parts`` those of an output that
    it hands out; of maps that are not here each has all. ``before``: by stage the rows that move ahead of it, and
    ``closing``, by the number of stages done, what moves after them: (value, from, to, rows). ``meetings``: when that
    is done, by the stage with which a run begins."""

    split: Split
    axes: dict[Value, int] = field(default_factory=dict)
    tiles: list[Bounds | None] = field(default_factory=list)
    held: dict[Value, list[Interval]] = field(default_factory=dict)
    parts: dict[Value, list[Interval]] = field(default_factory=dict)
    given: dict[Value, Bounds] = field(default_factory=dict)
    before: list[list[tuple[Value, int, int, Interval]]] = field(default_factory=list)
    closing: dict[int, list[tuple[Value, int, int, Interval]]] = field(default_factory=dict)
    meetings: dict[int, tuple[Meeting, ...]] = field(default_factory=dict)

    def region(self, value: Value, rows: Interval) -> Region:
        """These rows of a value."""
        axis = self.axes[value]
        return tuple(rows if a == axis else (0, n) for a, n in enumerate(value.shape))

    def nbytes(self, value: Value) -> int:
        """What a map takes on the rank that has most of it."""
        if value not in self.held:
            return value.nbytes
        rows = value.shape[self.axes[value]]
        most = min(rows, 1 + max(high - low for low, high in self.held[value]))
        return value.nbytes // max(1, rows) * most

    def meet(self, stages: Sequence[Stage], spans: Sequence[range]) -> None:
        """Say when what moves does so, in runs over these spans of the stages."""
        divided = [bounds is not None for bounds in self.tiles]
        for span in spans:
            moved = {n: [m[0] for m in self.before[n]] for n in span}
            moved[span.stop] = [m[0] for m in self.closing.get(span.stop, ())]
            self.meetings[span.start] = meetings(stages, divided, moved, span)

    def exchanged(self, stages: Sequence[Stage], max_in_flight: int) -> int:
        """The most bytes that a rank sends and receives at once, with the sums that wait for that, and those of
        stages that are made meanwhile."""
        made = [sums_nbytes(s) * (b is not None) for s, b in zip(stages, self.tiles, strict=True)]
        ahead = max((sum(made[k : k + max_in_flight]) for k in range(len(made))), default=0) * (max_in_flight > 1)
        most = 0
        for found in self.meetings.values():
            stop = found[-1].number
            for meeting in found:
                moves = [m for n in meeting.rows for m in (self.closing[n] if n == stop else self.before[n])]
                sums = (2 * self.split.ranks + 1) * sum(sums_nbytes(stages[n]) for n in meeting.sums)
                most = max(most, sums + self._moved(moves))
        return most + ahead

    def _moved(self, moves: Iterable[tuple[Value, int, int, Interval]]) -> int:
        """Bytes that come and go on the rank that has most of them."""
        taken = [0] * self.split.ranks
        for value, source, target, rows in moves:
            n = box.size(self.region(value, rows)) * value.itemsize
            taken[source] += n
            taken[target] += n
        return max(taken)

    def of(self, rank: int) -> Share:
        """What one rank has to know."""
        held = {v: self.region(v, rows[rank]) for v, rows in self.held.items()}
        room = {v: self._room(v, rows[rank]) for v, rows in self.held.items()}
        parts = {v: self.region(v, rows[rank]) for v, rows in self.parts.items()}
        given = {v: self.region(v, (b[rank], b[rank + 1])) for v, b in self.given.items()}
        tiles = tuple(None if b is None else (b[rank], b[rank + 1]) for b in self.tiles)
        before = tuple(self._exchange(moves, rank) for moves in self.before)
        closing = {at: self._exchange(moves, rank) for at, moves in self.closing.items()}
        return Share(rank, self.split, tiles, held, room, parts, given, before, closing, self.meetings)

    def _room(self, value: Value, rows: Interval) -> tuple[int, ...]:
        axis = self.axes[value]
        return tuple(min(n, rows[1] - rows[0] + 1) if a == axis else n for a, n in enumerate(value.shape))

    def _exchange(self, moves: Iterable[tuple[Value, int, int, Interval]], rank: int) -> Exchange | None:
        sends: list[list[Piece]] = [[] for _ in range(self.split.ranks)]
        receives: list[list[Piece]] = [[] for _ in range(self.split.ranks)]
        found = False
        for value, source, target, rows in moves:
            found = True
            if source == rank:
                sends[target].append(Piece(value, self.region(value, rows)))
            if target == rank:
                receives[source].append(Piece(value, self.region(value, rows)))
        return Exchange(tuple(map(tuple, sends)), tuple(map(tuple, receives))) if found else None


_READS: WeakKeyDictionary[Section, dict[Grid, Reads]] = WeakKeyDictionary()
"""What stages read, which the drafts of a plan have in common."""


def shares_of(graph: Graph, stages: Sequence[Stage], early: int, tile_axes: TileAxes, split: Split) -> Shares:
    """The shares of all ranks."""
    walk = _Walk(graph, tile_axes, split)
    for number, stage in enumerate(stages):
        if number == early and graph.late:
            walk.close(number, _wanted(graph, tile_axes, split, graph.early))
        walk.stage(stage)
    first = len(graph.early) if early < len(stages) else 0
    last = {v for v in graph.outputs[first:] if v is not None}
    wanted = _wanted(graph, tile_axes, split, graph.outputs)
    walk.close(len(stages), {v: where for v, where in wanted.items() if v in last})
    spans = [range(early), range(early, len(stages))] if graph.late else [range(len(stages))]
    walk.shares.meet(stages, spans)
    return walk.shares


class _Walk:
    """The stages of a plan in their order: who has made which rows, and who has which at hand."""

    def __init__(self, graph: Graph, tile_axes: TileAxes, split: Split):
        self.graph, self.tile_axes, self.split = graph, tile_axes, split
        self.ranks = range(split.ranks)
        self.tile_axis = split.tile_axis(tile_axes)
        self.shares = Shares(split)
        self.own: dict[Value, Bounds] = {}  # of maps that are divided
        self.at_hand: dict[Value, list[Rows]] = {}
        for value, axis, bounds in (*split.inputs, *self._late()):
            if value in graph.inputs:
                self.shares.axes[value] = axis
                self.shares.given[value] = bounds
                self._made(value, bounds)

    def _late(self) -> Iterator[tuple[Value, int, Bounds]]:
        """Gradients of outputs come in shards as the outputs are handed out."""
        wanted = _wanted(self.graph, self.tile_axes, self.split, self.graph.early)
        for value, number in self.split.late.items():
            output = self.graph.outputs[number]
            if value in self.graph.inputs and output is not None:
                axis, bounds = wanted[output]
                if bounds is not None:
                    yield value, axis, bounds

    def stage(self, stage: Stage) -> None:
        """Move on by a stage."""
        section = stage.section
        through = [*section.saves, *(walked(op) for op in section.sums)]
        divided = self.tile_axis is not None and all(self.tile_axis in self.tile_axes[v] for v in through)
        whose = self._whose(stage) if divided and through else None
        reads = self._reads(stage)
        moves = []
        for value in section.loads:
            if value not in self.own:
                continue
            found = [r[value] for r in reads if value in r] if whose is None else None
            for rank in self.ranks:
                if found is None:
                    assert whose is not None
                    rows = _hull(r[value] for r in reads[whose[rank] : whose[rank + 1]] if value in r)
                else:
                    rows = _hull(found)
                moves += self._fetch(value, rank, rows)
        self.shares.tiles.append(whose)
        self.shares.before.append(moves)
        for value in section.outputs:
            self.own.pop(value, None)
            if whose is None and value in self.shares.held:  # made again, and this time by every rank
                self.shares.held[value] = [(0, value.shape[self.shares.axes[value]])] * self.split.ranks
        if whose is not None:
            for value in section.saves:
                self._made(value, self._bounds(stage, value, whose))

    def close(self, number: int, wanted: Mapping[Value, tuple[int, Bounds | None]]) -> None:
        """Have outputs where they are handed out: each rank its rows, or all."""
        moves = []
        for value, (axis, bounds) in wanted.items():
            n = value.shape[axis] if value.shape else 0
            if value not in self.own and bounds is None:
                continue
            if value not in self.own:
                self.shares.axes[value] = axis
                self.shares.held[value] = [(0, n)] * self.split.ranks
            parts = [(0, n) if bounds is None else (bounds[r], bounds[r + 1]) for r in self.ranks]
            self.shares.parts[value] = parts
            if value in self.own:
                moves += [m for rank in self.ranks for m in self._fetch(value, rank, parts[rank])]
        self.shares.closing[number] = moves

    def _fetch(self, value: Value, rank: int, rows: Interval) -> Iterator[tuple[Value, int, int, Interval]]:
        """What a rank lacks of these rows, by who has made it; it has them from then on."""
        held = self.shares.held[value]
        held[rank] = _hull((held[rank], rows))
        missing = _without(rows, self.at_hand[value][rank])
        bounds = self.own[value]
        for low, high in missing:
            for source in self.ranks:
                part = max(low, bounds[source]), min(high, bounds[source + 1])
                if part[0] < part[1]:
                    yield value, source, rank, part
        self.at_hand[value][rank] = _joined(self.at_hand[value][rank], rows)

    def _made(self, value: Value, bounds: Bounds) -> None:
        """Rows are there, each where it was made."""
        rows = [(bounds[r], bounds[r + 1]) for r in self.ranks]
        self.own[value] = bounds
        axis = self._axis(value)
        assert axis is not None
        self.shares.axes[value] = axis
        self.at_hand[value] = [[r] if r[0] < r[1] else [] for r in rows]
        held = self.shares.held.setdefault(value, [(0, 0)] * self.split.ranks)
        held[:] = [_hull((old, new)) for old, new in zip(held, rows, strict=True)]

    def _strips(self, stage: Stage) -> tuple[int, int]:
        """Pixels of the divided axis where it is widest, and of a tile."""
        for tile_axis, extent, pixels in stage.grid.axes:
            if tile_axis == self.tile_axis:
                return extent, pixels
        return 1, 1

    def _whose(self, stage: Stage) -> Bounds:
        """Places along the divided axis by rank: a tile is whose interval its middle lies in."""
        extent, pixels = self._strips(stage)
        ends, total = self.split.bounds, self.split.bounds[-1]
        middles = [low + min(low + pixels, extent) for low in range(0, extent, pixels)]
        inner = (sum(m * total < 2 * end * extent for m in middles) for end in ends[1:-1])
        return (0, *inner, len(middles))

    def _bounds(self, stage: Stage, value: Value, whose: Bounds) -> Bounds:
        extent, pixels = self._strips(stage)
        assert self.tile_axis is not None
        n = value.shape[self.tile_axes[value].index(self.tile_axis)]
        return tuple(box.scaled(min(at * pixels, extent), n, extent) for at in whose)

    def _axis(self, value: Value) -> int | None:
        """The axis along which a map can be divided."""
        if value in self.shares.given:
            return self.shares.axes[value]
        axes = self.tile_axes[value]
        return axes.index(self.tile_axis) if self.tile_axis is not None and self.tile_axis in axes else None

    def _reads(self, stage: Stage) -> Reads:
        """The rows that the tiles at each place along the divided axis read of every map that is divided."""
        known = _READS.setdefault(stage.section, {})
        if stage.grid not in known:
            known[stage.grid] = self._found(stage)
        return known[stage.grid]

    def _found(self, stage: Stage) -> Reads:
        section = stage.section
        names = [tile_axis for tile_axis, _, _ in stage.grid.axes]
        counts = stage.grid.counts()
        at = names.index(self.tile_axis) if self.tile_axis in names else None
        found: Reads = [{} for _ in range(1 if at is None else counts[at])]
        axes = {v: axis for v in section.loads if (axis := self._axis(v)) is not None}
        if not axes:
            return found
        for k in range(prod(counts)):
            position, rest = [], k
            for n in reversed(counts):
                rest, here = divmod(rest, n)
                position.insert(0, here)
            tile = stage.grid.tile(tuple(position))
            regions = work_of(stage.groups, section.saves, frozenset(section.sums), self.tile_axes, tile)[1]
            rows = found[0 if at is None else position[at]]
            for value, axis in axes.items():
                if value in regions and not box.is_empty(regions[value]):
                    rows[value] = _hull((rows.get(value, (0, 0)), regions[value][axis]))
        return found


def _wanted(graph: Graph, tile_axes: TileAxes, split: Split,
            outputs: Sequence[Value | None]) -> dict[Value, tuple[int, Bounds | None]]:  # fmt: skip
    """Of each output the axis along which ranks hand it out, and where each one's rows begin; None: all of it."""
    tile_axis = split.tile_axis(tile_axes)
    shards = {v: (axis, bounds) for v, axis, bounds in split.inputs}
    lasting = split.lasting(graph)
    found: dict[Value, tuple[int, Bounds | None]] = {}
    for k, value in enumerate(outputs):
        if value is None:
            continue
        axis = tile_axes[value].index(tile_axis) if tile_axis is not None and tile_axis in tile_axes[value] else 0
        here: tuple[int, Bounds | None] = axis, None
        if k in lasting:
            here = shards.get(lasting[k], here)
        elif value in shards:
            here = shards[value]
        elif k < graph.signature.handed_out and tile_axis is not None and tile_axis in tile_axes[value]:
            here = axis, tuple(box.scaled(b, value.shape[axis], split.bounds[-1]) for b in split.bounds)
        if found.setdefault(value, here) != here:
            raise UnsupportedOpError(
                f"{value.name} is handed out in shards and is a gradient or new contents of a tensor, too, which "
                "every rank has in full; return a clone of it"
            )
    return found


def localized(plan: Plan, split: Split, rank: int) -> Plan:
    """A plan with what one rank has of it, and its maps in the shape in which they are held there."""
    share = shares_of(plan.graph, plan.stages, plan.early, plan.tile_axes, split).of(rank)
    slots = {v: replace(slot, shape=share.room.get(v, v.shape)) for v, slot in plan.slots.items()}
    return replace(plan, slots=slots, share=share)


def _hull(intervals: Iterable[Interval]) -> Interval:
    """The smallest interval that holds others; the empty ones add nothing."""
    found = [i for i in intervals if i[0] < i[1]]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else (0, 0)


def _without(rows: Interval, there: Rows) -> Rows:
    found, at = [], rows[0]
    for low, high in sorted(there):
        if min(low, rows[1]) > at:
            found.append((at, min(low, rows[1])))
        at = max(at, high)
    return [*found, (at, rows[1])] if at < rows[1] else found


def _joined(there: Rows, rows: Interval) -> Rows:
    found: Rows = []
    every: Rows = [*there, rows] if rows[0] < rows[1] else there
    for low, high in sorted(every):
        if found and low <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], high)
        else:
            found.append((low, high))
    return found
