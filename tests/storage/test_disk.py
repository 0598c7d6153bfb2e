"""Maps on disk: the numbers of plain PyTorch, the bytes that were planned, and nothing changed or left after faults."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from disks import UNet, folder_on_disk
from test_plan import Residual, gradients

import fullframe
from fullframe.schedule import planner, tiling
from fullframe.schedule.plan import arithmetic, banded
from fullframe.storage import disk, protocol, unnamed_file
from fullframe.storage.unnamed_file import disk_folder

GB = 10**9


@pytest.fixture
def forced(monkeypatch):
    """Maps go to the disk rather than that anything is made again; tiles are small."""
    monkeypatch.setattr(planner, "PER_BYTE", 0)
    monkeypatch.setattr(planner, "LITTLE", 2)
    monkeypatch.setattr(tiling, "WINDOW", 100_000)
    for module in (planner, disk, unnamed_file):
        monkeypatch.setattr(module, "DISK_BUFFER", 1 << 15)
    return folder_on_disk()


def read_ahead(monkeypatch, yes=True):
    """Let stores read ahead and write behind, whatever the plan has left for that."""
    monkeypatch.setattr(disk.Disk, "spare", property(lambda _: (64 << 20) * yes, lambda *_: None))


def case(kind=UNet, dtype=torch.float64):
    torch.manual_seed(0)
    net = kind() if kind is UNet else kind(blocks=2)
    return net.to(dtype), torch.randn(2, 1, 72, 92, dtype=dtype), torch.randint(0, 3, (2, 72, 92))


def loss(output, target):
    return F.cross_entropy(output.float() if output.dtype is torch.bfloat16 else output, target)


@lru_cache
def smallest(kind, dtype, tile, workers):
    return least(*case(kind, dtype), tile=tile, workers=workers)


def least(net, image, label, **options):
    with pytest.raises(fullframe.BudgetError) as refused:
        fullframe.tile(net, loss=loss, budget=1, disk="1 GB", **options).plan(image, label)
    return refused.value.smallest


def on_disk(net, image, label, more=0, tile=None, workers=1):
    """A step of whose maps some live on disk, in the smallest budget and some bytes more."""
    budget = smallest(type(net), image.dtype, tile, workers) + more
    step = fullframe.tile(
        net, loss=loss, budget=budget, disk="1 GB", folder=folder_on_disk(), tile=tile, workers=workers
    )
    plan = step.plan(image, label)
    assert plan.bytes.disk and plan.offloaded and plan.projected_bytes <= budget
    return step


def file_of(step):
    return step._fullframe["pool"]._idle["disk"].store.file


def state(net):
    return [t.detach().clone() for t in (*net.parameters(), *net.buffers())]


@pytest.mark.parametrize(
    ("kind", "workers", "tile", "more", "ahead"),
    [
        (UNet, 1, None, 0, False),
        (UNet, 2, None, 1_000_000, True),
        (Residual, 1, (70, 13), 0, True),
        (Residual, 2, None, 700_000, False),
    ],
)
def test_a_step_is_that_of_plain_pytorch(forced, monkeypatch, kind, workers, tile, more, ahead):
    read_ahead(monkeypatch, ahead)
    net, image, label = case(kind)
    plain = copy.deepcopy(net)
    step = on_disk(net, image, label, more, tile=tile, workers=workers)
    for _ in range(3):
        expected = gradients(plain, lambda x, y: loss(plain(x), y), image, label)
        found = gradients(net, step, image, label)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-13, atol=0)
        scale = max(float(g.abs().max()) for g in expected[1])
        for a, b in zip(found[1], expected[1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13 * scale)
        for a, b in zip(net.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_numbers_are_no_further_from_the_truth(forced, dtype):
    net, image, label = case(dtype=dtype)
    truth = copy.deepcopy(net).double()
    plain = copy.deepcopy(net)
    true = gradients(truth, lambda x, y: loss(truth(x), y), image.double(), label)
    near = gradients(plain, lambda x, y: loss(plain(x), y), image, label)
    found = gradients(net, on_disk(net, image, label, workers=2), image, label)

    def off(made):
        pairs = zip(made[1], true[1], strict=True)
        return sum(float((a.double() - b).square().sum()) for a, b in pairs) ** 0.5

    assert off(found) <= 1.5 * off(near)


def test_workers_and_the_way_to_the_disk_change_no_bit(forced, monkeypatch):
    net, image, label = case(dtype=torch.float32)
    found = []
    for workers, direct, ahead in ((1, True, False), (2, True, True), (2, False, False)):
        one = copy.deepcopy(net)
        with monkeypatch.context() as patched:
            if not direct:
                patched.setattr(unnamed_file, "_direct", lambda fd: None)
            read_ahead(patched, ahead)
            step = on_disk(one, image, label, workers=workers, tile=24)
            for _ in range(2):
                made = gradients(one, step, image, label)
        found.append([made[0], *made[1], *one.buffers()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_module_keeps_its_maps_there_until_the_backward(forced):
    net, image, _ = case()
    plain = copy.deepcopy(net)
    with pytest.raises(fullframe.BudgetError) as refused:
        fullframe.tile(net, budget=1, disk="1 GB").plan(image)
    tiled = fullframe.tile(net, budget=refused.value.smallest, disk="1 GB", folder=forced)
    assert tiled.plan(image).bytes.disk
    outputs = [(m(image), m(2 * image)) for m in (tiled, plain)]
    for (a, b), module in zip(outputs, (net, plain), strict=True):
        (a.square().mean() + 3 * b.square().mean()).backward()
        assert all(p.grad is not None for p in module.parameters())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-13)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-13)


def test_a_forward_without_gradients(forced):
    net, image, _ = case()
    plain = copy.deepcopy(net)
    with torch.no_grad():
        with pytest.raises(fullframe.BudgetError) as refused:
            fullframe.tile(net, budget=1, disk="1 GB").plan(image)
        tiled = fullframe.tile(net, budget=refused.value.smallest, disk="1 GB", folder=forced)
        assert tiled.plan(image).bytes.disk
        for _ in range(2):
            torch.testing.assert_close(tiled(image), plain(image), rtol=1e-13, atol=1e-13)


# What is planned -----------------------------------------------------------------------------------


def test_the_plan_says_what_is_read_and_written_and_that_is_so(forced):
    net, image, label = case()
    step = on_disk(net, image, label, workers=2)
    plan = step.plan(image, label)
    text = str(plan)
    assert "on disk; a step reads" in text and "and writes" in text and "ahead and behind" in text
    for _ in range(3):
        step(image, label).backward()
    store = step._fullframe["pool"]._idle["disk"].store
    assert (store.fetched, store.stored) == tuple(3 * n for n in plan.disk_traffic)
    assert plan.bytes.disk <= store.file.nbytes and "in the memory of the disk" not in step.explain()
    assert "on disk" in step.explain()


@pytest.mark.rest
def test_maps_stay_in_memory_as_far_as_the_budget_goes(forced):
    net, image, label = case()
    written = []
    for more in (0, 1_500_000, 3_000_000, 100_000_000):
        budget = least(net, image, label, workers=1) + more
        plan = fullframe.tile(net, loss=loss, budget=budget, disk="1 GB", workers=1).plan(image, label)
        assert plan.projected_bytes <= budget
        written.append(plan.disk_traffic.written)
    assert written == sorted(written, reverse=True) and written[0] > written[2] and written[-1] == 0


def test_what_the_budget_leaves_is_for_reading_ahead(forced):
    net, image, label = case()
    image, label = image[:1, :, :1, :1].expand(2, 1, 288, 368), label[:, :1, :1].expand(2, 288, 368)
    budget = least(net, image, label, workers=2)
    found = []
    for more in (0, 20_000_000):
        plan = fullframe.tile(net, loss=loss, budget=budget + more, disk="1 GB", workers=2).plan(image, label)
        assert plan.projected_bytes <= budget + more and plan.bytes.disk
        found.append(plan.bytes.spare)
    assert found[0] == 0 < found[1]


def test_bands_are_counted(forced, monkeypatch):
    """Where maps on a disk are cut along both axes, what is kept of their rows in full width is part of the budget."""
    net, image, label = case()
    image, label = image[:1, :, :1, :1].expand(1, 1, 1200, 900), label[:1, :1, :1].expand(1, 1200, 900)
    found, budget = [], least(net, image, label, tile=60, workers=1) + 80_000_000
    for run in (1 << 30, 1):
        monkeypatch.setattr(protocol, "BAND_RUN", run)
        plan = fullframe.tile(net, loss=loss, budget=budget, disk="1 GB", tile=60, workers=1).plan(image, label)
        assert plan.projected_bytes <= budget and plan.bytes.disk
        found.append(plan.bytes.spare)
        assert (banded(plan, plan.offloaded) > 0) is (run > 1) and found[-1] > banded(plan, plan.offloaded)
    assert found[0] > found[1]


@pytest.mark.rest
def test_the_smallest_budget_named_is_enough_whatever_the_disk(forced):
    net, image, label = case()
    sizes = [fullframe.tile(net, loss=loss, budget="4 GB").plan(image, label).bytes.arena, 600_000, 100_000]
    needed = []
    for size in sizes:
        with pytest.raises(fullframe.BudgetError) as refused:
            fullframe.tile(net, loss=loss, budget=1, disk=size, workers=1).plan(image, label)
        needed.append(refused.value.smallest)
        step = fullframe.tile(net, loss=loss, budget=needed[-1], disk=size, workers=1, folder=forced)
        assert step.plan(image, label).bytes.disk <= size
        with pytest.raises(fullframe.BudgetError):
            fullframe.tile(net, loss=loss, budget=needed[-1] - 1, disk=size, workers=1).plan(image, label)
    assert needed == sorted(needed) and needed[0] < needed[-1]


@pytest.mark.rest
def test_what_a_disk_does_not_pay_for_is_made_again(monkeypatch):
    """A byte has its price, in operations: where it is high, less is written and more is made again."""
    monkeypatch.setattr(planner, "LITTLE", 2)
    monkeypatch.setattr(planner, "PER_BYTE", 0)
    net = Residual().double()
    image = torch.zeros(1, 1, 1, 1, dtype=torch.float64).expand(2, 1, 300, 292)
    label = torch.zeros(1, 1, 1).long().expand(2, 300, 292)
    budget = least(net, image, label, workers=1)
    found = []
    for price in (0, 500):
        monkeypatch.setattr(planner, "PER_BYTE", 500 * price)
        plan = fullframe.tile(net, loss=loss, budget=budget, disk="1 GB", workers=1).plan(image, label)
        found.append((sum(plan.disk_traffic), arithmetic(plan)))
    assert found[0][0] > found[1][0] and found[0][1] < found[1][1], found


# What is refused -----------------------------------------------------------------------------------


def test_options_that_make_no_sense_are_refused(tmp_path):
    net = UNet()
    with pytest.raises(ValueError, match="give budget="):
        fullframe.tile(net, disk="1 GB")
    with pytest.raises(ValueError, match="give disk="):
        fullframe.tile(net, budget="1 GB", folder="/")
    for wrong in ("many", 0, -1, True, "1 parsec"):
        with pytest.raises(ValueError, match=r"^disk "):
            fullframe.tile(net, budget="1 GB", disk=wrong)
    with pytest.raises(TypeError, match=r"^disk "):
        fullframe.tile(net, budget="1 GB", disk=[1])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fullframe.tile(net, budget="1 GB", disk="1 GB", folder=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is no folder"):
        fullframe.tile(net, budget="1 GB", disk="1 GB", folder=tmp_path / "file")


def test_a_folder_that_cannot_be_written_is_refused(monkeypatch):
    folder = folder_on_disk()
    monkeypatch.setattr(unnamed_file.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="cannot be written"):
        fullframe.tile(UNet(), budget="1 GB", disk="1 GB", folder=folder)


@pytest.mark.skipif(
    sys.platform != "linux" or not Path("/dev/shm").is_dir(), reason="no folder known to be in memory"
)
def test_a_folder_in_memory_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match=r"/dev/shm' is in memory \(tmpfs\)"):
        fullframe.tile(UNet(), budget="1 GB", disk="1 GB", folder="/dev/shm")
    monkeypatch.setattr(unnamed_file.tempfile, "gettempdir", lambda: "/dev/shm")
    with pytest.raises(ValueError, match="temporary folder '/dev/shm' is in memory"):
        fullframe.tile(UNet(), budget="1 GB", disk="1 GB")


# Faults --------------------------------------------------------------------------------------------


def fails(code, after=0):
    """In the place of a function of the system: an error from a call on."""
    calls = iter(range(10**9))

    def call(name, real):
        def replaced(fd, buffers, offset):
            if next(calls) >= after:
                raise OSError(code, os.strerror(code))
            return real(fd, buffers, offset)

        return name, replaced

    return call


@pytest.mark.parametrize(
    ("name", "workers", "calls", "ahead"),
    [("preadv", 1, 3, False), ("preadv", 2, 1, True), ("pwritev", 1, 3, True), ("pwritev", 2, 1, False)],
)
def test_an_error_of_the_disk_changes_nothing(forced, monkeypatch, name, workers, calls, ahead):
    read_ahead(monkeypatch, ahead)
    net, image, label = case()
    plain = copy.deepcopy(net)
    step = on_disk(net, image, label, workers=workers)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(calls - 1):
        step(image, label)
    before, real = state(net), getattr(os, name)
    with monkeypatch.context() as patched:
        patched.setattr(unnamed_file.os, *fails(errno.EIO, after=5)(name, real))
        there = descriptors(forced)
        with pytest.raises(OSError, match="stored maps on the disk failed") as failed:
            step(image, label)
        assert len(descriptors(forced)) <= len(there)  # the room is free, though the error is still there
    assert failed.value.errno == errno.EIO and str(folder_on_disk()) in str(failed.value)
    assert all(map(torch.equal, state(net), before))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())
    for _ in range(calls - 1):
        plain(image)
    expected = gradients(plain, lambda x, y: loss(plain(x), y), image, label)
    found = gradients(net, step, image, label)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_file_that_ends_too_early_is_an_error(forced, monkeypatch):
    net, image, label = case()
    step = on_disk(net, image, label)
    monkeypatch.setattr(unnamed_file.os, "preadv", lambda *_: 0)
    with pytest.raises(OSError, match="ends too early"):
        step(image, label)


def test_a_full_disk_is_an_error_before_anything_has_run(forced, monkeypatch):
    net, image, label = case()
    step = on_disk(net, image, label)
    before = state(net)

    def full(fd, offset, nbytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(unnamed_file.os, "posix_fallocate", full)
        there = descriptors(forced)
        with pytest.raises(OSError, match="no room on the disk") as failed:
            step(image, label)
        assert descriptors(forced) == there
    assert failed.value.errno == errno.ENOSPC and all(map(torch.equal, state(net), before))
    step(image, label)


def test_a_small_file_system_is_found_too_small(forced, tmp_path):
    """A real one, of 4 MB, in a file."""
    if os.geteuid() or not folder_on_disk():
        pytest.skip("only root mounts file systems")
    image_file, mounted = tmp_path / "small.img", tmp_path / "small"
    mounted.mkdir()
    with image_file.open("wb") as file:
        file.truncate(8_000_000)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image_file)], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(image_file), str(mounted)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        net = Residual().double()
        image, label = torch.randn(2, 1, 120, 150, dtype=torch.float64), torch.randint(0, 3, (2, 120, 150))
        budget = least(net, image, label)
        step = fullframe.tile(net, loss=loss, budget=budget, disk="1 GB", folder=mounted)
        before = state(net)
        with pytest.raises(OSError, match="no room on the disk"):
            step(image, label)
        assert all(map(torch.equal, state(net), before)) and os.listdir(mounted) == ["lost+found"]
    finally:
        subprocess.run(["umount", str(mounted)], check=False)


def descriptors(folder):
    """Files without a name that this process has open in a folder."""
    gc.collect()
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith(f"{folder}/") and "(deleted)" in target:
            found.append(target)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not tell open files")
def test_a_file_goes_with_its_step(forced):
    net, image, label = case()
    there = descriptors(forced)
    step = on_disk(net, image, label)
    step(image, label).backward()
    assert os.fstat(file_of(step)._cached).st_mode & 0o777 == 0o600 and len(descriptors(forced)) > len(there)
    del step
    assert descriptors(forced) == there


def test_without_unnamed_files_one_is_unlinked_at_once(forced, monkeypatch, tmp_path):
    monkeypatch.delattr(unnamed_file.os, "O_TMPFILE", raising=False)
    monkeypatch.setattr(unnamed_file, "_kept_in_memory", lambda _: None)
    file = unnamed_file.UnnamedFile(tmp_path, 10_000)
    assert not os.listdir(tmp_path) and os.fstat(file._cached).st_mode & 0o777 == 0o600


STEPS = """
import sys, torch
sys.path[:0] = {paths!r}
import test_disk
from fullframe.schedule import planner
from test_disk import case, descriptors, disk, on_disk, unnamed_file
test_disk.folder_on_disk = lambda: {folder!r}
planner.PER_BYTE, planner.LITTLE = 0, 2
for module in (planner, disk, unnamed_file):
    module.DISK_BUFFER = 1 << 15
