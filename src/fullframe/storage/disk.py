"""The store on a disk, for maps that fit no memory: one file without a name.

A map lies there as in an arena, channels innermost, so that a band of whole rows is one run of bytes, and a tile
within it a run for each of its rows.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from math import prod

import torch

from fullframe.device import CPU, device_of
from fullframe.ir import region as box
from fullframe.ir.region import Region
from fullframe.storage.arena import dense, empty_map
from fullframe.storage.bands import Bands
from fullframe.storage.in_flight import THREADS, InFlight
from fullframe.storage.protocol import DISK_BUFFER, Slot, band_of, inner
from fullframe.storage.unnamed_file import Run, UnnamedFile, disk_folder

SHORT = 4096  # bytes of a run below which more is read than is asked for,
WIDER = 4  # but no more than so many times as much along an axis


class Disk:
    """A `Store` of so many bytes in a ``folder``, for runs on a ``device``.

    All bytes are allocated at once: raises `OSError` where the disk has not so many, before anything has run. Within
    ``spare`` bytes of the host's memory it reads ahead and writes behind.
    """

    spare = 0

    def __init__(self, nbytes: int, device: torch.device, folder: str | os.PathLike[str] | None = None):
        self.nbytes, self.device = nbytes, device
        self.file = UnnamedFile(disk_folder(folder), nbytes)
        self.fetched = self.stored = 0  # bytes of regions so far
        self._lock = threading.Lock()
        self._in_flight: InFlight | None = None
        self._bands: Bands | None = None

    def open(self, slot: Slot) -> None:
        """As `Store.open`."""
        if self._under_way() is not None:
            assert self._in_flight is not None and self._bands is not None
            self._in_flight.forget(slot)
            self._in_flight.settle(slot)  # or what is under way to its bytes would come later than its own
            self._bands.open(slot)

    def expect(self, slot: Slot, region: Region) -> None:
        """As `Store.expect`."""
        nbytes = box.size(region) * slot.itemsize
        in_flight = self._under_way() if nbytes else None
        if in_flight is not None and self._bands is not None:
            band = band_of(slot.shape, region, slot.itemsize)
            if self._bands.unsettled(slot) or (band is not None and self._bands.expect(slot, band)):
                return
            file = self.file
            in_flight.read(slot, region, nbytes, self._allowed, lambda: _fetched(file, slot, region))

    def fetch(self, slot: Slot, region: Region) -> torch.Tensor:
        """As `Store.fetch`: a copy, channels innermost for images and volumes."""
        self.file.check_owner()
        made = None
        if self._in_flight is not None and self._bands is not None:
            made = self._bands.fetch(slot, band_of(slot.shape, region, slot.itemsize), region)
            made = self._in_flight.found(slot, region) if made is None else made
            if made is None:
                self._in_flight.settle(slot, region)
        made = _fetched(self.file, slot, region) if made is None else made
        with self._lock:
            self.fetched += made.nbytes
        return made if self.device == CPU else made.to(self.device)

    def put(self, slot: Slot, region: Region, window: torch.Tensor) -> None:
        """As `Store.put`."""
        if not device_of(window.device).on_host:
            window = empty_map(window.shape, window.dtype, window.device).copy_(window).to(CPU)
        in_flight = self._under_way()
        if in_flight is not None:
            in_flight.forget(slot)
            in_flight.settle(slot, region)
        band = band_of(slot.shape, region, slot.itemsize)
        if self._bands is not None and self._bands.put(slot, band, region, window):
            self._count(window)
            return
        if in_flight is not None and window.numel() and in_flight.reserved(window.nbytes, self._allowed):
            file, kept = self.file, empty_map(window.shape, window.dtype, CPU).copy_(window)
            in_flight.write(slot, region, window.nbytes, lambda: _put(file, slot, region, kept))
        else:
            _put(self.file, slot, region, window)
        if self._bands is not None:
            self._bands.wrote(slot, window)
        self._count(window)

    def close(self, slot: Slot) -> None:
        """As `Store.close`."""
        if self._in_flight is not None and self._bands is not None:
            self._in_flight.forget(slot)
            self._bands.close(slot)

    def _count(self, window: torch.Tensor) -> None:
        with self._lock:
            self.stored += window.nbytes

    def release(self) -> None:
        """As `Store.release`: its file is gone."""
        if self._in_flight is not None:
            self._in_flight.stop()
        self.file.close()

    @property
    def _allowed(self) -> int:
        """Bytes that may be under way beside the buffers of the threads that move them."""
        return self.spare - 2 * THREADS * DISK_BUFFER

    def _under_way(self) -> InFlight | None:
        self.file.check_owner()
        if self._allowed <= 0 or self._in_flight is not None:
            return self._in_flight
        with self._lock:
            if self._in_flight is None:
                file = self.file
                moves = partial(_fetched, file), partial(_put, file)
                in_flight = InFlight()
                self._bands = Bands(in_flight, lambda: self._allowed, *moves)
                self._in_flight = in_flight
            return self._in_flight


def _fetched(file: UnnamedFile, slot: Slot, region: Region) -> torch.Tensor:
    made = empty_map(box.shape_of(region), slot.dtype, CPU)
    wide = _widened(slot, region)
    if wide == region:
        file.read(list(_runs(slot, region, made.data_ptr())))
        return made
    for part in _parts(wide, slot.itemsize):
        band = empty_map(box.shape_of(part), slot.dtype, CPU)
        file.read(list(_runs(slot, part, band.data_ptr())))
        inside = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(part, region, strict=True))
        if not box.is_empty(inside):
            made[box.slices(inside, region)].copy_(band[box.slices(inside, part)])
    return made


def _put(file: UnnamedFile, slot: Slot, region: Region, window: torch.Tensor) -> None:
    if dense(window):
        file.write(list(_runs(slot, region, window.data_ptr())))
        return
    for part in _parts(region, slot.itemsize):
        piece = empty_map(box.shape_of(part), slot.dtype, CPU).copy_(window[box.slices(part, region)])
        file.write(list(_runs(slot, part, piece.data_ptr())))


def _runs(slot: Slot, region: Region, address: int) -> Iterator[Run]:
    """The runs of bytes of a region in the order of the file; in memory they follow each other from an address on."""
    axes = inner(len(slot.shape))
    sizes, spans = [slot.shape[a] for a in axes], [region[a] for a in axes]
    nbytes = prod(high - low for low, high in spans) * slot.itemsize
    if not nbytes:
        return
    steps = [prod(sizes[k + 1 :]) * slot.itemsize for k in range(len(sizes))]
    whole = len(spans)  # axes from here on are there in full
    while whole and spans[whole - 1] == (0, sizes[whole - 1]):
        whole -= 1
    outer = spans[: max(0, whole - 1)]
    start = slot.offset + sum(low * step for (low, _), step in zip(spans, steps, strict=True))
    count = prod(high - low for low, high in outer)
    each = nbytes // count
    for k in range(count):
        at, rest = start, k
        for (low, high), step in zip(reversed(outer), reversed(steps[: len(outer)]), strict=True):
            rest, index = divmod(rest, high - low)
            at += index * step
        yield Run(at, address + k * each, each)


def _widened(slot: Slot, region: Region) -> Region:
    """The region with those of its inner axes in full whose parts would be very short runs: channels of many."""
    spans = list(region)
    run = slot.itemsize
    for axis in reversed(inner(len(slot.shape))):
        low, high = region[axis]
        run *= high - low
        if run >= SHORT or (high - low) * WIDER < slot.shape[axis]:
            break
        spans[axis] = (0, slot.shape[axis])
        run = run // (high - low) * slot.shape[axis] if high > low else 0
    return tuple(spans) if not box.is_empty(region) else region


def _parts(region: Region, itemsize: int) -> Iterator[Region]:
    """A region as parts in the order of the file, each of no more than a buffer's bytes where one row is not."""
    nbytes = box.size(region) * itemsize
    axes = [a for a in inner(len(region)) if region[a][1] - region[a][0] > 1]
    if nbytes <= DISK_BUFFER or not axes:
        yield region
        return
    axis = axes[0]
    low, high = region[axis]
    step = max(1, (high - low) * DISK_BUFFER // nbytes)
    for at in range(low, high, step):
        yield from _parts((*region[:axis], (at, min(high, at + step)), *region[axis + 1 :]), itemsize)
