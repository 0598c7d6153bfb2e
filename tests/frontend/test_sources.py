"""Inputs and targets that are read region by region from files and objects: the numbers of the same tensors."""

import copy
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from itertools import count

import h5py
import mapped
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budgeting import ABOVE, BESIDE, CLEAR
from disks import folder_on_disk
from torch import nn

import fullframe
from fullframe.bytecode.libtorch import bytecode_available
from fullframe.compiler import agreement
from fullframe.frontend.inputs import Call, Pair
from fullframe.runtime import executor
from fullframe.schedule import planner
from fullframe.storage.external import Source, is_source

ROWS, COLUMNS = 44, 36
NUMBERS = count()  # of files


class Made:
    """An object of the user's own: it says what it has, and makes regions when it is asked for them."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.asked = array, array.shape, array.dtype, []

    def __getitem__(self, part):
        assert isinstance(part, tuple) and all(type(s) is slice and s.step is None for s in part)
        assert all(0 <= s.start < s.stop <= n for s, n in zip(part, self.shape, strict=True))
        self.asked.append(part)
        return self.array[part]


class Lazy(Made):
    """One that makes tensors, always in the same memory."""

    def __init__(self, array):
        super().__init__(array)
        self.dtype = torch.from_numpy(np.ascontiguousarray(array)).dtype
        self.buffer = torch.empty(array.size, dtype=self.dtype)

    def __getitem__(self, part):
        made = torch.from_numpy(np.ascontiguousarray(super().__getitem__(part)))
        return self.buffer[: made.numel()].view(made.shape).copy_(made)


class Net(nn.Module):
    """It makes numbers of a picture's bytes by its own first ops."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x):
        return self.last(F.relu(self.norm(self.first(x.float() / 255))))


def criterion(output, target):
    return F.cross_entropy(output, target.long())


def picture(dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 200, (1, 3, ROWS, COLUMNS)).astype(dtype)


def labels(dtype=np.uint8):
    return np.random.default_rng(1).integers(0, 5, (1, ROWS, COLUMNS)).astype(dtype)


def memmap(array, folder):
    made = np.memmap(folder / f"{next(NUMBERS)}.raw", array.dtype, "w+", shape=array.shape)
    made[...] = array
    return made


def hdf5(array, folder):
    made = h5py.File(folder / f"{array.ndim}.h5", "w").create_dataset(
        "x", data=array, chunks=(1,) * (array.ndim - 2) + (7, 9), compression="gzip"
    )
    return made


def zarr_array(array, folder):
    zarr = pytest.importorskip("zarr", reason="comes with the packages of the examples")
    made = zarr.open(
        str(folder / f"{array.ndim}.zarr"), mode="w", shape=array.shape, chunks=array.ndim * (8,), dtype=array.dtype
    )
    made[...] = array
    return made


def tiff(array, folder):
    zarr = pytest.importorskip("zarr", reason="comes with the packages of the examples")
    tifffile = pytest.importorskip("tifffile", reason="comes with the packages of the examples")
    path = folder / f"{array.ndim}.tif"
    tifffile.imwrite(path, array, tile=(16, 16), photometric="minisblack", metadata={"axes": "QCYX"[-array.ndim :]})
    return zarr.open(tifffile.imread(path, aszarr=True, level=0), mode="r")


def big_endian(array, folder):
    return memmap(array.astype(array.dtype.newbyteorder(">")), folder)


KINDS = {
    "memmap": memmap,
    "memmap without writing": lambda a, folder: np.memmap(memmap(a, folder).filename, a.dtype, "r", shape=a.shape),
    "private memmap": lambda a, folder: np.memmap(memmap(a, folder).filename, a.dtype, "c", shape=a.shape),
    "hdf5": hdf5,
    "zarr": zarr_array,
    "tiff": tiff,
    "array": lambda a, folder: a,
    "view of a memmap": lambda a, folder: np.asarray(memmap(np.stack((a, a)), folder))[1],
    "reversed axes": lambda a, folder: np.ascontiguousarray(a.T).T,
    "backwards": lambda a, folder: np.ascontiguousarray(a[..., ::-1, ::-1])[..., ::-1, ::-1],
    "parts of pixels": lambda a, folder: np.stack((a, a), -1)[..., 1],
    "object": lambda a, folder: Made(a),
    "object of tensors": lambda a, folder: Lazy(a),
}  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def step(network):
    return fullframe.tile(network, loss=criterion, tile=16, workers=2, budget="1 GB")


