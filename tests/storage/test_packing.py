"""Places in one block: what is alive together does not overlap, and little is left between."""

from __future__ import annotations

import random

import pytest

from fullframe.storage.packing import Piece, pack, peak


def test_a_piece_takes_the_place_of_one_that_is_gone() -> None:
    offsets, nbytes = pack({"a": Piece(0, 1, 100), "b": Piece(1, 2, 50), "c": Piece(2, 3, 100)})
    assert offsets == {"a": 0, "b": 100, "c": 0}
    assert nbytes == 150


@pytest.mark.parametrize("seed", range(20))
def test_pieces_alive_together_do_not_overlap(seed: int) -> None:
    rng = random.Random(seed)
    pieces = {}
    for name in range(rng.randrange(1, 60)):
        first = rng.randrange(100)
        pieces[name] = Piece(first, first + rng.randrange(20), 64 * rng.randrange(1, 30))
    offsets, nbytes = pack(pieces)
    assert peak(pieces.values()) <= nbytes <= 2 * peak(pieces.values())
    for a, one in pieces.items():
        assert 0 <= offsets[a] <= nbytes - one.nbytes
        for b, other in pieces.items():
            if a < b and one.first <= other.last and other.first <= one.last:
                assert offsets[a] + one.nbytes <= offsets[b] or offsets[b] + other.nbytes <= offsets[a]
