"""Tasks: what is to be done on one tile, with every region turned into slices.

A task follows from the plan and never changes, so it can be kept: the arithmetic of footprints is not repeated at
every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

import torch

from fullframe.ir import region as box
from fullframe.ir.graph import Op, Value, reduces, reduction_of, walked
from fullframe.ir.region import Region
from fullframe.partition.fusion import FusionGroup, Work, work_of
from fullframe.partition.tile_axes import Tile, own_region, tiled
from fullframe.schedule.plan import KEPT, NBYTES, TASK, Plan, Stage

if TYPE_CHECKING:
    from fullframe.runtime.fused import BoundKernel

Part = tuple[slice, ...] | None  # of a tensor; None is all of it


@dataclass(frozen=True, eq=False, slots=True)
class Read:
    """What an op or a kernel takes: a part of a window or of a stored map; ``empty`` gives the shape of nothing."""

    value: Value
    window: bool
    part: Part
    empty: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Target:
    """Where a kernel writes a value: a part of its stored map, or (``shape``) a new window; ``keep`` it as one."""

    value: Value
    part: Part
    shape: tuple[int, ...] | None
    keep: bool


@dataclass(frozen=True, eq=False, slots=True)
class Store:
    """A part of a window that is the tile's own region of a map; an untiled value, without one, is kept as it is."""

    value: Value
    region: Region | None
    to: Part
    made: Part


@dataclass(frozen=True, eq=False, slots=True)
class Sum:
    """A partial result: its region of the output, None for all of it, and its shape. Not counted on tiles that
    another one stands for."""

    op: Op
    region: Region | None
    shape: tuple[int, ...]
    counted: bool


@dataclass(eq=False, slots=True)
class Job:
    """One group on a tile; ``frees`` are the windows that nothing reads afterwards, ``bound`` is kept here
    by who runs it."""

    group: FusionGroup
    region: Region
    reads: tuple[Read, ...]
    targets: tuple[Target, ...]
    stores: tuple[Store, ...]
    sums: tuple[Sum, ...]
    frees: tuple[Value, ...]
    bound: BoundKernel | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Fetch:
    """A region of an offloaded map, to be a window of the tile."""

    value: Value
    region: Region


@dataclass(frozen=True, eq=False, slots=True)
class Task:
    """The jobs of a tile, in runnable order, and what is to be fetched first."""

    fetches: tuple[Fetch, ...]
    jobs: tuple[Job, ...]


def room_of(plan: Plan) -> tuple[int, int]:
    """How many tiles are scheduled outside of Python, and how many tasks are kept: more than were counted where the
    plan leaves memory of its budget."""
    spare = max(0, plan.budget - plan.projected_bytes)
    kinds = min(KEPT, sum(stage.kinds for stage in plan.stages))
    return KEPT + spare // (2 * NBYTES), kinds + spare // (2 * TASK)


def place_of(stage: Stage, k: int) -> int:
    """Which tile of the image is the ``k``-th that a stage makes, the last axis fastest."""
    return len(stage.grid) - 1 - k if stage.reversed else k


