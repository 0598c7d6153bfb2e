"""The store in the host's memory, for maps that do not fit a device's own.

A tile's parts of maps are fetched when it begins and put back as they are made. Where a device has streams, tiles
take turns on a few of them, so that one is copied while another is computed.
"""

from __future__ import annotations

import torch

from fullframe.device import CPU, device_of
from fullframe.ir import region as box
from fullframe.ir.region import Region
from fullframe.storage.arena import Block, dense, empty_map, view
from fullframe.storage.protocol import Slot


class Host(Block):
    """A `Store` of bytes of the host's memory for runs on a ``device``.

    Where the device has streams its pages are locked, so that copies need not be waited for; the streams on which
    they are made keep their order. A window never looks into it, also where the device is the processor itself.
    """

    def __init__(self, nbytes: int, device: torch.device):
        super().__init__(nbytes, device, CPU)
        device_of(device).lock(self, self.block, device)

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


def _copy(to: torch.Tensor, source: torch.Tensor) -> None:
    """Not waited for where both are one run of bytes; else torch copies by way of the processor, which knows nothing
    of the copies still on their way."""
    run = dense(to) and dense(source)
    if not run:
        for place in (to.device, source.device):
            device_of(place).synchronize(place)
    to.copy_(source, non_blocking=run)
