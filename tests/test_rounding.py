"""Where few bits are kept, and where sums must see more: bfloat16 against float64 beside plain PyTorch."""

import copy

import pytest
import torch
from torch import nn

import fullframe
from fullframe.ops import window


def gradients(net: nn.Module, image: torch.Tensor, target: torch.Tensor, *, tiled: bool, half: bool) -> dict:
    net = copy.deepcopy(net).to(image.dtype)
    criterion = nn.MSELoss()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        step = fullframe.tile(net, loss=criterion, tile=20) if tiled else lambda x, y: criterion(net(x), y)
        step(image, target).backward()
    return {name: p.grad.double() for name, p in net.named_parameters()}


def rms(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).square().mean().sqrt())


@pytest.mark.parametrize("seed", range(3))
def test_bias_before_a_norm_is_not_the_rounding_of_its_terms(seed):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.Conv2d(8, 2, 1)]
    net = nn.Sequential(*layers)
    image, target = torch.randn(2, 2, 40, 56), torch.randn(2, 2, 40, 56)
    truth = gradients(net, image.double(), target.double(), tiled=False, half=False)
    plain = gradients(net, image, target, tiled=False, half=True)
    made = gradients(net, image, target, tiled=True, half=True)
    assert rms(made["0.bias"], truth["0.bias"]) <= 0.1 * rms(plain["0.bias"], truth["0.bias"])
    for name, value in truth.items():
        assert rms(made[name], value) <= 1.5 * rms(plain[name], value) + 1e-4 * float(value.abs().max()), name


@pytest.mark.parametrize("native", [False, True])
def test_a_bfloat16_convolution_rounds_once(native, monkeypatch):
    monkeypatch.setattr(window, "_has_bfloat16", lambda: native)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s).bfloat16() for s in ((1, 16, 12, 14), (8, 16, 3, 3), (8,)))
    made = window.convolve(x, weight, bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    truth = nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert made.dtype == torch.bfloat16
    # One rounding to 8 binary places, and what float32 sums of 145 terms may lose.
    assert bool(((made.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-5).all())
