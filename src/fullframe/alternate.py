"""Sections of independent branches put between each other, where that takes no more memory.

One after the other, sections of one branch have to wait for each other's sums; with a section of another branch
between them, whose turn it is anyway soon, there is something to do meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush

from fullframe.graph import Value
from fullframe.memory import lifetimes
from fullframe.section import Section


def alternate(steps: Sequence[Section], early: int, kept: Iterable[Value], sizes: dict[Value, int],
              slight: Callable[[Section], bool] = lambda _: False) -> list[Section]:  # fmt: skip
    """The order with sections moved ahead that need not wait for the one before; the peak is what it was.

    ``steps[:early]`` stay the first; ``kept`` values live to the end. What is ``slight`` and waits for nothing is no
    work to put between: it comes just before its first reader.
    """
    used = lifetimes(steps, kept).usage(len(steps), sizes)
    peak = max(used, default=0)
    maker = {v: k for k, s in enumerate(steps) for v in s.outputs}
    needs = [{maker[v] for v in s.loads if v in maker} for s in steps]
    users: list[list[int]] = [[] for _ in steps]
    for k, wanted in enumerate(needs):
        for j in wanted:
            users[j].append(k)
    lone = {k for k, wanted in enumerate(needs) if not wanted and users[k] and slight(steps[k])}
    lone -= {k for k in lone if k < early <= users[k][0]}  # made early for its own sake
    waiting = [len(n - lone) for n in needs]
    ready = [k for k, n in enumerate(waiting) if n == 0 and k not in lone]
    made = [sum(sizes.get(v, 0) for v in s.outputs) for s in steps]
    order: list[int] = []
    done = [k in lone for k in range(len(steps))]
    first = done.index(False) if False in done else len(steps)  # in the old order, of those still to come
    while first < len(steps):
        bound = early if first < early else len(steps)
        at, highest = first, 0  # the most in use at steps passed over
        chosen, passed = first, []
        while ready:
            k = heappop(ready)
            passed.append(k)
            if k >= bound:
                break
            if order and order[-1] in needs[k]:
                continue
            for j in range(at, k):
                highest = highest if done[j] else max(highest, used[j])
            at = k
            if k == first or made[k] + sum(made[j] for j in needs[k] & lone) <= peak - highest:
                chosen = k
                break
        for k in passed:
            if k != chosen:
                heappush(ready, k)
        added = [*sorted(needs[chosen] & lone), chosen]
        lone.difference_update(added)
        order += added
        done[chosen] = True
        for j in range(first, chosen):
            used[j] += sum(made[k] for k in added)
        while first < len(steps) and done[first]:
            first += 1
        for k in users[chosen]:
            waiting[k] -= 1
            if waiting[k] == 0:
                heappush(ready, k)
    return [steps[k] for k in order]
