"""Memory over time: lifetimes of stored values, their peak, and their places in one arena."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from fullframe.ir.graph import Value
from fullframe.partition.sections import Section
from fullframe.storage.packing import Piece, pack

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
    """Offsets in one arena such that values alive together do not overlap, and the arena's size."""
    return pack({v: Piece(lives.first[v], lives.last[v], sizes[v]) for v in lives.first if v in sizes})
