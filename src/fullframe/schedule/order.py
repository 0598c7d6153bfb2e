"""The order of sections: candidate orders, of which the planner takes the one of lowest peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush

from fullframe.ir.graph import Graph, Value
from fullframe.partition.sections import Section
from fullframe.schedule.memory import lifetimes


def orders(graph: Graph, sections: Sequence[Section], sizes: dict[Value, int]) -> Iterator[tuple[list[Section], int]]:
    """Candidate orders, each with the number of stages that make the early outputs.

    Depth first from the section with the longest way to it: a branch finishes, backward included,
    before the next begins. Once with and once without running at once whatever frees memory.
    """
    needs = _needs(sections)
    depth = _depths(needs)
    early = {v for v in graph.early if v is not None}
    first = [k for k, s in enumerate(sections) if early & set(s.outputs)]
    users = [[] for _ in sections]
    for k, wanted in enumerate(needs):
        for j in wanted:
            users[j].append(k)
    for greedy in (True, False):
        walk = _Walk(sections, needs, users, depth, sizes, greedy)
        for k in sorted(first, key=lambda k: -depth[k]):
            walk.visit(k, within=_closure(first, needs))
        count = len(walk.order)
        for k in sorted(range(len(sections)), key=lambda k: -depth[k]):
            walk.visit(k, within=None)
        yield [sections[k] for k in walk.order], count


def _needs(sections: Sequence[Section]) -> list[list[int]]:
    maker = {v: k for k, s in enumerate(sections) for v in s.outputs}
    return [sorted({maker[v] for v in s.loads if v in maker}) for s in sections]


def _depths(needs: Sequence[Sequence[int]]) -> list[int]:
    """Longest path to each section."""
    depth: list[int | None] = [None] * len(needs)
    for start in range(len(needs)):
        stack = [start]
        while stack:
            k = stack[-1]
            waiting = [j for j in needs[k] if depth[j] is None]
            if waiting:
                stack.extend(waiting)
                continue
            depth[k] = 1 + max((depth[j] or 0 for j in needs[k]), default=0)
            stack.pop()
    return [d or 0 for d in depth]


def _closure(start: Sequence[int], needs: Sequence[Sequence[int]]) -> set[int]:
    found: set[int] = set()
    stack = list(start)
    while stack:
        k = stack.pop()
        if k not in found:
            found.add(k)
            stack.extend(needs[k])
    return found


class _Walk:
    """A depth-first walk that emits sections; ``remaining`` counts readers of each value to come."""

    def __init__(self, sections, needs, users, depth, sizes, greedy):
        self.sections, self.needs, self.users = sections, needs, users
        self.depth, self.sizes, self.greedy = depth, sizes, greedy
        self.order: list[int] = []
        self.done: set[int] = set()
        self.remaining: dict[Value, int] = {}
        for section in sections:
            for value in section.loads:
                self.remaining[value] = self.remaining.get(value, 0) + 1

    def visit(self, goal: int, within: set[int] | None) -> None:
        stack = [goal]
        while stack:
            k = stack[-1]
            if k in self.done:
                stack.pop()
                continue
            waiting = [j for j in self.needs[k] if j not in self.done]
            if waiting:
                stack.append(max(waiting, key=lambda j: (self.depth[j], -j)))
                continue
            stack.pop()
            self._emit(k)
            if self.greedy:
                self._drain(k, within)

    def _emit(self, k: int) -> None:
        self.order.append(k)
        self.done.add(k)
        for value in self.sections[k].loads:
            self.remaining[value] -= 1

    def _drain(self, k: int, within: set[int] | None) -> None:
        """Run whatever has become ready and does not add memory, first of all untiled work."""
        queue = list(self.users[k])
        while queue:
            j = queue.pop(0)
            if j in self.done or (within is not None and j not in within):
                continue
            if any(i not in self.done for i in self.needs[j]) or self._growth(j) > 0:
                continue
            self._emit(j)
            queue.extend(self.users[j])

    def _growth(self, k: int) -> int:
        section = self.sections[k]
        freed = sum(self.sizes.get(v, 0) for v in section.loads if self.remaining[v] == 1)
        return sum(self.sizes.get(v, 0) for v in section.outputs) - freed


def interleave(stages: Sequence[Section], early: int, kept: Iterable[Value], sizes: dict[Value, int],
              trivial: Callable[[Section], bool] = lambda _: False) -> list[Section]:  # fmt: skip
    """The order with sections moved ahead that need not wait for the one before; the peak is what it was.

    ``stages[:early]`` stay the first; ``kept`` values live to the end. What is ``trivial`` and waits for nothing is
    no work to put between: it comes just before its first reader.
    """
    used = lifetimes(stages, kept).usage(len(stages), sizes)
    peak = max(used, default=0)
    maker = {v: k for k, s in enumerate(stages) for v in s.outputs}
    needs = [{maker[v] for v in s.loads if v in maker} for s in stages]
    users: list[list[int]] = [[] for _ in stages]
    for k, wanted in enumerate(needs):
        for j in wanted:
            users[j].append(k)
    deferred = {k for k, wanted in enumerate(needs) if not wanted and users[k] and trivial(stages[k])}
    deferred -= {k for k in deferred if k < early <= users[k][0]}  # made early for its own sake
    waiting = [len(n - deferred) for n in needs]
    ready = [k for k, n in enumerate(waiting) if n == 0 and k not in deferred]
    made = [sum(sizes.get(v, 0) for v in s.outputs) for s in stages]
    order: list[int] = []
    done = [k in deferred for k in range(len(stages))]
    first = done.index(False) if False in done else len(stages)  # in the old order, of those still to come
    while first < len(stages):
        bound = early if first < early else len(stages)
        at, highest = first, 0  # the most in use at stages passed over
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
            if k == first or made[k] + sum(made[j] for j in needs[k] & deferred) <= peak - highest:
                chosen = k
                break
        for k in passed:
            if k != chosen:
                heappush(ready, k)
        added = [*sorted(needs[chosen] & deferred), chosen]
        deferred.difference_update(added)
        order += added
        done[chosen] = True
        for j in range(first, chosen):
            used[j] += sum(made[k] for k in added)
        while first < len(stages) and done[first]:
            first += 1
        for k in users[chosen]:
            waiting[k] -= 1
            if waiting[k] == 0:
                heappush(ready, k)
    return [stages[k] for k in order]
