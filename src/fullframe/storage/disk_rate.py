"""How fast a disk is, measured once, since it decides what is kept there and what is made again."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from fullframe.storage.unnamed_file import Run, UnnamedFile

VARIABLE = "FULLFRAME_DISK_RATE"
USUAL = 500  # million bytes a second, of a disk on which there is no room to measure
SLOWEST, FASTEST = 64, 8192
PIECE, PIECES = 8 << 20, 256  # bytes that are written and read at once, and how often at most: a burst is no measure
SECONDS = 0.8  # after which enough has been written, or read


def told() -> int | None:
    """Million bytes a second by the variable `VARIABLE` of the environment, None where it is not set. Raises
    `ValueError` where that is no number above zero."""
    given = os.environ.get(VARIABLE)
    return None if given is None else number(VARIABLE, given, "million bytes a second")


def number(variable: str, given: str, what: str) -> int:
    """What a variable of the environment says. Raises `ValueError` where that is no number above zero."""
    if not given.isdecimal() or not int(given):
        raise ValueError(f"{variable}={given!r} must be a whole number of {what} above zero")
    return int(given)


def measured(folder: Path) -> int:
    """Million bytes a second that the disk of a folder takes and gives, a power of two, so that plans seldom depend
    on when it was measured."""
    try:
        file = UnnamedFile(folder, PIECE * PIECES)
        try:
            piece = torch.zeros(PIECE, dtype=torch.uint8)
            moved, began = 0, time.monotonic()
            for move in (file.write, file.read):
                start = time.monotonic()
                for k in range(PIECES):
                    move([Run(k * PIECE, piece.data_ptr(), PIECE)])
                    moved += PIECE
                    if time.monotonic() - start > SECONDS:
                        break
            rate = moved / 1e6 / max(1e-9, time.monotonic() - began)
        finally:
            file.close()
    except OSError:  # a step that needs the disk will say so
        return USUAL
    return 2 ** round(math.log2(min(max(rate, SLOWEST), FASTEST)))
