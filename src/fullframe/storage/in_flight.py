"""Reads ahead of their callers and writes behind them, by threads, within a number of bytes.

A read waits for the writes that it overlaps, and so does a write. Those are always submitted before it, and threads
take what was submitted first, so they are being done or done: nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import RLock
from typing import NamedTuple

import torch

from fullframe.ir import region as box
from fullframe.ir.region import Region
from fullframe.storage.protocol import Slot

THREADS = 2


class _Write(NamedTuple):
    slot: Slot
    region: Region
    done: Future[None]


class _Read(NamedTuple):
    nbytes: int
    done: Future[torch.Tensor]


class InFlight:
    """What is under way to a store and from it, of no more bytes at once than it is allowed each time.

    Where it is not allowed so many, the caller does it itself. An error of a write is raised by the next call that
    waits for anything.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "fullframe-disk")
        self._lock = RLock()
        self._writes: list[_Write] = []
        self._reads: dict[tuple[Slot, Region], _Read] = {}
        self._taken = 0
        self._failed: BaseException | None = None

    def reserved(self, nbytes: int, allowed: int) -> bool:
        """Whether so many bytes more may be under way; they are taken if so."""
        with self._lock:
            fits = self._taken + nbytes <= allowed
            self._taken += nbytes if fits else 0
            return fits

    def write(self, slot: Slot, region: Region, nbytes: int, work: Callable[[], None]) -> None:
        """Begin a write, for which bytes are reserved and no other of its region is under way."""
        with self._lock:
            done = self._threads.submit(work)
            self._writes.append(_Write(slot, region, done))
        done.add_done_callback(lambda _: self._finished(done, nbytes))

    def read(self, slot: Slot, region: Region, nbytes: int, allowed: int, work: Callable[[], torch.Tensor]) -> None:
        """Begin a read, unless it is under way or that many bytes are not to be had."""
        with self._lock:
            if (slot, region) in self._reads or not self.reserved(nbytes, allowed):
                return
            self._reads[slot, region] = _Read(nbytes, self.after(slot, region, work))

    def after(self, slot: Slot, region: Region, work: Callable[[], torch.Tensor]) -> Future[torch.Tensor]:
        """Begin a read, for which bytes are reserved, after the writes that it overlaps."""
        with self._lock:
            before = self._overlapping(slot, region)

            def made() -> torch.Tensor:
                for write in before:
                    write.result()
                if self._failed is not None:  # what is read may be what was not written
                    raise self._failed
                return work()

            return self._threads.submit(made)

    def found(self, slot: Slot, region: Region) -> torch.Tensor | None:
        """What was read ahead of this region, once; None where nothing was."""
        with self._lock:
            read = self._reads.pop((slot, region), None)
        if read is None:
            return None
        try:
            return read.done.result()
        finally:
            self.give_back(read.nbytes)

    def settle(self, slot: Slot, region: Region | None = None) -> None:
        """Wait for the writes that overlap a region; those to any of a slot's bytes, whoever's, where none is given.
        Raises the error of any write."""
        for done in self._overlapping(slot, region):
            done.result()
        if self._failed is not None:
            raise self._failed

    def forget(self, slot: Slot) -> None:
        """What was read ahead of a slot is not wanted."""
        with self._lock:
            for key in [key for key in self._reads if key[0] is slot]:
                read = self._reads.pop(key)
                read.done.cancel()
                self.give_back(read.nbytes)

    def stop(self) -> None:
        """Begin nothing more, and wait for what has begun."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _overlapping(self, slot: Slot, region: Region | None) -> list[Future[None]]:
        with self._lock:
            if region is not None:
                return [w.done for w in self._writes if w.slot is slot and box.overlap(w.region, region)]
            stop = slot.offset + slot.nbytes
            near = (w for w in self._writes if w.slot.offset < stop)
            return [w.done for w in near if slot.offset < w.slot.offset + w.slot.nbytes]

    def give_back(self, nbytes: int) -> None:
        """So many bytes are no longer taken."""
        with self._lock:
            self._taken -= nbytes

    def _finished(self, done: Future[None], nbytes: int) -> None:
        error = None if done.cancelled() else done.exception()
        with self._lock:
            self.give_back(nbytes)
            self._writes = [w for w in self._writes if w.done is not done]
            self._failed = self._failed or error
