"""What the C library keeps of memory that it was given back.

It hands out windows by its own lists, and keeps what was freed for the next one, of which another size may be asked:
after a few sections it holds three or four times what is in use. Where a budget has no room for that, windows from
a megabyte on are mapped one by one, so that they are given back when they are freed, and it is told now and then to
give back what nobody uses of the rest.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
MAPPED = 1 << 20  # bytes from which a window is mapped alone within a tight budget
LARGEST = 32 << 20  # what glibc raises its own threshold to as large windows are freed; it trims at twice as much


@contextmanager
def mapped(tight: bool) -> Iterator[None]:
    """Within ``tight`` budgets what is freed goes back to the system at once, but for small windows.

    Afterwards the thresholds are those at which glibc's own, which grow with what is freed, come to rest, or what
    `keep` has asked for.
    """
    library = _library() if tight else None
    if library is None:
        yield
        return
    library.mallopt(MMAP_THRESHOLD, MAPPED)
    try:
        yield
    finally:
        library.mallopt(MMAP_THRESHOLD, LARGEST)
        library.mallopt(TRIM_THRESHOLD, _kept[0])


_kept = [2 * LARGEST]


def keep(nbytes: int) -> None:
    """Let the C library keep so many bytes of what each thread has given back, from now on.

    What is freed at the end of a step and asked for in the next need not come from the system, page by page.
    """
    library = _library() if nbytes > _kept[0] else None
    if library is not None:
        _kept[0] = nbytes
        library.mallopt(MMAP_THRESHOLD, LARGEST)
        library.mallopt(TRIM_THRESHOLD, nbytes)


class HeapTrimmer:
    """Gives back what is free once the process has grown by more than ``room`` bytes; None: each time it looks."""

    def __init__(self, room: int | None):
        trim()
        self.most = 0 if room is None else resident() + room

    def poll(self) -> None:
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
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):
        return None
