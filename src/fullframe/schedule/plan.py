"""The plan: what runs in which order and tiles, what is stored where and how long. Only data."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod
from typing import NamedTuple

from fullframe.ir import region as box
from fullframe.ir.graph import Graph, Value
from fullframe.ir.region import Region
from fullframe.partition.fusion import FusionGroup, Work, work_of
from fullframe.partition.sections import Section
from fullframe.partition.tile_axes import Span, Tile, TileAxes, own_region, tiled
from fullframe.schedule import saved_plan
from fullframe.schedule.request import LARGE
from fullframe.schedule.saved_plan import Limits
from fullframe.schedule.split import Share
from fullframe.storage.protocol import BANDS, DEVICE, DISK, HOST, Slot, band_of


@dataclass(frozen=True)
class Grid:
    """Cuts tile axes into tiles: (tile axis, pixels where the tile axis is widest, pixels of a tile) each."""

    axes: tuple[tuple[int, int, int], ...] = ()

    def counts(self) -> list[int]:
        return [-(-extent // pixels) for _, extent, pixels in self.axes]

    def __len__(self) -> int:
        n = 1
        for c in self.counts():
            n *= c
        return n

    def tile(self, position: tuple[int, ...]) -> Tile:
        return {
            tile_axis: Span(k * pixels, min((k + 1) * pixels, extent), extent)
            for (tile_axis, extent, pixels), k in zip(self.axes, position, strict=True)
        }

    def tiles(self) -> Iterator[Tile]:
        """All tiles, the last axis fastest."""
        return (self.tile(p) for p in product(*(range(n) for n in self.counts())))

    def corners(self) -> Iterator[Tile]:
        """The first tile, one from the middle, and the last: where there is much halo, what a tile takes at most."""
        counts = self.counts()
        ends = dict.fromkeys((tuple((n - 1) // 2 for n in counts), (0,) * len(counts), tuple(n - 1 for n in counts)))
        return (self.tile(p) for p in ends)

    def samples(self) -> Iterator[Tile]:
        """One tile of each class: first, second and last along every axis."""
        return (tile for tile, _ in self.classes())

    def classes(self) -> Iterator[tuple[Tile, int]]:
        """One tile of each class, and how many tiles there are of it."""
        counts = self.counts()
        choices = [sorted({0, min(1, n - 1), n - 1}) for n in counts]
        for position in product(*choices):
            inner = (n - 2 for n, k in zip(counts, position, strict=True) if n > 2 and k == 1)
            yield self.tile(position), prod(inner)


@dataclass(frozen=True, eq=False)
class Stage:
    """One section with its tiles, and the stored values that are not needed after it. ``window``: bytes of windows of
    a tile; ``sums``: bytes of sums in progress; ``reversed``: whether the last tile is made first; ``kinds``: how
    many of its tiles are unlike each other, about, so that each has a task of its own; ``tables``: bytes of the
    numbers that its ops keep for them, each kept once in a plan."""

    section: Section
    groups: tuple[FusionGroup, ...]
    grid: Grid
    frees: tuple[Value, ...]
    window: int
    sums: int
    parallel: bool
    reversed: bool = False
    kinds: int = 1
    tables: Mapping[Hashable, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Bytes:
    """Projected bytes: the arena of stored maps, untiled values at their peak, the windows of the
    tiles in work and sums in progress (``scratch``, with what the C library keeps of them), outputs handed to the
    caller, and ``fixed``, an estimate of what the recording, the plan, its tiles' tasks and the libraries take.
    ``host`` is the arena where the maps
    live in the host's memory and not on the device, ``disk`` that of the maps on a disk: they are not part of the
    total. ``spare`` is for what is read ahead and written behind there, ``exchanged`` for what ranks send each other
    at once."""

    arena: int
    untiled: int
    scratch: int
    outputs: int
    fixed: int
    host: int = 0
    disk: int = 0
    spare: int = 0
    exchanged: int = 0

    @property
    def stores(self) -> dict[str, int]:
        """Bytes of each memory in which maps live, by its name."""
        return {DEVICE: self.arena, HOST: self.host, DISK: self.disk}

    @property
    def total(self) -> int:
        """All that count against the budget."""
        return self.arena + self.untiled + self.scratch + self.outputs + self.fixed + self.spare + self.exchanged


class Traffic(NamedTuple):
    """Bytes of maps that a step fetches from a store, and bytes that it puts there."""

    read: int
    written: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Immutable; printable. ``stages[:early]`` make the outputs that are handed out first; of ``max_in_flight``
    stages in a row any may be in work at the same time, if they need not wait for each other; one that makes more
    than ``alone`` bytes of untiled values waits for all before it, and is made op by op. ``tight``: the C library is
    told to give back what is free, since the budget has no room for all that it would keep; ``keeps``: bytes that it
    is let keep for each thread, if it has room for more. ``fastest``: operations of expensive ops in the plan that
    makes nothing again. ``share``: what one of several ranks has of it; then the bytes are those of the rank that
    takes most. ``external`` are the inputs and outputs that live in objects of the caller's. ``timed`` says
    how long a step will take."""

    graph: Graph
    tile_axes: TileAxes
    stages: tuple[Stage, ...]
    early: int
    slots: dict[Value, Slot]
    bytes: Bytes
    budget: int
    workers: int
    whole: tuple[str, ...] = ()
    max_in_flight: int = 1
    alone: int = LARGE
    tight: bool = False
    keeps: int = 0
    fastest: float = 0.0
    share: Share | None = None
    external: frozenset[Value] = frozenset()
    limits: Limits | None = None
    timed: Callable[[Plan], float] | None = None

    def timed_by(self, timed: Callable[[Plan], float]) -> Plan:
        """The same plan, which from now on says how long a step will take: nothing else of it may be changed."""
        object.__setattr__(self, "timed", timed)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write down what the plan was made from and what came of it, for ``fullframe.tile(..., plan=path)``.

        A training that goes on elsewhere, or beside other work, then has the same plan, and so the same bits. The
        file is JSON, and is written whole or not at all. Raises OSError where it cannot be written.
        """
        saved_plan.save(self, path)

    @cached_property
    def offloaded(self) -> Collection[Value]:
        """The maps that live in another memory than the device's, or with the caller."""
        return self.external.union(v for v, slot in self.slots.items() if slot.tier != DEVICE)

    @cached_property
    def disk_traffic(self) -> Traffic:
        """What a step reads from the disk and writes to it."""
        return traffic(self, {v for v, slot in self.slots.items() if slot.tier == DISK})

    @property
    def predicted_seconds(self) -> float | None:
        """How long a step will take on this machine, once it has been recorded and compiled: by measurements of ops
        in the plan's shapes, each made once in a process, and by the disk's speed. None where it is not known: on
        other devices than the processor, and on several ranks."""
        return None if self.timed is None else self.timed(self)

    @property
    def projected_bytes(self) -> int:
        """Bytes the step adds beyond inputs, parameters and gradients, by arithmetic."""
        return self.bytes.total

    def __str__(self) -> str:
        return describe(self)


