"""Files that NumPy maps into memory: where their numbers lie, and how their pages go again.

A page that has been read or written stays part of the process, as if its numbers had been loaded. It belongs to the
system's cache of files as well, so the process may let go of it at any time and nothing is lost.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

NEAR = 1 << 24  # bytes that a part may span, or so many times its own, before its pieces are looked at one by one:
APART = 4  # a page between them that others still read is soon there again, and each piece is a call of the system
AROUND = 1 << 16  # bytes of pages that come with one that is asked for, if the system's cache has them
Span = tuple[str, int, int]  # of bytes: in the memory, or in the file of a name, from one place up to another


def let_go(thing: Any, part: tuple[slice, ...] = ()) -> None:
    """Take the pages of a part of a mapped file out of the process; of anything else, nothing.

    Pages of a private mapping (mode "c") stay: what was written there is nowhere else.
    """
    mapped = _mapped(thing)
    if mapped is None or mapped.mode == "c" or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start, end = _start(mapped), _start(mapped) + len(mapped._mmap)
    import numpy

    for low, high in _pieces(thing[part].view(numpy.ndarray)):
        first, last = max(start, low // AROUND * AROUND), min(end, -(-high // AROUND) * AROUND)
        with suppress(OSError):  # a system that does not take the advice
            mapped._mmap.madvise(mmap.MADV_DONTNEED, first - start, last - first)


def spans(thing: Any) -> Iterator[Span]:
    """Where the numbers of an array lie: in memory, and in which part of which file."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(thing, numpy.ndarray):
        return
    low, high = _bounds(thing)
    yield "", low, high
    mapped = _mapped(thing)
    if mapped is not None and mapped.filename is not None:
        begin = mapped.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY - _start(mapped)
        yield os.path.realpath(mapped.filename), low + begin, high + begin


def _mapped(thing: Any) -> Any:
    """The mapped file that an array looks into; None where it looks into none."""
    numpy = sys.modules.get("numpy")
    while numpy is not None and isinstance(thing, numpy.ndarray):
        if isinstance(thing, numpy.memmap) and thing._mmap is not None:
            return thing
        thing = thing.base
    return None


def _start(mapped: Any) -> int:
    """The address at which a mapping begins."""
    import numpy

    return numpy.frombuffer(mapped._mmap, numpy.uint8, 1).__array_interface__["data"][0]


def _bounds(array: Any) -> tuple[int, int]:
    """The first byte of an array, and the one after its last."""
    low = high = array.__array_interface__["data"][0]
    for n, step in zip(array.shape, array.strides, strict=True):
        low, high = low + min(0, (n - 1) * step), high + max(0, (n - 1) * step)
    return low, high + array.itemsize


def _pieces(array: Any) -> Iterator[tuple[int, int]]:
    """Runs of bytes that hold an array and not much else."""
    low, high = _bounds(array)
    if array.ndim < 2 or high - low <= max(NEAR, APART * array.nbytes):
        yield low, high
    else:
        for piece in array:
            yield from _pieces(piece)
