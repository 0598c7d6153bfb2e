"""Reels: a range of steps whose tiles are on tape, played by one call outside of Python.

What follows from the plan is then fixed: which tapes, in which order they may run, and how their partial results are
added up, which is written down once, too. A step that has a tile without a tape is made in Python when its turn
comes, in the same order of things.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

import torch

from fullframe.bytecode.recorder import Tape
from fullframe.bytecode.scheduler import NativeFlow, Stage, Stages, Track
from fullframe.ir.graph import Op, Value
from fullframe.runtime.accumulate import Summation, add
from fullframe.runtime.tasks import Partials, Task, Tasks
from fullframe.runtime.tile import TapedTask
from fullframe.schedule.dependencies import Waits
from fullframe.schedule.plan import Plan
from fullframe.storage.arena import Arena, empty_output, shaped

CPU = torch.device("cpu")
SMALL = 1 << 16  # bytes of an untiled value that has its place from the beginning, beside all others


class Playable(Protocol):
    """A run of a plan, as a reel needs it."""

    values: dict[Value, torch.Tensor]
    arena: Arena

    def threads(self, count: int) -> None: ...
    def begin(self, number: int) -> dict[Op, Summation]: ...
    def task(self, number: int, k: int) -> Task: ...
    def tile(self, task: Task) -> Partials: ...
    def jobs(self, task: Task) -> Partials: ...
    def end(self, number: int, sums: dict[Op, Summation]) -> None: ...
    def free(self, number: int) -> None: ...
    def look(self) -> None: ...
    def allocate(self, value: Value) -> torch.Tensor: ...


class Home(NamedTuple):
    """Where an untiled value lives: its layout, and where in the block of small ones; None has memory of its own."""

    stride: tuple[int, ...]
    offset: int | None


def taped(tasks: Tasks, steps: range) -> int:
    """How many of their tiles are on tape."""
    kept = (tasks.kept[number] for number in steps)
    return sum(task is not None and bool(task.taped) for found in kept for task in found or ())


class Reel:
    """The ``steps``; ``maps`` are the values cut into tiles, ``kept`` those of them that live in the arena."""

    def __init__(self, plan: Plan, tasks: Tasks, waits: Waits, maps: Collection[Value], kept: Collection[Value],
                 steps: range):  # fmt: skip
        self.plan, self.waits, self.maps, self.kept, self.steps = plan.steps, waits, maps, kept, steps
        self.slots, self.workers, self.ahead = plan.slots, plan.workers, plan.ahead
        self.graph, self.given_out = plan.graph, {v for v in plan.graph.outputs if v is not None}
        self.index: dict[Value, int] = {}  # in the table of addresses, where the first is the arena's
        self.strides: dict[Value, tuple[int, ...]] = {}  # as the tapes know them
        self.homes: dict[Value, Home] = {}
        self.nbytes = 0
        self.native: dict[int, list[TapedTask]] = {}
        self.stages = Stages([self._stage(number, tasks.kept[number]) for number in steps])
        made = {v for number in steps for v in plan.steps[number].section.outputs}
        self.read = [v for v in self.index if v not in made]
        lasting = made.difference(*(plan.steps[number].frees for number in steps))
        python = (number for number in steps if number not in self.native)
        self.shown = lasting.union(*(plan.steps[number].section.loads for number in python)) & made

    # Made once ------------------------------------------------------------------------------------

    def _stage(self, number: int, tasks: Sequence[Task | None] | None) -> Stage:
        before, count = self.waits.before[number], self.waits.counts[number]
        wide, frees = self.waits.wide[number], self.plan[number].frees
        tapes = [task.taped for task in tasks or () if task is not None and task.taped]
        after = self._after(number, tapes) if len(tapes) == count and self._agree(tapes) else None
        if after is None:
            return Stage(before, count, room=False, frees=bool(frees), wide=wide)
        self.native[number] = tapes
        tracks = [Track(t.tape, [0, *map(self._at, t.values)]) for t in tapes]
        room = any(self.roomy(v) for v in self.plan[number].section.outputs)
        held = any(v not in self.kept and not self._small(v) for v in frees)
        return Stage(before, count, room, held, wide, tracks, after)

    def _agree(self, tapes: Sequence[TapedTask]) -> bool:
        """Whether tapes know values by the same layout as others, and as they are made."""
        found = [(v, stride) for t in tapes for v, stride in zip(t.values, t.strides, strict=True)]
        if any(self.strides.setdefault(v, stride) != stride for v, stride in found):
            return False
        return all(self.homes[v].stride == stride for v, stride in found if v in self.homes)

    def _at(self, value: Value) -> int:
        return self.index.setdefault(value, len(self.index) + 1)

    def _small(self, value: Value) -> bool:
        home = self.homes.get(value)
        return home is not None and home.offset is not None

    def roomy(self, value: Value) -> bool:
        """Whether memory is to be had for a value when its step begins."""
        return value not in self.kept and not self._small(value)

    def _after(self, number: int, tapes: Sequence[TapedTask]) -> Track | None:
        """What adds up and keeps the results of a step's tiles, on tape; None where it has no word for that."""
        blocks = [torch.zeros(max(t.tape.nbytes // 8, 1), dtype=torch.float64) for t in tapes]
        section = self.plan[number].section
        trial = _fold(section.sums, tapes, blocks, None)
        targets = {v: self._target(v, made) for v, made in trial.items()}
        starts = [self.slots[v].offset if v in self.kept else 0 for v in targets]
        tape = Tape([*targets.values(), *blocks], [*starts, *[0] * len(blocks)], owned=len(blocks))
        with tape:
            for value, made in _fold(section.sums, tapes, blocks, tape).items():
                targets[value].copy_(made)
        done = tape.finish([])
        if done is None or any(not v.numel() for v in targets.values()):
            return None
        for value, target in targets.items():
            if value not in self.maps:
                self._house(value, target)
        return Track(done, [0 if v in self.kept else self._at(v) for v in targets])

    def _target(self, value: Value, made: torch.Tensor) -> torch.Tensor:
        """An array as the one in which a value lives."""
        if value in self.kept:
            return shaped(torch.empty(made.numel(), dtype=value.dtype), value.shape)
        if value in self.maps:
            return empty_output(self.graph, value, CPU)
        return torch.empty_strided(made.shape, torch.empty_like(made).stride(), dtype=value.dtype)

    def _house(self, value: Value, target: torch.Tensor) -> None:
        offset = None
        if value not in self.given_out and value.nbytes <= SMALL:
            offset, self.nbytes = self.nbytes, self.nbytes + -(-value.nbytes // 64) * 64
        self.homes[value] = Home(target.stride(), offset)
        self._at(value)

    # Each time ------------------------------------------------------------------------------------

    def play(self, run: Playable, threads: int, pool: Callable[[int], ThreadPoolExecutor]) -> bool:
        """Run the steps with so many threads inside wide ones; False, and nothing done, where a value that they read
        lies otherwise in memory than when the tapes were written."""
        if any(v in self.strides and run.values[v].stride() != self.strides[v] for v in self.read):
            return False
        flow = _Playing(self, run, threads)
        others: list[Future[None]] = []
        run.threads(1)
        try:
            for _ in range(self.workers - 1):
                others.append(pool(self.workers - 1).submit(flow.run))
            flow.run(own=True)
        except BaseException:
            flow.native.fail()
            raise
        finally:
            # One that has not begun, behind another step of this process, is not needed any more.
            wait([other for other in others if not other.cancel()])
            flow.native.close()
        flow.native.check()
        for number in self.steps:
            run.free(number)
        return True


def _fold(sums: Sequence[Op], tapes: Sequence[TapedTask], blocks: Sequence[torch.Tensor],
          tape: Tape | None) -> dict[Value, torch.Tensor]:  # fmt: skip
    """What a step makes of the results of its tiles, which lie in these blocks."""
    found: dict[Value, torch.Tensor] = {}
    totals = {op: Summation(op, CPU, alone=len(tapes) == 1) for op in sums}
    for k, (tile, block) in enumerate(zip(tapes, blocks, strict=True)):
        if tape is not None and k:
            tape.mark()
        add(totals, tile.hand_out(tile.tape.views(block), found))
    return found | {op.output: total.finish() for op, total in totals.items()}


class _Playing:
    """One time that a reel is played."""

    def __init__(self, reel: Reel, run: Playable, threads: int):
        self.reel, self.work, self.count = reel, run, threads
        self.sums: dict[int, dict[Op, Summation]] = {}
        self.waiting: dict[tuple[int, int], Partials] = {}
        self.block = torch.empty(reel.nbytes, dtype=torch.uint8)
        self.table = (ctypes.c_void_p * (len(reel.index) + 1))(run.arena.block.data_ptr())
        for value in reel.read:
            self._at(value)
        start = self.block.data_ptr()
        for value, home in reel.homes.items():
            if home.offset is not None:
                self.table[reel.index[value]] = start + home.offset
        self._show(reel.shown)
        calls = (self._begin, self._tile, self._add, self._end, self._free, self._wide, self._look)
        self.native = NativeFlow(reel.stages, reel.steps, reel.ahead, 2 * reel.workers, self.table,
                                 calls)  # fmt: skip

    def _at(self, value: Value) -> None:
        self.table[self.reel.index[value]] = self.work.values[value].data_ptr()

    def _show(self, values: Iterable[Value]) -> None:
        """Let Python see values that live in the arena or in the block."""
        for value in values:
            home = self.reel.homes.get(value)
            if value in self.work.values:
                continue
            if home is not None and home.offset is not None:
                flat = self.block[home.offset : home.offset + value.nbytes].view(value.dtype)
                self.work.values[value] = flat.as_strided(value.shape, home.stride)
            elif value in self.reel.kept:
                self.work.values[value] = self.work.allocate(value)

    def run(self, own: bool = False) -> None:
        """Help until all is done, or has failed."""
        self.native.run(own)

    def _begin(self, number: int) -> None:
        if number not in self.reel.native:
            self.sums[number] = self.work.begin(number)
            return
        for value in self.reel.plan[number].section.outputs:
            if not self.reel.roomy(value):
                continue
            if value in self.reel.maps or value not in self.reel.homes:  # which no tile makes: it is empty
                self.work.values[value] = self.work.allocate(value)
            else:
                stride = self.reel.homes[value].stride
                self.work.values[value] = torch.empty_strided(value.shape, stride, dtype=value.dtype)
            if value in self.reel.index:
                self._at(value)

    def _tile(self, number: int, k: int, block: int | None) -> None:
        task = self.work.task(number, k)
        if number not in self.reel.native:
            self.waiting[number, k] = self.work.tile(task)
            return
        section = self.reel.plan[number].section
        self._show((*section.loads, *section.outputs))
        tile = self.reel.native[number][k]
        homes = {place: self.work.values[place] for place in tile.places if isinstance(place, Value)}
        made = [t for _, t in self.work.jobs(task)]
        made += [self.work.values[value] for value in homes]
        self.work.values.update(homes)
        if block:
            raw = (ctypes.c_double * (tile.tape.nbytes // 8)).from_address(block)
            for to, t in zip(tile.tape.views(torch.frombuffer(raw, dtype=torch.float64)), made, strict=True):
                to.copy_(t)

    def _add(self, number: int, k: int) -> None:
        add(self.sums[number], self.waiting.pop((number, k)))

    def _end(self, number: int) -> None:
        self.work.end(number, self.sums.pop(number))
        values = self.work.values
        for value in self.reel.plan[number].section.outputs:
            stride = self.reel.strides.get(value, values[value].stride())
            if values[value].stride() != stride:
                values[value] = torch.empty_strided(value.shape, stride, dtype=value.dtype).copy_(values[value])
            if value in self.reel.index:
                self._at(value)

    def _free(self, number: int) -> None:
        self.work.free(number)

    def _wide(self, on: int) -> None:
        self.work.threads(self.count if on else 1)

    def _look(self) -> None:
        self.work.look()
        for _ in range(2):  # where the interpreter sees to signals
            pass