def results(step, net, image, target):
    """Loss, gradients and buffers of one step, from the same state."""
    net.zero_grad()
    net.norm.reset_running_stats()
    loss = step(image, target)
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def expected(network):
    """Of tensors, by a step of their own."""
    step = fullframe.tile(network, loss=criterion, tile=16, workers=2, budget="1 GB")
    return results(step, network, torch.from_numpy(picture()), torch.from_numpy(labels()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_numbers_of_the_same_tensors(kind, network, step, expected, tmp_path):
    given = KINDS[kind](picture(), tmp_path), KINDS[kind](labels(), tmp_path)
    assert all(is_source(x) for x in given)
    for _ in range(2):  # the second is replayed where it can be
        assert same(results(step, network, *given), expected)


def test_what_is_read_is_no_part_of_the_recordings_key(network, step, expected, recordings):
    for _ in range(3):
        assert same(results(step, network, Made(picture()), Made(labels())), expected)
    assert not same(results(step, network, Made(picture() // 2), Made(labels())), expected)
    assert len(recordings) <= 1


def test_tensors_and_sources_of_one_step_are_told_apart(network, step, expected):
    given = torch.from_numpy(picture()), torch.from_numpy(labels())
    flat = torch.zeros((), dtype=torch.uint8).expand(given[0].shape)  # laid out as what stands for a source
    results(step, network, Made(picture()), Made(labels()))
    assert same(results(step, network, *given), expected)
    assert same(results(step, network, Made(picture()), given[1]), expected)
    assert same(results(step, network, flat, given[1]), results(step, network, flat.clone(), given[1]))


def test_all_is_read_by_tiles_and_nothing_outside(network, step):
    image, target = Made(picture()), Made(labels())
    results(step, network, image, target)
    for source in (image, target):
        seen = np.zeros(source.shape, bool)
        for part in source.asked:
            seen[part] = True
            assert seen[part].size < source.array.size / 2
        assert seen.all()


def test_types_of_numbers_are_those_of_tensors(tmp_path):
    names = ("u1", "i1", "u2", "i2", "i4", "i8", "f2", "f4", "f8", "?", ">u2", ">i4", ">f8", ">f2", "u4")

    class Sum(nn.Module):
        def forward(self, xs):
            return torch.cat([F.avg_pool2d(x.double(), 3, 1, 1) for x in xs], 1)

    arrays = [picture(name)[:, :1] for name in names]
    tensors = [torch.from_numpy(a.astype(a.dtype.newbyteorder("="))) for a in arrays]
    net = fullframe.tile(Sum(), tile=16, budget="1 GB")
    with torch.no_grad():
        expected = net(tensors)
        assert torch.equal(net([memmap(a, tmp_path) for a in arrays]), expected)
        assert torch.equal(net([Made(a) for a in arrays]), expected)
        assert torch.allclose(Sum()(tensors), expected)


def test_numbers_that_torch_has_no_type_for_are_refused():
    with pytest.raises(TypeError, match=r"input0, a numpy.ndarray.*longdouble|float128"):
        fullframe.tile(Net(), budget="1 GB")(picture(np.longdouble))


def test_what_is_no_picture_stays_as_it_is():
    masked = np.ma.masked_equal(picture(), 3)
    for thing in (np.ones(9), np.float32(3), masked, np.zeros((2, 2, 2), object), np.zeros((2, 2, 2), "U3"), "abc", [1],
                  np.zeros((2, 2, 2), [("a", "f4")]), torch.zeros(1, 2, 3), range(3), np.ndarray):  # fmt: skip
        assert not is_source(thing)

    class Scaled(nn.Module):
        def forward(self, x, scales):
            return x.float() * torch.from_numpy(scales)[0]

    with torch.no_grad():
        found = fullframe.tile(Scaled(), tile=16, budget="1 GB")(Made(picture()), np.full(4, 3.0, np.float32))
    assert torch.equal(found, torch.from_numpy(picture()).float() * 3)


def test_a_module_has_its_gradients_later_and_again(network):
    image, other = picture(), Made(picture())
    tiled = fullframe.tile(network, tile=16, budget="1 GB")
    found = []
    for given in (torch.from_numpy(image), other):
        out = tiled(given)
        for _ in range(2):  # the second makes the forward again
            found.append(
                torch.autograd.grad(out.sum() + (out**2).sum(), list(network.parameters()), retain_graph=True)
            )
    assert same(found[0], found[2]) and same(found[1], found[3]) and len(other.asked) > 20


def test_channels_may_come_last_in_the_file():
    class Last(Net):
        def forward(self, x):
            return super().forward(x.permute(2, 0, 1)[None])

    torch.manual_seed(0)
    image = np.ascontiguousarray(picture()[0].transpose(1, 2, 0))
    net = Last().eval()
    tiled, source = fullframe.tile(net, tile=16, budget="1 GB"), Made(image)
    with torch.no_grad():
        assert torch.equal(tiled(source), tiled(torch.from_numpy(image)))
        torch.testing.assert_close(tiled(source), net(torch.from_numpy(image)))
    assert all(np.empty(image.shape, bool)[part].size < image.size / 2 for part in source.asked)


def test_what_reads_all_of_a_source_is_named_and_counted():
    class Sorted(nn.Module):
        def forward(self, x):
            return torch.sort(x.float().flatten(1), 1).values.view(x.shape)

    image = np.random.default_rng(0).integers(0, 200, (1, 8, 400, 400)).astype(np.uint8)
    tiled = fullframe.tile(Sorted(), budget="1 GB")
    with torch.no_grad():
        plan = tiled.plan(Made(image))
        assert "sort" in str(plan.whole) and plan.bytes.scratch > 2 * image.size
        assert torch.equal(tiled(Made(image)), tiled(torch.from_numpy(image)))
        with pytest.raises((fullframe.BudgetError, fullframe.UnsupportedOpError), match="sort"):
            fullframe.tile(Sorted(), budget="101 MB")(Made(image))


def test_the_plan_says_what_is_read(step):
    image = Made(picture())
    text = str(step.plan(image, labels()))
    assert "input0:uint8[1,3,44,36] is read by regions" in text and "input1:uint8[1,44,36] is read by regions" in text
    step(image, labels())
    read = sum(image.array[part].size for part in image.asked) / 1000
    assert f"{read:.1f} kB a step" in text


def test_what_is_handed_out_as_it_was_read_is_a_tensor():
    class Through(nn.Module):
        def forward(self, x):
            self.kept = x.clone()
            return x, x.float() + 1

    net = Through()
    with torch.no_grad():
        out = fullframe.tile(net, tile=16, budget="1 GB")(Made(picture()))
    expected = torch.from_numpy(picture())
    assert all(torch.equal(t, expected) for t in (out[0], net.kept, out[1].sub(1).byte()))


def test_a_gradient_of_a_parameter_may_be_the_source():
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(1, 3, ROWS, COLUMNS))
    net.forward = lambda x: (net.weight * x).sum()
    image = picture(np.float32)
    fullframe.tile(net, tile=16, budget="1 GB")(Made(image)).backward()
    assert torch.equal(net.weight.grad, torch.from_numpy(image))


def test_every_way_of_running_gives_the_same_bits(network, expected, monkeypatch):
    monkeypatch.setattr(executor, "bytecode_available", lambda: False)
    serial = fullframe.tile(network, loss=criterion, tile=16, workers=1, budget="1 GB")
    assert same(results(serial, network, Made(picture()), Made(labels())), expected)


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_maps_elsewhere_go_together_with_sources(tier, network, expected, monkeypatch):
    given = {"disk": "1 GB", "folder": folder_on_disk()} if tier == "disk" else {}
    monkeypatch.setattr(planner, "_tiers", lambda request, _: [replace(request, host=10**9 * (tier == "host"))])
    monkeypatch.setattr(planner, "PER_BYTE", 0)
    monkeypatch.setattr(planner, "spill", lambda draft, maps, room, limit, versions: (draft, frozenset(maps)))  # all
    step = fullframe.tile(network, loss=criterion, tile=16, workers=2, budget="1 GB", **given)
    plan = step.plan(Made(picture()), Made(labels()))
    assert plan.bytes.stores[tier] and plan.bytes.arena == 0 and "is read by regions" in str(plan)
    for a, b in zip(results(step, network, Made(picture()), Made(labels())), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# What goes wrong ---------------------------------------------------------------------------------------------------


class Failing(Made):
    """One that fails when it has been read so many times."""

    left = 10**9

    def __getitem__(self, part):
        self.left -= 1
        if self.left == 0:
            raise OSError("the disk is on fire")
        return super().__getitem__(part)


@pytest.mark.parametrize("reads", [1, 5, 12])
def test_a_read_error_is_an_error_and_nothing_has_changed(network, step, expected, reads):
    image = Failing(picture())
    image.left = reads
    before = copy.deepcopy(network.state_dict())
    network.zero_grad()
    with pytest.raises(OSError, match="on fire") as raised:
        step(image, labels()).backward()
    assert "when reading input0[0:1, 0:3, " in raised.value.__notes__[0]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))
    assert all(p.grad is None for p in network.parameters())
    assert same(results(step, network, image, Made(labels())), expected)


WRONG = {
    "shape": (lambda made: made[..., :-1], r"input0, a .*Wrong.* returns uint8 of shape .* for \[0:1, 0:3, "),
    "a row": (lambda made: made[0], "returns uint8 of shape"),
    "dtype": (lambda made: made.astype(np.int16), "says it has shape .* and dtype uint8, returns int16"),
    "text": (lambda made: made.astype("U3"), "returns <U3"),
    "tensor": (lambda made: torch.from_numpy(made).float(), r"returns torch.float32"),
    "nothing": (lambda made: None, "returns object"),
    "masked": (lambda made: np.ma.masked_less(made, 300), "numbers are missing"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_region_is_an_error_that_names_the_object(step, what):
    change, words = WRONG[what]

    class Wrong(Made):
        def __getitem__(self, part):
            return change(super().__getitem__(part))

    with pytest.raises(ValueError, match=words):
        step(Wrong(picture()), labels())


def test_a_source_cannot_be_changed_in_place():
    class Clamped(Net):
        def forward(self, x):
            return super().forward(x.clamp_(max=9))

    with pytest.raises(fullframe.CaptureError, match=r"input0 in place.*clone"):
        fullframe.tile(Clamped(), tile=16, budget="1 GB")(Made(picture()))


@pytest.mark.parametrize("keep", [lambda x: x, lambda x: [x.float(), x], lambda x: {"x": (x,)}])
def test_a_source_cannot_be_kept_in_the_place_of_a_tensor(keep):
    class Keeping(Net):
        def forward(self, x):
            self.kept = keep(x)
            return super().forward(x)

    with pytest.raises(fullframe.CaptureError, match="keeps input0"):
        fullframe.tile(Keeping(), tile=16, budget="1 GB")(Made(picture()))


def test_a_source_has_no_gradient():
    source = Made(picture())
    source.requires_grad = True
    with pytest.raises(ValueError, match=r"input 0, a .*Made, asks for a gradient"):
        fullframe.tile(Net(), budget="1 GB")(source)


def test_numbers_of_a_source_cannot_be_asked_in_python():
    class Asking(Net):
        def forward(self, x):
            return super().forward(x * int(x[0, 0, 0, 0]))

    with pytest.raises(fullframe.CaptureError, match="depends on the data"):
        fullframe.tile(Asking(), budget="1 GB")(Made(picture()))


# Threads and lives -------------------------------------------------------------------------------------------------


class Crowded(Made):
    """One that sees how many threads are in it."""

    def __init__(self, array):
        super().__init__(array)
        self.inside = self.most = 0
        self.together = threading.Barrier(2)

    def __getitem__(self, part):
        self.inside += 1
        self.most = max(self.most, self.inside)
        if getattr(self, "thread_safe", False) and not self.together.broken:
            try:
                self.together.wait(5)
                self.together.abort()  # once is enough
            except threading.BrokenBarrierError:
                pass
        time.sleep(0.001)
        self.inside -= 1
        return super().__getitem__(part)


def test_one_thread_at_a_time_reads_an_object_unless_it_says_otherwise(network, step):
    image = Crowded(picture())
    results(step, network, image, labels())
    assert image.most == 1
    image.thread_safe = True
    results(step, network, image, labels())
    assert image.most > 1 or not bytecode_available()  # without a compiler tiles are made one after the other


def test_an_object_has_one_lock_whoever_reads_it():
    image = Made(picture())
    a, b = (Source(image, name, torch.device("cpu")) for name in ("a", "b"))
    assert a._lock is b._lock and a._lock is not Source(Made(picture()), "c", torch.device("cpu"))._lock


def test_an_object_goes_when_its_steps_are_done(network, step):
    image = Made(picture())
    seen = weakref.ref(image)
    step(image, labels()).backward()
    step(Made(picture()), labels()).backward()
    del image
    gc.collect()
    assert seen() is None


def test_private_pages_are_not_taken_away(tmp_path):
    image = memmap(picture(), tmp_path)
    image.flush()
    private = np.memmap(image.filename, image.dtype, "c", shape=image.shape)
    private[...] = 7
    with torch.no_grad():
        found = fullframe.tile(nn.ReLU(), tile=16, budget="1 GB")(private)
    assert bool((found == 7).all()) and (private == 7).all() and (image == picture()).all()


@pytest.mark.skipif(not CLEAR.exists(), reason="the system does not tell peaks")
@pytest.mark.rest
def test_files_larger_than_the_budget_are_read_and_written_within_it(tmp_path):
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, mapped.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=here)
    assert not done.returncode, done.stderr
    found = eval(done.stdout.splitlines()[-1])
    assert found["grown"] <= ABOVE * found["projected"] + BESIDE < found["whole"], found


def test_ranks_take_tensors(network):
    for call in (Call(Pair(network, None), (Made(picture()),), {}), ungraded(network, Made(picture()[:, [0] * 5]))):
        with pytest.raises(fullframe.CaptureError, match="mesh= and what is read or written by regions"):
            agreement._described(None, call)


def ungraded(network, out):
    with torch.no_grad():
        return Call(Pair(network, None), (torch.from_numpy(picture()),), {}, out)
