"""Tiles of a stage: made in Python the first time, while one of each class is recorded, and from its bytecode from
then on."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from fullframe.bytecode.program import Bytecode
from fullframe.bytecode.recorder import Recorder
from fullframe.capture.threads import ForkSafeLock
from fullframe.errors import fall_back
from fullframe.ir import region as box
from fullframe.ir.graph import Value
from fullframe.ir.region import Region
from fullframe.ops.numerics.table_cache import held
from fullframe.runtime.task_run import Memory, part_of, run_task
from fullframe.runtime.tasks import Partials, Sum, Task, position_of, task_of
from fullframe.runtime.tile_classes import (
    Draw,
    Likeness,
    Position,
    Steps,
    accesses,
    arrays_of,
    begins,
    follows,
    outline,
    puts_of,
    span,
)
from fullframe.schedule.plan import Plan, Stage, whole_axes
from fullframe.storage.arena import empty_map

TRIES = 2  # What a library does once only, when it is first called, may keep the first recording from being used.


class Base(NamedTuple):
    """An array that bytecode is given: so many bytes behind the first of a value that lies with these strides, and so
    many further from tile to tile along each axis of the grid."""

    value: Value
    stride: tuple[int, ...]
    offset: int
    steps: tuple[int, ...]

    def at(self, shift: Sequence[int]) -> int:
        """Bytes behind the value's first, so many tiles on."""
        return self.offset + sum(n * step for n, step in zip(shift, self.steps, strict=True))


class Away(NamedTuple):
    """A region that is fetched, or put away from the device, and how it lies in memory."""

    value: Value
    region: Region
    stride: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]

    def at(self, shift: Sequence[int]) -> Region:
        """The region so many tiles on."""
        far = [sum(n * step[a] for n, step in zip(shift, self.steps, strict=True)) for a in range(len(self.region))]
        return tuple((low + n, high + n) for (low, high), n in zip(self.region, far, strict=True))


class Recorded(NamedTuple):
    """The bytecode of a class of tiles: its arrays, what is fetched before and put afterwards, and what its results
    are, partial results of sums and untiled values."""

    bytecode: Bytecode
    bases: tuple[Base, ...]
    fetches: tuple[Away, ...]
    puts: tuple[Away, ...]
    places: tuple[Sum | Value, ...]

    def run(self, memory: Memory, shift: Sequence[int]) -> Partials | None:
        """The partial results of the tile that is so many tiles on from the recorded one, with the untiled values put
        among the values; None where a tensor lies otherwise in memory than when it was recorded."""
        values = memory.values
        if any(values[base.value].stride() != base.stride for base in self.bases):
            return None
        addresses = [values[base.value].data_ptr() + base.at(shift) for base in self.bases]
        fetched = [memory.offloaded[f.value].fetch(f.at(shift)) for f in self.fetches]
        if any(t.stride() != f.stride for t, f in zip(fetched, self.fetches, strict=True)):
            return None
        puts = [empty_map(box.shape_of(p.region), p.value.dtype, memory.device) for p in self.puts]
        made = self.bytecode.run([*addresses, *(t.data_ptr() for t in (*fetched, *puts))])
        if made is None:
            return None
        for put, tensor in zip(self.puts, puts, strict=True):
            memory.offloaded[put.value].put(put.at(shift), tensor)
        partials = self.hand_out(made, values)
        if len(made) > 1:
            values.update((v, values[v].clone()) for v in self.places if isinstance(v, Value))
        return partials

    def hand_out(self, made: Sequence[torch.Tensor], values: MutableMapping[Value, torch.Tensor]) -> Partials:
        """Results: the untiled values among the others, the partial results returned."""
        partials: Partials = []
        for place, tensor in zip(self.places, made, strict=True):
            if isinstance(place, Sum):
                partials.append((place, tensor))
            else:
                values[place] = tensor
        return partials


