"""Every refusal names op, place and way out, and leaves parameters, buffers and random state alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import fullframe

IMAGE = torch.randn(1, 2, 12, 11)


class Block(nn.Module):
    def __init__(self, what: Callable[..., Any]):
        super().__init__()
        self.what = what
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> Any:
        return self.what(self, x)


class Net(nn.Module):
    def __init__(self, what: Callable[..., Any]):
        super().__init__()
        self.norm, self.block = nn.BatchNorm2d(2), Block(what)

    def forward(self, x: torch.Tensor) -> Any:
        return self.block(self.norm(x))


def kept(s: Any, x: torch.Tensor) -> torch.Tensor:
    s.features = {s.conv(x)}
    return x


def grown(s: Any, x: torch.Tensor) -> torch.Tensor:
    s.count = torch.cat([s.count, s.count])
    return x


def selected(s: Any, x: torch.Tensor) -> torch.Tensor:
    def counted(y: torch.Tensor) -> torch.Tensor:
        s.count.add_(1)
        return s.conv(y)

    kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    return torch.utils.checkpoint.checkpoint(counted, x, use_reentrant=False, context_fn=kept)


PLACE = r"block \(Block\)"
# What the block does, and words of op, place and way out that the error must have.
REFUSED: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "item": (lambda s, x: x * x.mean().item(), (PLACE, "_local_scalar_dense", "compute that value outside")),
    "selection": (lambda s, x: x[x > 0].mean() * x, (PLACE, "nonzero", "mask of fixed shape")),
    "unique": (lambda s, x: x * len(torch.unique(x.detach())), (PLACE, "unique", "compute that value outside")),
    "counts": (lambda s, x: x * torch.bincount(x.long().flatten().abs())[0], (PLACE, "bincount", "compute that value")),
    "numpy": (lambda s, x: x * float(x.detach().numpy().mean()), (PLACE, "numpy", "torch's own functions")),
    "python random": (lambda s, x: x * random.random(), ("Python's or NumPy's random", "torch's random functions")),
    "poisson": (lambda s, x: x + torch.poisson(x.abs()), (PLACE, "aten.poisson", "draw them with")),
    "multinomial": (lambda s, x: x + x.abs().flatten(1).multinomial(1)[0], (PLACE, "aten.multinomial", "draw them with")),
    "generator": (lambda s, x: x + torch.rand_like(x, generator=torch.Generator()), (PLACE, "rand_like", "leave generator= out")),
    "strides": (lambda s, x: x[:, :1].as_strided((1, 1, 12, 11), (264, 132, 11, 1), 132) + x, (PLACE, "as_strided", "use slices")),
    "linearize": (lambda s, x: torch.func.linearize(torch.tanh, s.conv(x))[1](x), ("traced inside", "torch.func.jvp")),
    "selective": (selected, ("selective checkpoint", "leave context_fn= out")),
    "reentrant": (lambda s, x: torch.utils.checkpoint.checkpoint(s.conv, x, use_reentrant=True), ("checkpoint", "use_reentrant=False")),
    "kept": (kept, (PLACE, "features", "return it as an output")),
    "grown": (grown, ("block.count", "its final shape")),
    "set": (lambda s, x: {"a": x, "b": slice(0, 1)}, ("slice", "tuples, lists, dicts or dataclasses")),
}  # fmt: skip


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_nothing_changes(name: str) -> None:
    what, words = REFUSED[name]
    net = Net(what)
    before, drawn = state(net), torch.get_rng_state()
    step = fullframe.tile(net, tile=5)
    for image in (IMAGE, IMAGE.clone().requires_grad_()):
        with pytest.raises(fullframe.CaptureError) as error:
            step(image)
        for word in words:
            assert error.match(word)
    after = state(net)
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(p.grad is None and type(p) is nn.Parameter for p in net.parameters())
    net.block.what = lambda s, x: s.conv(x)
    assert fullframe.tile(net, tile=5)(IMAGE).shape == IMAGE.shape  # and no mode is left behind


def test_a_budget_too_small_names_the_smallest_and_nothing_changes() -> None:
    net = Net(lambda s, x: s.conv(x))
    before, drawn = state(net), torch.get_rng_state()
    with pytest.raises(fullframe.BudgetError, match="the smallest that would do is") as error:
        fullframe.tile(net, budget="1 MB")(torch.zeros(1, 2, 64, 64))
    assert error.value.smallest > 1e6 and torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    fullframe.tile(net, budget=error.value.smallest)(torch.zeros(1, 2, 64, 64))


def test_an_op_that_cannot_run_whole_is_named() -> None:
    net = Net(lambda s, x: torch.fft.rfft2(s.conv(x)).abs())
    step = fullframe.tile(net, budget="200 MB")
    with pytest.raises(fullframe.UnsupportedOpError) as error:
        step.plan(torch.empty(1, 2, 4096, 4096))
    for word in ("aten._fft", PLACE, "Raise the budget", "fullframe/ops"):
        assert error.match(word)


CALLS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "tile 0": (lambda n: fullframe.tile(n, tile=0), ValueError, "tile=0 must be positive"),
    "workers 0": (lambda n: fullframe.tile(n, workers=0), ValueError, "workers=0 must be positive"),
    "tile rank": (lambda n: fullframe.tile(n, tile=(3, 4, 5))(IMAGE), ValueError, "2 spatial axes"),
    "budget words": (lambda n: fullframe.tile(n, budget="much"), ValueError, "write for example"),
    "budget negative": (lambda n: fullframe.tile(n, budget=-5), ValueError, "positive"),
    "no target": (lambda n: fullframe.tile(n, loss=F.mse_loss)(IMAGE), TypeError, "step\\(input, target\\)"),
    "no elements": (lambda n: fullframe.tile(n)(IMAGE[:0]), ValueError, "leave that batch out"),
    "no loss": (lambda n: fullframe.tile(n, loss=lambda y, t: 1.0)(IMAGE, IMAGE), ValueError, "must return a loss.*got float"),
    "no image": (lambda n: fullframe.tile(nn.Flatten(), tile=3)(torch.ones(2, 3)), ValueError, "needs an image input"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls_say_what_is_right(name: str) -> None:
    call, kind, words = CALLS[name]
    net = Net(lambda s, x: s.conv(x))
    before, drawn = state(net), torch.get_rng_state()
    with pytest.raises(kind, match=words):
        call(net)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())


OPTIONS = {
    "tile of text": ({"tile": "16"}, TypeError, "tile='16' must be a whole number"),
    "tile of a fraction": ({"tile": 2.5}, TypeError, "tile=2.5 must be a whole number"),
    "tiles of fractions": ({"tile": [4.0, 4]}, TypeError, "tile=.* must be a whole number"),
    "tile of nothing": ({"tile": (0, 4)}, ValueError, "must be positive"),
    "workers of a fraction": ({"workers": 2.0}, TypeError, "workers=2.0 must be a whole number"),
    "workers of text": ({"workers": "2"}, TypeError, "workers='2' must be a whole number"),
    "budget in a list": ({"budget": ["8 GB"]}, TypeError, "budget is a number of bytes.*got \\['8 GB'\\]"),
    "loss by name": ({"loss": "mse"}, TypeError, "loss='mse' must be a function or Module"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_wrong_kind_are_named(name: str) -> None:
    options, kind, words = OPTIONS[name]
    with pytest.raises(kind, match=words):
        fullframe.tile(Net(lambda s, x: s.conv(x)), **options)


def test_an_error_of_the_users_own_looks_as_in_plain_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    """The line in the user's code is among the last frames, and torch logs nothing of how it failed."""

    def wrong(_net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ torch.ones(7, 3)

    with pytest.raises(RuntimeError) as plain:
        Net(wrong)(IMAGE)
    with pytest.raises(RuntimeError) as tiled:
        fullframe.tile(Net(wrong), tile=5)(IMAGE)
    for error in (plain, tiled):
        assert error.traceback[-1].frame.code.name == "wrong"
    assert len(tiled.traceback) < 3 * len(plain.traceback)
    assert not [r for r in caplog.records if "failed while" in r.getMessage()]
