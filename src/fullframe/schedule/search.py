"""Which values are stored in which gaps between their uses, so that stored bytes keep to a limit at least cost.

The state is, for every node and every stage, whether the stage finds the node stored when it begins. A stage makes
all else that it needs from what it finds, through any number of expensive ops; what it makes can be stored behind it.
Starting from everything stored, gaps are dropped one by one, the one that costs least for the bytes that it frees
where there are too many; from there, and from states with much less stored, the gaps that save most per byte and
stage are filled again. The best of all these is taken. No stage depends on clocks: the same graph has the same plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import accumulate, pairwise
from math import inf

from fullframe.schedule.cost import BYTE, Nodes, Stage, bits_of

FLAT = 2  # expensive ops of a stage that is still best walked in strips
LARGEST = 8  # times the window of a tile: none of what is made again on its way may be larger


@dataclass(frozen=True)
class Made:
    """What a stage makes and reads, as bit sets, the bytes that it moves, and the operations that it counts for, with
    or without those."""

    made: int
    read: int
    moved: int
    work: float
    cost: float


class Search:
    """A state of storing, with what follows from it. ``window``: bytes of the largest window of a tile; ``byte``: the
    operations that loading or storing a byte counts for."""

    def __init__(self, nodes: Nodes, stages: Sequence[Stage], window: int, extents: dict[int, int]):
        self.nodes, self.stages, self.window, self.extents = nodes, stages, window, extents
        self.byte = float(BYTE)
        count = len(nodes.values)
        self.above = [sum({1 << e.node for e in edges}) for edges in nodes.edges]
        self.origins: list[int] = []  # by node: itself, and all that it is made of
        for k in range(count):
            mask = 1 << k
            for e in nodes.edges[k]:
                mask |= self.origins[e.node]
            self.origins.append(mask)
        self.bytes = [v.nbytes for v in nodes.values]
        self.inner = [tuple(e for e in edges if not nodes.always[e.node]) for edges in nodes.edges]
        self.known: dict[tuple[int, int, int], Made] = {}
        self.always = sum(1 << k for k in range(count) if nodes.always[k])
        self.home = [-1] * count
        for t, stage in enumerate(stages):
            for k in (*stage.wanted, *stage.offers):
                self.home[k] = t
        self.wanted = [sum(1 << k for k in s.wanted) for s in stages]
        self.large = sum(1 << k for k in range(count) if nodes.always[k] and nodes.size[k] > 1 << 16)
        alike: dict[frozenset[int], int] = {}
        for k in range(count):
            axes = frozenset(a for a, _ in nodes.axes[k])
            if not nodes.always[k]:
                alike[axes] = alike.get(axes, 0) | 1 << k
        self.fits = [alike.get(s.axes, 0) | sum(1 << k for k in s.offers) for s in stages]  # what can be stored there
        self.parts = sum(1 << k for k in range(count) if self.home[k] < 0)
        self.enter = [0] * (len(stages) + 1)  # by stage: droppable nodes that it finds stored
        self.pinned = [0] * (len(stages) + 1)  # of them those that it must find
        self.visits = [0]  # of this state and all copies
        self._pin()
        self.done: list[Made] = [Made(0, 0, 0, 0.0, 0.0)] * len(stages)
        self.reads, self.makes = [0] * count, [0] * count  # by node: the stages that read it stored, and that make it
        self.refresh(range(len(stages)))

    # What a stage makes --------------------------------------------------------------------------------------------

    def _pin(self) -> None:
        """Stages that are not cut read maps as they are stored."""
        for t, stage in enumerate(self.stages):
            if stage.cut:
                continue
            for j in bits_of(self._direct(stage)):
                if not self.nodes.always[j] and self.home[j] < t:
                    for at in range(self.home[j] + 1, t + 1):
                        self.enter[at] |= 1 << j
                        self.pinned[at] |= 1 << j

    def found(self, t: int) -> int:
        """The nodes that a stage finds stored."""
        return self.enter[t] | self.always & ~self.wanted[t]

    def evaluate(self, t: int, enter: int | None = None, after: int | None = None) -> Made:
        """What a stage makes where it finds and leaves these droppable nodes."""
        enter = self.enter[t] if enter is None else enter
        after = self.enter[t + 1] if after is None else after
        starts = after & ~enter
        todo = self.wanted[t] | starts
        within = 0
        for k in bits_of(todo):
            within |= self.origins[k]
        key = t, enter & within, starts
        if key not in self.known:
            self.known[key] = self._evaluate(t, enter & within, starts)
        return self.known[key]

    def priced(self, byte: float) -> Search:
        """The same state, where a byte counts for so many operations."""
        other = self.copy()
        other.byte = byte
        other.known = {key: self._priced(made, byte) for key, made in self.known.items()}
        other.done = [self._priced(made, byte) for made in self.done]
        other.refresh(range(len(self.stages)))
        return other

    @staticmethod
    def _priced(made: Made, byte: float) -> Made:
        return replace(made, cost=made.work + byte * made.moved)

    def _evaluate(self, t: int, enter: int, starts: int) -> Made:
        found = enter | self.always & ~self.wanted[t]
        todo = self.wanted[t] | starts
        read = mask = 0
        made: list[int] = []
        above = self.above
        while todo:
            read |= todo & found
            todo &= ~found
            if not todo:
                break
            k = todo.bit_length() - 1
            todo = todo ^ 1 << k | above[k]
            mask |= 1 << k
            made.append(k)
        self.visits[0] += len(made)
        stage = self.stages[t]
        if not stage.cut:
            allowed = self.wanted[t] | sum(1 << k for k in stage.offers) | self.parts
            if mask & ~allowed & ~self.always:
                return Made(mask, read, 0, inf, inf)
        moved = sum(self.bytes[k] for k in bits_of(read)) + sum(self.bytes[k] for k in bits_of(starts))
        work = self._work(stage, made, read)
        return Made(mask, read, moved, work, work + self.byte * moved)

    def _work(self, stage: Stage, made: Sequence[int], read: int) -> float:
        """Operations with the halo of tiles."""
        nodes, size = self.nodes, self.bytes
        total = sum(nodes.work[k] for k in made)
        if not stage.cut:
            return total
        largest = max((size[k] for k in made if nodes.axes[k]), default=0)
        largest = max(largest, max((size[k] for k in bits_of(read)), default=0))
        if largest <= self.window or (len(made) < 2 and not read):
            return total
        shares = self._shares(stage, self.window / largest, squares=sum(nodes.heavy[k] > 0 for k in made) > FLAT)
        return self._grown(made, shares)

    def _shares(self, stage: Stage, share: float, *, squares: bool) -> dict[int, float]:
        """Tiles of this share of the image, as parts of its axes: strips, or as nearly squares as may be."""
        axes = sorted(stage.axes)
        sizes = [self.extents[a] for a in axes]
        found: dict[int, float] = {}
        left = share
        for position, (a, n) in enumerate(zip(axes, sizes, strict=True)):
            wanted = left
            rest = len(axes) - position
            if squares and rest > 1 and (position > 0 or len(axes) < 3):
                area = left * n
                for m in sizes[position + 1 :]:
                    area *= m
                wanted = area ** (1 / rest) / n
            found[a] = max(1 / n, min(1.0, wanted))
            left = min(1.0, left / found[a])
        return found

    def _grown(self, made: Sequence[int], shares: dict[int, float]) -> float:
        """Operations with the halo of tiles that are these shares of their axes; infinite where that reaches so far
        that a window is no longer small."""
        nodes, total, most = self.nodes, 0.0, LARGEST * self.window
        work, inner, along = nodes.work, self.inner, nodes.axes
        width: dict[int, list[float]] = {}
        for k in made:
            mine = width.get(k)
            if mine is None:
                mine = [n * shares.get(a, 1.0) for a, n in along[k]]
                total += work[k]
            else:
                growth, part = 1.0, float(self.bytes[k])
                for (a, n), w in zip(along[k], mine, strict=True):
                    reached = (w if w < n else n) / n
                    part *= reached
                    growth *= reached / shares.get(a, 1.0)
                if part > most:
                    return inf
                total += work[k] * growth
            for edge in inner[k]:
                node = edge.node
                known = width.get(node)
                if known is None:
                    known = width[node] = [n * shares.get(a, 1.0) for a, n in along[node]]
                for at, (source, times, more) in enumerate(edge.widths):
                    multi_threaded = more if source < 0 else times * mine[source] + more
                    if multi_threaded > known[at]:
                        known[at] = multi_threaded
        return total

    # The state -----------------------------------------------------------------------------------------------------

    @property
    def total(self) -> float:
        return sum(d.cost for d in self.done)

    def heavy(self) -> float:
        """Operations of expensive ops alone, without halo."""
        return sum(self.nodes.heavy[k] for d in self.done for k in bits_of(d.made))

    def copy(self) -> Search:
        other = object.__new__(Search)
        other.__dict__.update(self.__dict__)
        other.enter, other.done = [*self.enter], [*self.done]
        other.reads, other.makes = [*self.reads], [*self.makes]
        return other

    def store_everything(self) -> None:
        """As the sections say: each map from where it is made to its last reader."""
        last: dict[int, int] = {}
        for t, stage in enumerate(self.stages):
            for k in bits_of(self._direct(stage)):
                last[k] = t
        for k, t in enumerate(self.home):
            if t < 0 or self.nodes.always[k] or not self.fits[t] >> k & 1:
                continue
            for s in range(t + 1, last.get(k, t) + 1):
                self.enter[s] |= 1 << k
        self.refresh(range(len(self.stages)))

    def _direct(self, stage: Stage) -> int:
        """The nodes that stages store of which this one makes what it makes, with no other of them between."""
        todo = seen = 0
        for j in (*stage.wanted, *stage.offers):
            todo |= self.above[j]
        while todo:
            j = todo.bit_length() - 1
            todo ^= 1 << j
            if self.home[j] < 0:
                todo |= self.above[j]
            else:
                seen |= 1 << j
        return seen

    def refresh(self, stages: Iterable[int]) -> None:
        """Look at stages again whose nodes to find or to leave have changed."""
        for t in stages:
            old, new = self.done[t], self.evaluate(t)
            if old is new:
                continue
            self.done[t] = new
            for k in bits_of(old.read ^ new.read):
                self.reads[k] ^= 1 << t
            for k in bits_of(old.made ^ new.made):
                self.makes[k] ^= 1 << t

    def _run(self, k: int, t: int) -> tuple[int, int]:
        """The first and last of the stages in a row about one that find a node stored."""
        bit = 1 << k
        first = last = t
        while self.enter[first - 1] & bit:
            first -= 1
        while last + 1 < len(self.enter) and self.enter[last + 1] & bit:
            last += 1
        return first, last

    def profile(self) -> list[int]:
        """Bytes stored during each stage."""
        nodes, count = self.nodes, len(self.stages)
        change = [0] * (count + 1)
        last: dict[int, int] = {}
        before = 0
        for t in range(count):
            alive = self.enter[t] | self.enter[t + 1]
            for k in bits_of(alive & ~before):
                change[t] += nodes.size[k]
            for k in bits_of(before & ~alive):
                change[t] -= nodes.size[k]
            before = alive
            for k in bits_of(self.done[t].read & self.large):
                last[k] = t
        for k in bits_of(self.large):
            change[self.home[k]] += nodes.size[k]
            change[max(last.get(k, 0), self.home[k]) + 1] -= nodes.size[k]
        return list(accumulate(change[:count]))

    def clear(self, k: int, x: int, y: int) -> None:
        """No longer store a node from stage x to stage y."""
        for t in range(x + 1, y + 1):
            self.enter[t] &= ~(1 << k)
        self.refresh((x, y))

    # Dropping ------------------------------------------------------------------------------------------------------

    def drop(self, limit: float) -> bool:
        """Drop gaps until no stage stores more than the limit; False where what is left must be stored."""
        known: dict[tuple[int, int, int], tuple[int, float]] = {}
        runs: dict[int, dict[int, tuple[int, int]]] = {}
        stamp = [0] * (len(self.stages) + 1)
        clock, used = 0, self.profile()
        while True:
            peak = max(range(len(used)), key=used.__getitem__)
            if used[peak] <= limit:
                used = self.profile()  # what is always stored may be read later than before
                peak = max(range(len(used)), key=used.__getitem__)
                if used[peak] <= limit:
                    return True
            excess = [u - limit if u > limit else 0.0 for u in used]
            above = [0.0, *accumulate(excess)]
            many = [0, *accumulate(e > 0 for e in excess)]
            candidates: list[tuple[float, float, int, int, int]] = []
            for k in bits_of((self.enter[peak] | self.enter[peak + 1]) & ~self.always):
                size = self.nodes.size[k]
                gap = self._gap(k, peak, runs) if size else None
                if gap is None:
                    continue
                first, last = self._freed(k, *gap)
                freed = min(size * (many[last + 1] - many[first]), above[last + 1] - above[first])
                if freed > 0:
                    candidates.append((known.get((k, *gap), (-1, 0.0))[1] / freed, freed, k, *gap))
            candidates.sort()
            best: tuple[float, int, int, int] | None = None
            for expected, freed, k, x, y in candidates:
                if best is not None and expected >= best[0]:
                    break  # what a drop cost once, it mostly costs at least later on
                when, loss = known.get((k, x, y), (-1, inf))
                if when < max(stamp[x], stamp[y]):
                    loss = self._loss(k, x, y)
                    known[k, x, y] = clock, loss
                if loss < inf and (best is None or loss / freed < best[0]):
                    best = loss / freed, k, x, y
            if best is None:
                return False
            _, k, x, y = best
            first, last = self._freed(k, x, y)
            for t in range(first, last + 1):
                used[t] -= self.nodes.size[k]
            self.clear(k, x, y)
            runs.pop(k, None)
            clock += 1
            for t in range(x, y + 1):
                stamp[t] = clock

    def _gap(self, k: int, peak: int, runs: dict[int, dict[int, tuple[int, int]]]) -> tuple[int, int] | None:
        """The gap between uses of a node whose dropping frees its bytes at a stage: two where it is read there."""
        at = peak if self.enter[peak] >> k & 1 else peak + 1
        known = runs.setdefault(k, {})
        if at not in known:
            first, last = self._run(k, at)
            known.update(dict.fromkeys(range(first, last + 1), (first, last)))
        first, last = known[at]
        reads = self.reads[k] & ((1 << last + 1) - (1 << first))
        before = reads & ((1 << peak) - 1)
        x = max(before.bit_length() - 1, first - 1)
        after = reads >> peak + 1
        y = peak + 1 + (after & -after).bit_length() - 1 if after else last
        if at > peak:
            x = peak
        elif y == peak or (not after and last == peak):
            y = peak
        return (x, y) if x < y else None

    def _freed(self, k: int, x: int, y: int) -> tuple[int, int]:
        """The stages in which dropping a gap frees bytes."""
        return (x + 1 if self.enter[x] >> k & 1 else x), (y - 1 if self.enter[y + 1] >> k & 1 else y)

    def _loss(self, k: int, x: int, y: int) -> float:
        """What dropping a gap costs."""
        bit = 1 << k
        if any(self.pinned[t] & bit for t in range(x + 1, y + 1)):
            return inf
        goes_on = bool(self.enter[y + 1] & bit) if y + 1 < len(self.enter) else False
        if goes_on and not self.fits[y] & bit:
            return inf
        total = 0.0
        inner = bits_of(self.reads[k] & ((1 << y) - (1 << x + 1)))
        for t in inner:
            total += self.evaluate(t, self.enter[t] & ~bit, self.enter[t + 1] & ~bit).cost - self.done[t].cost
        total += self.evaluate(x, None, self.enter[x + 1] & ~bit).cost - self.done[x].cost
        total += self.evaluate(y, self.enter[y] & ~bit).cost - self.done[y].cost
        return total

    # Filling -------------------------------------------------------------------------------------------------------

    def fill(self, limit: float, enough: float = inf) -> None:
        """Store the gaps that save most per byte and stage, as long as the limit allows, and until so many nodes have
        been looked at."""
        used = self.profile()

        def fits(k: int, x: int, y: int) -> bool:
            first, last = self._span(k, x, y)
            size = self.nodes.size[k]
            return all(used[t] + size <= limit for t in range(first, last + 1))

        # Ever more is used: what has no room now has none later, unless the node itself is stored, which looks again.
        heap = [(-self._gain(c)[0], c) for c in self._additions(range(len(self.home))) if fits(*c)]
        heap = [h for h in heap if h[0] < 0]
        heapify(heap)
        waiting: set[tuple[int, int, int]] = {c for _, c in heap}
        while heap and self.visits[0] < enough:
            old, candidate = heappop(heap)
            waiting.discard(candidate)
            k, x, y = candidate
            if not self._open(k, x, y) or not fits(k, x, y):
                continue
            gain, _ = self._gain(candidate)
            if gain <= 0:
                continue
            if heap and -gain > heap[0][0] + 1e-12:
                heappush(heap, (-gain, candidate))
                waiting.add(candidate)
                if -gain != old:
                    continue
                continue
            before = [self.done[t].made for t in range(x, y + 1)]
            first, last = self._span(k, x, y)
            for t in range(first, last + 1):
                used[t] += self.nodes.size[k]
            for t in range(x + 1, y + 1):
                self.enter[t] |= 1 << k
            self.refresh(range(x, y + 1))
            changed = 0
            for t, was in zip(range(x, y + 1), before, strict=True):
                changed |= was ^ self.done[t].made
            for c in self._additions(bits_of(changed | 1 << k)):
                if c not in waiting and fits(*c):
                    gain, _ = self._gain(c)
                    if gain > 0:
                        waiting.add(c)
                        heappush(heap, (-gain, c))
        self._trim()

    def _trim(self) -> None:
        """Forget what is kept and not read any more."""
        for k in range(len(self.home)):
            if self.nodes.always[k]:
                continue
            bit = 1 << k
            wanted = False
            for t in range(len(self.stages), 0, -1):
                at = t < len(self.stages)
                if not self.enter[t] & bit:
                    wanted = False
                    continue
                wanted = wanted or bool(self.pinned[t] & bit) or (at and bool(self.done[t].read & bit))
                if not wanted:
                    self.enter[t] &= ~bit
        self.refresh(range(len(self.stages)))

    def _additions(self, some: Iterator[int] | range) -> Iterator[tuple[int, int, int]]:
        """Gaps between where a node is at hand, or its home, and where it is recomputed."""
        for k in some:
            if self.nodes.always[k] or not self.nodes.size[k]:
                continue
            stages = self.makes[k] | self.reads[k] | (1 << self.home[k] if self.home[k] >= 0 else 0)
            at = [*bits_of(stages)][::-1]
            for x, y in pairwise(at):
                if self.makes[k] >> y & 1:
                    yield k, x, y

    def _open(self, k: int, x: int, y: int) -> bool:
        """Whether a gap can be stored: the node is at hand at its beginning, or can be made there."""
        bit = 1 << k
        if self.enter[y] & bit or not self.done[y].made & bit:
            return False
        if self.enter[x] & bit:
            return True
        return bool(self.fits[x] & bit) and (bool(self.done[x].made & bit) or self.home[k] == x)

    def _span(self, k: int, x: int, y: int) -> tuple[int, int]:
        """Stages in which a gap adds bytes."""
        bit = 1 << k
        first = x + 1 if (self.enter[x] | self.enter[x + 1]) & bit else x
        last = y - 1 if (self.enter[y] | self.enter[y + 1]) & bit else y
        return first, last

    def _gain(self, candidate: tuple[int, int, int]) -> tuple[float, float]:
        """Operations saved per byte and stage, and in all."""
        k, x, y = candidate
        bit = 1 << k
        if not self._open(k, x, y):
            return 0.0, 0.0
        saved = 0.0
        if not self.enter[x] & bit:
            saved += self.done[x].cost - self.evaluate(x, None, self.enter[x + 1] | bit).cost
        for t in bits_of((self.makes[k] | self.reads[k]) & ((1 << y + 1) - (1 << x + 1))):
            after = None if t == y else self.enter[t + 1] | bit
            saved += self.done[t].cost - self.evaluate(t, self.enter[t] | bit, after).cost
        first, last = self._span(k, x, y)
        return saved / (self.nodes.size[k] * max(1, last - first + 1)), saved