class TileClass:
    """Tiles that are alike: the task of one, at its ``origin``, and its bytecode once it has been recorded."""

    __slots__ = ("origin", "recorded", "steps", "task", "tries")

    def __init__(self, task: Task, origin: Position, steps: Steps | None, tries: int):
        self.task, self.origin, self.steps, self.tries = task, origin, steps, tries
        self.recorded: Recorded | None = None

    @property
    def settled(self) -> bool:
        """Whether it is known in which way its tiles will be made from now on."""
        return self.recorded is not None or not self.tries

    def shift(self, position: Position) -> tuple[int, ...]:
        """How many tiles a tile of the class is away from the one at the origin; nothing of one like no other."""
        return () if self.steps is None else tuple(at - of for at, of in zip(position, self.origin, strict=True))

    def record(self, memory: Memory) -> Partials:
        """Make the tile at the origin, and note how."""
        task, offloaded = self.task, memory.offloaded
        arrays = {a: _from(memory.values[a[0]], a[1]) for a in arrays_of(task, offloaded)}
        parts = {}
        for value, part in accesses(task, offloaded):
            there = part_of(memory.values[value], part)
            parts[value, span(part)] = arrays[begins(value, part)].as_strided(there.shape, there.stride())
        fetched = [offloaded[f.value].fetch(f.region) for f in task.fetches]
        puts = {
            s: empty_map(box.shape_of(s.region or ()), s.value.dtype, memory.device) for s in puts_of(task, offloaded)
        }
        recorder = Recorder([*arrays.values(), *fetched, *puts.values()])
        with held() as recorder.tables:
            partials = run_task(task, memory._replace(arrays=parts, puts=puts), recorder, fetched)
        for store, tensor in puts.items():
            offloaded[store.value].put(store.region or (), tensor)
        untiled = untiled_of(task)
        done = recorder.finish([*(made for _, made in partials), *(memory.values[v] for v in untiled)])
        if done is None:
            self.tries -= 1
            if not self.tries:
                fall_back(
                    f"some tiles run op by op in Python, which is slower, for lack of bytecode: {recorder.refused}"
                )
            return partials
        bases = tuple(self._base(k, *array, memory.values) for k, array in enumerate(arrays))
        away = [(f.value, f.region, t) for f, t in zip(task.fetches, fetched, strict=True)]
        away += [(s.value, s.region or (), t) for s, t in puts.items()]
        there = [Away(v, r, t.stride(), self._steps(len(bases) + k)) for k, (v, r, t) in enumerate(away)]
        places = (*(place for place, _ in partials), *untiled)
        self.recorded = Recorded(done, bases, tuple(there[: len(fetched)]), tuple(there[len(fetched) :]), places)
        return partials

    def _steps(self, base: int) -> tuple[tuple[int, ...], ...]:
        return tuple(step[base] for step in self.steps or ())

    def _base(self, k: int, value: Value, start: Sequence[int], values: Mapping[Value, torch.Tensor]) -> Base:
        size, stride = value.itemsize, values[value].stride()

        def far(element: Sequence[int]) -> int:
            return size * sum(n * step for n, step in zip(element, stride, strict=True))

        return Base(value, stride, far(start), tuple(map(far, self._steps(k))))


def _from(tensor: torch.Tensor, start: Sequence[int]) -> torch.Tensor:
    """The memory of a tensor from an element on, as a tensor whose own memory it is: a recording tells what it knows
    apart by where memory begins."""
    if not tensor.numel():
        return tensor
    before = sum(n * step for n, step in zip(start, tensor.stride(), strict=True))
    count = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) - before
    size = tensor.itemsize
    raw = (ctypes.c_char * (count * size)).from_address(tensor.data_ptr() + before * size)
    return torch.frombuffer(raw, dtype=torch.uint8).view(tensor.dtype)


