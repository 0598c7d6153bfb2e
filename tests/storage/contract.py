"""What every store of maps must do, whatever memory it has. A store's tests inherit `StoreContract` and say how one
is made."""

from __future__ import annotations

import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import prod

import pytest
import torch

from fullframe.ir import region as box
from fullframe.storage.protocol import Slot, Store

PAGE = 4096
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8,
          torch.bool, torch.complex64)  # fmt: skip
SHAPES = ((), (5,), (3, 4), (2, 3, 7), (2, 3, 6, 5), (1, 2, 4, 3, 5), (2, 2, 2, 3, 2, 2), (0, 3, 4, 5), (1, 1, 1, 1))


def slots_of(*kinds: tuple[tuple[int, ...], torch.dtype]) -> list[Slot]:
    """Slots one after the other, each from a whole page on."""
    made, offset = [], 0
    for shape, dtype in kinds:
        nbytes = -(-prod(shape) * dtype.itemsize // PAGE) * PAGE
        made.append(Slot(offset, nbytes, shape, dtype, dtype.itemsize))
        offset += nbytes
    return made


def numbers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Any bits that the type may have, NaNs and negative zeros among them."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, device=device).bool()
    raw = torch.randint(0, 256, (max(1, prod(shape)) * dtype.itemsize,), dtype=torch.uint8, device=device)
    return raw[: prod(shape) * dtype.itemsize].view(dtype).view(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    raw = [t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*raw)


def part(shape: tuple[int, ...], draw: random.Random) -> box.Region:
    """A region that is not empty, if the shape is not."""
    ends = [sorted(draw.sample(range(n + 1), 2)) if n else [0, 0] for n in shape]
    return tuple((low, high) for low, high in ends)


class StoreContract:
    """Inherit it, and make a store of at least so many bytes."""

    device = torch.device("cpu")

    def make(self, nbytes: int) -> Store:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def seeded(self):
        torch.manual_seed(0)

    def test_it_knows_its_size_and_the_device_of_its_runs(self):
        store = self.make(3 * PAGE)
        assert store.nbytes >= 3 * PAGE and store.device == self.device

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_what_is_put_is_fetched_bit_for_bit(self, dtype):
        slots = slots_of(*((shape, dtype) for shape in SHAPES))
        store = self.make(max(1, sum(s.nbytes for s in slots)))
        whole = {slot: numbers(slot.shape, dtype, self.device) for slot in slots}
        for slot, tensor in whole.items():
            store.open(slot)
            store.put(slot, box.full(slot.shape), tensor)
        for slot, tensor in whole.items():
            found = store.fetch(slot, box.full(slot.shape))
            assert same(found, tensor) and found.device == tensor.device
            store.close(slot)

    def test_regions_are_put_and_fetched_in_any_order_and_beside_each_other(self):
        draw = random.Random(1)
        slots = slots_of(*((shape, torch.float32) for shape in SHAPES))
        store = self.make(sum(s.nbytes for s in slots))
        wholes = {slot: numbers(slot.shape, slot.dtype, self.device) for slot in slots}
        for slot, whole in wholes.items():
            store.open(slot)
            store.put(slot, box.full(slot.shape), whole)
        for _ in range(200):
            slot, region = (slot := draw.choice(slots)), part(slot.shape, draw)
            if draw.random() < 0.5:
                window = numbers(box.shape_of(region), slot.dtype, self.device)
                wholes[slot][box.slices(region)] = window
                store.put(slot, region, window)
            if draw.random() < 0.5:
                store.expect(slot, region)
            assert same(store.fetch(slot, region), wholes[slot][box.slices(region)])
        assert all(same(store.fetch(s, box.full(s.shape)), whole) for s, whole in wholes.items())

    def test_windows_may_have_any_layout(self):
        (slot,) = slots_of(((2, 3, 6, 5), torch.float32))
        store = self.make(slot.nbytes)
        store.open(slot)
        for axes in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (2, 0, 3, 1)):
            back = [axes.index(k) for k in range(4)]
            window = numbers(tuple(slot.shape[k] for k in axes), slot.dtype, self.device).permute(back)
            store.put(slot, box.full(slot.shape), window)
            assert same(store.fetch(slot, box.full(slot.shape)), window)
        strided = numbers((4, 6, 6, 10), slot.dtype, self.device)[::2, ::2, :, ::2]
        store.put(slot, box.full(slot.shape), strided)
        assert same(store.fetch(slot, box.full(slot.shape)), strided)
        store.put(slot, box.full(slot.shape), strided[:1, :1].expand(slot.shape))
        assert same(store.fetch(slot, box.full(slot.shape)), strided[:1, :1].expand(slot.shape))

    def test_a_window_is_the_callers_own_again_once_it_was_put(self):
        (slot,) = slots_of(((1, 4, 64, 64), torch.float32))
        store = self.make(slot.nbytes)
        store.open(slot)
        window = numbers(slot.shape, slot.dtype, self.device)
        expected = window.clone()
        store.put(slot, box.full(slot.shape), window)
        window.zero_()
        assert same(store.fetch(slot, box.full(slot.shape)), expected)

    def test_what_is_read_ahead_is_what_was_put(self):
        (slot,) = slots_of(((1, 3, 40, 9), torch.float32))
        store = self.make(slot.nbytes)
        store.open(slot)
        for turn in range(3):  # what was read ahead and never fetched must not come up in a later turn
            whole = numbers(slot.shape, slot.dtype, self.device)
            store.put(slot, box.full(slot.shape), whole)
            bands = [((0, 1), (0, 3), (max(0, row - 1), min(40, row + 5)), (0, 9)) for row in range(0, 40, 4)]
            for band in bands:
                store.expect(slot, band)
            for band in bands[turn:]:
                assert same(store.fetch(slot, band), whole[box.slices(band)])

    def test_tiles_are_cut_along_both_axes(self):
        """Put in rows of tiles by two threads, some fetched before their row is there; then fetched with a halo."""
        (slot,) = slots_of(((2, 3, 40, 36), torch.float32))
        store = self.make(slot.nbytes)
        spans = [[(low, min(low + 10, n)) for low in range(0, n, 10)] for n in slot.shape[2:]]
        tiles = [((image, image + 1), (0, 3), *both) for image in range(2) for both in product(*spans)]
        halos = [(n, c, *((max(0, a - 2), min(m, b + 2)) for (a, b), m in zip(both, (40, 36), strict=True)))
                 for n, c, *both in tiles]  # fmt: skip
        for turn in range(3):
            store.open(slot)
            whole = numbers(slot.shape, slot.dtype, self.device)

            def put(k: int, whole: torch.Tensor = whole, turn: int = turn) -> None:
                store.put(slot, tiles[k], whole[box.slices(tiles[k])])
                if turn == 1 and k % 3 == 0:  # somebody reads while others are still putting
                    store.expect(slot, tiles[k])
                    assert same(store.fetch(slot, tiles[k]), whole[box.slices(tiles[k])])

            def fetch(k: int, whole: torch.Tensor = whole) -> None:
                for region in (*halos[k + 2 : k + 3], *tiles[k + 1 : k + 2]):
                    store.expect(slot, region)
                for region in (halos[k], tiles[k]):
                    assert same(store.fetch(slot, region), whole[box.slices(region)])

            with ThreadPoolExecutor(2) as threads:
                list(threads.map(put, range(len(tiles))))
                list(threads.map(fetch, range(len(tiles))))
            assert same(store.fetch(slot, box.full(slot.shape)), whole)
            store.close(slot)

    def test_the_place_of_a_closed_slot_is_anothers(self):
        first = Slot(0, PAGE, (1, 2, 8, 8), torch.float32, 4)
        second = Slot(128, PAGE, (31,), torch.int64, 8)
        store = self.make(2 * PAGE)
        for _ in range(3):
            for slot in (first, second):
                store.open(slot)
                window = numbers(slot.shape, slot.dtype, self.device)
                store.put(slot, box.full(slot.shape), window)
                store.expect(slot, box.full(slot.shape))
                assert same(store.fetch(slot, box.full(slot.shape)), window)
                store.close(slot)

    def test_a_run_that_ended_early_leaves_slots_open(self):
        (slot,) = slots_of(((3, 5), torch.float64))
        store = self.make(slot.nbytes)
        for _ in range(2):
            store.open(slot)
            window = numbers(slot.shape, slot.dtype, self.device)
            store.put(slot, box.full(slot.shape), window)
            assert same(store.fetch(slot, box.full(slot.shape)), window)

    def test_threads_put_and_fetch_at_the_same_time(self):
        rows, band = 96, 8
        source, target = slots_of(((1, 3, rows, 32), torch.float32), ((1, 3, rows, 32), torch.float32))
        store = self.make(source.nbytes + target.nbytes)
        whole = numbers(source.shape, source.dtype, self.device)
        for slot in (source, target):
            store.open(slot)

        def bands(slot: Slot, make):
            def one(low: int) -> None:
                region = ((0, 1), (0, 3), (low, low + band), (0, 32))
                store.put(slot, region, make(low))

            with ThreadPoolExecutor(4) as pool:
                list(pool.map(one, range(0, rows, band)))

        def moved(low: int) -> torch.Tensor:
            around = ((0, 1), (0, 3), (max(0, low - 1), min(rows, low + band + 1)), (0, 32))
            store.expect(source, around)
            return store.fetch(source, around)[:, :, low - around[2][0] :][:, :, :band].flip(1)

        bands(source, lambda low: whole[:, :, low : low + band])
        bands(target, moved)
        assert same(store.fetch(source, box.full(source.shape)), whole)
        assert same(store.fetch(target, box.full(target.shape)), whole.flip(1))

    def test_it_goes_when_nobody_has_it(self):
        (slot,) = slots_of(((64, 64), torch.float32))
        store = self.make(slot.nbytes)
        store.open(slot)
        store.put(slot, box.full(slot.shape), torch.zeros(64, 64, device=self.device))
        seen = weakref.ref(store)
        del store
        gc.collect()
        assert seen() is None

    def test_it_can_be_let_go_twice_and_with_maps_in_it(self):
        (slot,) = slots_of(((64, 64), torch.float32))
        store = self.make(slot.nbytes)
        store.open(slot)
        store.put(slot, box.full(slot.shape), torch.zeros(64, 64, device=self.device))
        store.expect(slot, box.full(slot.shape))
        store.release()
        store.release()

    def test_stores_are_made_apart(self):
        (slot,) = slots_of(((16,), torch.int32))
        stores = [self.make(slot.nbytes) for _ in range(3)]
        windows = [numbers(slot.shape, slot.dtype, self.device) for _ in stores]
        for store, window in zip(stores, windows, strict=True):
            store.open(slot)
            store.put(slot, box.full(slot.shape), window)
        pairs = product(range(3), repeat=2)
        assert all(
            same(stores[a].fetch(slot, box.full(slot.shape)), windows[b]) == same(windows[a], windows[b])
            for a, b in pairs
        )
