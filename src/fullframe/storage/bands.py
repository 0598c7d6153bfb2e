"""Bands: rows of a map in full width, by which tiles that are cut along both axes come from a disk and go there.

The rows of such a tile are short runs of bytes far from each other, each a request to the disk of its own. So what is
read is kept for the tiles beside it, which follow, and what is written is gathered until the row of tiles is there.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import prod
from threading import RLock

import torch

from fullframe.device import CPU
from fullframe.ir import region as box
from fullframe.ir.region import Region
from fullframe.storage.arena import empty_map
from fullframe.storage.in_flight import InFlight
from fullframe.storage.protocol import BANDS, Slot

Write = Callable[[Slot, Region, torch.Tensor], None]
Read = Callable[[Slot, Region], torch.Tensor]


@dataclass(eq=False)
class _Filling:
    """A band that is being put together; ``missing`` elements are not there yet."""

    made: torch.Tensor
    missing: int
    parts: list[Region] = field(default_factory=list)
    lock: RLock = field(default_factory=RLock)


@dataclass(eq=False)
class _Map:
    """What is known of the map of a slot: ``missing`` elements have not been put."""

    missing: int
    filling: dict[Region, _Filling] = field(default_factory=dict)
    split: set[Region] = field(default_factory=set)  # bands that went to the disk in parts
    read: dict[Region, Future[torch.Tensor]] = field(default_factory=dict)  # those used last, the oldest first
    awaited: dict[Region, int] = field(default_factory=dict)  # tiles announced that have not fetched


class Bands:
    """The bands of a store's maps, of no more bytes than it is allowed; ``read`` and ``write`` move regions."""

    def __init__(self, in_flight: InFlight, allowed: Callable[[], int], read: Read, write: Write):
        self._in_flight, self._allowed, self._read, self._write = in_flight, allowed, read, write
        self._lock = RLock()
        self._maps: dict[Slot, _Map] = {}

    def open(self, slot: Slot) -> None:
        """Nothing of a map has been put."""
        with self._lock:
            self.close(slot)
            self._maps[slot] = _Map(prod(slot.shape))

    def close(self, slot: Slot) -> None:
        """Nothing of a map is wanted any more."""
        with self._lock:
            found = self._maps.pop(slot, None)
            if found is not None:
                for region in (*found.filling, *found.read):
                    self._in_flight.give_back(_nbytes(slot, region))

    def put(self, slot: Slot, band: Region | None, region: Region, window: torch.Tensor) -> bool:
        """Whether a window has become part of its band; else the caller writes it, and says so by `wrote`."""
        with self._lock:
            here = self._maps.get(slot)
            if here is not None:
                self._forget(slot, here)  # nobody puts what others are reading, but nothing old may stay
            if here is None or band is None:
                return False
            filling = self._filling(slot, here, band)
            if filling is None:
                return False
            filling.lock.acquire()
        try:
            filling.made[box.slices(region, band)].copy_(window)
            filling.parts.append(region)
            filling.missing -= window.numel()
            whole = not filling.missing
        finally:
            filling.lock.release()
        with self._lock:
            here.missing -= window.numel()
            if whole and here.filling.pop(band, None) is not None:
                made = filling.made
                self._in_flight.write(slot, band, _nbytes(slot, band), lambda: self._write(slot, band, made))
        return True

    def wrote(self, slot: Slot, window: torch.Tensor) -> None:
        """A window has been put by its caller."""
        with self._lock:
            if slot in self._maps:
                self._maps[slot].missing -= window.numel()

    def expect(self, slot: Slot, band: Region) -> bool:
        """Begin to read a band of a map that is there as a whole; whether it is being read, or need not be."""
        with self._lock:
            here = self._maps.get(slot)
            if here is None or self._reading(slot, here, band) is None:
                return False
            here.awaited[band] = here.awaited.get(band, 0) + 1
            return True

    def fetch(self, slot: Slot, band: Region | None, region: Region) -> torch.Tensor | None:
        """A copy of a region; None where the caller has to read it."""
        with self._lock:
            here = self._maps.get(slot)
            if here is None:
                return None
            self._settle(slot, here, region)
            reading = None if band is None else self._reading(slot, here, band)
            if band is not None and here.awaited.get(band):
                here.awaited[band] -= 1
        if band is None or reading is None:
            return None
        found = reading.result()
        return empty_map(box.shape_of(region), slot.dtype, CPU).copy_(found[box.slices(region, band)])

    def unsettled(self, slot: Slot) -> bool:
        """Whether a part of a map is in a band that is not complete."""
        with self._lock:
            return slot in self._maps and bool(self._maps[slot].filling)

    def _filling(self, slot: Slot, here: _Map, band: Region) -> _Filling | None:
        if band in here.split:
            return None
        found = here.filling.get(band)
        if found is None and self._in_flight.reserved(_nbytes(slot, band), self._allowed()):
            found = _Filling(empty_map(box.shape_of(band), slot.dtype, CPU), box.size(band))
            here.filling[band] = found
        elif found is None:
            here.split.add(band)  # or a later part of it would wait for one that went to the disk
        return found

    def _settle(self, slot: Slot, here: _Map, region: Region) -> None:
        """Write what is there of incomplete bands that a region meets: somebody reads it already."""
        for band in [b for b in here.filling if box.overlap(b, region)]:
            filling = here.filling.pop(band)
            here.split.add(band)
            with filling.lock:
                for part in filling.parts:
                    self._write(slot, part, filling.made[box.slices(part, band)])
            self._in_flight.give_back(_nbytes(slot, band))

    def _reading(self, slot: Slot, here: _Map, band: Region) -> Future[torch.Tensor] | None:
        """The band on its way or there; None where the map is not complete, or bytes are not to be had."""
        if here.missing or here.filling:
            return None
        found = here.read.pop(band, None)
        if found is None:
            # What a tile is still to come for stays: to read it again would push out what the next ones wait for.
            idle = [b for b in here.read if not here.awaited.get(b)]
            for first in idle[: max(0, len(here.read) - BANDS + 1)]:
                self._in_flight.give_back(_nbytes(slot, first))
                del here.read[first]
                here.awaited.pop(first, None)
            if not self._in_flight.reserved(_nbytes(slot, band), self._allowed()):
                return None
            found = self._in_flight.after(slot, band, lambda: self._read(slot, band))
        here.read[band] = found
        return found

    def _forget(self, slot: Slot, here: _Map) -> None:
        for band in here.read:
            self._in_flight.give_back(_nbytes(slot, band))
        here.read.clear()
        here.awaited.clear()


def _nbytes(slot: Slot, region: Region) -> int:
    return box.size(region) * slot.itemsize