class Tile:
    """A tile of a stage, as what is alike to others and where it is."""

    __slots__ = ("alike", "plan", "position", "tiles")

    def __init__(self, tiles: StageTiles, plan: Plan, position: Position, alike: TileClass):
        self.tiles, self.plan, self.position, self.alike = tiles, plan, position, alike

    @property
    def recorded(self) -> Recorded | None:
        """The bytecode that it is made by."""
        return self.alike.recorded

    @property
    def task(self) -> Task:
        """What is to be done."""
        alike = self.alike
        return alike.task if self.position == alike.origin else self.tiles.task(self.plan, self.position)

    def fetches(self) -> list[tuple[Value, Region]]:
        """What it will fetch."""
        if self.recorded is not None:
            return [(f.value, f.at(self.alike.shift(self.position))) for f in self.recorded.fetches]
        return [(f.value, f.region) for f in self.task.fetches]

    def run(self, memory: Memory) -> Partials:
        """Make the tile; returns its partial result of each sum."""
        alike = self.alike
        if alike.recorded is not None:
            partials = alike.recorded.run(memory, self.alike.shift(self.position))
            if partials is not None:
                return partials
        elif alike.tries and memory.records and self.position == alike.origin:
            return alike.record(memory)
        return self.run_in_python(memory)

    def run_in_python(self, memory: Memory) -> Partials:
        """Make the tile without bytecode, as when that has failed."""
        return run_task(self.task, memory)


class Room:
    """How many tasks are still to be kept."""

    def __init__(self, count: int):
        self.count = count

    def take(self) -> bool:
        """Whether there is room for one more, which it then takes."""
        self.count -= 1
        return self.count >= 0


class StageTiles:
    """The tiles of a stage: their classes and, of those that run in Python, their tasks, made when they are first
    asked for. Threads may ask at the same time."""

    def __init__(self, number: int, stage: Stage, room: Room, *, records: bool, scheduled: bool,
                 offloaded: Collection[Value]):  # fmt: skip
        """``scheduled``: whether they may be scheduled outside of Python, where each takes memory."""
        self.number, self.room, self.records, self.offloaded = number, room, records, offloaded
        self.scheduled = scheduled
        self.counts = tuple(stage.grid.counts())
        self.away = not set(offloaded).isdisjoint((*stage.section.loads, *stage.section.outputs))
        self.full = False  # some of its tiles are made anew every time
        self.likeness: Likeness | None = None
        self.mine: Sequence[Position] | None = None  # of one of several ranks, which makes no others
        self.classes: dict[Position, TileClass] = {}
        self.tasks: dict[Position, Task] = {}
        self.lock = ForkSafeLock()

    def task(self, plan: Plan, position: Position) -> Task:
        """The task of a tile; kept as long as there is room."""
        found = self.tasks.get(position)
        if found is None:
            stage = plan.stages[self.number]
            found = task_of(plan, stage, stage.grid.tile(position))
            if self.room.take():
                self.tasks[position] = found
        return found

    def tile(self, plan: Plan, k: int) -> Tile:
        """The tile that is made at a turn."""
        stage = plan.stages[self.number]
        position = position_of(stage, k)
        with self.lock:
            steps, key = self._box(plan, position)
            found = self.classes.get(key)
            if found is None and steps is not None and not self._typical(plan, position, key):
                steps, key = None, position
                found = self.classes.get(key)
            if found is None:
                found = self._make(plan, position, steps)
                if self.room.take() or steps is not None:
                    self.classes[key] = found
                else:
                    self.full, found.tries = True, 0  # what is made anew in each step is not worth a recording
        return Tile(self, plan, position, found)

    def _typical(self, plan: Plan, position: Position, first: Position) -> bool:
        """Whether a tile may be recorded for its class: not one in which two arrays happen to begin in one place."""
        draw = self._draw(plan)
        steps = self.likeness.steps[first] if self.likeness else None
        return steps is not None and follows(draw(position), draw(first), steps, first, position)

    def _make(self, plan: Plan, position: Position, steps: Steps | None) -> TileClass:
        stage = plan.stages[self.number]
        task = task_of(plan, stage, stage.grid.tile(position))
        small = all(v.nbytes <= plan.alone for v in untiled_of(task))
        return TileClass(task, position, steps, TRIES if small and self.records else 0)

    def _box(self, plan: Plan, position: Position) -> tuple[Steps | None, Position]:
        """How tiles of the class of this one move on, and its first; of one like no other, nothing and itself."""
        if not self.records or prod(self.counts) == 1:
            return None, position
        draw = self._draw(plan)
        if self.likeness is None:
            stage = plan.stages[self.number]
            self.likeness = Likeness(self.counts, whole_axes(stage.section, plan.tile_axes, stage.grid), draw)
        first = self.likeness.box(position)
        steps = self.likeness.found(first, draw)
        return steps, position if steps is None else first

    def _draw(self, plan: Plan) -> Draw:
        stage = plan.stages[self.number]
        return lambda at: outline(task_of(plan, stage, stage.grid.tile(at)), self.offloaded)

    @property
    def settled(self) -> bool:
        """Whether it is known of all its tiles in which way they will be made."""
        if self.away or self.full or not self.scheduled:
            return True
        if self.mine is not None:
            found = [self.classes.get(self._key(position)) for position in self.mine]
            return all(c is not None and c.settled for c in found)
        if not self.records or prod(self.counts) == 1:
            return len(self.classes) == prod(self.counts) and all(c.settled for c in self.classes.values())
        if self.likeness is None:
            return False
        for first, last in self.likeness.boxes():
            spans = [range(low, high + 1) for low, high in zip(first, last, strict=True)]
            keys = product(*spans) if self.likeness.steps.get(first) is None else [first]
            if not all(key in self.classes and self.classes[key].settled for key in keys):
                return False
        return True

    def all_recorded(self, stage: Stage) -> list[tuple[Recorded, tuple[int, ...]]] | None:
        """The bytecode of all tiles in their turns, each with how many tiles away from the recorded one it is; None
        where one has none, or they are too many to be scheduled outside of Python."""
        if self.away or not self.scheduled:
            return None
        found = []
        positions = (position_of(stage, k) for k in range(prod(self.counts))) if self.mine is None else self.mine
        for position in positions:
            alike = self.classes.get(self._key(position))
            if alike is None or alike.recorded is None:
                return None
            found.append((alike.recorded, alike.shift(position)))
        return found or None

    def way(self, stage: Stage, k: int) -> bool | None:
        """Whether the tile of a turn is made by bytecode; None where that is not known yet."""
        alike = self.classes.get(self._key(position_of(stage, k)))
        return None if alike is None or not alike.settled else alike.recorded is not None

    def _key(self, position: Position) -> Position:
        """The first tile of the class of this one, as far as it is known."""
        first = self.likeness.box(position) if self.likeness else position
        return position if self.likeness is None or self.likeness.steps.get(first) is None else first


