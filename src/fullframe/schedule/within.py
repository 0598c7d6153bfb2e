"""Within a budget: the fastest plan found that stores no more than fits.

First a ladder of states with less and less stored, whatever the budget, until one fits: the smallest of them is the
smallest budget that is named. Then, from the bytes that this one leaves, the best state for the limit is searched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from fullframe.ir.graph import Graph
from fullframe.schedule.clones import Draft
from fullframe.schedule.plan import Plan
from fullframe.schedule.rematerialize import Stages
from fullframe.schedule.search import Search

SHARES = (0.8, 0.6, 0.4, 0.25, 0.15, 0.08, 0.04, 0.0)  # of the most that is stored at once
MOST = (64 << 20, 12 << 20, 0)  # bytes of the windows in work where values are recomputed; 0: as few as may be
WINDOW = 4 << 20  # bytes of the largest window of a tile that the search counts halo for
TRIES = 4  # of limits, at a price of a byte,
FEW = 2  # or so many where there are several: what stores less because bytes are dear is seldom at the limit
CLOSE = 0.02  # of a limit, by which another is not worth a try
DEPTHS = (0.8, 0.6, 0.4, 0.2, 0.0)  # of the limit, down to which gaps are dropped before some are filled again
VISITS = 3_000_000  # nodes looked at, after which nothing else is tried
FILLING = 500_000  # nodes looked at to fill a rung again
MANY = 400  # stages, beyond which joining them is not tried: a search that is long already would take twice as long


@dataclass(frozen=True, eq=False)
class Found:
    """A state of stages, its draft, the bytes that its windows may take, and the plan of these."""

    stages: Stages
    state: Search
    draft: Draft
    most: int
    plan: Plan

    @property
    def cost(self) -> float:
        """Operations, as the search counts them."""
        return self.state.total


Finish = Callable[[Draft, int], Plan]


def within(
    both: Sequence[Stages],
    base: Plan,
    finish: Finish,
    over: Callable[[Plan], int],
    price: Callable[[Plan], float],
    worth: Sequence[float],
) -> Found:
    """What fits, as fast as was found, by searches as of `searches_of`; the smallest plan there is where none does.
    ``over`` says by how many bytes a plan does not fit, ``price`` what it costs, and ``worth`` at which prices of a
    byte to search."""
    fits, peak = _ladder(both, base, finish, over)
    if over(fits.plan) > 0:
        return fits
    best, lowest = fits, price(fits.plan)
    for stages in both:
        if len(worth) == 1 and stages.search.total > best.cost:
            continue  # even with everything stored
        low, limit, high = float(peak), float(peak - over(fits.plan)), inf
        for byte in worth:
            start = stages.search if byte == stages.search.byte else stages.search.priced(byte)
            for _ in range(TRIES if len(worth) == 1 else FEW):
                state = best_of(start, limit)
                if state is None:
                    break
                made = _made(stages, state, fits.most, finish)
                excess, cost = over(made.plan), price(made.plan)
                if excess <= 0:
                    best, lowest = (made, cost) if cost < lowest else (best, lowest)
                    low, following = limit, min(limit - excess, (limit + high) / 2)
                else:
                    high, following = limit, max(limit - excess, (low + limit) / 2)
                if abs(following - limit) < CLOSE * limit:
                    break
                limit = following
            limit, high = low, inf
    return _roomier(best, finish, over, price)


def _roomier(found: Found, finish: Finish, over: Callable[[Plan], int], price: Callable[[Plan], float]) -> Found:
    """With larger windows, and less stored to make room for them, where that is cheaper: small tiles are mostly halo
    and calls."""
    best, lowest = found, price(found.plan)
    for most in MOST:
        if most <= found.most:
            break
        state = found.state.copy()
        limit, made = max(state.profile(), default=0), _made(found.stages, state, most, finish)
        for _ in range(TRIES):
            excess = over(made.plan)
            limit -= excess
            if excess <= 0 or not state.drop(limit):
                break
            state.fill(limit, state.visits[0] + FILLING)
            made = _made(found.stages, state, most, finish)
        if over(made.plan) <= 0 and price(made.plan) < lowest:
            best, lowest = made, price(made.plan)
    return best


def searches_of(graph: Graph, draft: Draft) -> list[Stages]:
    """The stages of a draft as they are, and joined where that changes anything and they are not too many."""
    if len(draft.stages) > MANY:
        return [Stages(graph, draft, WINDOW, join=False)]
    joined = Stages(graph, draft, WINDOW, join=True)
    return [Stages(graph, draft, WINDOW, join=False)] + [joined] * any(
        not (s.wanted or s.offers) for s in joined.stages
    )


def _ladder(both: Sequence[Stages], base: Plan, finish: Finish, over: Callable[[Plan], int]) -> tuple[Found, int]:
    """The first rung that fits, or the smallest, and the most that is stored at once on it."""
    smallest: tuple[Found, int] | None = None
    states = [stages.search.copy() for stages in both]
    tops = [max(state.profile(), default=0) for state in states]
    passed: list[tuple[Stages, Search]] = []

    def rung(stages: Stages, state: Search) -> bool:
        nonlocal smallest
        for most in MOST:
            found = _made(stages, state, most, finish), max(state.profile(), default=0)
            if smallest is None or over(found[0].plan) < over(smallest[0].plan):
                smallest = found
            if over(found[0].plan) <= 0:
                return True
            if found[0].plan.bytes.scratch * 16 < found[0].plan.bytes.total:
                break  # smaller windows would not help much
        return False

    for share in SHARES:
        for k, stages in enumerate(both):
            states[k].drop(tops[k] * share)
            peak = max(states[k].profile(), default=0)
            states[k].fill(peak, states[k].visits[0] + FILLING)
            if over(base) > base.bytes.total + base.bytes.host + base.bytes.disk - base.bytes.outputs - peak:
                # The maps alone would not fit; they may be the smallest all the same.
                passed.append((stages, states[k].copy()))
            elif rung(stages, states[k].copy()) and smallest is not None:
                return smallest
    for stages, state in passed:
        rung(stages, state)
    assert smallest is not None
    return smallest


def _made(stages: Stages, state: Search, most: int, finish: Finish) -> Found:
    made = stages.draft(state)
    return Found(stages, state.copy(), made, most, finish(made, most))


def best_of(start: Search, limit: float) -> Search | None:
    """The cheapest state found within a limit; None where there is none.

    Of several starts with less and less stored each is filled again.
    """
    enough = start.visits[0] + VISITS
    state = start.copy()
    if not state.drop(limit):
        return None
    best: Search | None = None
    for depth in (1.0, *DEPTHS):
        if depth < 1.0:
            state.drop(limit * depth)
        tried = state.copy()
        tried.fill(limit, enough)
        if max(tried.profile()) <= limit and (best is None or tried.total < best.total):
            best = tried
        if start.visits[0] > enough:
            break
    return best
