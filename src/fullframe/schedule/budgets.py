"""The budgets that a step can run in, from the fastest plan to the smallest, and what each costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fullframe.errors import BudgetError
from fullframe.schedule.plan import Plan, arithmetic, human, seconds

PLENTY = 1 << 62
"""A budget that no plan comes near."""
COUNT = 8
"""Budgets of a table, at most."""


class Choice(NamedTuple):
    """A budget in bytes, with which the step adds ``projected`` bytes at most; ``arithmetic``: operations of
    expensive ops as a multiple of the fastest plan's; bytes of maps that a step reads from the disk and writes there;
    and how many ``seconds`` it will take, None where that is not known."""

    budget: int
    projected: int
    arithmetic: float
    read: int
    written: int
    seconds: float | None = None


class Budgets(tuple[Choice, ...]):
    """Choices from the fastest to the smallest, printable as a table."""

    def __str__(self) -> str:
        rows = [("budget", "projected", "arithmetic", "read from disk", "written to disk", "predicted")]
        for c in self:
            moved = human(c.read), human(c.written)
            rows.append((human(c.budget), human(c.projected), f"{c.arithmetic:.2f}", *moved, seconds(c.seconds)))
        return "\n".join("  ".join(f"{cell:>15}" for cell in row) for row in rows)


def budgets(planned: Callable[[int], Plan]) -> Budgets:
    """What some budgets buy: that of the fastest plan, the smallest, and others at equal ratios between.

    ``planned`` is the plan for a budget in bytes, and raises `BudgetError` with the smallest that would do. Of
    budgets that have the same plan only the smallest is kept.
    """
    fastest = planned(PLENTY)
    top, least = fastest.projected_bytes, _least(planned)
    found: dict[int, Choice] = {}
    for k in range(COUNT):
        budget = top if k == 0 else round(top * (least / top) ** (k / (COUNT - 1)))
        made = fastest if k == 0 else planned(max(budget, least))
        more = arithmetic(made) / max(1.0, arithmetic(fastest))
        found[made.projected_bytes] = Choice(
            max(budget, least), made.projected_bytes, more, *made.disk_traffic, made.predicted_seconds
        )
    return Budgets(tuple(found.values()))


def _least(planned: Callable[[int], Plan]) -> int:
    """The smallest budget there is."""
    try:
        return planned(1).projected_bytes
    except BudgetError as error:
        return error.smallest
