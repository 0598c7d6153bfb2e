"""The stores of a tiled module, kept between steps: one of each kind per run in flight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fullframe.device import device_of
from fullframe.ir.region import Region
from fullframe.storage.arena import Arena
from fullframe.storage.offload import Host
from fullframe.storage.protocol import DEVICE, HOST, Slot, Store

MAKERS: dict[str, Callable[[int, torch.device], Store]] = {DEVICE: Arena, HOST: Host}
"""How each kind of store is made: of so many bytes, for runs on a device."""


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


class _Idle(NamedTuple):
    store: Store
    done: Any  # a mark of its device: the run before is done with it


class Pool:
    """The stores that no run has, at most one of each kind: a run in flight has its own (a forward whose backward is
    to come)."""

    def __init__(self) -> None:
        self._idle: dict[str, _Idle] = {}

    def take(self, sizes: Mapping[str, int], device: torch.device) -> Stores:
        """Stores of at least so many bytes each: idle ones that are large enough, or new ones in their place.

        There is always an arena, and other stores where bytes of them are asked for.
        """
        made = {name: self._take(name, n, device) for name, n in sizes.items() if n}
        arena = made.setdefault(DEVICE, Arena(0, device))
        assert isinstance(arena, Arena)
        return Stores(arena, made)

    def _take(self, name: str, nbytes: int, device: torch.device) -> Store:
        found = self._idle.pop(name, None)
        if found is not None and found.store.device == device and found.store.nbytes >= nbytes:
            device_of(device).wait(found.done, device)
            return found.store
        del found  # before the new one is made
        return MAKERS[name](nbytes, device)

    def give(self, stores: Stores) -> None:
        """Take back the stores of a run that is done, or will be when the current stream has come so far."""
        for name, store in stores.by_name.items():
            if store.nbytes and name not in self._idle:
                self._idle[name] = _Idle(store, device_of(store.device).mark(store.device))

    def clear(self) -> None:
        """Let go of those that no run has."""
        self._idle.clear()

    def __deepcopy__(self, _: object) -> Pool:
        return Pool()

    def __reduce__(self) -> tuple[type[Pool], tuple[()]]:
        return Pool, ()
