"""What the C library keeps of memory that it was given back.

It hands out windows by its own lists, and keeps what was freed for the next one, of which another size may be asked:
after a few sections it holds three or four times what is in use. Where a budget has no room for that, it is told now
and then to give back what nobody uses.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from pathlib import Path
from typing import Any


class Keeper:
    """Gives back what is free once the process has grown by more than ``room`` bytes; None: each time it looks."""

    def __init__(self, room: int | None):
        trim()
        self.most = 0 if room is None else resident() + room

    def look(self) -> None:
        """To be called between pieces of work, by any thread."""
        if resident() > self.most:
            trim()


def trim() -> None:
    """Let the C library give back what is free, if it is glibc, the one that would keep it."""
    library = _library()
    if library is not None:
        library.malloc_trim(0)


def resident() -> int:
    """Bytes of the process that are in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return 0


@cache
def _library() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):
        return None
