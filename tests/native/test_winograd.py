"""The convolution by fewer products: exact for small integers, the same wherever its window is cut, and as precise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fullframe
from fullframe.native import loader as loading
from fullframe.native.convolution import Axis, convolution, for_convolution
from fullframe.native.loader import own
from fullframe.native.weight_gradient import weight_grad
from fullframe.native.winograd import for_winograd, suits_winograd, winograd

CASES = [
    # out, in, pixels, rows of taps, stride, padding, dilation; of the last axis, the padding
    (16, 16, (9, 70), (3,), (1,), (1, 1), (1,)),
    (17, 19, (11, 13), (3,), (2,), (1, 1), (1,)),
    (48, 80, (12, 17), (5,), (2,), (2, 0), (1,)),
    (24, 16, (21, 200), (3,), (1,), (3, 2), (3,)),
    (100, 150, (6, 7), (3,), (1,), (1, 1), (1,)),
    (256, 130, (5, 16), (1,), (1,), (0, 1), (1,)),
    (16, 16, (2, 1), (3,), (1,), (2, 3), (1,)),
    (64, 300, (30, 33), (3,), (1,), (1, 1), (1,)),
    (24, 16, (4, 6, 9), (3, 3), (1, 2), (1, 1, 0), (1, 1)),
    (16, 40, (3, 5, 130), (2, 1), (1, 1), (1, 0, 2), (2, 1)),
]


@pytest.fixture(params=["compiled", "plain"])
def _either(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(loading, "_LOADED", dict.fromkeys(("winograd", "pack_winograd")))
    elif own("winograd", "convolution") is None:
        pytest.skip("no compiler")


def integers(*shape):
    return torch.randint(-3, 4, shape).float()


def innermost(x):
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", ["innermost", "outermost", "part"])
@pytest.mark.parametrize("first", [0, 7])
def test_exact_for_integers(case, layout, first):
    out, deep, pixels, rows, stride, padding, dilation = case
    torch.manual_seed(0)
    x, weight, bias = integers(2, deep, *pixels), integers(out, deep, *rows, 3), integers(out)
    stride, dilation = (*stride, 1), (*dilation, 1)
    like = F.conv2d if len(pixels) == 2 else F.conv3d
    truth = like(x.double(), weight.double(), bias.double(), stride, padding, dilation)
    if layout == "part":  # of more channels, as from a concatenation
        x = innermost(torch.cat([x, x, x], 1))[:, deep : 2 * deep]
    x = innermost(x) if layout == "innermost" else x
    axes = [Axis(*a) for a in zip(truth.shape[2:], stride, padding, dilation, strict=True)]
    made = winograd(x, for_winograd(weight), bias, axes, first)
    assert torch.equal(made.double(), truth) and made.stride(1) == 1


@pytest.mark.usefixtures("_either")
def test_a_bias_with_gaps():
    torch.manual_seed(0)
    x, weight, bias = integers(1, 16, 6, 9), integers(20, 16, 3, 3), integers(40)[::2]
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    made = winograd(x, for_winograd(weight), bias, [Axis(6, 1, 1, 1), Axis(9, 1, 1, 1)], 0)
    assert torch.equal(made.double(), truth)


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("extents", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("first", [0, 1])
def test_of_nothing_nothing(extents, first):
    x, weight = torch.randn(2, 16, 7, 7), for_winograd(torch.randn(16, 16, 3, 3))
    made = winograd(x, weight, None, [Axis(n, 1, 0, 1) for n in extents], first)
    assert made.shape == (2, 16, *extents)


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("pixels", [(0, 4), (3, 0)])
def test_outputs_that_read_only_padding_are_the_bias(pixels):
    weight, bias = for_winograd(torch.randn(16, 16, 3, 3)), torch.randn(16)
    made = winograd(torch.randn(1, 16, *pixels), weight, bias, [Axis(2, 1, 3, 1), Axis(3, 1, 4, 1)], 1)
    assert torch.equal(made, bias.view(1, -1, 1, 1).expand_as(made))


@pytest.mark.parametrize("shape", [(16, 24, 3, 3), (20, 33, 5, 3), (17, 16, 2, 3, 3)])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_the_sums_of_a_weight(shape, flipped, layout, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight = weight.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" else weight
    found = for_winograd(weight, flipped)
    taps = weight.transpose(0, 1).flip(tuple(range(2, len(shape)))) if flipped else weight
    a, b, c = taps.unbind(-1)
    assert torch.equal(found, torch.stack([a, (a + b + c) / 2, (a - b + c) / 2, c], -1))
    assert found.stride()[:2] == (1, taps.shape[0])
    monkeypatch.setattr(loading, "_LOADED", {"pack_winograd": None})
    plain = for_winograd(weight, flipped)
    assert torch.equal(plain, found) and plain.stride() == found.stride()


@pytest.mark.parametrize("deep", [16, 40, 200])
def test_an_output_does_not_depend_on_where_its_window_is_cut(deep):
    if own("winograd", "convolution") is None:
        pytest.skip("no compiler")
    torch.manual_seed(0)
    x, weight = innermost(torch.randn(1, deep, 20, 90)), for_winograd(torch.randn(40, deep, 3, 3))
    whole = winograd(x, weight, None, [Axis(18, 1, 0, 1), Axis(88, 1, 0, 1)], 0)
    for top, left, rows, columns in [(0, 0, 9, 50), (3, 7, 8, 31), (5, 1, 6, 80), (9, 40, 11, 17), (2, 33, 3, 3)]:
        part = x[:, :, top : top + rows, left : left + columns]
        made = winograd(part, weight, None, [Axis(rows - 2, 1, 0, 1), Axis(columns - 2, 1, 0, 1)], left)
        assert torch.equal(made, whole[:, :, top : top + rows - 2, left : left + columns - 2])


@pytest.mark.parametrize("out", [16, 32, 48, 20])
def test_an_output_is_the_same_in_windows_of_every_width(out):
    """A block of pixels is made by a kernel for so many, down to one, and each must round as the others."""
    if own("winograd", "convolution") is None:
        pytest.skip("no compiler")
    torch.manual_seed(0)
    x, weight = innermost(torch.randn(1, 32, 3, 66)), torch.randn(out, 32, 3, 3)
    sums, ordered, rows = for_winograd(weight), for_convolution(weight), Axis(1, 1, 0, 1)
    whole = winograd(x, sums, None, [rows, Axis(64, 1, 0, 1)], 0)
    direct = convolution(x, ordered, None, [rows, Axis(64, 1, 0, 1)], 1)
    assert direct is not None
    for width in range(1, 64):
        axes = [rows, Axis(width, 1, 0, 1)]
        assert torch.equal(winograd(x[..., : width + 2], sums, None, axes, 0), whole[..., :width])
        made = convolution(x[..., : width + 2], ordered, None, axes, 1)
        assert made is not None and torch.equal(made, direct[..., :width])


@pytest.mark.parametrize("size", [(5, 7), (4, 4), (16, 16), (17, 19), (30, 37), (47, 101)])
@pytest.mark.parametrize("first", [0, 1])
def test_where_a_row_is_constant_all_outputs_are_equal(size, first):
    if own("winograd", "convolution") is None:
        pytest.skip("no compiler")
    torch.manual_seed(0)
    column, weight = torch.randn(1, 48, size[0], 1), for_winograd(torch.randn(16, 48, 3, 3))
    x = innermost(column.expand(1, 48, *size))
    made = winograd(x, weight, None, [Axis(size[0] - 2, 1, 0, 1), Axis(size[1] - 2, 1, 0, 1)], first)
    assert torch.equal(made, made[..., :1].expand_as(made))


@pytest.mark.parametrize("deep", [16, 64, 256])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_as_precise_as_the_direct_way(deep, offset):
    if own("winograd", "convolution") is None:
        pytest.skip("no compiler")
    torch.manual_seed(0)
    x, weight = innermost(torch.randn(1, deep, 24, 60) + offset), torch.randn(32, deep, 3, 3)
    g, axes = innermost(torch.randn(1, 32, 24, 60)), [Axis(24, 1, 1, 1), Axis(60, 1, 1, 1)]

    def rms(made, truth):
        return float((made - truth).square().mean().sqrt())

    truth = F.conv2d(x.double(), weight.double(), padding=1)
    direct = convolution(x, for_convolution(weight), None, axes, 1)
    made = winograd(x, for_winograd(weight), None, axes, 0)
    assert direct is not None and rms(made, truth) < 2 * rms(direct, truth)
    assert rms(made, truth) < 1.5 * rms(F.conv2d(x, weight, padding=1), truth)
    mask = [False, True, False]
    back = lambda g, x, w: torch.ops.aten.convolution_backward(  # noqa: E731
        g, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)[1]  # fmt: skip
    truth = back(g.double(), x.double(), weight.double())
    made = weight_grad(g, x, weight.shape, (1, 1), (1, 1), (1, 1), 1)
    assert made is not None and rms(made, truth) < 4e-7 * rms(truth, 0)


def test_what_is_not_its_business():
    one, two = [1, 1], [2, 2]
    if own("winograd", "convolution") is not None:
        assert suits_winograd((16, 16, 3, 3), torch.float32, 1, one, one)
        assert suits_winograd((16, 16, 5, 3), torch.float32, 1, [2, 1], [3, 1])
    assert not suits_winograd((16, 16, 3, 3), torch.bfloat16, 1, one, one)
    assert not suits_winograd((16, 16, 3, 3), torch.float64, 1, one, one)
    assert not suits_winograd((16, 16, 3, 3), torch.float32, 2, one, one)
    assert not suits_winograd((16, 16, 3, 3), torch.float32, 1, two, one)
    assert not suits_winograd((16, 16, 3, 3), torch.float32, 1, one, two)
    assert not suits_winograd((16, 16, 3, 5), torch.float32, 1, one, one)
    assert not suits_winograd((16, 8, 3, 3), torch.float32, 1, one, one)
    assert not suits_winograd((16, 16, 3), torch.float32, 1, [1], [1])


@pytest.mark.rest
def test_without_a_compiler_a_step_makes_the_same(monkeypatch):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3, padding=1))
    image, target, found = torch.randn(2, 3, 25, 31), torch.randn(2, 16, 23, 29), []
    for names in ((), ("winograd", "winograd_gradient", "convolution", "gradient", "pack", "pack_winograd")):
        monkeypatch.setattr(loading, "_LOADED", dict.fromkeys(names))
        net.zero_grad()
        fullframe.tile(net, loss=torch.nn.MSELoss(), tile=9)(image, target).backward()
        found.append([p.grad.clone() for p in net.parameters()])
    truth = torch.nn.MSELoss()(net.double()(image.double()), target.double())
    truth = torch.autograd.grad(truth, list(net.parameters()))
    for wanted, *made in zip(truth, *found, strict=True):
        assert all((g - wanted).abs().max() < 1e-5 * wanted.abs().max() for g in made)
