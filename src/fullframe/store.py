"""Where stored maps live: one arena per run in flight, reused from step to step.

Knows bytes and places only. These are the only long-lived allocations of the engine.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch


class Arena:
    """A block of bytes on a device from which maps are views.

    On the CPU it is private anonymous memory with huge pages asked for: the first touch of a map in
    4 KB pages costs as much as a convolution over it (Python's default shared mapping would not
    take the advice).
    """

    def __init__(self, nbytes: int, device: torch.device):
        self.nbytes = nbytes
        self.device = device
        if device.type == "cpu" and nbytes > 0 and hasattr(mmap, "MAP_PRIVATE"):
            block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without huge pages: same numbers, slower first touch
                    block.madvise(mmap.MADV_HUGEPAGE)
            self.block = torch.frombuffer(block, dtype=torch.uint8)
        else:
            self.block = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A map at an offset, channels innermost for images and volumes."""
        count = 1
        for n in shape:
            count *= n
        flat = self.block[offset : offset + count * dtype.itemsize].view(dtype)
        return shaped(flat, shape)


def shaped(flat: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Flat elements as a map: channels innermost where there are two or more spatial axes."""
    if len(shape) not in (4, 5):
        return flat.view(list(shape))
    inner = [shape[0], *shape[2:], shape[1]]
    return flat.view(inner).movedim(-1, 1)


def empty_map(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised map in the layout of stored ones."""
    count = 1
    for n in shape:
        count *= n
    return shaped(torch.empty(count, dtype=dtype, device=device), shape)


class Arenas:
    """The arenas of a tiled module: one per run in flight (a forward whose backward is to come)."""

    def __init__(self) -> None:
        self._idle: list[Arena] = []

    def take(self, nbytes: int, device: torch.device) -> Arena:
        """An idle arena that is large enough, or a new one in place of a smaller idle one."""
        while self._idle:
            arena = self._idle.pop()
            if arena.device == device and arena.nbytes >= nbytes:
                return arena
        return Arena(nbytes, device)

    def give(self, arena: Arena) -> None:
        if not self._idle:
            self._idle.append(arena)

    def __deepcopy__(self, _: object) -> Arenas:
        return Arenas()

    def __reduce__(self) -> tuple[type[Arenas], tuple[()]]:
        return Arenas, ()