def human(nbytes: float) -> str:
    """Bytes in decimal units, as budgets are given."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def seconds(count: float | None) -> str:
    """A time with two digits or more."""
    return "-" if count is None else f"{count:.0f} s" if count >= 10 else f"{count:.2g} s"


def describe(plan: Plan) -> str:
    """The whole plan as text: totals, then each section with what it loads, saves and sums.

    ``tiles 40x2 of 32x1024``: so many along each axis that is cut, of so many pixels.
    """
    b = plan.bytes
    tiled_stages = [s for s in plan.stages if _is_tiled(plan, s)]
    saved = [v for s in plan.stages for v in s.section.saves if tiled(v, plan.tile_axes)]
    barriers = [op for s in plan.stages for op in s.section.sums]
    clones = sum(s.section.clone for s in plan.stages)
    again = sum(s.section.recompute for s in plan.stages)
    rest = len(plan.stages) - len(tiled_stages)
    lines = [
        f"plan: {len(plan.graph.ops)} ops in {len(tiled_stages)} tiled sections and {rest} untiled",
        f"  saved {len(saved)} (of them recomputed {clones}), sums {len(barriers)}, workers {plan.workers}",
        f"  projected {human(b.total)} of a budget of {human(plan.budget)}: stored maps {human(b.arena)}, "
        f"untiled {human(b.untiled)}, windows {human(b.scratch)}, outputs {human(b.outputs)}, fixed {human(b.fixed)}",
    ]
    predicted = plan.predicted_seconds
    lines += [f"  predicted {seconds(predicted)} a step"] * (predicted is not None)
    if again:
        more = arithmetic(plan) / max(1.0, plan.fastest)
        lines.append(f"  expensive ops made again {again}, arithmetic {more:.2f} times that of the fastest plan")
    lines += [f"  stored maps {human(b.host)} in the host's memory, copied tile by tile"] * bool(b.host)
    if b.disk:
        read, written = plan.disk_traffic
        lines.append(
            f"  stored maps {human(b.disk)} on disk; a step reads {human(read)} there and writes {human(written)}, "
            f"{human(b.spare)} of the budget ahead and behind"
        )
    lines += [f"  {ranks(plan.share)}"] * (plan.share is not None)
    lines += _external(plan)
    lines += [f"  runs whole: {name}" for name in plan.whole]
    for k, stage in enumerate(plan.stages):
        if k == plan.early and k > 0:
            lines.append("  -- outputs are ready; gradients arrive --")
        if _is_tiled(plan, stage):
            lines.append(_line(plan, k, stage))
    return "\n".join(lines)


def ranks(share: Share | None) -> str:
    """In words, what a rank has of a plan and what moves."""
    if share is None:
        return "one process"
    bounds, name = share.split.bounds, share.split.name
    whole = sum(tiles is None for tiles in share.tiles)
    return (
        f"rank {share.rank} of {share.ranks}, {bounds[share.rank]} to {bounds[share.rank + 1]} of {bounds[-1]} along "
        f"the {name}; {human(share.received)} of rows come from others in {len(share.exchanges)} exchanges, and each "
        f"rank makes all of {whole} stages"
    )


def runs_whole(stages: Sequence[Stage], tile_axes: TileAxes, external: Collection[Value]) -> tuple[str, ...]:
    """The ops, with their modules, that are not cut into tiles though what they make is, or for which all of a large
    input is there at once that others read by regions."""
    found = []
    for stage in stages:
        section = stage.section
        read = len(stage.grid) == 1 and any(v in external and v.nbytes > LARGE for v in section.loads)
        for op in section.ops:
            cut, kind = tiled(op.output, tile_axes), op.rule.kind
            if (cut and kind == "whole") or (read and not cut and kind not in ("layout", "reduce")):
                found.append(f"{op.target} ({op.path or 'in the step'})")
    return tuple(found)


def _external(plan: Plan) -> Iterator[str]:
    """What is read from objects of the caller's, and what is written there."""
    for value in plan.graph.inputs:
        if value in plan.external:
            read = traffic(plan, (value,)).read
            yield f"  {value!r} is read by regions: {human(read)} a step, {read / value.nbytes:.2f} times its size"
    for value in plan.graph.outputs:
        if value is not None and value in plan.external and value not in plan.graph.inputs:
            yield f"  {value!r} is written by regions: {human(value.nbytes)}"


