"""Where few bits are kept, and where sums must see more: bfloat16 against float64 beside plain PyTorch."""

import copy

import pytest
import torch
from torch import nn

import fullframe
from fullframe import torch_compat
from fullframe.codegen import group as kernels
from fullframe.codegen.kernel import build
from fullframe.native.loader import own
from fullframe.ops.numerics import convolve


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


LAYERS = [
    nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(16, 8, 3, 2, 1, bias=False), nn.Conv2d(16, 8, 5, dilation=2),
    nn.Conv2d(16, 4, 1), nn.Conv2d(16, 32, 3, padding=1, groups=4), nn.ConvTranspose2d(16, 8, 4, 2, 1),
    nn.ConvTranspose2d(16, 8, 3), nn.Conv2d(16, 1, (1, 3), padding=(0, 1)),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_bfloat16_rounds_once_where_the_processor_has_no_products_of_it(layer, monkeypatch):
    """A convolution and its gradients; the library's own gradients round in each tile."""
    monkeypatch.setattr(torch_compat, "has_bfloat16", lambda: False)
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).bfloat16()
    x = torch.randn(1, 16, 23, 30).bfloat16().requires_grad_()
    g = torch.randn(layer(x).shape).bfloat16()
    made = fullframe.tile(layer, tile=12)(x)
    found = torch.autograd.grad(made, [x, *layer.parameters()], g)
    wide, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    truth = torch.autograd.grad(wide(x64), [x64, *wide.parameters()], g.double())
    for a, b in zip((made, *found), (wide(x64), *truth), strict=True):
        assert a.dtype == torch.bfloat16
        # One rounding to 8 binary places, and what float32 sums of some hundred terms may lose.
        assert bool(((a.double() - b).abs() <= 2**-8 * b.abs() + 1e-5).all())


