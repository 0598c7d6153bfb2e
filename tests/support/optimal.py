"""The least that storing within a limit can cost, by looking at every state: for small graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, pairwise
from math import inf
from typing import Any
from unittest import mock

import torch
from torch import nn

import fullframe
from fullframe.schedule import planner, within
from fullframe.schedule.cost import bits_of
from fullframe.schedule.search import Search

WINDOW = 20_000  # bytes of the largest window of a tile: maps of these graphs are small
MOST = 400_000  # ways from the states of a stage to those of the next, of all stages


class TooLarge(Exception):
    """A graph with more states than can be looked at."""


@contextmanager
def noted(found: list[tuple[Any, Any]]) -> Iterator[None]:
    """Inside, graphs that are planned and their drafts are noted."""
    fit = planner._fit

    def noting(begun: Any, request: Any) -> Any:
        found.append((begun.graph, begun.draft))
        return fit(begun, request)

    with mock.patch.object(planner, "_fit", noting):
        yield


class Small(nn.Module):
    """A few convolutions, drawn with what lies between them: norms, functions, pools, repetition, a residual."""

    def __init__(self, seed: int):
        super().__init__()
        rng = random.Random(seed)
        self.width = rng.choice((4, 8))
        self.parts = nn.ModuleList()
        deep, level = 1, 0
        for _ in range(rng.randrange(1, 5)):
            kernel = rng.choice((1, 3, 3, 5))
            self.parts.append(nn.Conv2d(deep, self.width, kernel, padding=kernel // 2))
            deep = self.width
            if rng.random() < 0.3:
                self.parts.append(rng.choice((nn.BatchNorm2d, nn.InstanceNorm2d))(deep))
            self.parts.append(rng.choice((nn.ReLU, nn.SiLU, nn.Tanh))())
            if level < 2 and rng.random() < 0.3:
                self.parts.append(rng.choice((nn.AvgPool2d, nn.MaxPool2d))(2))
                level += 1
            elif level and rng.random() < 0.5:
                self.parts.append(nn.Upsample(scale_factor=2.0))
                level -= 1
        self.residual = rng.random() < 0.3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            made = part(x)
            x = made + x if self.residual and made.shape == x.shape and isinstance(part, nn.Conv2d) else made
        return x.square().mean()


def plan_of(seed: int) -> tuple[list, fullframe.Plan]:
    """A drawn network's graphs with their drafts, and its plan."""
    torch.manual_seed(seed)
    graphs: list = []
    with noted(graphs):
        plan = fullframe.tile(nn.Sequential(Small(seed)), loss=lambda made, _: made, workers=1).plan(
            torch.rand(1, 1, 96, 128), torch.zeros(1)
        )
    return graphs, plan


def searched(graph: Any, draft: Any) -> list[Search]:
    """The states with everything stored that the planner begins with."""
    with mock.patch.object(within, "WINDOW", WINDOW):
        return [stages.search for stages in within.searches_of(graph, draft)]


def best(starts: Sequence[Search], limit: float) -> float:
    """What the planner's search finds; infinite where it finds nothing."""
    states = [within.best_of(start, limit) for start in starts]
    return min((state.total for state in states if state is not None), default=inf)


class Optimum:
    """All states of the stages of a search, looked at once for any limit.

    The state is what a stage finds stored. What a stage costs follows from what it finds and what it leaves, what is
    stored while it runs from both; so the cheapest way through the stages is found from stage to stage (a shortest
    path).
    """

    def __init__(self, start: Search):
        self.search, self.sizes = start, start.nodes.size
        self.count = len(start.stages)
        if start.large:
            raise TooLarge("a large value that is always stored")
        late = self._latest()
        free = [self._free(t, late) for t in range(1, self.count)]
        ways = sum(1 << len(a) + len(b) for a, b in pairwise([[], *free, []]))
        if ways > MOST:
            raise TooLarge(f"{ways:,} ways from stage to stage")
        self.states = [[0], *(self._states(t, f) for t, f in enumerate(free, 1)), [0]]
        self.steps = [self._steps(t) for t in range(self.count)]

    def least(self, limit: float) -> float:
        """The least cost where no stage has more than so many bytes stored."""
        costs = {0: 0.0}
        for steps in self.steps:
            following: dict[int, float] = {}
            for before, after, cost, used in steps:
                if used <= limit and before in costs:
                    total = costs[before] + cost
                    if total < following.get(after, inf):
                        following[after] = total
            costs = following
        return costs.get(0, inf)

    def _latest(self) -> list[int]:
        """By node, the last stage that might read it: one under which it lies."""
        latest = [-1] * len(self.sizes)
        for t, stage in enumerate(self.search.stages):
            for j in (*stage.wanted, *stage.offers):
                for k in bits_of(self.search.origins[j] & ~(1 << j)):
                    latest[k] = max(latest[k], t)
        return latest

    def _earliest(self, k: int) -> int:
        """The first stage that can make a node: with all that must be stored before, and not in the same one."""
        search = self.search
        if search.home[k] >= 0:
            return search.home[k]
        under = [j for j in bits_of(search.origins[k]) if search.home[j] >= 0]
        return max(search.home[j] + bool(search.nodes.always[j]) for j in under) if under else 0

    def _free(self, t: int, latest: Sequence[int]) -> list[int]:
        """What a stage may find stored or not: what one before it can have made, and one from it on may read."""
        search = self.search
        return [
            k
            for k, always in enumerate(search.nodes.always)
            if not always
            and self.sizes[k]
            and not search.pinned[t] >> k & 1
            and latest[k] >= t > self._earliest(k)
            and any(search.fits[s] >> k & 1 for s in range(self._earliest(k), t))
        ]

    def _states(self, t: int, free: Sequence[int]) -> list[int]:
        """What a stage may find stored, with what it must."""
        must = self.search.pinned[t]
        return [must | sum(1 << k for k in some) for n in range(len(free) + 1) for some in combinations(free, n)]

    def _steps(self, t: int) -> list[tuple[int, int, float, int]]:
        search, found = self.search, []
        for before in self.states[t]:
            for after in self.states[t + 1]:
                starts = after & ~before
                if any(not search.fits[t] >> k & 1 or t < self._earliest(k) for k in bits_of(starts)):
                    continue
                cost = search.evaluate(t, before, after).cost
                if cost < inf:
                    found.append((before, after, cost, sum(self.sizes[k] for k in bits_of(before | after))))
        return found
