"""A range of stages given to the scheduler in C++, which replays what is in bytecode outside of Python.

What follows from the plan is fixed: which bytecode, in which order it may run, and how its partial results are added
up, which is recorded, too. A stage that has a tile without bytecode is made in Python, by calls back, when its turn
comes, in the same order of things.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

import torch

from fullframe.bytecode.recorder import Recorder
from fullframe.bytecode.scheduler import HELPER, OWNER, BoundBytecode, NativeScheduler, NativeStage, NativeStages
from fullframe.device import CPU
from fullframe.ir.graph import Value
from fullframe.runtime.accumulate import Running, Sums
from fullframe.runtime.task_run import Memory
from fullframe.runtime.tasks import Partials, place_of, tiles_of
from fullframe.runtime.tile import Base, Recorded, StageTiles, Tile, Tiles
from fullframe.schedule.dependencies import Dependencies
from fullframe.schedule.plan import Plan, Stage
from fullframe.storage.arena import Arena, empty_output, shaped

SMALL = 1 << 16  # bytes of an untiled value that has its place from the beginning, beside all others


class Replayable(Running, Protocol):
    """A run of a plan, as a schedule needs it."""

    arena: Arena

    @property
    def memory(self) -> Memory: ...

    def tile(self, number: int, k: int) -> Tile: ...
    def poll(self) -> None: ...
    def allocate(self, value: Value) -> torch.Tensor: ...


class Location(NamedTuple):
    """Where an untiled value lives: its layout, and where in the block of small ones; None has memory of its own."""

    stride: tuple[int, ...]
    offset: int | None


class Schedule:
    """The ``stage_range``, with the bytecode of ``tiles`` if there are any.

    ``maps`` are the values cut into tiles, ``kept`` those of them that live in the arena.
    """

    def __init__(self, plan: Plan, tiles: Tiles | None, dependencies: Dependencies, maps: Collection[Value],
                 kept: Collection[Value], stage_range: range):  # fmt: skip
        self.plan, self.stage_range, self.dependencies = plan.stages, stage_range, dependencies
        self.turns = {number: tiles_of(plan, number) for number in stage_range}
        self.maps, self.kept = maps, kept
        self.slots, self.workers, self.max_in_flight = plan.slots, plan.workers, plan.max_in_flight
        self.graph, self.given_out = plan.graph, {v for v in plan.graph.outputs if v is not None}
        self.ends = self.given_out.difference(*(s.section.loads for s in plan.stages))  # that no stage reads
        self.index: dict[Hashable, int] = {}  # in the table of addresses, where the first is the arena's
        self.strides: dict[Value, tuple[int, ...]] = {}  # as the bytecode knows them
        self.locations: dict[Value, Location] = {}
        self.nbytes = 0
        self.native: dict[int, list[Recorded]] = {}
        self.stages = NativeStages(
            [self._stage(number, tiles.stages[number] if tiles else None) for number in stage_range]
        )
        made = {v for number in stage_range for v in plan.stages[number].section.outputs}
        self.read = [v for v in self.index if isinstance(v, Value) and v not in made]
        lasting = made.difference(*(plan.stages[number].frees for number in stage_range))
        python = (number for number in stage_range if number not in self.native)
        self.shown = lasting.union(*(plan.stages[number].section.loads for number in python)) & made

    # Made once ------------------------------------------------------------------------------------

    def _stage(self, number: int, tiles: StageTiles | None) -> NativeStage:
        before, count = self.dependencies.before[number], max(1, len(self.turns[number]))
        multi_threaded, frees = self.dependencies.multi_threaded[number], self.plan[number].frees
        met = self.meetings(number)
        found = tiles.all_recorded(self.plan[number]) if tiles else None
        recorded = [r for r, _ in found or ()]
        after = self._after(number, recorded) if found is not None and self._agree(recorded) else None
        if found is None or after is None:
            return NativeStage(before, count, room=False, frees=bool(frees), multi_threaded=multi_threaded,
                               meetings=met)  # fmt: skip
        self.native[number] = recorded
        bound = [BoundBytecode(r.bytecode, [self._base(b, shift) for b in r.bases]) for r, shift in found]
        held = any(v not in self.kept and not self._small(v) for v in frees)
        return NativeStage(before, count, self.room(number), held, multi_threaded, bound, after, met)

    def _base(self, base: Base, shift: Sequence[int]) -> tuple[int, int]:
        """Which address of the table a base is counted from, and how far behind it begins."""
        if base.value in self.kept:
            return 0, self.slots[base.value].offset + base.at(shift)
        return self._at(base.value), base.at(shift)

    def _agree(self, recorded: Sequence[Recorded]) -> bool:
        """Whether bytecode knows values by the same layout as others, and as they are made."""
        found = dict.fromkeys((b.value, b.stride) for r in {id(r): r for r in recorded}.values() for b in r.bases)
        if any(self.strides.setdefault(v, stride) != stride for v, stride in found):
            return False
        return all(self.locations[v].stride == stride for v, stride in found if v in self.locations)

    def _at(self, value: Hashable) -> int:
        return self.index.setdefault(value, len(self.index) + 1)

    def _small(self, value: Value) -> bool:
        location = self.locations.get(value)
        return location is not None and location.offset is not None

    def made(self, number: int) -> Sequence[Value]:
        """What bytecode makes of a stage's outputs."""
        return self.plan[number].section.outputs

    def meetings(self, number: int) -> int:
        """How many meetings with other ranks a stage waits for."""
        return 0

    def room(self, number: int) -> bool:
        """Whether the caller has to find room when a stage begins."""
        return any(self.roomy(v) for v in self.made(number))

    def roomy(self, value: Value) -> bool:
        """Whether memory is to be had for a value when its stage begins."""
        return value not in self.kept and not self._small(value)

    def _after(self, number: int, recorded: Sequence[Recorded]) -> BoundBytecode | None:
        """What adds up and keeps the results of a stage's tiles, in bytecode; None where it has no word for that."""
        blocks = [torch.zeros(max(t.bytecode.nbytes // 8, 1), dtype=torch.float64) for t in recorded]
        stage = self.plan[number]
        places = [place_of(stage, k) for k in self.turns[number]]
        trial = _total(stage, places, recorded, blocks, None)
        targets = {v: self._target(v, made) for v, made in trial.items()}
        starts = [self.slots[v].offset if v in self.kept else 0 for v in targets]
        recorder = Recorder([*targets.values(), *blocks], [*starts, *[0] * len(blocks)], owned=len(blocks))
        with recorder:
            for value, made in _total(stage, places, recorded, blocks, recorder).items():
                targets[value].copy_(made)
        done = recorder.finish([])
        if done is None or any(not v.numel() for v in targets.values()):
            return None
        for value, target in targets.items():
            if value not in self.maps:
                self._settle(value, target)
        return BoundBytecode(done, [(0 if v in self.kept else self._at(v), 0) for v in targets])

    def _target(self, value: Value, made: torch.Tensor) -> torch.Tensor:
        """An array as the one in which a value lives."""
        if value in self.kept:
            return shaped(torch.empty(made.numel(), dtype=value.dtype), value.shape)
        if value in self.maps:
            return empty_output(self.graph, value, CPU)
        expected = self.graph.strides.get(value) if value in self.ends else None
        if expected is not None and len(expected) == made.dim():
            return torch.empty_strided(made.shape, expected, dtype=value.dtype)
        return torch.empty_strided(made.shape, torch.empty_like(made).stride(), dtype=value.dtype)

    def _settle(self, value: Value, target: torch.Tensor) -> None:
        offset = None
        if value not in self.given_out and value.nbytes <= SMALL:
            offset, self.nbytes = self.nbytes, self.nbytes + -(-value.nbytes // 64) * 64
        self.locations[value] = Location(target.stride(), offset)
        self._at(value)

    # Each time ------------------------------------------------------------------------------------

    def fits(self, values: dict[Value, torch.Tensor]) -> bool:
        """Whether the values that the stages read lie in memory as when they were recorded."""
        return all(values[v].stride() == self.strides[v] for v in self.read if v in self.strides)

    def replay(self, run: Replayable, threads: int, pool: Callable[[int], ThreadPoolExecutor]) -> None:
        """Run the stages with so many threads inside multi-threaded ones."""
        scheduler = Replaying(self, run, threads)
        others: list[Future[None]] = []
        run.threads(1)
        try:
            for _ in range(self.workers - 1):
                others.append(pool(self.workers - 1).submit(scheduler.native.run, HELPER))
            scheduler.native.run(OWNER)
        except BaseException:
            scheduler.native.fail()
            raise
        finally:
            # One that has not begun, behind another step of this process, is not needed any more.
            wait([other for other in others if not other.cancel()])
            scheduler.native.close()
        scheduler.native.check()
        for number in self.stage_range:
            run.free(number)


def _total(stage: Stage, places: Sequence[int], recorded: Sequence[Recorded], blocks: Sequence[torch.Tensor],
           recorder: Recorder | None) -> dict[Value, torch.Tensor]:  # fmt: skip
    """What a stage makes of the results of its tiles."""
    sums, found = folded(stage, places, recorded, blocks, recorder)
    return found | {op.output: total for op, total in sums.finish().items()}


def folded(stage: Stage, places: Sequence[int], recorded: Sequence[Recorded], blocks: Sequence[torch.Tensor],
           recorder: Recorder | None) -> tuple[Sums, dict[Value, torch.Tensor]]:  # fmt: skip
    """What the results of tiles add up to, which lie in these blocks, and the untiled values among them."""
    found: dict[Value, torch.Tensor] = {}
    sums = Sums(stage.section.sums, len(stage.grid), CPU)
    for k, (place, tile, block) in enumerate(zip(places, recorded, blocks, strict=True)):
        if recorder is not None and k:
            recorder.mark()
        sums.add(place, tile.hand_out(tile.bytecode.views(block), found))
    return sums, found


class Replaying:
    """One run of a schedule."""

    def __init__(self, schedule: Schedule, run: Replayable, threads: int):
        self.schedule, self.work, self.count, self.memory = schedule, run, threads, run.memory
        self.sums: dict[int, Sums] = {}
        self.waiting: dict[tuple[int, int], Partials] = {}
        self.block = torch.empty(schedule.nbytes, dtype=torch.uint8)
        self.table = (ctypes.c_void_p * (len(schedule.index) + 1))(run.arena.block.data_ptr())
        for value in schedule.read:
            self._at(value)
        start = self.block.data_ptr()
        for value, location in schedule.locations.items():
            if location.offset is not None:
                self.table[schedule.index[value]] = start + location.offset
        self._show(schedule.shown)
        calls = (self._begin, self._tile, self._add, self._end, self._free, self._multi_threaded, self._poll)
        self.native = NativeScheduler(
            schedule.stages, schedule.stage_range, schedule.max_in_flight, 2 * schedule.workers, self.table, calls
        )

    def _at(self, value: Value) -> None:
        self.table[self.schedule.index[value]] = self.work.values[value].data_ptr()

    def _show(self, values: Iterable[Value]) -> None:
        """Let Python see values that live in the arena or in the block."""
        for value in values:
            location = self.schedule.locations.get(value)
            if value in self.work.values:
                continue
            if location is not None and location.offset is not None:
                flat = self.block[location.offset : location.offset + value.nbytes].view(value.dtype)
                self.work.values[value] = flat.as_strided(value.shape, location.stride)
            elif value in self.schedule.kept:
                self.work.values[value] = self.work.allocate(value)

    def _begin(self, number: int) -> None:
        if number not in self.schedule.native:
            self.sums[number] = self.work.begin(number)
            return
        for value in self.schedule.made(number):
            if not self.schedule.roomy(value):
                continue
            # A value that no tile makes is empty.
            if value in self.schedule.maps or value not in self.schedule.locations:
                self.work.values[value] = self.work.allocate(value)
            else:
                stride = self.schedule.locations[value].stride
                self.work.values[value] = torch.empty_strided(value.shape, stride, dtype=value.dtype)
            if value in self.schedule.index:
                self._at(value)

    def _tile(self, number: int, k: int, block: int | None) -> None:
        if number not in self.schedule.native:
            turns = self.schedule.turns[number]  # a rank may have none
            self.waiting[number, k] = self.work.make(number, turns[k]) if turns else []
            return
        section = self.schedule.plan[number].section
        self._show((*section.loads, *section.outputs))
        tile = self.schedule.native[number][k]
        locations = {place: self.work.values[place] for place in tile.places if isinstance(place, Value)}
        made = [t for _, t in self.work.tile(number, self.schedule.turns[number][k]).run_in_python(self.memory)]
        made += [self.work.values[value] for value in locations]
        self.work.values.update(locations)
        if block:
            raw = (ctypes.c_double * (tile.bytecode.nbytes // 8)).from_address(block)
            for to, t in zip(tile.bytecode.views(torch.frombuffer(raw, dtype=torch.float64)), made, strict=True):
                to.copy_(t)

    def _add(self, number: int, k: int) -> None:
        made, turns = self.waiting.pop((number, k)), self.schedule.turns[number]
        if turns:
            self.sums[number].add(place_of(self.schedule.plan[number], turns[k]), made)

    def _end(self, number: int) -> None:
        self.work.end(number, self.sums.pop(number))
        self.settle(self.schedule.plan[number].section.outputs)

    def settle(self, made: Iterable[Value]) -> None:
        """Have what Python has made where bytecode will look for it."""
        values = self.work.values
        for value in made:
            if value not in values:  # it lives elsewhere
                continue
            stride = self.schedule.strides.get(value, values[value].stride())
            if values[value].stride() != stride:
                values[value] = torch.empty_strided(value.shape, stride, dtype=value.dtype).copy_(values[value])
            if value in self.schedule.index:
                self._at(value)

    def _free(self, number: int) -> None:
        self.work.free(number)

    def _multi_threaded(self, on: int) -> None:
        self.work.threads(self.count if on else 1)

    def _poll(self) -> None:
        self.work.poll()
        for _ in range(2):  # where the interpreter sees to signals
            pass