def test_a_bfloat16_convolution_rounds_once():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s).bfloat16() for s in ((1, 16, 12, 14), (8, 16, 3, 3), (8,)))
    made = convolve.convolve(x, weight, bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    truth = nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert made.dtype == torch.bfloat16
    # One rounding to 8 binary places, and what float32 sums of 145 terms may lose.
    assert bool(((made.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-5).all())


PLANE, SPACE = (torch.channels_last, 40, 48), (torch.channels_last_3d, 9, 20, 18)


@pytest.mark.parametrize("form", [PLANE, SPACE], ids=["plane", "space"])
@pytest.mark.parametrize(
    "channels, kernel, stride, padding, dilation",
    [
        (192, 3, 1, 1, 1), (96, 3, 1, 1, 1), (64, 3, 2, 1, 1), (32, 3, 1, 0, 1), (40, 3, 1, 2, 2), (20, 5, 1, 2, 1),
        (24, 4, 2, 1, 1), (100, 2, 2, 0, 1), (7, 3, 1, 1, 1),
    ],
)  # fmt: skip
def test_a_wide_convolution_rounds_as_little_as_in_the_layout_of_torch(
    form, channels, kernel, stride, padding, dilation
):
    torch.manual_seed(0)
    packed, *sides = form
    rank = len(sides)
    x, bias = torch.randn(2, channels, *sides), torch.randn(16)
    weight = torch.randn(16, channels, *[kernel] * rank)
    geometry = ([stride] * rank, [padding] * rank, [dilation] * rank, False, [0] * rank, 1)
    truth = torch.convolution(x.double(), weight.double(), bias.double(), *geometry)
    made = convolve.convolve(x.contiguous(memory_format=packed), weight, bias, *geometry)
    assert made.shape == truth.shape and made.stride(1) == 1
    plain = torch.convolution(x, weight, bias, *geometry)
    assert rms(made.double(), truth) <= 1.5 * rms(plain.double(), truth)


@pytest.mark.parametrize("shape", [(1, 192, 40, 48, 64), (1, 96, 20, 32, 96), (1, 64, 20, 128, 64), (2, 24, 9, 7, 8)])
def test_a_wide_convolution_of_a_small_image_rounds_as_little(shape):
    torch.manual_seed(0)
    n, cin, rows, columns, cout = shape
    x, weight, bias = torch.randn(n, cin, rows, columns), torch.randn(cout, cin, 3, 3), torch.randn(cout)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    truth = torch.convolution(x.double(), weight.double(), bias.double(), *geometry)
    made = convolve.convolve(x.contiguous(memory_format=torch.channels_last), weight, bias, *geometry)
    assert rms(made.double(), truth) <= 1.5 * rms(torch.convolution(x, weight, bias, *geometry).double(), truth)


@pytest.mark.parametrize("channels, kernel", [(64, 3), (256, 3), (64, 9), (16, 3)])
def test_a_wide_convolution_along_one_axis_rounds_as_little(channels, kernel):
    torch.manual_seed(0)
    x, weight = torch.randn(2, channels, 200), torch.randn(channels, channels, kernel)
    geometry = ([1], [1], [1], False, [0], 1)
    truth = torch.convolution(x.double(), weight.double(), None, *geometry)
    made = convolve.convolve(x.movedim(1, -1).contiguous().movedim(-1, 1), weight, None, *geometry)
    assert rms(made.double(), truth) <= 1.2 * rms(torch.convolution(x, weight, None, *geometry).double(), truth)


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("number", [0.1, -3.3e5, 1e-7])
def test_the_mean_of_equal_numbers_is_that_number(compile, number):
    # A norm then makes zeros of a constant map; the sign of a rounding decided what a SELU after it let through.
    group = kernels.Group(
        3,
        (kernels.Operand(torch.float64, (False,) * 3),),
        (),
        (),
        (kernels.Reduction(kernels.Ref(0), "moments", (0, 2)),),
    )
    (found,) = build(group, compile=compile).run([torch.full((3, 5, 11), number, dtype=torch.float64)])
    assert found[1].eq(number).all() and found[2].eq(0).all()


def test_means_of_windows_round_without_a_bias():
    # Each axis was weighted by a rounded 1 / 7: differences of means, as in a structural similarity, showed it.
    torch.manual_seed(0)
    x = torch.rand(1, 3, 46, 58)

    def variance(y: torch.Tensor, pool=lambda t: nn.functional.avg_pool2d(t, 7, 1)) -> torch.Tensor:
        return pool(y * y) - pool(y).square()

    pool = fullframe.tile(nn.AvgPool2d(7, 1), tile=20)
    truth = variance(x.double())
    with torch.no_grad():
        bias = [float((v.double() - truth).mean().abs()) for v in (variance(x, pool), variance(x))]
    assert bias[0] <= 3 * bias[1] + 1e-9


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_weight_gradient_of_a_constant_image_has_no_bias(kernel):
    # Float32 sums of equal terms round the same way each time: a long one is wrong by 2e-5, where 2e-6 is usual.
    if own("gradient") is None:
        pytest.skip("no compiler: the library's sums are longer")
    torch.manual_seed(0)
    x = torch.randn(1, 16, 1, 1).expand(1, 16, 96, 256).contiguous(memory_format=torch.channels_last)
    net = nn.Conv2d(16, 3, kernel)
    g = torch.randn(1, 3, 1, 1).expand(net(x).shape) / 3
    step = fullframe.tile(net, loss=lambda y, t: (y * t).sum(), tile=(96, 256))
    step(x, g).backward()
    truth = g[0, :, 0, 0].double().outer(x[0, :, 0, 0].double())[..., None, None] * g[0, 0].numel()
    assert rms(net.weight.grad / truth, torch.ones(())) <= 3e-6


SMALL = [  # kernel, stride, padding, extents: an axis shorter than the window
    ((3,), 2, (1,), (1,)), ((5,), 2, (2,), (1,)), ((1, 3), 2, (0, 1), (4, 1)), ((3, 5), 2, (1, 2), (4, 1)),
    ((3, 1, 1), 1, (1, 0, 0), (2, 4, 5)), ((3, 3, 3), 1, (1, 1, 1), (2, 4, 5)), ((5, 1, 1), 1, (2, 0, 0), (3, 4, 5)),
    ((5, 3, 3), 2, (3, 1, 1), (2, 4, 5)), ((1, 5, 1), 1, (0, 2, 0), (4, 1, 5)), ((3, 1, 2), 2, (1, 0, 1), (4, 4, 1)),
]  # fmt: skip


@pytest.mark.parametrize("kernel, stride, padding, extents", SMALL, ids=str)
def test_a_bfloat16_weight_gradient_of_a_small_image_is_complete(kernel, stride, padding, extents):
    # The library left some of it as it was in memory.
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    net, image = kind(20, 24, kernel, stride, padding), torch.randn(1, 20, *extents)
    target = torch.randn(net(image).shape)
    for _ in range(3):
        spoilt = [torch.full((300_000,), float("nan")) for _ in range(3)]
        del spoilt
        made = gradients(net, image, target, tiled=True, half=True)
        truth = gradients(net.double(), image.double(), target.double(), tiled=False, half=False)
        net.float()
        for name, value in truth.items():
            assert rms(made[name], value) < 0.02 * float(value.square().mean().sqrt()), name
