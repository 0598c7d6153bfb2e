"""Which stages wait for which, so that several may be in flight."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from fullframe.ir.graph import Value, walked
from fullframe.schedule.plan import Plan, Slot, Stage

EXPENSIVE = 4_000_000_000  # operations: some ten milliseconds, as long as threads inside an op wait busily after it


def is_expensive(stage: Stage) -> bool:
    """Whether a stage is worth more than one thread."""
    spent = 0
    for op in stage.section.ops:
        whole = 100 * prod(op.output.shape) * (op.rule.kind == "whole")
        spent += max(op.rule.cost(op, prod(walked(op).shape)), whole)
    return spent > EXPENSIVE


class Dependencies(NamedTuple):
    """Per stage, which of the few stages before it must be done first, how many tiles it has, and whether its one
    tile is worth more than one thread, with nothing expensive beside it."""

    before: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    multi_threaded: tuple[bool, ...]


def dependencies_of(plan: Plan, expensive: Sequence[bool]) -> Dependencies:
    """The stages that each stage waits for, of the ``plan.max_in_flight - 1`` before it: makers of what it reads, and
    all that read or write memory that it will write."""
    stages, max_in_flight = plan.stages, plan.max_in_flight
    touched = [_slots(plan, (*s.section.loads, *s.section.outputs)) for s in stages]
    made = [frozenset(s.section.outputs) for s in stages]
    before: list[tuple[int, ...]] = []
    ordered: list[set[int]] = []  # of those, the stages it waits for directly or through others
    for k, stage in enumerate(stages):
        recent = range(max(0, k - max_in_flight + 1), k)
        writes = _slots(plan, stage.section.outputs)
        wanted = [j for j in recent if _follows(stage, made[j], writes, touched[j])]
        before.append(tuple(recent) if _large(plan, stage) else tuple(wanted))
        through = set(before[k]).union(*(ordered[j] for j in before[k]))
        ordered.append({j for j in through if j > k - max_in_flight})
    counts = tuple(len(stage.grid) for stage in stages)
    multi_threaded = []
    for k in range(len(stages)):
        near = range(max(0, k - max_in_flight + 1), min(len(stages), k + max_in_flight))
        beside = any(expensive[j] and min(j, k) not in ordered[max(j, k)] for j in near if j != k)
        multi_threaded.append(expensive[k] and counts[k] == 1 and not beside)
    return Dependencies(tuple(before), counts, tuple(multi_threaded))


def _slots(plan: Plan, values: Sequence[Value]) -> list[Slot]:
    return [plan.slots[v] for v in values if v in plan.slots]


def _follows(stage: Stage, made: frozenset[Value], writes: Sequence[Slot], touched: Sequence[Slot]) -> bool:
    if not made.isdisjoint(stage.section.loads):
        return True
    return any(
        a.tier == b.tier and a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes
        for a in writes
        for b in touched
    )


def _large(plan: Plan, stage: Stage) -> bool:
    """Whether a stage makes more that has no place of its own in the arena, as large weights' gradients, than the
    plan counts for stages in flight: it waits for all before it."""
    return sum(v.nbytes for v in stage.section.outputs if v not in plan.slots) > plan.alone
