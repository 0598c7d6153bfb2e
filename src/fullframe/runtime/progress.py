"""How far a long step is: a line in the log now and then."""

from __future__ import annotations

import logging
import time
from functools import cached_property
from math import prod

from fullframe.schedule.plan import Plan, stage_cost

LOG = logging.getLogger("fullframe.progress")
SECONDS = 15.0  # between two lines, and before the first


class Progress:
    """Of one run of a plan, in shares of its arithmetic. The pixels that it counts are those of the largest input."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.start = self.last = time.monotonic()
        self.done = 0  # stages
        self.tiles = [0] * len(plan.stages)  # made from Python

    @cached_property
    def _costs(self) -> list[float]:
        return [stage_cost(self.plan, stage) for stage in self.plan.stages]

    @property
    def share(self) -> float:
        """What is done of the arithmetic, from 0 to 1."""
        costs, stages = self._costs, self.plan.stages
        parts = (c * n / len(s.grid) for c, n, s in zip(costs, self.tiles, stages, strict=True))
        return (sum(costs[: self.done]) + sum([*parts][self.done :])) / max(1.0, sum(costs))

    def poll(self) -> None:
        """Say how far it is, if nothing has been said for a while and somebody listens."""
        now = time.monotonic()
        if now - self.last < SECONDS or not LOG.isEnabledFor(logging.INFO):
            return
        self.last = now
        share, spent = self.share, now - self.start
        if share > 0:
            pixels = max(prod((v.shape[0], *v.shape[2:])) for v in self.plan.graph.inputs if v.shape) * share
            left = spent / share - spent
            LOG.info(
                "%.1f %% of a step in %s, %s left, %.3g Mpx/s",
                100 * share, _minutes(spent), _minutes(left), pixels / spent / 1e6,
            )  # fmt: skip


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
