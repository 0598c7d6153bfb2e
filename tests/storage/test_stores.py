"""Each store keeps the contract, and one that nobody has thought of is one class."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contract import PAGE, StoreContract, same, slots_of
from disks import folder_on_disk
from test_plan import Residual, gradients

import fullframe
from fullframe.compiler import pipeline
from fullframe.ir import region as box
from fullframe.schedule import tiling
from fullframe.storage import pool, protocol, unnamed_file
from fullframe.storage.arena import Arena, shaped
from fullframe.storage.disk import Disk
from fullframe.storage.in_flight import THREADS
from fullframe.storage.offload import Host
from fullframe.storage.pool import Pool
from fullframe.storage.protocol import DEVICE, DISK_BUFFER, HOST

CPU = torch.device("cpu")


class Memory:
    """A store in lists of Python's numbers: all that it takes to add one."""

    def __init__(self, nbytes, device):
        self.nbytes, self.device, self.maps = nbytes, device, {}

    def open(self, slot):
        self.maps[slot] = bytearray(slot.nbytes)

    def expect(self, slot, region):
        pass

    def _view(self, slot):
        count = torch.Size(slot.shape).numel()
        flat = (
            torch.frombuffer(self.maps[slot], dtype=torch.uint8) if slot.nbytes else torch.empty(0, dtype=torch.uint8)
        )
        return shaped(flat[: count * slot.itemsize].view(slot.dtype), slot.shape)

    def fetch(self, slot, region):
        return self._view(slot)[box.slices(region)].to(self.device, copy=True)

    def put(self, slot, region, window):
        self._view(slot)[box.slices(region)].copy_(window)

    def close(self, slot):
        del self.maps[slot]

    def release(self):
        self.maps.clear()


class TestArena(StoreContract):
    def make(self, nbytes):
        return Arena(nbytes, self.device)


class TestHost(StoreContract):
    def make(self, nbytes):
        return Host(nbytes, self.device)


class TestDisk(StoreContract):
    def make(self, nbytes):
        return Disk(nbytes, self.device, folder_on_disk())


class TestDiskAhead(StoreContract):
    """What is put is written behind, and what is expected is read ahead."""

    def make(self, nbytes):
        store = Disk(nbytes, self.device, folder_on_disk())
        store.spare = 64 << 20
        return store


class TestDiskWithLittleToSpare(StoreContract):
    """Some is under way, and some is waited for."""

    def make(self, nbytes):
        store = Disk(nbytes, self.device, folder_on_disk())
        store.spare = 2 * THREADS * DISK_BUFFER + 700
        return store


class TestDiskInBands(TestDiskAhead):
    """All that is cut within a row goes there and comes back in rows of full width."""

    @pytest.fixture(autouse=True)
    def wide(self, monkeypatch):
        monkeypatch.setattr(protocol, "BAND_RUN", 1 << 30)


class TestDiskInFewBands(TestDiskInBands):
    """There is room for one band at a time, if that."""

    def make(self, nbytes):
        store = Disk(nbytes, self.device, folder_on_disk())
        store.spare = 2 * THREADS * DISK_BUFFER + 5000
        return store


class TestDiskWithoutDirectAccess(TestDisk):
    """As on a file system that has none: all goes by the page cache."""

    @pytest.fixture(autouse=True)
    def cached(self, monkeypatch):
        monkeypatch.setattr(unnamed_file, "_direct", lambda fd: None)


class TestMemory(StoreContract):
    def make(self, nbytes):
        return Memory(nbytes, self.device)


if torch.cuda.is_available():

    class TestArenaOfADevice(TestArena):
        device = torch.device("cuda:0")

    class TestHostOfADevice(TestHost):
        device = torch.device("cuda:0")

    class TestDiskOfADevice(TestDisk):
        device = torch.device("cuda:0")


def test_a_band_is_moved_once(monkeypatch):
    monkeypatch.setattr(protocol, "BAND_RUN", 1 << 30)
    (slot,) = slots_of(((1, 3, 40, 36), torch.float32))
    store, whole = TestDiskAhead().make(slot.nbytes), torch.randn(slot.shape)
    moved = []
    for name in ("read", "write"):
        call = getattr(store.file, name)
        monkeypatch.setattr(store.file, name, lambda runs, call=call, name=name: (moved.append(name), call(runs)))
    tiles = [((0, 1), (0, 3), (r, r + 10), (c, c + 6)) for r in range(0, 40, 10) for c in range(0, 36, 6)]
    store.open(slot)
    for tile in tiles:
        store.put(slot, tile, whole[box.slices(tile)])
    for tile in tiles:
        assert same(store.fetch(slot, tile), whole[box.slices(tile)])
    assert sorted(moved) == ["read"] * 4 + ["write"] * 4