class Tiles:
    """The tiles of a plan, which they do not hold: it is the key under which they are found."""

    def __init__(self, stages: Sequence[Stage], room: tuple[int, int], offloaded: frozenset[Value] = frozenset(), *,
                 records: bool = True, mine: Sequence[Sequence[int]] | None = None):  # fmt: skip
        """``room``: how many tiles may be scheduled outside of Python, and how many tasks are kept; others are made
        anew each time. ``records``: whether tiles are recorded. ``mine``: by stage the turns of a rank."""
        left, tasks = room
        shared, self.stages = Room(tasks), []
        for k, stage in enumerate(stages):
            fits = len(stage.grid) <= left
            left -= len(stage.grid) if fits else 0
            self.stages.append(StageTiles(k, stage, shared, records=records, scheduled=fits, offloaded=offloaded))
            if mine is not None:
                self.stages[-1].mine = [position_of(stage, turn) for turn in mine[k]]
        self._settled: set[int] = set()

    def tile(self, plan: Plan, number: int, k: int) -> Tile:
        """Tile ``k`` of stage ``number``."""
        return self.stages[number].tile(plan, k)

    def classes(self) -> Iterator[TileClass]:
        """Those that have been made."""
        return (alike for stage in self.stages for alike in stage.classes.values())

    def settled(self, stages: range) -> bool:
        """Whether it is known of all tiles of these stages in which way they will be made."""
        self._settled |= {k for k in stages if k not in self._settled and self.stages[k].settled}
        return self._settled.issuperset(stages)


def untiled_of(task: Task) -> list[Value]:
    """The untiled values that a task makes."""
    return [s.value for job in task.jobs for s in job.stores if s.region is None]
