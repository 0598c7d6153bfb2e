"""Several steps in flight: a thread without a tile goes on to the next step that need not wait.

Most sections end with a sum over all tiles that the next one needs. Threads that waited there for each other would
spend a tenth of the time so; where the planner found sections of other branches to put between, they go on with
those. What each sum adds up, and in which order, does not depend on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fullframe.graph import Value
from fullframe.plan import LARGE, Plan, Slot, Step


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


class Work(NamedTuple):
    """What a flow runs: ``begin`` a step, make a ``tile`` of it, ``add`` its partial results in order, ``end`` it,
    and ``free`` what it was the last to read once all before it are done, too."""

    begin: Callable[[int], Any]
    tile: Callable[[int, int], Any]
    add: Callable[[Any, Any], None]
    end: Callable[[int, Any], None]
    free: Callable[[int], None]


class Flow:
    """Runs the ``steps``.

    Every thread that helps calls `run`; one of them with ``own``, through which it makes the wide steps, which no
    other thread takes. No tile is begun that is ``most`` after one whose result is not there yet: results
    that wait for their turn take memory.
    """

    def __init__(self, steps: range, waits: Waits, ahead: int, most: int, work: Work):
        self.stop, self.before, self.counts, self.wide = steps.stop, waits.before, waits.counts, waits.wide
        self.ahead, self.most, self.work = ahead, most, work
        self.base = steps.start  # all steps before it are done
        self.done: set[int] = set()  # and these
        self.open: dict[int, _Open] = {}  # steps of which tiles are to be had, or in work
        self.changed = threading.Condition()
        self.idle = 0  # threads that wait for a change
        self.failed = False
        self._begin()

    def run(self, own: Callable[[Callable[[], None]], None] | None = None) -> None:
        """Make tiles until there are none. Raises what a tile raises, when the other threads have stopped or will."""
        try:
            while (picked := self._pick(own is not None)) is not None:
                step, k = picked
                if own is not None and self.wide[step.number]:
                    own(lambda step=step, k=k: self._make(step, k))
                else:
                    self._make(step, k)
        except BaseException:
            self.fail()
            raise

    def fail(self) -> None:
        """Let no thread begin another tile."""
        with self.changed:
            self.failed = True
            self.changed.notify_all()

    def _make(self, step: _Open, k: int) -> None:
        if not step.put(k, self.work.tile(step.number, k), self.work.add):
            if self.idle and step.tiles:  # one may wait for this result
                with self.changed:
                    self.changed.notify()
            return
        self.work.end(step.number, step.state)
        with self.changed:
            del self.open[step.number]
            self.done.add(step.number)
            while self.base in self.done:
                self.done.remove(self.base)
                self.work.free(self.base)
                self.base += 1
            self._begin()
            if self.idle:
                self._wake()

    def _pick(self, own: bool) -> tuple[_Open, int] | None:
        """A tile to make, of a step that is begun before others; None when all are made or one has failed."""
        with self.changed:
            while not self.failed and self.base < self.stop:
                found = next((s for s in self.open.values() if self._may(s, own)), None)
                if found is not None:
                    found.tiles -= 1
                    return found, found.count - found.tiles - 1
                self.idle += 1
                self.changed.wait()
                self.idle -= 1
            return None

    def _may(self, step: _Open, own: bool) -> bool:
        first = step.count - step.tiles
        return step.tiles > 0 and (own or not self.wide[step.number]) and first - step.next < self.most

    def _begin(self) -> None:
        for k in range(self.base, min(self.stop, self.base + self.ahead)):
            if k in self.open or k in self.done or any(j >= self.base and j not in self.done for j in self.before[k]):
                continue
            self.open[k] = _Open(k, self.counts[k], self.work.begin(k))

    def _wake(self) -> None:
        """Wake threads if there is more to do than the thread that asks will do itself."""
        wide = any(s.tiles and self.wide[s.number] for s in self.open.values())
        more = sum(s.tiles for s in self.open.values()) - 1
        if wide or self.base >= self.stop:
            self.changed.notify_all()
        elif more > 0:
            self.changed.notify(more)


class _Open:
    """A step that has begun: ``tiles`` still to be given away, ``left`` still to be finished."""

    __slots__ = ("count", "left", "lock", "next", "number", "state", "tiles", "waiting")

    def __init__(self, number: int, count: int, state: Any):
        self.number, self.count, self.state = number, count, state
        self.tiles = self.left = count
        self.next, self.waiting = 0, {}
        self.lock = threading.Lock()

    def put(self, k: int, made: Any, add: Callable[[Any, Any], None]) -> bool:
        """Add results in the order of their tiles, whichever comes first: every bit of a sum is then fixed.

        Returns whether this was the last.
        """
        with self.lock:
            self.waiting[k] = made
            while self.next in self.waiting:
                add(self.state, self.waiting.pop(self.next))
                self.next += 1
            self.left -= 1
            return not self.left
