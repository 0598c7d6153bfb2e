"""What a forward writes into tensors that others hold, and what it may ask of those it is given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import close
from torch import nn
from torch.autograd import forward_ad

import fullframe


@pytest.fixture(autouse=True)
def _double():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """A convolution, and a forward of the test's own."""

    def __init__(self, what: Callable[..., Any]):
        super().__init__()
        self.conv, self.gain = nn.Conv2d(3, 4, 3, padding=1), nn.Parameter(torch.tensor(1.5))
        self.register_buffer("buffer", torch.zeros(()))
        self.register_buffer("row", torch.zeros(4).view(1, 4, 1, 1))
        self.kept, self.what = torch.zeros(()), what

    def forward(self, *args: torch.Tensor) -> Any:
        return self.what(self, *args)


def image() -> torch.Tensor:
    return torch.randn(2, 3, 13, 17, generator=torch.Generator().manual_seed(3))


def written(net: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    out.copy_(y)
    return y.sigmoid()


def into_one(step: Any, _: Any) -> torch.Tensor:
    out = torch.zeros(2, 4, 13, 17)
    return step(image(), out).mean() + out.square().mean()


def into_parts(step: Any, _: Any) -> torch.Tensor:
    out = torch.zeros(2, 8, 13, 17)
    return step(image(), out[:, :4]).mean() + step(image() * 2, out[:, 4:]).mean() + out.square().mean()


def scaled(net: Any, x: torch.Tensor) -> torch.Tensor:
    x.mul_(net.gain)
    return net.conv(x)


def used_again(step: Any, _: Any) -> torch.Tensor:
    x = image()
    return step(x).mean() + x.square().mean()


def made_by_layers(step: Any, net: Any) -> torch.Tensor:
    x = net.gain * image()
    return step(x).mean() + x.square().mean()


def kept_in_place(net: Any, x: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    net.kept.detach_().zero_()
    net.kept.add_(y.square().mean())
    return y.sigmoid()


def assigned(net: Any, x: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    net.buffer = y.square().mean()
    return y.sigmoid()


def assigned_row(net: Any, x: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    net.row = 0.9 * net.row.detach() + 0.1 * y.mean((0, 2, 3), keepdim=True)
    return y - net.row


def averaged(net: Any, x: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    net.buffer = 0.9 * net.buffer + 0.1 * y.mean()
    return y.sigmoid()


def plainly(step: Any, _: Any) -> torch.Tensor:
    return step(image()).square().mean()


CASES: dict[str, tuple[Callable[..., Any], Callable[..., torch.Tensor]]] = {
    "an output given": (written, into_one),
    "parts of an output given": (written, into_parts),
    "an input scaled": (scaled, used_again),
    "a map scaled": (scaled, made_by_layers),
    "an attribute": (kept_in_place, lambda step, net: step(image()).mean() + net.kept),
    "a buffer": (assigned, lambda step, net: step(image()).mean() + net.buffer),
    "a buffer that is a view": (assigned_row, lambda step, net: step(image()).mean() + net.row.square().sum()),
    "a mean that nobody uses": (averaged, plainly),
    "relu of a map": (lambda net, x: net.conv(torch.relu_(x)), made_by_layers),
    "asks for a leaf": (lambda net, x: net.conv(x if x.is_leaf else 2 * x), made_by_layers),
    "asks for a graph": (lambda net, x: net.conv(x if x.grad_fn is None else 3 * x), made_by_layers),
    "asks for the layout": (
        lambda net, x: net.conv(x if x.is_contiguous() else x.flip(-1)) * (2 if x.storage_offset() else x.stride(1)),
        lambda step, net: step(torch.cat([image()] * 2, 3)[..., 3:9]).square().mean(),
    ),
    "asks how it is spread": (
        lambda net, x: net.conv(x) * (2 if x.stride(0) == 0 else 3),
        lambda step, net: step(image()[:1].expand(4, -1, -1, -1)).square().mean(),
    ),
    "asks for its shape": (
        lambda net, x: (net.conv(x), x.shape), lambda step, net: (lambda y, s: y.mean() / s.numel())(*step(image())),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_as_in_plain_pytorch(case):
    forward, use = CASES[case]
    net = Net(forward)
    twin = copy.deepcopy(net)
    tiled = fullframe.tile(twin, tile=6)
    for _ in range(3):
        losses = use(net, net), use(tiled, twin)
        assert close(losses[1], losses[0])
        for loss, module in zip(losses, (net, twin), strict=True):
            module.zero_grad()
            loss.backward()
        for ours, plain in zip(twin.parameters(), net.parameters(), strict=True):
            assert (ours.grad is None) == (plain.grad is None)
            if plain.grad is not None:
                assert close(ours.grad, plain.grad)
        for name in ("kept", "buffer"):
            ours, plain = getattr(twin, name), getattr(net, name)
            assert ours.requires_grad == plain.requires_grad
            assert close(ours.detach(), plain.detach())


def parted(net: Any, x: torch.Tensor) -> torch.Tensor:
    net.buffer = net.buffer + net.conv(x).mean()
    return net.conv(x) * net.buffer * net.other


def test_one_of_two_names_of_a_buffer_is_not_assigned_alone():
    net = Net(parted)
    net.register_buffer("other", net.buffer)
    with pytest.raises(fullframe.CaptureError, match="one of buffer and other anew"):
        fullframe.tile(net, tile=6)(image())


def test_a_leaf_is_not_assigned_anew():
    net = Net(assigned)
    net.register_buffer("buffer", torch.ones((), requires_grad=True))
    with pytest.raises(fullframe.CaptureError, match="gives buffer, of which a gradient is asked"):
        fullframe.tile(net, tile=6)(image())
    assert net.buffer == 1


def test_a_gradient_kept_of_what_is_changed_in_place():
    net = Net(lambda net, x: net.conv(torch.relu_(x)))
    x = image().requires_grad_() * 2
    x.retain_grad()
    with pytest.raises(fullframe.CaptureError, match=r"changes input0 in place.*retain_grad.*clone"):
        fullframe.tile(net, tile=6)(x)


def test_switches_of_backends():
    net = Net(lambda net, x: net.conv(x) * (2 if torch.backends.mkldnn.enabled else 3))
    tiled = fullframe.tile(net, tile=6)
    for enabled in (True, False, True):
        with torch.backends.mkldnn.flags(enabled=enabled):
            assert close(tiled(image()), net(image()))


def test_data_replaced_before_the_backward():
    net = Net(lambda net, x: net.conv(x).square())
    made = fullframe.tile(net, tile=6)(image().requires_grad_())
    net.conv.weight.data = net.conv.weight.data * 2
    with pytest.raises(RuntimeError, match=r"conv.weight was changed in place, or given other data"):
        made.sum().backward()


def _dual(step: Any) -> Any:
    with forward_ad.dual_level():
        return step(forward_ad.make_dual(image(), image()))


@pytest.mark.parametrize("use", [
    _dual, lambda step: torch.func.vmap(step)(image()[None]), lambda step: torch.func.grad(lambda x: step(x).sum())(image()),
    lambda step: torch.func.jvp(step, (image(),), (image(),)),
])  # fmt: skip
def test_transforms_are_refused(use):
    net = Net(lambda net, x: net.conv(x))
    tiled = fullframe.tile(net, tile=6)
    with pytest.raises(fullframe.CaptureError, match=r"torch.func.*use the plain module"):
        use(tiled)
    assert close(tiled(image()), net(image()))


def test_several_gradients_at_once_are_refused():
    net = Net(lambda net, x: net.conv(x))
    made = fullframe.tile(net, tile=6)(image()).sum()
    with pytest.raises(RuntimeError, match="is_grads_batched=True"):
        torch.autograd.grad(made, net.conv.weight, torch.ones(3), is_grads_batched=True)


def test_while_anomalies_are_looked_for():
    net = Net(lambda net, x: net.conv(x))
    with torch.autograd.set_detect_anomaly(True):
        fullframe.tile(net, tile=6)(image()).sum().backward()
        assert torch.is_anomaly_enabled()


def test_an_op_that_resizes_a_buffer_is_refused_before_anything_changes():
    class Observed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.observed = torch.ao.quantization.default_fused_per_channel_wt_fake_quant()

        def forward(self, x):
            return self.norm(torch.conv2d(x, self.observed(self.conv.weight)))

    torch.set_default_dtype(torch.float32)
    net = Observed()
    tiled = fullframe.tile(net, tile=6)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(
        fullframe.CaptureError, match=r"changes observed.*from shape \(1,\) to \(4,\).*plain module once"
    ):
        tiled(image().float())
    assert all(v.shape == before[k].shape and torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net(image().float())
    twin = copy.deepcopy(net)
    torch.testing.assert_close(tiled(image().float()), twin(image().float()), rtol=1e-5, atol=1e-5)