@pytest.mark.parametrize("run", [0, 1 << 30], ids=["parts", "bands"])
def test_what_was_not_written_is_not_read(monkeypatch, run):
    """Also where the write has failed long before somebody asks for it."""
    monkeypatch.setattr(protocol, "BAND_RUN", run)
    (slot,) = slots_of(((1, 3, 40, 36), torch.float32))
    store = TestDiskAhead().make(slot.nbytes)

    def broken(runs):
        raise OSError(5, "broken")

    monkeypatch.setattr(store.file, "write", broken)
    store.open(slot)
    halves = [((0, 1), (0, 3), (0, 40), (c, c + 18)) for c in (0, 18)]
    with pytest.raises(OSError, match="broken"):
        for half in halves:
            store.put(slot, half, torch.randn(1, 3, 40, 18))
        while store._in_flight._writes:
            pass
        store.expect(slot, halves[0])
        store.fetch(slot, halves[0])


def test_a_pool_hands_out_what_is_large_enough_and_of_the_kind():
    kept = Pool()
    first = kept.take({DEVICE: PAGE, HOST: 2 * PAGE}, CPU)
    assert isinstance(first.arena, Arena) and first.by_name[DEVICE] is first.arena
    second = kept.take({DEVICE: PAGE, HOST: 0}, CPU)  # a run in flight has its own
    assert second.arena is not first.arena and HOST not in second.by_name
    kept.give(first)
    again = kept.take({DEVICE: 1, HOST: 2 * PAGE}, CPU)
    assert again.arena is first.arena and again.by_name[HOST] is first.by_name[HOST]
    kept.give(again)
    larger = kept.take({DEVICE: 2 * PAGE, HOST: 0}, CPU)
    assert larger.arena is not first.arena and larger.arena.nbytes == 2 * PAGE
    kept.give(larger)
    kept.clear()
    assert kept.take({DEVICE: 1, HOST: 1}, CPU).arena is not larger.arena
    assert not copy.deepcopy(kept)._idle and not pickle.loads(pickle.dumps(kept))._idle


def test_a_run_without_stored_maps_has_an_arena_without_bytes():
    assert Pool().take({DEVICE: 0, HOST: 0}, CPU).arena.nbytes == 0


def test_a_step_runs_with_a_store_of_ones_own(monkeypatch):
    """Offloaded maps live in whatever store has their tier's name."""
    torch.manual_seed(0)
    net, image, label = (
        Residual().double(),
        torch.randn(1, 1, 60, 44, dtype=torch.float64),
        torch.zeros(1, 60, 44).long(),
    )
    made = []

    def maker(nbytes, device):
        made.append(Memory(nbytes, device))
        return made[-1]

    requested = pipeline.request_for
    monkeypatch.setattr(pipeline, "request_for", lambda *args: replace(requested(*args), host=10**9))
    monkeypatch.setattr(tiling, "WINDOW", 50_000)
    with pytest.raises(fullframe.BudgetError) as refused:
        fullframe.tile(net, loss=F.cross_entropy, tile=16, budget=1, workers=2).plan(image, label)
    budget = refused.value.smallest
    results = []
    for kind in (Host, maker):
        monkeypatch.setitem(pool.MAKERS, HOST, kind)
        one = copy.deepcopy(net)
        step = fullframe.tile(one, loss=F.cross_entropy, tile=16, budget=budget, workers=2)
        assert step.plan(image, label).offloaded
        results.append(gradients(one, step, image, label))
    assert made and not made[0].maps  # each life had its end
    assert torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0][1], results[1][1]))


@pytest.mark.parametrize("columns", [2, 3])
def test_a_band_is_read_once_though_a_tile_comes_late(monkeypatch, columns):
    """Two workers, of whom one is behind: it begins its tile when the other has announced those of the next rows."""
    monkeypatch.setattr(protocol, "BAND_RUN", 1 << 30)
    rows, width = 12, 12
    slot = slots_of(((1, 4, rows, width), torch.float32))[0]
    store = Disk(slot.nbytes, CPU, folder_on_disk())
    store.spare = 64 << 20
    numbers = torch.randn(slot.shape)
    store.open(slot)
    store.put(slot, box.full(slot.shape), numbers)
    moved, read = [], store.file.read
    monkeypatch.setattr(store.file, "read", lambda runs: (moved.append(sum(r.nbytes for r in runs)), read(runs)))
    extent = width // columns
    tiles = [((0, 1), (0, 4), (y, y + 1), (x, x + extent)) for y in range(rows) for x in range(0, width, extent)]
    late = None
    for k, tile in enumerate(tiles):
        if k + 2 < len(tiles):
            store.expect(slot, tiles[k + 2])
        if k % 3 == 1:  # its part is fetched two tiles later
            late = tile
            continue
        assert torch.equal(store.fetch(slot, tile), numbers[box.slices(tile)])
        if late is not None and k % 3 == 0:
            assert torch.equal(store.fetch(slot, late), numbers[box.slices(late)])
            late = None
    store.release()
    assert sum(moved) == numbers.nbytes
