"""Arithmetic of views: a reshaped value as a product of the axes of the value it was.

A box in rows and columns is no box once they are merged into one axis. So a merged axis is kept as
a product of its factors, and ops on it run on the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from fullframe.ir.graph import Value

Shape = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """``factors[a]``: the extents (none of them 1) whose product is axis ``a``, outermost first."""

    source: Value
    factors: tuple[Shape, ...]

    @property
    def merged(self) -> bool:
        return any(len(f) > 1 for f in self.factors)


def solid(shape: Sequence[int]) -> Shape:
    """A shape without its axes of extent 1."""
    return tuple(n for n in shape if n != 1)


def common(a: Sequence[int], b: Sequence[int]) -> Shape | None:
    """The coarsest shape (without ones) of which both are merges; None where there is none."""
    if prod(a) != prod(b) or 0 in a:
        return None
    ends = sorted(_suffixes(a) | _suffixes(b))
    if any(q % p for p, q in pairwise(ends)):
        return None
    return tuple(q // p for p, q in pairwise(ends))[::-1]


def _suffixes(shape: Sequence[int]) -> set[int]:
    found, total = {1}, 1
    for n in reversed(shape):
        total *= n
        found.add(total)
    return found


def factors_of(fine: Sequence[int], coarse: Sequence[int]) -> tuple[Shape, ...]:
    """For each axis of ``coarse`` the axes of ``fine`` (without ones) that it merges."""
    left = list(solid(fine))
    found = []
    for n in coarse:
        part: list[int] = []
        while prod(part) < n:
            part.append(left.pop(0))
        assert prod(part) == n, (fine, coarse)
        found.append(tuple(part))
    assert not left, (fine, coarse)
    return tuple(found)


def refine(candidates: Sequence[Shape]) -> Shape | None:
    """The coarsest common refinement of several factorings of one extent."""
    found: Shape | None = candidates[0]
    for other in candidates[1:]:
        if found is None:
            return None
        found = common(found, other)
    return found


def spans(factors: Sequence[Shape]) -> list[tuple[int, ...]]:
    """Axis numbers of each group once the groups are laid side by side; an empty one takes one axis."""
    found, at = [], 0
    for part in factors:
        width = max(1, len(part))
        found.append(tuple(range(at, at + width)))
        at += width
    return found


def laid_out(factors: Sequence[Shape]) -> Shape:
    """The shape of the groups side by side; an empty one is an axis of extent 1."""
    return tuple(n for part in factors for n in (part or (1,)))
