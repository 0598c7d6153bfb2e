"""Steps that are replayed outside of Python: the same bits as in Python, whatever fails or changes in between."""

from __future__ import annotations

import _thread
import copy
import gc
import signal
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.bytecode.libtorch import bytecode_available
from fullframe.runtime import executor
from fullframe.runtime import workers as threads
from fullframe.runtime.executor import Run, runtime_of
from fullframe.runtime.replay_cpu import Schedule

pytestmark = pytest.mark.skipif(
    not bytecode_available(), reason="no compiler, or a PyTorch without the functions that bytecode calls"
)
STEPS = 7


class _Mixed(nn.Module):
    """Norms of several kinds, branches, resampling, and an op (RReLU) that stays in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.GELU(), nn.MaxPool2d(2))
        self.right = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Dropout2d(0.2), nn.SiLU())
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = F.interpolate(self.left(x) * self.right(x), scale_factor=2.0, mode="bilinear")
        return self.last(x + y)


def _setup(workers: int = 2, tile: int = 24) -> tuple[nn.Module, Any, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = _Mixed()
    step = fullframe.tile(net, loss=F.mse_loss, tile=[tile, tile], workers=workers)
    return net, step, torch.randn(2, 3, 72, 60), torch.randn(2, 2, 72, 60)


def _step(net: nn.Module, step: Any, image: torch.Tensor, target: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    net.zero_grad()
    loss = step(image, target)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None),
            *(b.clone() for b in net.buffers())]  # fmt: skip


def _replays(step: Any) -> list[Schedule]:
    (program,) = step._fullframe["programs"].values()
    return [s for s in runtime_of(program.plan, torch.device("cpu")).schedules.values() if s.native]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_same_bits_as_in_python(monkeypatch, workers):
    net, step, image, target = _setup(workers)
    found = [_step(net, step, image, target, seed) for seed in range(STEPS)]
    assert _replays(step)
    steps = sum(len(r.stage_range) for r in _replays(step))
    assert steps > sum(len(r.native) for r in _replays(step)) > steps / 2
    monkeypatch.setattr(executor, "bytecode_available", lambda: False)
    net, step, image, target = _setup(workers)
    for seed, made in enumerate(found):
        assert all(map(torch.equal, made, _step(net, step, image, target, seed)))
    assert not _replays(step)


def _played(workers: int = 2) -> tuple[Any, ...]:
    """A step that is replayed, and what it makes."""
    case = _setup(workers)
    for _ in range(STEPS):
        buffers = copy.deepcopy(dict(case[0].named_buffers()))
        made = _step(*case)
    assert _replays(case[1])
    for name, buffer in case[0].named_buffers():
        buffer.copy_(buffers[name])
    return case, buffers, made


def _same(case: Any, buffers: Any, made: list[torch.Tensor]) -> None:
    for name, buffer in case[0].named_buffers():
        buffer.copy_(buffers[name])
    assert all(map(torch.equal, made, _step(*case)))


def test_a_tile_whose_bytecode_fails_is_made_in_python():
    case, buffers, made = _played()
    for replay in _replays(case[1]):
        for recorded in replay.native.values():
            recorded[-1].bytecode.words[0] = 99  # no instruction
    _same(case, buffers, made)


def test_sums_whose_bytecode_fails_are_an_error():
    case, buffers, made = _played()
    broken = [
        s.after.bytecode.words
        for replay in _replays(case[1])
        for s in replay.stages.list
        if s.after is not None and len(s.after.bytecode.words) > 1
    ]
    kept = [(words, words[0]) for words in broken]
    for words in broken:
        words[0] = 99
    with pytest.raises(MemoryError, match="could not be added up"):
        _step(*case)
    for words, first in kept:
        words[0] = first
    _same(case, buffers, made)


@pytest.mark.parametrize("name", ["begin", "make", "end", "free"])
@pytest.mark.parametrize("workers", [1, 2])
def test_errors_in_python_reach_the_caller(monkeypatch, name, workers):
    case, buffers, made = _played(workers)
    calls = []

    def broken(self, *args, **kwargs):
        calls.append(args)
        raise ZeroDivisionError(name)

    with monkeypatch.context() as patch:
        patch.setattr(Run, name, broken)
        with pytest.raises(ZeroDivisionError, match=name):
            _step(*case)
    assert calls
    _same(case, buffers, made)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one may come where none is caught
def test_an_interrupt_ends_a_step():
    case, buffers, made = _played()
    stop = threading.Event()

    def interrupt() -> None:
        while not stop.wait(0.1):
            _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            try:
                for _ in range(500):
                    _step(*case)
            finally:
                stop.set()
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    _same(case, buffers, made)


@pytest.mark.rest
def test_another_layout_of_the_image():
    case, buffers, made = _played()
    net, step, image, target = case
    other = image.contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        _same((net, step, other, target), buffers, made)
        _same(case, buffers, made)


def test_two_backwards_and_a_forward_between():
    case, buffers, made = _played()
    net, step, image, target = case
    net.zero_grad()
    torch.manual_seed(0)
    loss = step(image, target)
    for name, buffer in net.named_buffers():
        buffer.copy_(buffers[name])
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(step(image, target), loss)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    assert all(map(torch.equal, once, made[1:]))
    net.zero_grad()
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(once, net.parameters(), strict=True) if p.grad is not None)


def test_nothing_of_a_step_is_kept(monkeypatch):
    case, _, _ = _played()
    runs: list[weakref.ref[Run]] = []
    made = Run.__init__

    def noted(self: Run, *args: Any) -> None:
        made(self, *args)
        runs.append(weakref.ref(self))

    monkeypatch.setattr(Run, "__init__", noted)
    gc.collect()
    gc.disable()
    try:
        _step(*case)
        assert runs and not any(run() for run in runs)
    finally:
        gc.enable()


@pytest.mark.rest
def test_threads_that_cannot_be_had(monkeypatch):
    case, buffers, made = _played(3)
    pool = threads.pool(2)
    submit, left = pool.submit, [1]

    def short(call: Any, *rest: Any) -> Any:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        return submit(call, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pool, "submit", short)
        with pytest.raises(RuntimeError, match="new thread"):
            _step(*case)
    _same(case, buffers, made)


def test_untiled_values_of_every_kind():
    """Counts times numbers, sums in bfloat16, and nothing at all."""

    def loss(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mean = y.mean((0, 2, 3))
        counts = F.one_hot(target[:, 0].gt(0).long(), 2).sum((0, 1, 2))
        narrow = (y.bfloat16().sum() * 0.1) * 0.3 + mean.bfloat16().sum() / 0.3
        return (mean * (counts * 0.3)).sum() + torch.cat([mean[:0], mean]).sum() + narrow.float() + mean[:0].sum()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    step = fullframe.tile(net, loss=loss, tile=[24, 24], workers=2)
    image, target = torch.randn(1, 3, 72, 60), torch.randn(1, 1, 72, 60)
    found = [_step(net, step, image, target) for _ in range(STEPS)]
    assert _replays(step)
    assert all(all(map(torch.equal, found[0], other)) for other in found)
    plain = loss(net(image), target)
    assert torch.allclose(found[0][0], plain, rtol=0.02)


@pytest.mark.rest
def test_several_threads():
    cases = [_played() for _ in range(2)]
    errors: list[BaseException] = []

    def work(case: Any) -> None:
        net, step, image, target = case[0]
        try:
            for _ in range(5):
                net.zero_grad()
                step(image, target).backward()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not errors and not any(t.is_alive() for t in threads)
    for case in cases:
        _same(*case)
