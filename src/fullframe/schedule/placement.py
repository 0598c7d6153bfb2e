"""In which memory each stored map lives from one use to the next: in the nearest, or farther away where that one does
not hold them all.

A map is made by one stage and read by others. Between two of these it lies in one memory, and may lie in another one
after the next: the stage that reads it there copies it on its way, tile by tile. So a map that is read at once, and
again much later, is away in between alone. What is read from far away twice in a row is fetched once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from fullframe.ir.graph import Op, Value, walked
from fullframe.partition.sections import Section
from fullframe.partition.tile_axes import TileAxes, tiled
from fullframe.schedule.clones import Draft
from fullframe.schedule.memory import Lifetimes, place
from fullframe.schedule.request import Copied


@dataclass(frozen=True)
class Stay:
    """A stretch of a map's life that it spends in one memory: from the stage that makes or reads it to another one,
    with so many ``reads`` in it, the last of them there. ``number`` counts the stays of a map."""

    value: Value
    number: int
    start: int
    end: int
    reads: int


class Versions:
    """The values, ops and sections in which maps are copied: made once for all drafts of a graph."""

    def __init__(self, copied: Copied | None):
        self.copied = copied
        self.values: dict[tuple[Value, int], Value] = {}
        self.ops: dict[tuple[Op | None, tuple[Value, ...], Value], Op] = {}
        self.sections: dict[tuple[object, ...], Section] = {}

    def of(self, value: Value, number: int, draft: Draft) -> Value:
        """A copy of a map: the one far away has the number 0."""
        if (value, number) not in self.values:
            name = f"{value.name}~{number or ''}"
            self.values[value, number] = Value(name, value.shape, value.dtype, value.itemsize)
        found = self.values[value, number]
        draft.saved.tile_axes[found] = draft.saved.tile_axes[value]
        draft.sizes[found] = draft.sizes[value]
        return found

    def section(self, section: Section, names: Mapping[Value, Value], copies: Mapping[Value, Value]) -> Section:
        """A section that reads maps by other names, and makes copies of some."""
        if not names and not copies:
            return section
        key = section, tuple(names.items()), tuple(copies.items())
        if key not in self.sections:
            ops = [self._op(op, tuple(names.get(v, v) for v in op.inputs)) for op in section.ops]
            new = {old.output: op for old, op in zip(section.ops, ops, strict=True)}
            ops += [self._copy(value, to) for value, to in copies.items()]
            self.sections[key] = replace(
                section, ops=tuple(ops), loads=tuple(names.get(v, v) for v in section.loads),
                saves=(*section.saves, *copies.values()), sums=tuple(new[op.output] for op in section.sums),
            )  # fmt: skip
        return self.sections[key]

    def _op(self, op: Op, inputs: tuple[Value, ...]) -> Op:
        if inputs == op.inputs:
            return op
        return self.ops.setdefault((op, inputs, op.output), replace(op, inputs=inputs))

    def _copy(self, value: Value, to: Value) -> Op:
        assert self.copied is not None
        if (None, (value,), to) not in self.ops:
            self.ops[None, (value,), to] = self.copied(value, to)
        return self.ops[None, (value,), to]


def spill(draft: Draft, maps: Mapping[Value, int], room: int, limit: int,
          versions: Versions) -> tuple[Draft, frozenset[Value]]:  # fmt: skip
    """The draft in which the maps that lie near need no more than ``room`` bytes at once, if that can be, and what
    lies farther away, where ``limit`` bytes have place."""
    stays = _Stays(draft, maps, versions.copied is not None)
    stays.move(room, limit)
    stays.fetch(room)
    moved = stays.placed(limit)
    if not moved:
        return draft, frozenset()
    away = {stay for stay in stays.moved if stay in moved}
    names: list[dict[Value, Value]] = [{} for _ in draft.stages]
    copies: list[dict[Value, Value]] = [{} for _ in draft.stages]
    far: set[Value] = set()
    draft = replace(draft, sizes=dict(draft.sizes))
    for value in {stay.value for stay in away}:
        there: Value | None = None
        here = value
        for stay in stays.of[value]:
            if stay not in away:
                if stay.number and stays.of[value][stay.number - 1] in away:
                    assert there is not None
                    here = versions.of(value, stay.number, draft)
                    copies[stay.start][there] = here
            elif there is None:
                there = value if stay.number == 0 else versions.of(value, 0, draft)
                far.add(there)
                if stay.number:
                    copies[stay.start][here] = there
            now = here if stay not in away else there
            assert now is not None
            if now is not value:
                for t in stays.readers(stay):
                    names[t][value] = now
    stages = [versions.section(*each) for each in zip(draft.stages, names, copies, strict=True)]
    return replace(draft, stages=stages), frozenset(far)


class _Stays:
    """The stays of all maps, which of them are moved, in order, and the bytes that lie near and far in each stage."""

    def __init__(self, draft: Draft, maps: Mapping[Value, int], turns: bool):
        self.maps, count = maps, len(draft.stages)
        lives = draft.lifetimes()
        uses = {v: [at] for v, at in lives.first.items() if maps.get(v)}
        for t, section in enumerate(draft.stages):
            for v in section.loads:
                if v in uses:
                    uses[v].append(t)
        self.uses = uses
        able = [_axes_of(section, draft.saved.tile_axes) if turns else None for section in draft.stages]
        self.of = {v: _cut(v, at, able, draft.saved.tile_axes, lives.last[v]) for v, at in uses.items()}
        self.near, self.far = lives.usage(count, dict(maps)), [0] * count
        self.moved: dict[Stay, None] = {}
        self.at: list[list[Stay]] = [[] for _ in range(count)]
        for stays in self.of.values():
            for stay in stays:
                for t in range(stay.start, stay.end + 1):
                    self.at[t].append(stay)

    def readers(self, stay: Stay) -> list[int]:
        """The stages that read a map as it lies in a stay."""
        return [t for t in self.uses[stay.value][1:] if stay.start < t <= stay.end]

    def _span(self, stay: Stay) -> range:
        """The stages in which a map need not lie near for a stay's sake alone."""
        stays = self.of[stay.value]
        before = stay.number and stays[stay.number - 1] not in self.moved
        after = stay.number + 1 < len(stays) and stays[stay.number + 1] not in self.moved
        return range(stay.start + bool(before), stay.end + 1 - bool(after))

    def _there(self, value: Value, also: Stay | None = None, without: Stay | None = None) -> range:
        """The stages in which a map lies far away: from the first of the stays there to the last."""
        found = [s for s in self.of[value] if (s in self.moved or s == also) and s != without]
        return range(found[0].start, found[-1].end + 1) if found else range(0)

    def move(self, room: int, limit: int) -> None:
        """Move stays until the bytes near keep to the room: each time, at the peak, the one that takes least to be
        written and read for the stages that it helps."""
        rejected: set[Stay] = set()
        while self.near and max(self.near) > room:
            peak = max(range(len(self.near)), key=self.near.__getitem__)
            over = [0, *accumulate(n > room for n in self.near)]
            best: tuple[float, int, Stay] | None = None
            for order, stay in enumerate(self.at[peak]):
                if stay in self.moved or stay in rejected:
                    continue
                span = self._span(stay)
                if peak not in span:
                    continue
                written = not self._there(stay.value)
                price = (stay.reads + written) / (over[span.stop] - over[span.start])
                if best is None or (price, order) < best[:2]:
                    best = price, order, stay
            if best is None:
                return
            stay = best[2]
            size, old = self.maps[stay.value], self._there(stay.value)
            more = [t for t in self._there(stay.value, also=stay) if t not in old]
            if any(self.far[t] + size > limit for t in more):
                rejected.add(stay)
                continue
            for t in self._span(stay):
                self.near[t] -= size
            for t in more:
                self.far[t] += size
            self.moved[stay] = None

    def fetch(self, room: int) -> None:
        """Have those near again for which there is room after all."""
        for stay in reversed(list(self.moved)):
            size, span = self.maps[stay.value], self._span(stay)
            if any(self.near[t] + size > room for t in span):
                continue
            left = self._there(stay.value, without=stay)
            for t in self._there(stay.value):
                self.far[t] -= 0 if t in left else size
            del self.moved[stay]
            for t in span:
                self.near[t] += size

    def placed(self, limit: int) -> frozenset[Stay]:
        """The stays that are moved, or the first of them, as many as have place in so many bytes: there are gaps
        between maps."""
        moved = list(self.moved)

        def fits(count: int) -> bool:
            some = moved[:count]
            first: dict[Value, int] = {}
            last: dict[Value, int] = {}
            for stay in some:
                first[stay.value] = min(stay.start, first.get(stay.value, stay.start))
                last[stay.value] = max(stay.end, last.get(stay.value, stay.end))
            return place(Lifetimes(first, last), {v: self.maps[v] for v in first})[1] <= limit

        least, most = 0, len(moved) + 1  # so many fit, so many do not
        if fits(len(moved)):
            least = len(moved)
        while most - least > 1 and least < len(moved):
            middle = (least + most) // 2
            least, most = (middle, most) if fits(middle) else (least, middle)
        return frozenset(moved[:least])


def _axes_of(section: Section, tile_axes: TileAxes) -> frozenset[int] | None:
    """The tile axes that a section is cut along; None where it takes or makes whole maps."""
    if any(op.rule.kind == "whole" and tiled(op.output, tile_axes) for op in section.ops):
        return None
    through = [v for v in (*section.saves, *(walked(op) for op in section.sums)) if tiled(v, tile_axes)]
    root = max(through, key=lambda v: v.nbytes, default=None)
    return None if root is None else _tiled_along(root, tile_axes)


def _tiled_along(value: Value, tile_axes: TileAxes) -> frozenset[int]:
    return frozenset(a for a in tile_axes[value] if a is not None)


def _cut(value: Value, uses: Sequence[int], able: Sequence[Iterable[int] | None], tile_axes: TileAxes,
         last: int) -> list[Stay]:  # fmt: skip
    """The stays of a map: from each stage that could copy it to the next."""
    axes = _tiled_along(value, tile_axes)
    turns = [uses[0], *(t for t in uses[1:] if able[t] == axes and t < last), last]
    return [Stay(value, k, a, b, sum(a < t <= b for t in uses[1:])) for k, (a, b) in enumerate(pairwise(turns))]
