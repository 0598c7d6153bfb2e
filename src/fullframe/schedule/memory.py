"""Memory over time: lifetimes of stored values, their peak, and their places in one arena."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from fullframe.ir.graph import Value
from fullframe.partition.sections import Section

ALIGN = 4096


def rounded(nbytes: int) -> int:
    """Bytes of a map in the arena, in whole pages."""
    return -(-nbytes // ALIGN) * ALIGN


@dataclass
class Lifetimes:
    """First and last stage (inclusive) of every value made by the stages."""

    first: dict[Value, int]
    last: dict[Value, int]

    def usage(self, stages: int, sizes: dict[Value, int]) -> list[int]:
        """Bytes alive during each stage."""
        change = [0] * (stages + 1)
        for value, start in self.first.items():
            size = sizes.get(value, 0)
            change[start] += size
            change[self.last[value] + 1] -= size
        return list(accumulate(change[:stages]))

    def lingering(self, stages: int, sizes: dict[Value, int], by: int) -> Lifetimes:
        """With values of these sizes alive for up to so many stages more, where the peak allows it."""
        used, last = self.usage(stages, sizes), dict(self.last)
        peak = max(used, default=0)
        for value in sorted((v for v in self.first if v in sizes), key=self.last.__getitem__):
            for k in range(self.last[value] + 1, min(self.last[value] + by, stages - 1) + 1):
                if used[k] + sizes[value] > peak:
                    break
                used[k] += sizes[value]
                last[value] = k
        return Lifetimes(self.first, last)


def lifetimes(stages: Sequence[Section], kept: Iterable[Value]) -> Lifetimes:
    """When each stored value is made and last read; ``kept`` values live to the end."""
    first: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for k, section in enumerate(stages):
        for value in section.outputs:
            first[value] = last[value] = k
        for value in section.loads:
            if value in first:
                last[value] = k
    for value in kept:
        if value in first:
            last[value] = len(stages) - 1
    return Lifetimes(first, last)


def place(lives: Lifetimes, sizes: dict[Value, int]) -> tuple[dict[Value, int], int]:
    """Offsets in one arena such that values alive together do not overlap, and the arena's size.

    Largest first, each at the lowest gap among the values that it overlaps in time; of those of one size the first to
    be made, the last to be read or the longest alive, whichever needs the least.
    """
    found: tuple[dict[Value, int], int] | None = None
    mapped = [v for v in lives.first if v in sizes]
    least = max(lives.usage(1 + max(lives.last.values(), default=0), sizes), default=0)
    for rank in (lives.first.__getitem__, lambda v: -lives.last[v], lambda v: lives.first[v] - lives.last[v]):
        made = _in_order(sorted(mapped, key=lambda v: (-sizes[v], rank(v))), lives, sizes)
        found = made if found is None or made[1] < found[1] else found
        if found[1] == least:
            break
    assert found is not None
    return found


def _in_order(order: Sequence[Value], lives: Lifetimes, sizes: dict[Value, int]) -> tuple[dict[Value, int], int]:
    placed: list[tuple[int, int, Value]] = []  # (offset, end, value), sorted by offset
    offsets: dict[Value, int] = {}
    top = 0
    for value in order:
        first, last, size = lives.first[value], lives.last[value], sizes[value]
        at = 0
        for offset, end, other in placed:
            if lives.first[other] > last or lives.last[other] < first:
                continue
            if offset - at >= size:
                break
            at = max(at, end)
        offsets[value] = at
        top = max(top, at + size)
        insort(placed, (at, at + size, value), key=lambda p: p[0])
    return offsets, top
