"""The store on a disk, for maps that fit no memory: one file without a name.

A map lies there as in an arena, channels innermost, so that a band of whole rows is one run of bytes, and a tile
within it a run for each of its rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod

import torch

from fullframe.device import CPU, device_of
from fullframe.ir import region as box
from fullframe.ir.region import Region
from fullframe.storage.arena import dense, empty_map
from fullframe.storage.protocol import DISK_BUFFER, Slot
from fullframe.storage.unnamed_file import Run, UnnamedFile, disk_folder


class Disk:
    """A `Store` of so many bytes in a ``folder``, for runs on a ``device``.

    All bytes are allocated at once: raises `OSError` where the disk has not so many, before anything has run.
    """

    def __init__(self, nbytes: int, device: torch.device, folder: str | os.PathLike[str] | None = None):
        self.nbytes, self.device = nbytes, device
        self.file = UnnamedFile(disk_folder(folder), nbytes)

    def open(self, slot: Slot) -> None:
        """As `Store.open`."""

    def expect(self, slot: Slot, region: Region) -> None:
        """As `Store.expect`."""

    def fetch(self, slot: Slot, region: Region) -> torch.Tensor:
        """As `Store.fetch`: a copy, channels innermost for images and volumes."""
        made = empty_map(box.shape_of(region), slot.dtype, CPU)
        self.file.read(list(_runs(slot, region, made.data_ptr())))
        return made if self.device == CPU else made.to(self.device)

    def put(self, slot: Slot, region: Region, window: torch.Tensor) -> None:
        """As `Store.put`."""
        if not device_of(window.device).on_host:
            window = empty_map(window.shape, window.dtype, window.device).copy_(window).to(CPU)
        for part, piece in [(region, window)] if dense(window) else _slabs(region, window):
            self.file.write(list(_runs(slot, part, piece.data_ptr())))

    def close(self, slot: Slot) -> None:
        """As `Store.close`."""

    def release(self) -> None:
        """As `Store.release`: its file is gone."""
        self.file.close()


def _inner(shape: tuple[int, ...]) -> list[int]:
    """Axes in the order in which they lie, the outermost first."""
    axes = list(range(len(shape)))
    return [axes[0], *axes[2:], 1] if len(axes) in (4, 5) else axes


def _runs(slot: Slot, region: Region, address: int) -> Iterator[Run]:
    """The runs of bytes of a region in the order of the file; in memory they follow each other from an address on."""
    axes = _inner(slot.shape)
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


def _slabs(region: Region, window: torch.Tensor) -> Iterator[tuple[Region, torch.Tensor]]:
    """A window of any layout as parts in the order of the file, each a copy of no more than a buffer's bytes."""
    for axis in _inner(tuple(window.shape)):
        extent = window.shape[axis]
        if window.nbytes <= DISK_BUFFER or extent == 1:
            continue
        low = region[axis][0]
        step = max(1, extent * DISK_BUFFER // window.nbytes)
        for at in range(0, extent, step):
            n = min(step, extent - at)
            part = (*region[:axis], (low + at, low + at + n), *region[axis + 1 :])
            yield from _slabs(part, window.narrow(axis, at, n))
        return
    yield region, empty_map(window.shape, window.dtype, CPU).copy_(window)
