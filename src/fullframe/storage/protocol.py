"""What a store of maps is: slots of bytes with lifetimes; regions of maps are put there and fetched.

A stored map lives in one of several memories: the device's own, the host's, a disk, other processes. A plan gives
each map a slot in one of them, and the executor knows no more of a memory than this protocol. A new one is a class
with these methods, a name in `storage.pool.MAKERS`, and a class of tests that inherits the contract.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

from fullframe.ir import region as box
from fullframe.ir.region import Region

if TYPE_CHECKING:
    import torch

DEVICE, HOST, DISK = "device", "host", "disk"
"""The names of the memories that there are: the device's own, that of the processor beside it, and a disk."""
DISK_BUFFER = 1 << 20
"""Bytes by which each thread reads and writes maps on a disk."""

BAND_RUN = 1 << 16
"""Bytes of a run of a tile's part of a map on a disk, below which the part is moved within a band."""
BANDS = 3
"""Bands of a map that are kept at once: tiles of one row of tiles are not done when the next row begins, and the one
after that is read ahead."""


def inner(rank: int) -> list[int]:
    """Axes of a map of this rank in the order in which they lie, the outermost first: channels are innermost where
    there are two or three spatial axes."""
    axes = list(range(rank))
    return [axes[0], *axes[2:], 1] if rank in (4, 5) else axes


def band_of(shape: tuple[int, ...], region: Region, itemsize: int) -> Region | None:
    """The rows of a region in full width, where its own runs of bytes would be short; None where they are not."""
    axes, run = inner(len(shape)), itemsize
    spans = list(region)
    for position, axis in reversed([*enumerate(axes)]):
        low, high = region[axis]
        run *= high - low
        if high - low == shape[axis]:
            continue
        if run >= BAND_RUN or position <= 1 or len(axes) < 4:
            break
        spans[axis] = (0, shape[axis])
        run = run // max(1, high - low) * shape[axis]
    found = tuple(spans)
    return None if found == region or box.is_empty(region) else found


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a map lives: in which store (``tier``), and there from which byte on (``offset``).

    Its ``nbytes`` may be more than its elements take, since places begin at whole pages. Elements lie in the order of
    `fullframe.storage.arena.shaped`: axis by axis, but with channels innermost where there are two or three spatial
    axes.
    """

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    itemsize: int
    tier: str = DEVICE

    def __post_init__(self) -> None:
        assert self.offset >= 0 and self.nbytes >= prod(self.shape) * self.itemsize, self


class Store(Protocol):
    """A memory in which maps live while a plan runs.

    Any thread may fetch and put. The caller sees to it that no region is fetched while one that overlaps it is being
    put, that nothing is fetched that has not been put since its slot was opened, and that slots which are open at the
    same time share no byte, but with one of which nothing is read any more.

    What goes wrong with the memory itself is an `OSError` or a `MemoryError` that names it. It is raised by the call
    that meets it, or, where a store works behind the caller's back, by any later one: at the latest by a fetch of
    what is lost. After that the store is only good for being let go, and the run has changed nothing of its caller's.

    A store holds its memory as long as it lives, and leaves nothing behind when it goes. Beside its maps it may take
    ``spare`` bytes, which a run sets, for what it reads ahead and writes behind.
    """

    nbytes: int
    device: torch.device
    spare: int

    def open(self, slot: Slot) -> None:
        """Begin the life of a map: its bytes are nobody else's from now on, and their content is undefined."""
        ...

    def expect(self, slot: Slot, region: Region) -> None:
        """A hint that this region will be fetched soon. What has been put of it by now may be read ahead."""
        ...

    def fetch(self, slot: Slot, region: Region) -> torch.Tensor:
        """A tensor of the region's shape on the device of the run, with the numbers that were put there last.

        It may look into the store, so it is read only, and lasts until its slot is closed.
        """
        ...

    def put(self, slot: Slot, region: Region, window: torch.Tensor) -> None:
        """Keep a tensor of the region's shape and the slot's dtype, of any layout. The caller may then reuse it."""
        ...

    def close(self, slot: Slot) -> None:
        """End the life of a map: nothing of it is read any more, and its bytes may become another's."""
        ...

    def release(self) -> None:
        """The store is let go, after a fault say: nothing is asked of it any more, and what it holds that others
        could use is free, though somebody may still refer to it."""
        ...


class StoredMap(Protocol):
    """One map as a run knows it, wherever it lives: in a store, or with the caller, as what is read region by region
    and what is written so (`storage.external`). The methods are those of `Store` for one slot."""

    def open(self) -> None:
        """As `Store.open`."""
        ...

    def expect(self, region: Region) -> None:
        """As `Store.expect`."""
        ...

    def fetch(self, region: Region) -> torch.Tensor:
        """As `Store.fetch`."""
        ...

    def put(self, region: Region, window: torch.Tensor) -> None:
        """As `Store.put`."""
        ...

    def close(self) -> None:
        """As `Store.close`."""
        ...
