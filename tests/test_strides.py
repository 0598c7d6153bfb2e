"""Outputs and gradients lie in memory as plain PyTorch's do."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fullframe

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def nets() -> dict[str, Any]:
    return {
        "one pixel": nn.Conv2d(3, 4, 1),
        "conv": nn.Conv2d(3, 4, 3, padding=1),
        "norm": nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        "groups": nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.GELU()),
        "pool": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)),
        "transposed": nn.ConvTranspose2d(3, 4, 2, stride=2),
        "pointwise": nn.Sigmoid(),
        "average": nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)),
        "head": nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    }


@pytest.mark.parametrize(("images", "weights"), [LAYOUTS, LAYOUTS[::-1], [torch.channels_last] * 2])
@pytest.mark.parametrize("name", list(nets()))
def test_strides_are_those_of_plain_pytorch(name: str, images: Any, weights: Any):
    net = nets()[name].to(memory_format=weights)
    tiled = fullframe.tile(copy.deepcopy(net), tile=8)
    for _ in range(4 if name == "norm" else 2):  # captured, recorded as bytecode, and replayed
        x = torch.randn(2, 3, 16, 16).contiguous(memory_format=images).requires_grad_()
        y = x.detach().clone().requires_grad_()
        plain, made = net(x), tiled(y)
        assert made.stride() == plain.stride()
        torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-5)
        expected = torch.autograd.grad(plain.square().sum(), (x, *net.parameters()))
        grads = torch.autograd.grad(made.square().sum(), (y, *tiled.parameters()))
        assert [g.stride() for g in grads] == [expected[0].stride(), *(p.stride() for p in net.parameters())]
        for one, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("images", LAYOUTS)
def test_strides_of_a_step(images: Any):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    step = fullframe.tile(copy.deepcopy(net), loss=lambda y, t: (F.mse_loss(y, t), y.detach()), tile=8)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=images)
    loss, seen = step(x, torch.zeros(2, 1, 16, 16))
    assert seen.stride() == net(x).stride()
    loss.backward()
    p: Any
    for p in step.parameters():
        assert p.grad.stride() == p.stride()


def test_views_and_several_layouts_at_once():
    net: Any = nn.Conv2d(3, 4, 3)
    net = net.to(memory_format=torch.channels_last)
    both: Any = nn.Module()

    def outputs(x: torch.Tensor) -> Any:
        y = net(x)
        return y, y.contiguous(), y.permute(0, 2, 3, 1).contiguous(), y.transpose(1, 2), y.sum((2, 3), keepdim=True)

    both.net, both.forward = net, outputs
    for x in (torch.randn(1, 3, 12, 12), torch.randn(2, 3, 12, 12)):
        for a, b in zip(outputs(x), fullframe.tile(both, tile=6)(x), strict=True):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_output_of_another_layout_may_be_changed_in_place():
    tiled = fullframe.tile(nn.Conv2d(3, 1, 1), tile=8)
    made = tiled(torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last))
    made.mul_(2).sum().backward()
    assert tiled.weight.grad is not None
