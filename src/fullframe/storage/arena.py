"""Where stored maps live: one arena per run in flight, reused from step to step.

Knows bytes and places only. These are the only long-lived allocations of the engine.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from fullframe.ir.graph import Graph, Value


class Arena:
    """A block of bytes from which maps are views: on the device, or ``away`` from it in the host's memory.

    On the CPU it is private anonymous memory with huge pages asked for: the first touch of a map in
    4 KB pages costs as much as a convolution over it (Python's default shared mapping would not
    take the advice). For a CUDA device it is locked besides, so that copies need not be waited for.
    """

    def __init__(self, nbytes: int, device: torch.device, away: bool = False):
        self.nbytes = nbytes
        self.device = device
        self.away = away
        self.done: Any = None  # on a device: when the run before is done with it
        if (away or device.type == "cpu") and nbytes > 0 and hasattr(mmap, "MAP_PRIVATE"):
            try:
                block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise MemoryError(
                    f"no memory for the stored maps of a tiled step: {nbytes:,} bytes ({error.strerror}); free some, "
                    "raise the limit (ulimit -v), or give a smaller budget"
                ) from error
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without huge pages: same numbers, slower first touch
                    block.madvise(mmap.MADV_HUGEPAGE)
            self.block = torch.frombuffer(block, dtype=torch.uint8)
        else:
            self.block = torch.empty(nbytes, dtype=torch.uint8, device="cpu" if away else device)
        if away and device.type == "cuda" and nbytes > 0:
            _lock(self, self.block)

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A map at an offset, channels innermost for images and volumes."""
        count = 1
        for n in shape:
            count *= n
        flat = self.block[offset : offset + count * dtype.itemsize].view(dtype)
        return shaped(flat, shape)


def _lock(arena: Arena, block: torch.Tensor) -> None:
    """Lock a block's pages as long as its arena lives."""
    runtime: Any = torch.cuda.cudart()
    error = int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0))
    if error:
        raise MemoryError(
            f"CUDA error {error} when locking {block.nbytes:,} bytes of the host's memory for the stored maps; free "
            "some of it, allow the process to lock more (ulimit -l), or raise the budget"
        )
    weakref.finalize(arena, _unlock, runtime, block, arena.device)


def _unlock(runtime: Any, block: torch.Tensor, device: torch.device) -> None:
    try:
        torch.cuda.synchronize(device)  # no copy may be on its way
    finally:
        runtime.cudaHostUnregister(block.data_ptr())


def dense(tensor: torch.Tensor) -> bool:
    """Whether a map is one run of bytes in the layout of stored ones."""
    return (tensor.movedim(1, -1) if tensor.dim() in (4, 5) else tensor).is_contiguous()


def gapless(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one run of memory, in whatever order."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) == tensor.numel()


def packed(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements with these strides fill one run of memory, each place once."""
    expected = 1
    for step, n in sorted((step, n) for step, n in zip(strides, shape, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= n
    return True


def laid_out(tensor: Any, strides: tuple[int, ...] | None) -> Any:
    """A tensor of no graph, or None, with these strides; a copy only where its elements lie in another order."""
    if strides is None or tensor is None or tensor.stride() == strides:
        return tensor
    pairs = zip(tensor.shape, tensor.stride(), strides, strict=True)
    if all(n == 1 or old == new for n, old, new in pairs):
        place = tensor.storage_offset(), tensor.shape, strides
        return tensor.new_empty(0).set_(tensor.untyped_storage(), *place)  # no view, as autograd understands it
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


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


def empty_output(graph: Graph, value: Value, device: torch.device) -> torch.Tensor:
    """An uninitialised map that is handed out, in the layout that is expected of it."""
    strides = graph.strides.get(value)
    if strides is None:
        return torch.empty(value.shape, dtype=value.dtype, device=device)
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=device)


class Arenas:
    """The arenas of a tiled module: one per run in flight (a forward whose backward is to come)."""

    def __init__(self) -> None:
        self._idle: list[Arena] = []

    def take(self, nbytes: int, device: torch.device, away: bool = False) -> Arena:
        """An idle arena that is large enough, or a new one in place of a smaller idle one."""
        while self._idle:
            arena = self._idle.pop()
            if arena.device == device and arena.away == away and arena.nbytes >= nbytes:
                if arena.done is not None:
                    torch.cuda.current_stream(device).wait_event(arena.done)
                return arena
            del arena  # before the new one is made
        return Arena(nbytes, device, away)

    def give(self, arena: Arena) -> None:
        """Take back the arena of a run that is done, or will be when the current stream has come so far."""
        if not self._idle:
            if arena.device.type == "cuda":
                arena.done = torch.cuda.current_stream(arena.device).record_event()
            self._idle.append(arena)

    def clear(self) -> None:
        """Let go of those that no run has."""
        self._idle.clear()

    def __deepcopy__(self, _: object) -> Arenas:
        return Arenas()

    def __reduce__(self) -> tuple[type[Arenas], tuple[()]]:
        return Arenas, ()
