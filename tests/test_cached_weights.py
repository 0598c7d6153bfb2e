"""What torch or a package keeps from call to call (``parametrize.cached``, grids by size) is none of a recording's."""

from __future__ import annotations

import copy
import importlib
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fullframe
from fullframe.frontend import names

D = torch.float64


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def spectral():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3)).double()
    for part in (net[0], net[2]):
        parametrizations.spectral_norm(part)
    return net


def weight():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh()).double()
    parametrizations.weight_norm(net[0])
    return net


@pytest.mark.parametrize("make", [spectral, weight])
@pytest.mark.parametrize("grad", [False, True])
def test_calls_inside_and_outside(make, grad):
    """One block for several calls, then calls without one, of the tiled module and of the network itself."""
    plain = make()
    net = copy.deepcopy(plain)
    tiled = fullframe.tile(net, tile=7)
    x = torch.randn(1, 1, 12, 10, dtype=D)
    with nullcontext() if grad else torch.no_grad():
        for calls in ((plain, plain, plain), (tiled, tiled, net)):
            with parametrize.cached():
                made = sum(m(x).square().mean() for m in calls)
            made = made + calls[0](x).square().mean() + calls[2](x).square().mean()
            if grad:
                calls[0].zero_grad()
                made.backward()
            if calls[0] is plain:
                expected = made.detach()
        close(made.detach(), expected)
    close(dict(net.named_buffers()), dict(plain.named_buffers()))
    close([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


def test_a_change_between_two_blocks_is_seen():
    plain = weight()
    net = copy.deepcopy(plain)
    tiled = fullframe.tile(net, tile=7)
    x = torch.randn(1, 1, 12, 10, dtype=D)
    for _ in range(3):
        with torch.no_grad(), parametrize.cached():
            close(tiled(x), plain(x))
            close(tiled(x), plain(x))
        with torch.no_grad():
            for m in (net, plain):
                m[0].parametrizations.weight.original1.mul_(1.5)


PACKAGE = """
import functools
import torch

_GRIDS, _LIST, _LAST = {}, [], None


def by_size(n):
    if n not in _GRIDS:
        _GRIDS[n] = torch.linspace(-1, 1, n, dtype=torch.float64).sin()
    return _GRIDS[n]


@functools.lru_cache
def memoised(n):
    return torch.hann_window(n, dtype=torch.float64)


def appended(n):
    if not _LIST:
        _LIST.append(torch.arange(n, dtype=torch.float64).sqrt())
    return _LIST[0]


def last(n):
    global _LAST
    if _LAST is None:
        _LAST = (n, torch.arange(n, dtype=torch.float64).cos())
    return _LAST[1]
"""


@pytest.mark.parametrize("name", ["by_size", "memoised", "appended", "last"])
def test_caches_of_a_package(name, tmp_path, monkeypatch):
    """What a package keeps by size is its own after a recording: plain calls and further recordings are right."""
    (tmp_path / "kept_by_size.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(names, "INSTALLED", (*names.INSTALLED, str(tmp_path)))
    monkeypatch.delitem(sys.modules, "kept_by_size", raising=False)
    package = importlib.import_module("kept_by_size")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1).double()

        def forward(self, x):
            return self.conv(x) * getattr(package, name)(10)

    plain = Net()
    net = copy.deepcopy(plain)
    tiled = fullframe.tile(net, tile=7)
    images = [torch.randn(1, 1, h, 10, dtype=D) for h in (12, 12, 14, 12)]
    made = [tiled(x).detach() for x in images] + [net(images[0]).detach()]
    close(made, [plain(x).detach() for x in (*images, images[0])])
    del sys.modules["kept_by_size"]
