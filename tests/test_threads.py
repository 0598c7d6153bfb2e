"""Tiled modules in several threads, beside plain PyTorch, and after a fork."""

from __future__ import annotations

import copy
import os
import random
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import fullframe
from fullframe.capture.threads import replaced

D = torch.float64


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def network(*last):
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 3), *last
    ).double()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def at_once(work, count=4):
    with ThreadPoolExecutor(count) as pool:
        start = threading.Barrier(count)

        def run(k):
            torch.set_num_threads(1)
            start.wait()
            return work(k)

        return [f.result(timeout=120) for f in [pool.submit(run, k) for k in range(count)]]


def alike(net, tiled, sizes=(12, 14)):
    """Calls of a tiled module, whatever other threads do, are those of a plain copy, which runs in this one."""
    plain = copy.deepcopy(net)
    for size in sizes:
        x = torch.linspace(-1, 1, size * 10, dtype=D).view(1, 1, size, 10)
        for m in (tiled, plain):
            m.zero_grad()
            m(x).square().mean().backward()
        close([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])
        close(list(net.buffers()), list(plain.buffers()))


def test_modules_of_their_own():
    nets = [network() for _ in range(4)]
    at_once(lambda k: alike(nets[k], fullframe.tile(nets[k], tile=7, workers=2)))


def test_a_checkpoint_inside_each():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    nets = [Net() for _ in range(3)]
    at_once(lambda k: alike(nets[k], fullframe.tile(nets[k], tile=7)), 3)


def test_one_module_from_several_threads():
    """They wait for each other: all that they add up is there."""
    net = network()
    plain, tiled = copy.deepcopy(net), fullframe.tile(net, tile=7)
    images = torch.randn(4, 1, 1, 12, 10, dtype=D)
    for x in images:
        plain(x)
    at_once(lambda k: tiled(images[k]))
    assert int(net[1].num_batches_tracked) == 4
    net.eval()
    plain.eval().load_state_dict(net.state_dict())
    found = at_once(lambda k: tiled(images[k]).detach())
    close(found, [plain(x).detach() for x in images])


def test_random_numbers_are_drawn_once():
    nets = [nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.5)) for _ in range(4)]
    x = torch.ones(1, 1, 16, 16)

    def work(k):
        tiled = fullframe.tile(nets[k], tile=7)
        return [tiled(x).detach().ne(0).flatten().tolist() for _ in range(3)] + [torch.rand(8).tolist()]

    found = [str(mask) for masks in at_once(work) for mask in masks]
    assert len(set(found)) == len(found)


def beside(work):
    """What ``work`` returns, called over and over in another thread while steps are recorded here."""
    found, stop = [], threading.Event()

    def run():
        try:
            while not stop.is_set():
                found.append(work())
        except BaseException:
            found.append(traceback.format_exc())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        nets = [network(nn.Dropout(0.5)), Functions(), Seeded()]
        for net in nets:
            fullframe.tile(net, tile=7)(torch.randn(1, 1, 12, 10, dtype=D)).sum().backward()
    finally:
        stop.set()
        thread.join()
    return found


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Functions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3).double()

    def forward(self, x):
        return checkpoint(lambda x: Square.apply(self.conv(x)), x, use_reentrant=False)


class Seeded(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3).double()

    def forward(self, x):
        with torch.random.fork_rng():
            return self.conv(x) + torch.rand(1, dtype=D)


def test_plain_pytorch_beside_a_recording():
    """Modules, functions, checkpoints and random numbers of another thread."""
    plain, x = nn.Sequential(network(), nn.Dropout(0.0)), torch.randn(1, 1, 12, 10, dtype=D)

    def work():
        plain.zero_grad()
        y = Square.apply(checkpoint(plain, x, use_reentrant=False))
        y.sum().backward()
        return [y.detach(), plain[0][0].weight.grad.clone()]

    expected = work()
    for found in beside(work):
        close(found, expected)


def test_random_numbers_beside_a_recording():
    """None comes twice."""
    found = beside(lambda: torch.rand(2).tolist())
    assert len({str(numbers) for numbers in found}) == len(found) > 1


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: random.shuffle([1, 2])])
@pytest.mark.rest
def test_pythons_random_numbers_beside_a_recording(draw):
    """Another thread may draw Python's; the step may not, whatever other threads do."""
    if draw is not np.random.rand:  # whose calls cannot be told apart by threads: the recording is refused
        beside(draw)

    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3)

        def forward(self, x):
            draw()
            return self.conv(x)

    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait)
    thread.start()
    try:
        with pytest.raises(fullframe.CaptureError, match="drew from"):
            fullframe.tile(Draws(), tile=7)(torch.randn(1, 1, 12, 10))
    finally:
        waiting.set()
        thread.join()


def forked(work):
    """Whether ``work`` comes to its end in a forked process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        threading.Event().wait(0.1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_after_a_fork(workers, calls):
    """A module that has run here, with worker threads, runs in a child of this process."""
    net = network()
    tiled = fullframe.tile(net, tile=5, workers=workers)
    for _ in range(calls):
        alike(net, tiled, (12,))
    assert forked(lambda: alike(net, tiled))
    alike(net, tiled)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_another_thread_records():
    net, reached, go = network(), threading.Event(), threading.Event()

    class Dependencies(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3)

        def forward(self, x):
            reached.set()
            go.wait()
            return self.conv(x)

    slow = fullframe.tile(Dependencies(), tile=7)
    thread = threading.Thread(target=lambda: slow(torch.randn(1, 1, 12, 10)))
    thread.start()
    reached.wait()
    try:
        assert forked(lambda: net(torch.randn(1, 1, 12, 10, dtype=D)))
    finally:
        go.set()
        thread.join()


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, k):
        return torch.full((1, 12, 10), float(k), dtype=D)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_workers_of_a_data_loader():
    net = network()
    tiled = fullframe.tile(net, tile=5, workers=2)
    plain = copy.deepcopy(net)
    for x in DataLoader(Images(), batch_size=2, num_workers=1, multiprocessing_context="fork"):
        close(tiled(x), plain(x))


@pytest.mark.parametrize(
    "method", [dict.__dict__["fromkeys"], classmethod(lambda cls, keys: cls((k, None) for k in keys))]
)
def test_class_methods_of_python_and_of_c_are_replaced_and_put_back(method):
    """That of autograd's functions is C's in some releases of torch."""
    owner = type("Owner", (dict,), {"fromkeys": method})
    with replaced([owner], "fromkeys", lambda own: lambda cls, keys: own(cls, [*keys, "more"])):
        made = owner.fromkeys("ab")
    assert type(made) is owner and [*made] == ["a", "b", "more"]
    assert vars(owner)["fromkeys"] is method and [*owner.fromkeys("ab")] == ["a", "b"]
