"""A range of stages on one of several ranks: its tiles by the scheduler, and meetings with the others meanwhile.

The helpers make tiles. The owner has the meetings, one after the other as all ranks do: it waits until the stages
before one are done, exchanges, and says so to the scheduler. Stages for which nothing of a meeting comes are made
while it lasts, so a rank that is early does not only wait.

What a rank adds up of a sum that others have a part of is left in one block, as the part of a message.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from typing import NamedTuple, Protocol

import torch

from fullframe.bytecode.recorder import Recorder
from fullframe.bytecode.scheduler import HELPER, WAITING, BoundBytecode
from fullframe.device import CPU
from fullframe.distributed.mesh import Domain
from fullframe.ir.graph import Value
from fullframe.runtime.accumulate import Sums
from fullframe.runtime.ranks import Journey, Message, Part, Together, nodes_of, parts_of, waits
from fullframe.runtime.replay_cpu import Replayable, Replaying, Schedule, folded
from fullframe.runtime.tasks import place_of
from fullframe.runtime.tile import Recorded, Tiles
from fullframe.runtime.workers import pool
from fullframe.schedule.dependencies import Dependencies
from fullframe.schedule.meetings import gates
from fullframe.schedule.plan import Plan


class Shareable(Replayable, Together, Protocol):
    """A run of a plan, as ranks need it."""


class Block(NamedTuple):
    """Stands in the table of addresses for what a stage's sums are, of this rank's tiles."""

    number: int


class SharedSchedule(Schedule):
    """The stages of a run on a rank."""

    def __init__(self, plan: Plan, tiles: Tiles | None, dependencies: Dependencies, maps: Collection[Value],
                 kept: Collection[Value], stage_range: range):  # fmt: skip
        assert plan.share is not None
        self.waiting = {number for number in stage_range if waits(plan, number)}  # whose sums have parts elsewhere
        self.messages: dict[int, Message] = {}  # by stage, what bytecode leaves in its block
        self.met = gates(plan.stages, plan.share, stage_range)
        super().__init__(plan, tiles, dependencies, maps, kept, stage_range)
        moved = {p.value for e in plan.share.exchanges for pieces in (*e.sends, *e.receives) for p in pieces}
        self.shown |= moved.intersection(kept, (v for n in stage_range for v in plan.stages[n].section.outputs))

    def meetings(self, number: int) -> int:
        return self.met[number]

    def made(self, number: int) -> Sequence[Value]:
        section = self.plan[number].section
        return section.saves if number in self.waiting else section.outputs

    def room(self, number: int) -> bool:
        return number in self.waiting or super().room(number)

    def _after(self, number: int, recorded: Sequence[Recorded]) -> BoundBytecode | None:
        if number not in self.waiting:
            return super()._after(number, recorded)
        stage = self.plan[number]
        blocks = [torch.zeros(max(t.bytecode.nbytes // 8, 1), dtype=torch.float64) for t in recorded]
        places = [place_of(stage, k) for k in self.turns[number]]
        sums, _ = folded(stage, places, recorded, blocks, None)
        parts = [part for part, _ in parts_of(stage, sums)]
        message = Message(sorted(sums.nodes), parts)
        targets = [torch.empty(part.shape, dtype=part.dtype) for part in parts]
        recorder = Recorder([*targets, *blocks], [0] * (len(targets) + len(blocks)), owned=len(blocks))
        with recorder:
            sums, _ = folded(stage, places, recorded, blocks, recorder)
            for target, (_, made) in zip(targets, parts_of(stage, sums), strict=True):
                target.copy_(made)
        done = recorder.finish([])
        if done is None or any(not t.numel() for t in targets):
            return None
        self.messages[number] = message
        return BoundBytecode(done, list(zip([self._at(Block(number))] * len(parts), _begins(parts), strict=True)))


def advance(run: Shareable, domain: Domain, stages: range, threads: int, scheduled: Callable[[], Schedule]) -> None:
    """Run the stages, as they are ``scheduled``, together with the other ranks; what fails on one raises on all, at
    the same place."""
    journey = _Journey(run, domain, stages)
    with journey.shared():
        schedule = scheduled()
        assert isinstance(schedule, SharedSchedule)
        journey.replaying = _Replaying(schedule, run, threads)
        journey.replaying.take(journey)
        for number in stages:
            run.free(number)


class _Journey(Journey):
    """Has the scheduler know of sums that are there."""

    replaying: _Replaying

    def end(self, number: int, sums: Sums) -> None:
        super().end(number, sums)
        self.replaying.settle([op.output for op in self.run.plan.stages[number].section.sums])


class _Replaying(Replaying):
    """One run of a schedule on a rank."""

    def __init__(self, schedule: SharedSchedule, run: Shareable, threads: int):
        self.shared = schedule
        self.blocks: dict[int, torch.Tensor] = {}
        self.apart: dict[int, Sums] = {}  # of stages that Python has made
        super().__init__(schedule, run, threads)

    def take(self, journey: Journey) -> None:
        """Make the stages, and have the meetings between them."""
        workers, helpers = self.schedule.workers, list[Future[None]]()
        self.work.threads(1)
        try:
            for _ in range(workers):
                helpers.append(pool(workers, journey.domain.group).submit(self.native.run, HELPER))
            for meeting in journey.meetings:
                self.native.run(WAITING, meeting.number)
                if self.native.failed:
                    break
                journey.waiting.update((n, self._sums(n)) for n in meeting.sums)
                journey.meet(meeting.number)
                self.native.met()
        except BaseException:
            self.native.fail()
            raise
        finally:
            wait([helper for helper in helpers if not helper.cancel()])
            self.native.close()
        self.native.check()

    def _sums(self, number: int) -> Sums:
        """What this rank has of a stage's sums."""
        if number not in self.blocks:
            return self.apart.pop(number)
        stage = self.schedule.plan[number]
        sums = Sums(stage.section.sums, len(stage.grid), CPU)
        sums.nodes = nodes_of(stage.section.sums, self.shared.messages[number], self.blocks.pop(number))
        return sums

    def _begin(self, number: int) -> None:
        message = self.shared.messages.get(number)
        if message is not None:
            self.blocks[number] = block = torch.empty(message.nbytes, dtype=torch.uint8)
            self.table[self.schedule.index[Block(number)]] = block.data_ptr()
        super()._begin(number)

    def _end(self, number: int) -> None:
        if number not in self.shared.waiting:
            super()._end(number)
            return
        self.apart[number] = self.sums.pop(number)
        self.settle(self.schedule.plan[number].section.saves)


def _begins(parts: Sequence[Part]) -> list[int]:
    """Where the parts of a message begin."""
    found, at = [], 0
    for part in parts:
        found.append(at)
        at += part.nbytes
    return found
