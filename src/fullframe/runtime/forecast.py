"""How long a step will take by its plan: the time of each kind of work on this machine, times how often it is done.

Ops that run one by one are measured as they are, on numbers of their own in the shapes of a tile from the middle, by
as many threads at once as there are workers. Fused groups take what their bytes take from memory. Nothing of the step
itself is run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import torch

from fullframe.ir import region as box
from fullframe.ir.graph import Op
from fullframe.ir.region import Region
from fullframe.partition.fusion import Work
from fullframe.runtime.workers import pool
from fullframe.schedule.dependencies import EXPENSIVE
from fullframe.schedule.plan import Plan, Stage, middle_works
from fullframe.storage.arena import empty_map

PIECE = 1 << 25  # bytes of the arrays on which the rate of memory is measured
LARGE = 1 << 28  # bytes of what an op reads and makes, from which on it is not measured, but counted
SECONDS, MOST = 0.004, 20  # of a measurement, at least, and calls in it, at most
CALL = 4e-6  # seconds between two ops of a tile, about
USUAL = 3e10  # operations a second of a thread, where none is measured


class Forecast(NamedTuple):
    """Seconds of a step: of ops that run one by one, of fused groups, between ops, and what a disk takes longer than
    all of these."""

    ops: float
    fused: float
    calls: float
    disk: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.ops + self.fused + self.calls + self.disk


_MEASURED: dict[Hashable, float] = {}


def forecast(plan: Plan) -> Forecast:
    """What a step of a plan will take on this machine's processor, by measurements of some milliseconds for each kind
    of op that has not been measured yet in this process."""
    fused = calls = measured = operations = counted = 0.0
    for stage, work, turns, threads in _works(plan):
        calls += turns * CALL
        if work.group.fused:
            fused += turns * _bytes(work) / _rate(threads)
            continue
        (op,) = work.group.ops or work.group.sums
        spent = op.rule.cost(op, box.size(work.region))
        inside = plan.workers if len(stage.grid) == 1 and spent >= EXPENSIVE else 1  # threads
        if _bytes(work) > LARGE:
            counted += turns * spent / inside
            fused += turns * _bytes(work) / _rate(threads) / inside
            continue
        measured += turns * _seconds(op, work, threads) / inside
        operations += turns * spent / inside
    ops = measured + counted * (measured / operations if operations else 1 / USUAL)
    rate = 1e6 * plan.limits.rate if plan.limits is not None else 1e9
    moved = sum(plan.disk_traffic) / rate if plan.bytes.disk else 0.0
    return Forecast(ops, fused, calls, max(0.0, moved - ops - fused - calls))


def seconds_of(plan: Plan) -> float:
    """All of it, as a plan says it."""
    return forecast(plan).seconds


def _works(plan: Plan) -> Iterator[tuple[Stage, Work, int, int]]:
    """The work of each stage's tiles, how often a thread does it, and how many threads do."""
    for stage in plan.stages:
        threads = min(plan.workers, len(stage.grid))
        for work in middle_works(plan, stage):
            yield stage, work, -(-len(stage.grid) // threads), threads


def _bytes(work: Work) -> int:
    """What a group reads and makes on a tile."""
    read = sum(box.size(r) * v.itemsize for v, r in zip(work.group.reads, work.reads, strict=True))
    made = {*work.group.makes, *work.group.saves}
    return read + box.size(work.region) * sum(v.itemsize for v in made)


def _seconds(op: Op, work: Work, threads: int) -> float:
    """Of one op on a tile, while as many threads do the same."""
    shapes = tuple(box.shape_of(r) for r in work.reads)
    types = tuple(v.dtype for v in (*op.inputs, op.output))
    key = op.target, str(op.args), shapes, types, box.shape_of(work.region), threads
    if key not in _MEASURED:
        _MEASURED[key] = _timed(lambda: _ready(op, work.region, work.reads), threads)
    return _MEASURED[key]


def _ready(op: Op, region: Region, reads: tuple[Region, ...]) -> Callable[[], object]:
    """An op on a region, ready to run on numbers of its own."""
    windows = []
    for value, read in zip(op.inputs, reads, strict=True):
        made = empty_map(box.shape_of(read), value.dtype, torch.device("cpu"))
        windows.append(made.fill_(1) if made.is_floating_point() else made.zero_())
    return lambda: op.rule.run(op, region, windows)


def _rate(threads: int) -> float:
    """Bytes a second that one of so many threads reads and writes."""

    def made() -> Callable[[], object]:
        x = torch.ones(PIECE // 4)
        y = torch.empty_like(x)
        return lambda: torch.add(x, 1.0, out=y)

    key = "bytes", threads
    if key not in _MEASURED:
        _MEASURED[key] = 2 * PIECE / _timed(made, threads)
    return _MEASURED[key]


def _timed(made: Callable[[], Callable[[], object]], threads: int) -> float:
    """Seconds of a call by each of several threads at once: the fastest of some."""

    def one() -> float:
        run = made()
        run()
        best, start = float("inf"), time.perf_counter()
        for _ in range(MOST):
            before = time.perf_counter()
            run()
            now = time.perf_counter()
            best = min(best, now - before)
            if now - start > SECONDS:
                break
        return best

    found = [f.result() for f in [pool(threads).submit(one) for _ in range(threads)]]
    return sum(found) / len(found)