def tiles_of(plan: Plan, number: int) -> Sequence[int]:
    """The turns of a stage at which this process makes a tile: all, but for one of several ranks."""
    stage = plan.stages[number]
    mine = None if plan.share is None else plan.share.tiles[number]
    if mine is None:
        return range(len(stage.grid))
    assert plan.share is not None
    tile_axis = plan.share.split.tile_axis(plan.tile_axes)
    counts = stage.grid.counts()
    names = [name for name, _, _ in stage.grid.axes]
    at = names.index(tile_axis) if tile_axis in names else len(names)
    inner = prod(counts[at + 1 :])
    count = counts[at] if at < len(names) else 1
    return [k for k in range(len(stage.grid)) if mine[0] <= place_of(stage, k) // inner % count < mine[1]]


def position_of(stage: Stage, k: int) -> tuple[int, ...]:
    """Where in the grid the tile is that a stage makes at a turn."""
    k = place_of(stage, k)
    position: list[int] = []
    for n in reversed(stage.grid.counts()):
        k, at = divmod(k, n)
        position.insert(0, at)
    return tuple(position)


def task_of(plan: Plan, stage: Stage, tile: Tile) -> Task:
    """What is to be done on a tile."""
    section, tile_axes = stage.section, plan.tile_axes
    works, regions = work_of(stage.groups, section.saves, frozenset(section.sums), tile_axes, tile)
    last = {value: k for k, work in enumerate(works) for value in work.group.reads}
    offloaded = plan.offloaded
    fetched = [v for v in section.loads if v in offloaded and v in last and not box.is_empty(regions[v])]
    made: set[Value] = {*fetched}
    jobs = []
    for k, work in enumerate(works):
        reads = tuple(_read(plan, v, r, regions, made) for v, r in zip(work.group.reads, work.reads, strict=True))
        form = _fused if work.group.fused else _single
        targets, stores, sums = form(plan, stage, work, tile)
        made |= {*work.group.makes}
        frees = tuple(
            v for v in dict.fromkeys((*work.group.reads, *work.group.makes)) if v in made and last.get(v, k) == k
        )
        made -= {*frees}
        jobs.append(Job(work.group, work.region, reads, targets, stores, sums, frees))
    return Task(tuple(Fetch(v, regions[v]) for v in fetched), tuple(jobs))


def _read(plan: Plan, value: Value, read: Region, regions: dict[Value, Region], made: set[Value]) -> Read:
    if box.is_empty(read):  # along one axis; what was made for this tile need not hold it along the others
        return Read(value, False, None, box.shape_of(read))
    if value in made:
        return Read(value, True, None if read == regions[value] else _slices(read, regions[value]))
    return Read(value, False, part_in(plan, value, read))


def part_in(plan: Plan, value: Value, region: Region) -> Part:
    """Where a region of a map lies in the tensor that this process has of it."""
    held = plan.share and plan.share.held.get(value)
    if held:
        return None if region == held else _slices(region, held)
    return None if region == box.full(value.shape) else _slices(region)


@lru_cache(maxsize=4096)
def _slices(region: Region, origin: Region | None = None) -> tuple[slice, ...]:
    return box.slices(region, origin)


def _stores(plan: Plan, values: Iterable[Value], tile: Tile, made: Region) -> Iterator[Store]:
    """Where each value's own part of the tile goes; an empty part, which may lie outside what is made, nowhere."""
    for value in values:
        own = own_region(value, plan.tile_axes, tile)
        if not tiled(value, plan.tile_axes):
            yield Store(value, None, None, None)
        elif not box.is_empty(own):
            yield Store(value, own, part_in(plan, value, own), None if own == made else _slices(own, made))


def _sum(plan: Plan, op: Op, region: Region, tile: Tile) -> Sum:
    """Tiles that differ only in tile axes a driver lacks share its region: the first counts it."""
    tile_axes = plan.tile_axes[walked(op)]
    counted = all(span.low == 0 or tile_axis in tile_axes for tile_axis, span in tile.items())
    out = reduction_of(op).out_region(op, region)
    whole = out == box.full(op.output.shape)
    return Sum(op, None if whole else out, box.shape_of(out), counted)


Form = tuple[tuple[Target, ...], tuple[Store, ...], tuple[Sum, ...]]


def _fused(plan: Plan, stage: Stage, work: Work, tile: Tile) -> Form:
    group, shape = work.group, box.shape_of(work.region)
    targets = []
    offloaded = plan.offloaded
    for value in dict.fromkeys((*group.saves, *group.makes)):
        stored = group.own and value in group.saves and value not in offloaded
        part = part_in(plan, value, work.region) if stored else None
        targets.append(Target(value, part, None if stored else shape, value in group.makes))
    # The halo is another tile's to store.
    later = [v for v in group.saves if not group.own or v in offloaded]
    stores = tuple(_stores(plan, later, tile, work.region))
    return tuple(targets), stores, tuple(_sum(plan, op, work.region, tile) for op in group.sums)


def _single(plan: Plan, stage: Stage, work: Work, tile: Tile) -> Form:
    group = work.group
    (op,) = group.ops or group.sums
    if op in stage.section.sums:
        return (), (), (_sum(plan, op, work.region, tile),)
    made = op.rule.out_region(op, work.region) if reduces(op.rule) else work.region
    return (), tuple(_stores(plan, group.saves, tile, made)), ()


Partials = list[tuple[Sum, torch.Tensor]]
