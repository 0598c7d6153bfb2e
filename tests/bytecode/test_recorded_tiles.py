"""Steps whose tiles run from bytecode: the same bits whatever changes between them, and bytecode that fails."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.bytecode.libtorch import bytecode_available
from fullframe.bytecode.program import Bytecode
from fullframe.runtime import executor
from fullframe.runtime.executor import runtime_of

pytestmark = pytest.mark.skipif(
    not bytecode_available(), reason="no compiler, or a PyTorch without the functions that bytecode calls"
)


class _Mixed(nn.Module):
    def __init__(self, rank: int):
        super().__init__()
        conv, up, norm = (getattr(nn, f"{n}{rank}d") for n in ("Conv", "ConvTranspose", "BatchNorm"))
        self.first = nn.Sequential(conv(3, 16, 3, padding=1), norm(16), nn.ReLU())
        self.down = nn.Sequential(conv(16, 48, 3, 2, 1, groups=1), nn.GroupNorm(4, 48), nn.GELU())
        self.deep = nn.Sequential(conv(48, 48, 3, padding=2, dilation=2, groups=3), conv(48, 48, 3, padding=1))
        self.up, self.last = up(48, 16, 2, 2), conv(32, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        z = self.up(self.deep(self.down(y)))
        return self.last(torch.cat([y, z], 1))


def _steps(rank: int, dtype: torch.dtype, half: bool) -> tuple[fullframe.tiled.Tiled, list[list[torch.Tensor]]]:
    torch.manual_seed(0)
    net = _Mixed(rank).to(dtype)
    image = torch.randn(2, 3, *{1: (480,), 2: (72, 60), 3: (20, 24, 16)}[rank]).to(dtype)
    target = torch.randn(2, 2, *image.shape[2:]).to(dtype)
    step = fullframe.tile(net, loss=F.mse_loss, tile=[{1: 96, 2: 24, 3: 8}[rank]] * rank, workers=2)
    found = []
    for _ in range(3):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = step(image, target)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    return step, found


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "half"), [(torch.float64, False), (torch.float32, False), (torch.float32, True)])
def test_same_bits_as_in_python(monkeypatch, rank, dtype, half):
    step, found = _steps(rank, dtype, half)
    (program,) = step._fullframe["programs"].values()
    classes = list(runtime_of(program.plan, torch.device("cpu")).tiles.classes())
    assert sum(bool(alike.recorded) for alike in classes) > len(classes) / 4
    monkeypatch.setattr(executor, "bytecode_available", lambda: False)
    _, truth = _steps(rank, dtype, half)
    for made, wanted in zip(found, truth, strict=True):
        assert all(map(torch.equal, made, wanted))


def test_a_map_in_another_layout_is_seen():
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 3, padding=1).double()
    tiled = fullframe.tile(net, tile=16)
    x = torch.randn(1, 3, 40, 40).double()
    for image in (x, x, x, x.transpose(2, 3).contiguous().transpose(2, 3), x):
        assert torch.allclose(tiled(image), net(image), rtol=0, atol=1e-14)


def test_bytecode_that_fails_runs_in_python(monkeypatch):
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 3, padding=1).double()
    tiled = fullframe.tile(net, tile=16)
    x = torch.randn(1, 3, 40, 40).double()
    truth = tiled(x)
    tiled(x)
    monkeypatch.setattr(Bytecode, "run", lambda self, bases: None)
    assert torch.equal(tiled(x), truth)


LOSSES: tuple[Any, ...] = (
    lambda y: y.sum(),
    lambda y: (y * y).sum(),
    lambda y: (y.transpose(2, 3).contiguous() * torch.arange(40.0, dtype=torch.float64)).sum(),
)


def test_gradients_in_changing_layouts():
    """A kernel that ran on another layout than the one known was missing from the bytecode that was written
    meanwhile.
    """
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Sigmoid()).double()
    twin = copy.deepcopy(net)
    tiled = fullframe.tile(twin, tile=16)
    for k in (0, 1, 1, 1, 0, 2, 2, 0, 1, 2):
        image = torch.randn(1, 3, 40, 40, dtype=torch.float64)
        found = []
        for module in (net, tiled):
            x = image.clone().requires_grad_()
            y = module(x)
            LOSSES[k](y).backward()
            found.append([x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
            module.zero_grad()
        for ours, plain in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-11)


@pytest.mark.rest
def test_bytecode_recorded_at_the_same_time_leave_torch_as_it_was():
    _steps(2, torch.float32, False)
    assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode()
