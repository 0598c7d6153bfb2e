"""Between two memories: a device's own, and the host's, where the stored maps live that do not fit there.

A tile's parts of maps are fetched when it begins and put back as they are made. On a CUDA device tiles take turns on
a few streams, so that one is copied while another is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fullframe.storage.arena import dense, empty_map

Partials = list[tuple[Any, torch.Tensor]]  # with the place of each


def fetch(stored: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A part of a stored map, on the device."""
    made = empty_map(stored.shape, stored.dtype, device)
    _copy(made, stored)
    return made


def put(made: torch.Tensor, stored: torch.Tensor) -> None:
    """A window to its part of a stored map."""
    if made.device == stored.device:
        stored.copy_(made)
        return
    _copy(stored, made if dense(made) else empty_map(made.shape, made.dtype, made.device).copy_(made))


def _copy(to: torch.Tensor, source: torch.Tensor) -> None:
    """Not waited for where both are one run of bytes; else torch copies by way of the processor, which knows nothing
    of the copies still on their way."""
    run = dense(to) and dense(source)
    if not run and "cuda" in (to.device.type, source.device.type):
        torch.cuda.synchronize(to.device if to.is_cuda else source.device)
    to.copy_(source, non_blocking=run)


class Lanes:
    """Streams of a CUDA device over which the tiles of a section take turns."""

    def __init__(self, device: torch.device, count: int):
        self.device = device
        self.streams = [torch.cuda.Stream(device) for _ in range(count)]

    def run(self, tiles: int, tile: Callable[[int], Partials], take: Callable[[Partials], None]) -> None:
        """Run ``tile`` for 0..n-1, each on the next stream, and ``take`` what it returns on the caller's stream."""
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
                take(partials)
        finally:  # whatever happened: what they read may be let go of now
            for stream in self.streams:
                main.wait_stream(stream)