def _is_tiled(plan: Plan, stage: Stage) -> bool:
    s = stage.section
    return bool(s.sums) or any(tiled(v, plan.tile_axes) for v in s.saves)


def _line(plan: Plan, k: int, stage: Stage) -> str:
    s = stage.section
    loads = " ".join(v.name for v in s.loads if tiled(v, plan.tile_axes)) or "-"
    saves = " ".join(f"{v.name}{list(v.shape)}" for v in s.saves) or "-"
    sums = " ".join(f"{op.output.name}" for op in s.sums) or "-"
    mark = "again " if s.clone else f"again {s.recompute} " if s.recompute else ""
    tiles = "x".join(map(str, stage.grid.counts())) or "1"
    tiles += f" of {'x'.join(str(pixels) for _, _, pixels in stage.grid.axes)}" * bool(stage.grid.axes)
    frees = " ".join(v.name for v in stage.frees if tiled(v, plan.tile_axes)) or "-"
    work = f"{len(s.ops)} ops, tiles {tiles}, halo {halo(plan, stage):.0%}"
    return f"  {k:4d} {mark}load {loads} | {work} | save {saves} | sum {sums} | free {frees}"


def halo(plan: Plan, stage: Stage) -> float:
    """Elements made more than once for the halo, relative to those needed once (interior tile)."""
    tiles = list(stage.grid.samples())
    tile = tiles[len(tiles) // 2]
    made = owned = 0
    section = stage.section
    for work in work_of(stage.groups, section.saves, frozenset(section.sums), plan.tile_axes, tile)[0]:
        for op in work.group.ops:
            if op.rule.heavy:
                made += box.size(work.region)
                owned += prod(op.output.shape) / len(stage.grid)
    return max(0.0, made / owned - 1) if owned else 0.0


def arithmetic(plan: Plan) -> float:
    """Operations of expensive ops, halo included, as if all tiles were like one from the middle."""
    return sum((operations(middle_works(plan, stage)) * len(stage.grid) for stage in plan.stages), 0.0)


POINTWISE = 50  # operations of a convolution that are made in the time of one elsewhere, where memory is the limit
CALL = 400_000  # and while an op or a fused group is called


def stage_cost(plan: Plan, stage: Stage) -> float:
    """Operations of a stage, halo included; cheap ops and calls count as much as the time that they take, about."""
    return tile_cost(middle_works(plan, stage)) * len(stage.grid)


def tile_cost(works: Sequence[Work]) -> float:
    """Operations of a tile, and what its cheap ops and its calls take, counted in operations."""
    cheap = sum(box.size(w.region) * (not op.rule.heavy) for w in works for op in (*w.group.ops, *w.group.sums))
    return operations(works) + POINTWISE * cheap + CALL * len(works)


def middle_works(plan: Plan, stage: Stage) -> Sequence[Work]:
    """What a tile from the middle does."""
    return _middle(plan, stage)[0]


def _middle(plan: Plan, stage: Stage) -> tuple[Sequence[Work], Mapping[Value, Region]]:
    """What a tile from the middle does, and the regions that it reads."""
    section = stage.section
    return work_of(stage.groups, section.saves, frozenset(section.sums), plan.tile_axes, _middle_tile(stage))


def _middle_tile(stage: Stage) -> Tile:
    return stage.grid.tile(tuple((n - 1) // 2 for n in stage.grid.counts()))


def operations(works: Sequence[Work]) -> float:
    """Operations of the expensive ops of a tile."""
    total = 0.0
    for work in works:
        for op in (*work.group.ops, *work.group.sums):
            if op.rule.heavy:
                total += op.rule.cost(op, box.size(work.region))
    return total


def traffic(plan: Plan, there: Collection[Value]) -> Traffic:
    """What goes to these maps and comes from there in a step, halo included."""
    read = written = 0
    for stage in plan.stages:
        section = stage.section
        written += sum(v.nbytes for v in section.outputs if v in there)
        loads = [v for v in section.loads if v in there]
        for tile, count in stage.grid.classes() if loads else ():
            regions = work_of(stage.groups, section.saves, frozenset(section.sums), plan.tile_axes, tile)[1]
            read += count * sum(box.size(regions[v]) * v.itemsize for v in loads if v in regions)
    return Traffic(read, written)


def banded(plan: Plan, there: Collection[Value]) -> int:
    """Bytes of the bands that a stage keeps at most, of maps on a disk that it cuts along both axes."""
    most = 0
    for stage in plan.stages:
        moved = [v for v in (*stage.section.loads, *stage.section.saves) if v in there]
        if moved:
            read, tile = _middle(plan, stage)[1], _middle_tile(stage)
            parts = {v: own_region(v, plan.tile_axes, tile) for v in stage.section.saves}
            parts |= {v: read[v] for v in stage.section.loads if v in read}
            bands = ((v, band_of(v.shape, parts[v], v.itemsize)) for v in moved if v in parts)
            most = max(most, sum(BANDS * box.size(band) * v.itemsize for v, band in bands if band))
    return most


EDGE = 4  # tiles at each end of an axis of the grid that may be unlike those between them
UNLIKE = 5  # tiles along such an axis that are unlike each other, about


def whole_axes(section: Section, tile_axes: TileAxes, grid: Grid) -> list[bool]:
    """Along which axes of the grid the tiles of a section begin at whole pixels of every map.

    Elsewhere the parts of a small map are now empty, now a pixel, and all tiles may be unlike each other.
    """
    maps = {*section.loads, *section.outputs, *(v for op in section.ops for v in (op.output, *op.inputs))}
    sizes = {(a, n) for v in maps for a, n in zip(tile_axes.get(v, ()), v.shape, strict=False) if a is not None}
    return [all(pixels * n % extent == 0 for a, n in sizes if a == axis) for axis, extent, pixels in grid.axes]


def kinds_of(section: Section, groups: Sequence[FusionGroup], tile_axes: TileAxes, grid: Grid) -> int:
    """How many of a stage's tiles are unlike each other, about: all, where what an op does depends on the place of
    its tile, as that of one that draws random numbers does."""
    counts = grid.counts()
    middle = tuple(n // 2 for n in counts)
    nexts = [(*middle[:a], k + 1, *middle[a + 1 :]) for a, k in enumerate(middle) if k + 2 < counts[a]]

    def positions(at: tuple[int, ...]) -> list[Hashable]:
        works = work_of(groups, section.saves, frozenset(section.sums), tile_axes, grid.tile(at))[0]
        return [op.rule.position(op, w.region) for w in works for op in (*w.group.ops, *w.group.sums)]

    here = positions(middle) if nexts else []
    if any(positions(at) != here for at in nexts):
        return len(grid)
    whole = whole_axes(section, tile_axes, grid)
    return prod(min(n, UNLIKE) if along else n for n, along in zip(counts, whole, strict=True))


def tables_of(
    section: Section, groups: Sequence[FusionGroup], tile_axes: TileAxes, grid: Grid
) -> Mapping[Hashable, int]:
    """Bytes of each table that the ops of a stage keep, as if all tiles were like one from the middle."""
    counts = grid.counts()
    tile = grid.tile(tuple((n - 1) // 2 for n in counts))
    pieces = {tile_axis: n for (tile_axis, _, _), n in zip(grid.axes, counts, strict=True)}
    found: dict[Hashable, int] = {}
    for work in work_of(groups, section.saves, frozenset(section.sums), tile_axes, tile)[0]:
        for op in work.group.ops:
            cut = [1 if axis is None else pieces.get(axis, 1) for axis in tile_axes[op.output]]
            found |= op.rule.kept(op, work.region, cut)
    return found


KEPT = 1 << 14  # tiles of a plan that are scheduled outside of Python in any case, and tasks that are kept;
NBYTES = 2 << 10  # bytes of each such tile,
JOB = 2 << 10  # of each job of a task, with its bytecode,
TASK = 16 << 10  # and of a task, about


def bookkeeping(stages: Sequence[Stage]) -> int:
    """Bytes of the tasks and the bytecode of a plan, of what is scheduled, and of tables."""
    tasks, kinds = 0, 0
    tables: dict[Hashable, int] = {}  # stages share them
    for stage in stages:
        tables |= stage.tables
        kept = min(stage.kinds, KEPT - kinds)
        kinds += kept
        tasks += kept * (1 + len(stage.groups)) * JOB
    return tasks + NBYTES * min(KEPT, sum(len(s.grid) for s in stages)) + sum(tables.values())
