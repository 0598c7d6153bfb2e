"""Places in one block of memory for what is alive at different times."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import NamedTuple, TypeVar

Name = TypeVar("Name")


class Piece(NamedTuple):
    """What is alive from one point in time to another, both included, and its bytes."""

    first: int
    last: int
    nbytes: int


ORDERS: tuple[Callable[[Piece], int], ...] = (lambda p: p.first, lambda p: -p.last, lambda p: p.first - p.last)


def pack(pieces: Mapping[Name, Piece]) -> tuple[dict[Name, int], int]:
    """Offsets such that pieces alive together do not overlap, and the bytes of them all.

    Largest first, each at the lowest gap among the pieces that it overlaps in time; of those of one size the first to
    be made, the last to be read or the longest alive, whichever needs the least.
    """
    found: tuple[dict[Name, int], int] | None = None
    least = peak(pieces.values())
    for rank in ORDERS:
        order = sorted(pieces, key=lambda name: (-pieces[name].nbytes, rank(pieces[name])))
        made = _in_order({name: pieces[name] for name in order})
        found = made if found is None or made[1] < found[1] else found
        if found[1] == least:
            break
    assert found is not None
    return found


def peak(pieces: Iterable[Piece]) -> int:
    """The most bytes that are alive at once."""
    pieces = list(pieces)
    change = [0] * (2 + max((p.last for p in pieces), default=0))
    for first, last, nbytes in pieces:
        change[first] += nbytes
        change[last + 1] -= nbytes
    return max(accumulate(change))


def _in_order(pieces: Mapping[Name, Piece]) -> tuple[dict[Name, int], int]:
    placed: list[tuple[int, int, Piece]] = []  # (offset, end, piece), sorted by offset
    offsets: dict[Name, int] = {}
    top = 0
    for name, piece in pieces.items():
        first, last, nbytes = piece
        at = 0
        for offset, end, other in placed:
            if other.first > last or other.last < first:
                continue
            if offset - at >= nbytes:
                break
            at = max(at, end)
        offsets[name] = at
        top = max(top, at + nbytes)
        insort(placed, (at, at + nbytes, piece), key=lambda p: p[0])
    return offsets, top