net, image, label = case()
step = on_disk(net, image, label, workers=2)
while True:
    step(image, label).backward()
    print("made", len(descriptors({folder!r})) > 0, flush=True)
"""


@pytest.mark.rest
def test_nothing_is_left_in_the_folder_of_a_process_that_was_killed(tmp_path):
    try:
        disk_folder(tmp_path)
    except ValueError:
        pytest.skip("the temporary folder is in memory")
    code = STEPS.format(paths=sys.path, folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "made True\n"  # and the next has begun
        process.kill()
    assert process.returncode == -signal.SIGKILL and not os.listdir(tmp_path)


def test_an_interrupt_in_the_middle_changes_nothing(forced, monkeypatch):
    net, image, label = case()
    step = on_disk(net, image, label, workers=2)
    step(image, label)
    before, real, calls = state(net), os.preadv, iter(range(10**9))

    def interrupted(*args):
        if next(calls) == 5 and threading.current_thread() is not threading.main_thread():
            signal.raise_signal(signal.SIGINT)  # Python sees to it in the main thread
        elif next(calls) > 7 and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(unnamed_file.os, "preadv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(image, label)
    assert all(map(torch.equal, state(net), before))
    step(image, label).backward()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_does_not_write_into_the_file(forced):
    net, image, label = case()
    step = on_disk(net, image, label)
    step(image, label)
    file = file_of(step)
    file._owner += 1  # as in a process that was forked
    with pytest.raises(OSError, match="forked"):
        step(image, label)


def test_copies_and_pickles_know_the_folder(forced):
    net, image, label = case()
    step = on_disk(net, image, label)
    step(image, label)
    for other in (copy.deepcopy(step._fullframe["pool"]), pickle.loads(pickle.dumps(step._fullframe["pool"]))):
        assert other.told == {"disk": {"folder": folder_on_disk()}} and not other._idle
    again = copy.deepcopy(step)
    assert torch.isfinite(again(image, label)) and file_of(again) is not file_of(step)
