"""Which stages wait for which, so that several may be in flight."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from fullframe.ir.graph import Value
from fullframe.schedule.plan import LARGE, Plan, Slot, Step

DEAR = 4_000_000_000  # operations: some ten milliseconds, as long as threads inside an op wait busily after it


def is_expensive(step: Step) -> bool:
    """Whether a step is worth more than one thread."""
    spent = 0
    for op in step.section.ops:
        rule: Any = op.rule
        through = op.inputs[rule.driver] if rule.kind == "reduce" else op.output
        spent += max(rule.cost(op, prod(through.shape)), 100 * prod(op.output.shape) * (rule.kind == "whole"))
    return spent > DEAR


class Waits(NamedTuple):
    """Per step, which of the few steps before it must be done first, how many tiles it has, and whether its one tile
    is worth more than one thread, with nothing dear beside it."""

    before: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    wide: tuple[bool, ...]


def waits_of(plan: Plan, dear: Sequence[bool]) -> Waits:
    """The steps that each step waits for, of the ``plan.ahead - 1`` before it: makers of what it reads, and all that
    read or write memory that it will write."""
    steps, ahead = plan.steps, plan.ahead
    touched = [_slots(plan, (*s.section.loads, *s.section.outputs)) for s in steps]
    made = [frozenset(s.section.outputs) for s in steps]
    before: list[tuple[int, ...]] = []
    ordered: list[set[int]] = []  # of those, the steps it waits for directly or through others
    for k, step in enumerate(steps):
        recent = range(max(0, k - ahead + 1), k)
        writes = _slots(plan, step.section.outputs)
        wanted = [j for j in recent if _follows(step, made[j], writes, touched[j])]
        before.append(tuple(recent) if _large(plan, step) else tuple(wanted))
        through = set(before[k]).union(*(ordered[j] for j in before[k]))
        ordered.append({j for j in through if j > k - ahead})
    counts = tuple(len(step.grid) for step in steps)
    wide = []
    for k in range(len(steps)):
        near = range(max(0, k - ahead + 1), min(len(steps), k + ahead))
        beside = any(dear[j] and min(j, k) not in ordered[max(j, k)] for j in near if j != k)
        wide.append(dear[k] and counts[k] == 1 and not beside)
    return Waits(tuple(before), counts, tuple(wide))


def _slots(plan: Plan, values: Sequence[Value]) -> list[Slot]:
    return [plan.slots[v] for v in values if v in plan.slots]


def _follows(step: Step, made: frozenset[Value], writes: Sequence[Slot], touched: Sequence[Slot]) -> bool:
    if not made.isdisjoint(step.section.loads):
        return True
    return any(a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes for a in writes for b in touched)


def _large(plan: Plan, step: Step) -> bool:
    """Whether a step makes much that has no place of its own in the arena, as large weights' gradients: it waits for
    all before it, or what the plan counts for steps in flight would be too little."""
    return sum(v.nbytes for v in step.section.outputs if v not in plan.slots) > LARGE
