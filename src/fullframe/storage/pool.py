"""The stores of a tiled module, kept between steps: one of each kind per run in flight."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fullframe.device import Mark, device_of
from fullframe.ir.region import Region
from fullframe.storage.arena import Arena
from fullframe.storage.disk import Disk
from fullframe.storage.offload import Host
from fullframe.storage.protocol import DEVICE, DISK, HOST, Slot, Store

MAKERS: dict[str, Callable[..., Store]] = {DEVICE: Arena, HOST: Host, DISK: Disk}
"""How each kind of store is made: of so many bytes, for runs on a device, and with what a pool was told of it."""


class Stored(NamedTuple):
    """One map, and the store that it lives in: its methods are those of `Store`."""

    store: Store
    slot: Slot

    def open(self) -> None:
        self.store.open(self.slot)

    def expect(self, region: Region) -> None:
        self.store.expect(self.slot, region)

    def fetch(self, region: Region) -> torch.Tensor:
        return self.store.fetch(self.slot, region)

    def put(self, region: Region, window: torch.Tensor) -> None:
        self.store.put(self.slot, region, window)

    def close(self) -> None:
        self.store.close(self.slot)


class Stores(NamedTuple):
    """The stores of one run, by name; the ``arena`` is among them."""

    arena: Arena
    by_name: Mapping[str, Store]

    def map(self, slot: Slot) -> Stored:
        """The map of a slot."""
        return Stored(self.by_name[slot.tier], slot)

    @contextmanager
    def released_on_failure(self) -> Iterator[None]:
        """Let go of the stores where what is done inside fails: the error may keep them alive for long."""
        try:
            yield
        except BaseException:
            for store in self.by_name.values():
                store.release()
            raise


class _Idle(NamedTuple):
    store: Store
    done: Mark  # a mark of its device: the run before is done with it
    process: int  # whose it is: one that was forked shares files with it


class Pool:
    """The stores that no run has, at most one of each kind: a run in flight has its own (a forward whose backward is
    to come).

    ``told`` are keywords for the makers of kinds: the folder of a disk.
    """

    def __init__(self, told: Mapping[str, Mapping[str, object]] | None = None) -> None:
        self.told = told or {}
        self._idle: dict[str, _Idle] = {}

    def take(self, sizes: Mapping[str, int], device: torch.device, spare: int = 0) -> Stores:
        """Stores of at least so many bytes each: idle ones that are large enough, or new ones in their place.

        There is always an arena, and other stores where bytes of them are asked for. They may take ``spare`` bytes
        beside their maps.
        """
        made = {name: self._take(name, n, device) for name, n in sizes.items() if n}
        for store in made.values():
            store.spare = spare
        arena = made.setdefault(DEVICE, Arena(0, device))
        assert isinstance(arena, Arena)
        return Stores(arena, made)

    def _take(self, name: str, nbytes: int, device: torch.device) -> Store:
        found = self._idle.pop(name, None)
        mine = found is not None and found.process == os.getpid()
        if found is not None and mine and found.store.device == device and found.store.nbytes >= nbytes:
            device_of(device).wait(found.done, device)
            return found.store
        del found  # before the new one is made
        return MAKERS[name](nbytes, device, **self.told.get(name, {}))

    def give(self, stores: Stores) -> None:
        """Take back the stores of a run that is done, or will be when the current stream has come so far."""
        for name, store in stores.by_name.items():
            if store.nbytes and name not in self._idle:
                self._idle[name] = _Idle(store, device_of(store.device).mark(store.device), os.getpid())

    def clear(self) -> None:
        """Let go of those that no run has."""
        self._idle.clear()

    def __deepcopy__(self, _: object) -> Pool:
        return Pool(self.told)

    def __reduce__(self) -> tuple[type[Pool], tuple[Mapping[str, Mapping[str, object]]]]:
        return Pool, (self.told,)
