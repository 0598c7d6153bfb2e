"""The store in the host's memory, for maps that do not fit a device's own.

A tile's parts of maps are fetched when it begins and put back as they are made. On a CUDA device tiles take turns on
a few streams, so that one is copied while another is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from fullframe.ir import region as box
from fullframe.ir.region import Region
from fullframe.storage.arena import dense, empty_map, host_block, view
from fullframe.storage.protocol import Slot

Partials = list[tuple[Any, torch.Tensor]]  # with the place of each


class Host:
    """A `Store` of bytes of the host's memory for runs on a ``device``.

    For a CUDA device its pages are locked, so that copies need not be waited for; the streams on which they are made
    keep their order. A window never looks into it, also where the device is the processor itself.
    """

    def __init__(self, nbytes: int, device: torch.device):
        self.nbytes, self.device = nbytes, device
        self.block = host_block(nbytes)
        if device.type == "cuda" and nbytes:
            _lock(self, self.block)

    def open(self, slot: Slot) -> None:
        """As `Store.open`."""

    def expect(self, slot: Slot, region: Region) -> None:
        """As `Store.expect`."""

    def fetch(self, slot: Slot, region: Region) -> torch.Tensor:
        """As `Store.fetch`: a copy, channels innermost for images and volumes."""
        stored = view(self.block, slot)[box.slices(region)]
        made = empty_map(stored.shape, stored.dtype, self.device)
        _copy(made, stored)
        return made

    def put(self, slot: Slot, region: Region, window: torch.Tensor) -> None:
        """As `Store.put`."""
        stored = view(self.block, slot)[box.slices(region)]
        if window.device != stored.device and not dense(window):
            window = empty_map(window.shape, window.dtype, window.device).copy_(window)
        _copy(stored, window)

    def close(self, slot: Slot) -> None:
        """As `Store.close`."""


def _lock(owner: Host, block: torch.Tensor) -> None:
    """Lock a block's pages as long as its owner lives."""
    runtime: Any = torch.cuda.cudart()
    error = int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0))
    if error:
        raise MemoryError(
            f"CUDA error {error} when locking {block.nbytes:,} bytes of the host's memory for the stored maps; free "
            "some of it, allow the process to lock more (ulimit -l), or raise the budget"
        )
    weakref.finalize(owner, _unlock, runtime, block, owner.device)


def _unlock(runtime: Any, block: torch.Tensor, device: torch.device) -> None:
    try:
        torch.cuda.synchronize(device)  # no copy may be on its way
    finally:
        runtime.cudaHostUnregister(block.data_ptr())


def _copy(to: torch.Tensor, source: torch.Tensor) -> None:
    """Not waited for where both are one run of bytes; else torch copies by way of the processor, which knows nothing
    of the copies still on their way."""
    run = dense(to) and dense(source)
    if not run and "cuda" in (to.device.type, source.device.type):
        torch.cuda.synchronize(to.device if to.is_cuda else source.device)
    to.copy_(source, non_blocking=run)


class StreamPool:
    """Streams of a CUDA device over which the tiles of a section take turns."""

    def __init__(self, device: torch.device, count: int):
        self.device = device
        self.streams = [torch.cuda.Stream(device) for _ in range(count)]

    def run(self, tiles: int, tile: Callable[[int], Partials], take: Callable[[int, Partials], None]) -> None:
        """Run ``tile`` for 0..n-1, each on the next stream, and ``take`` its number and what it returns on
        the caller's stream."""
        main = torch.cuda.current_stream(self.device)
        for stream in self.streams:
            stream.wait_stream(main)
        try:
            for k in range(tiles):
                stream = self.streams[k % len(self.streams)]
                with torch.cuda.stream(stream):
                    partials = tile(k)
                main.wait_stream(stream)
                for _, partial in partials:
                    partial.record_stream(main)
                take(k, partials)
        finally:  # whatever happened: what they read may be let go of now
            for stream in self.streams:
                main.wait_stream(stream)
