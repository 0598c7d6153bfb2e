"""Recorded runs, replayed on the processor by a substitute for CUDA graphs: who is recorded, when, and what is read."""

import contextlib
import copy
import types

import pytest
import torch
import torch.nn.functional as F
from networks import close
from test_plan import Residual
from torch import nn

import fullframe
from fullframe import errors
from fullframe.device import DEVICES, GRAPH
from fullframe.oracle import drawn
from fullframe.runtime import replay_cuda as replay


class Graph:
    """Plays a run by running it again on the tensors that it was recorded with."""

    def __init__(self):
        self.played = 0

    def replay(self):
        run = self.owner.run
        values = dict(zip((f.value for f in self.feeds), self.owner.fed, strict=True))
        run.values, run.position = {**run.runtime.constants, **values}, 0
        run.advance(len(run.plan.stages))
        self.played += 1


@pytest.fixture
def recording(monkeypatch):
    """The replays made, the latest last."""
    made = []
    nothing = types.SimpleNamespace(wait_event=lambda e: None)

    @contextlib.contextmanager
    def no_context(*args, **kwargs):
        yield

    cuda = types.SimpleNamespace(
        CUDAGraph=Graph,
        Event=lambda: types.SimpleNamespace(record=lambda s: None),
        Stream=lambda d: nothing,
        current_stream=lambda d: nothing,
        stream=no_context,
        graph=no_context,
        is_current_stream_capturing=lambda: False,
    )
    shim = types.SimpleNamespace(
        **{k: getattr(torch, k) for k in ("no_grad", "backends", "OutOfMemoryError", "Tensor")}
    )
    shim.cuda = cuda
    start = replay.CudaReplay.__init__

    def noted(self, program, arena, device, feeds):
        start(self, program, arena, device, feeds)
        self.graph.owner, self.graph.feeds = self, feeds
        made.append(self)

    monkeypatch.setattr(replay, "torch", shim)
    monkeypatch.setattr(DEVICES["cpu"], "replay", GRAPH)
    monkeypatch.setattr(replay.CudaReplay, "__init__", noted)
    return made


def case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 20, 22, dtype=torch.float64, generator=generator), torch.randint(
        0, 3, (2, 20, 22), generator=generator
    )


def both(ours, plain, step, image, label):
    for p in (*ours.parameters(), *plain.parameters()):
        p.grad = None
    a = step(image, label)
    with drawn():
        b = F.cross_entropy(plain(image), label)
    a.backward()
    b.backward()
    close(a, b)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        close(p.grad, q.grad)
    for p, q in zip(ours.buffers(), plain.buffers(), strict=True):
        close(p, q)


def test_the_second_run_in_a_row_is_recorded_and_played_with_new_numbers(recording):
    ours = Residual(4, 2).double()
    plain = copy.deepcopy(ours)
    step = fullframe.tile(ours, loss=F.cross_entropy)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (ours, plain)]
    for seed in range(4):
        both(ours, plain, step, *case(seed))
        for optimizer in optimizers:
            optimizer.step()
    assert len(recording) == 1 and recording[0].graph.played == 3


def test_weights_in_other_memory_are_recorded_anew(recording):
    ours = Residual(4, 2).double()
    plain = copy.deepcopy(ours)
    step = fullframe.tile(ours, loss=F.cross_entropy)
    for seed in range(5):
        both(ours, plain, step, *case(seed))
        if seed == 2:
            for net in (ours, plain):
                for p in net.parameters():
                    p.data = p.data * 1.01
    assert len(recording) == 2


def test_weights_whose_storage_moves_are_recorded_anew(recording):
    ours = Residual(4, 2).double()
    step = fullframe.tile(ours, loss=F.cross_entropy)
    for _ in range(2):
        step(*case())
    storage = ours.last.weight.untyped_storage()
    kept = ours.last.weight.detach().clone()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size + (1 << 20))
    with torch.no_grad():
        ours.last.weight.copy_(kept)
    step(*case())
    assert len(recording) == 2


def test_draws_are_new_in_every_replay(recording):
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 3, 1)).double()
    plain = copy.deepcopy(net)
    step = fullframe.tile(net, loss=F.cross_entropy)
    image, label = case()
    for seed in range(4):
        for p in (*net.parameters(), *plain.parameters()):
            p.grad = None
        torch.manual_seed(seed)
        a = step(image, label)
        torch.manual_seed(seed)
        with drawn():
            b = F.cross_entropy(plain(image), label)
        close(a, b)
    assert recording[0].graph.played == 3


def test_buffers_that_trade_places(recording):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 1)
            self.register_buffer("a", torch.zeros(()))
            self.register_buffer("b", torch.zeros(()))

        def forward(self, x):
            y = self.conv(x)
            with torch.no_grad():
                self.b.copy_(self.a)
                self.a.copy_(y.mean())
            return y

    ours = Net().double()
    plain = copy.deepcopy(ours)
    step = fullframe.tile(ours, loss=F.cross_entropy)
    for seed in range(4):
        both(ours, plain, step, *case(seed))


def test_other_flags_other_sizes_and_no_memory(recording, monkeypatch):
    ours = Residual(4, 2).double()
    plain = copy.deepcopy(ours)
    step = fullframe.tile(ours, loss=F.cross_entropy)
    for seed in range(3):
        both(ours, plain, step, *case(seed))
    with torch.backends.cudnn.flags(deterministic=True):
        for seed in range(3, 5):
            both(ours, plain, step, *case(seed))
    assert len(recording) == 2
    image, label = case(4)
    both(ours, plain, step, image[..., :16].contiguous(), label[..., :16].contiguous())
    assert step._fullframe["replays"]._replay is None
    for seed in range(5, 7):
        both(ours, plain, step, *case(seed))
    assert len(recording) == 3

    def full(self):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Graph, "replay", full)
    for seed in range(7, 9):
        both(ours, plain, step, *case(seed))
    assert len(recording) == 3, "what had no room is not recorded again"


def test_what_fails_while_it_is_recorded_runs_as_it_did_and_says_so_once(recording, monkeypatch, caplog):
    monkeypatch.setattr(errors, "_told", set())
    ours = Residual(4, 2).double()
    plain = copy.deepcopy(ours)
    step = fullframe.tile(ours, loss=F.cross_entropy)

    def fails(self, *args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay.CudaReplay, "__init__", fails)
    for seed in range(4):
        both(ours, plain, step, *case(seed))
    (told,) = [r.getMessage() for r in caplog.records if "CUDA graph" in r.getMessage()]
    assert "operation not permitted" in told


def test_a_module_and_an_op_without_a_rule_are_not_recorded(recording):
    tiled = fullframe.tile(Residual(4, 2).double())
    for seed in range(3):
        tiled(case(seed)[0]).sum().backward()

    class Sampled(nn.Module):
        def forward(self, x):
            grid = F.affine_grid(torch.eye(2, 3, dtype=x.dtype)[None].expand(len(x), 2, 3), list(x.shape), False)
            return F.grid_sample(x, grid, align_corners=False)

    step = fullframe.tile(nn.Sequential(nn.Conv2d(1, 3, 1).double(), Sampled()), loss=F.cross_entropy)
    for seed in range(3):
        step(*case(seed))
    assert not recording
