"""Operators at the edges of what they take: odd arguments, single numbers, no axes, empty tensors; and what is
refused.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from databases import Trial, judged
from fuzzing import uncompiled
from networks import agree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fullframe
from fullframe.ops.numerics import interpolate as taps
from fullframe.ops.primitives.resize import RULES, Resample

L = torch.linalg


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with uncompiled():
        yield


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * 2


class Net(nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x * self.scale)


def statistics() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.linspace(0, 1, 3, dtype=torch.float64), torch.linspace(1, 2, 3, dtype=torch.float64)


RIGHT: dict[str, Callable[[torch.Tensor], Any]] = {
    "stack of types": lambda x: torch.stack([x.float(), x, (x > 0).long()], 1).sum(1),
    "negative divisors": lambda x: (
        F.avg_pool2d(x, 2, divisor_override=-3),
        F.avg_pool2d(x, 3, 1, divisor_override=-1),
    ),
    "negative divisors 3d": lambda x: F.avg_pool3d(x[None], 2, 1, 1, divisor_override=-5),
    "pooling without a batch": lambda x: (
        F.avg_pool2d(x[0], 2),
        F.max_pool2d(x[0], 3, 2, 1),
        F.avg_pool3d(x, 2),
        F.max_pool3d(x, 2),
    ),
    "all, any": lambda x: [
        (f(x > -1, dim=d), f(x > -1, dim=d, keepdim=True))
        for f in (torch.all, torch.any)
        for d in (0, -1, (0, 2), ())
    ],
    "all, any of bytes": lambda x: (torch.all((x * 2).byte(), 1), torch.any((x * 2).byte()), torch.any(x, 2), x),
    "batch norm in evaluation": lambda x: torch.native_batch_norm(x, None, None, *statistics(), False, 0.1, 1e-5),
    "batch norm in training": lambda x: torch.native_batch_norm(x, None, None, *statistics(), True, 0.1, 1e-5),
    "norms": lambda x: [
        f(x, p, **a)
        for p in (0, 1, 3, -1, float("-inf"))
        for f in (L.vector_norm, torch.norm)
        for a in ({}, {"dim": 1})
    ],
    "norm 0": lambda x: L.vector_norm(x, 0),
    "sgn": lambda x: (torch.sgn(Twice.apply(x)) * x, torch.sgn(0.5 + 0.4 * torch.tanh(x))),
    "sgn alone": lambda x: torch.sgn(0.5 + 0.4 * torch.tanh(Twice.apply(x))),
    "nansum of a vector": lambda x: (
        torch.nansum(x.flatten()),
        torch.nanmean(x.flatten()),
        torch.nansum(x.mean((0, 2, 3))),
    ),
    "tensor_split": lambda x: (*torch.tensor_split(x, torch.tensor([1, 4]), 2), *x.tensor_split(torch.tensor(3), 3)),
    "matrix_power": lambda x: L.matrix_power(x, 0) + L.matrix_power(x, 2) + torch.matrix_power(x[0, 0], 0),
    "polygamma": lambda x: (x.abs() + 1).polygamma_(2) + torch.polygamma(1, x.abs() + 1),
    "softmax of a number": lambda x: (
        F.softmax(x.mean(), 0),
        F.log_softmax(x.mean(), -1),
        F.softmax(x.mean((0, 2, 3)), 0),
        x,
    ),
    "repeat none": lambda x: (x.repeat(1, 0, 1, 1), x.repeat(2, 1, 1, 2)),
    "roll of nothing": lambda x: (x[:, :0].roll(1, 1), x.roll(1, 1)),
    "products over nothing": lambda x: (x[:, :, :, :0] @ x[:, :, :0], x),
    "sums over nothing": lambda x: (
        x[:, :0].sum(1),
        x[:, :0].prod(1),
        (x[:, :0] > 0).any(1),
        (x[:, :0] > 0).all(1),
        x,
    ),
    "cat of nothing": lambda x: (torch.cat([x[:, :0], x[:, :0]], 1), torch.cat([x[:, :0], x], 1)),
    "numbers": lambda x: (
        x.mean().unfold(0, 1, 1),
        torch.gather(x.mean(), 0, torch.tensor([0])),
        torch.bucketize(x.mean(), torch.arange(3.0)),
        x,
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_the_edges_are_as_in_plain_pytorch(name):
    outcome, detail = judged(Trial(Net(RIGHT[name]), torch.randn(2, 3, 8, 8, dtype=torch.float64)))
    assert outcome == "right", detail


REFUSED: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "segments": (
        lambda x: torch.segment_reduce(x.flatten(), "sum", lengths=torch.tensor([3, 381])),
        "segment_reduce reads .* use index_add",
    ),
    "cross-map": (lambda x: nn.CrossMapLRN2d(3)(x), "CrossMapLRN2d works on .*LocalResponseNorm"),
    "sparse": (lambda x: x.to_sparse(), "makes a sparse tensor"),
    "split": (
        lambda x: torch.tensor_split(x, (x[0, 0, 0, :1] > 0).long(), 2),
        "tensor_split at test_edges.py.* whole numbers",
    ),
    "no axes": (lambda x: torch.nansum(x, dim=()), "nansum.* makes a tensor of shape"),
    "least squares": (lambda x: L.lstsq(x, x).solution, r"test_edges.py:\d+ .*linalg_lstsq"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_refused_by_name(name):
    function, words = REFUSED[name]
    with pytest.raises(fullframe.CaptureError, match=words):
        fullframe.tile(Net(function), tile=4)(torch.randn(2, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.l1_loss, F.kl_div])
@pytest.mark.parametrize("kinds", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_losses_of_several_types_are_as_in_plain_pytorch(loss: Any, kinds: tuple[torch.dtype, torch.dtype]) -> None:
    """A target of NumPy's is float64 where nobody has converted it."""
    net, x, y = (
        nn.Conv2d(3, 2, 1).to(kinds[0]),
        torch.randn(1, 3, 8, 8).to(kinds[0]),
        torch.rand(1, 2, 8, 8).to(kinds[1]),
    )
    found = []
    for made in (loss(net(x), y), fullframe.tile(net, loss=loss, tile=4)(x, y)):
        net.zero_grad()
        made.backward()
        found.append([made.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    for ours, plain in zip(found[1], found[0], strict=True):
        assert ours.dtype == plain.dtype and torch.allclose(ours, plain, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (F.huber_loss, "huber_loss.* several types.* convert one"),
        (F.binary_cross_entropy_with_logits, None),
        (
            lambda x, y: F.cross_entropy(x, y[:, :2].argmax(1), weight=y.new_ones(2)),
            "weights of torch.float64 for scores",
        ),
        (lambda x, y: F.binary_cross_entropy(x.sigmoid(), y), "binary_cross_entropy.* refuses them"),
    ],
)
def test_losses_that_do_not_take_several_types_say_so(loss: Any, words: str | None) -> None:
    step = fullframe.tile(nn.Conv2d(3, 2, 1), loss=loss, tile=4)
    x, y = torch.randn(1, 3, 8, 8), torch.rand(1, 2, 8, 8, dtype=torch.float64)
    if words is None:
        step(x, y)
        return
    with pytest.raises(fullframe.CaptureError, match=words):
        step(x, y)


def test_another_shape_than_pytorchs_rule_says_is_refused_by_name():
    labels = torch.tensor([1, 2, -1, 0])
    step = fullframe.tile(Net(lambda x: F.multilabel_margin_loss(x, labels, reduction="none")))
    with pytest.raises(fullframe.UnsupportedOpError, match=r"multilabel_margin_loss.* shape \(\), .* says \(1,\)"):
        step(torch.randn(4, dtype=torch.float64))


def test_tensors_without_elements_share_no_memory():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("a", torch.zeros(0, 3, dtype=torch.float64))
            self.register_buffer("b", torch.zeros(0, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> Any:
            self.a.mul_(2)
            return x * 2 + self.b.sum()

    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    assert torch.equal(fullframe.tile(Empty(), tile=2)(x), x * 2)


def means_of_long_windows(x: torch.Tensor) -> list[torch.Tensor]:
    """Bins of different sizes, of sizes that differ by one, overlapping and half in the padding."""
    return [
        F.adaptive_avg_pool2d(x, (1, 2)),
        F.adaptive_avg_pool2d(x, 3),
        F.avg_pool2d(x, (1, 401), stride=350, padding=(0, 70)),
        F.interpolate(x, size=(2, 2), mode="area"),
    ]


class Outputs(nn.Module):
    """A convolution, and some function of what it makes."""

    def __init__(self, function: Any):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 2, 3, padding=1), function

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [y.flatten(1) for y in self.function(self.conv(x).relu())]


def test_means_of_long_windows_are_right() -> None:
    agree(Outputs(means_of_long_windows), torch.randn(1, 3, 9, 2001, dtype=torch.float64), tile=(5, 300))


def test_sums_of_long_windows_take_few_calls() -> None:
    """They are not added up element by element."""
    calls: list[Any] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    x, spec = torch.randn(1, 2, 4, 5001), taps.Spec("adaptive", 5001, 2)
    found = taps.forward_table(spec, 0, 2, x.dtype, x.device)
    with Counting():
        made = taps.divided(taps.apply(x, 3, found, 2), [spec], [(0, 2)])
    assert torch.allclose(made, F.adaptive_avg_pool2d(x, (4, 2)), atol=1e-5)
    assert len(calls) < 150


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic", "adaptive"])
def test_gradients_of_few_from_many_are_sums_of_windows(mode: str) -> None:
    """As a table of taps gives them, one after the other, for all and for some inputs."""
    spec = taps.Spec(mode, 5, 3001)
    assert taps.widely_read(spec) and not taps.widely_read(taps.Spec(mode, 5, 20))
    g = torch.randn(2, 3001, 3, dtype=torch.float64)
    for low, high in ((0, 5), (1, 2), (3, 5)):
        first, last = taps.readers(spec, low, high)
        found = taps.backward_table(spec, low, high, g.dtype, g.device)
        made = taps.apply(g[:, first:last], 1, found, high - low)
        wanted = torch.zeros(2, high - low, 3, dtype=torch.float64)
        for out in range(first, last):
            for index, weight in taps.taps_at(spec, out):
                if low <= index < high:
                    wanted[:, index - low] += weight * g[:, out]
        assert torch.allclose(made, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        taps.Spec("linear", 700, 2000), taps.Spec("linear", 2000, 700), taps.Spec("linear", 5, 2000),
        taps.Spec("cubic", 700, 2000), taps.Spec("nearest", 700, 1999), taps.Spec("adaptive", 2000, 700),
        taps.Spec("reflect", 2000, 2010, padding=5), taps.Spec("linear-aa", 2000, 500),
    ],
)  # fmt: skip
def test_what_tables_keep_is_counted(spec: taps.Spec) -> None:
    """Places and weights of all taps, within a tenth and what is at the ends."""
    device = torch.device("cpu")
    for name, make, extent in (
        ("tile.resample", taps.forward_table, spec.target), ("tile.resample_grad", taps.backward_table, spec.source),
    ):  # fmt: skip
        rule = RULES[name]
        assert isinstance(rule, Resample)
        low, high = extent // 4, extent // 4 + max(1, extent // 2)
        table = make(spec, low, high, torch.float32, device)
        if isinstance(table, taps.Table):
            there = sum(len(index) for index in table.where)
        else:
            there = sum(0 if w.weight is None else len(w.weight) for w in table)
        counted = rule.taps(spec, low, high)
        assert counted >= 0.6 * there - 10 and counted <= 2 * there + 10


def test_tables_take_little_while_they_are_made() -> None:
    """They are counted in bytes of numbers, not in objects of Python's."""
    spec, device = taps.Spec("reflect", 40_000, 40_010, padding=5), torch.device("cpu")
    tracemalloc.start()
    taps.forward_table(spec, 0, 40_010, torch.float32, device)
    taps.backward_table(taps.Spec("linear", 20, 40_000), 0, 20, torch.float32, device)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 48 * 40_010


def test_equal_long_windows_have_equal_means() -> None:
    """Whatever lies beside them, and wherever they begin."""
    spec = taps.Spec("average", 4000, 4, kernel=1000, stride=1000)
    assert taps.wide(spec)
    window = torch.randn(1, 2, 5, 1000)
    for x in (window.repeat(1, 1, 1, 4), window.repeat(1, 1, 1, 4).transpose(2, 3).contiguous().transpose(2, 3)):
        made = taps.apply(x, 3, taps.forward_table(spec, 0, 4, x.dtype, x.device), 4)
        part = taps.apply(x[..., 2000:3000], 3, taps.forward_table(spec, 2, 3, x.dtype, x.device), 1)
        assert torch.equal(made, made[..., :1].expand_as(made)) and torch.equal(part, made[..., :1])
