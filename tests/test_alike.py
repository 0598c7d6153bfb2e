"""Equal windows give equal numbers, wherever they lie: what is a tie in plain PyTorch is one here."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.ops.convolve import convolve

SIZES = [(5, 7), (7, 7), (4, 4), (11, 13), (16, 16), (17, 19), (30, 37), (64, 64), (47, 101)]
GEOMETRIES = [(k, s, d, t) for k, s, d, t in product((1, 2, 3), (1, 2), (1, 2), (False, True)) if s == 2 or not t]

pytestmark = pytest.mark.usefixtures("one_thread")


def outputs(size, channels, geometry, groups, dtype, packed):
    """Outputs of an image that is the same everywhere: one column for each pixel, but for those at the ends."""
    k, stride, dilation, transposed = geometry
    cin, cout = channels
    torch.manual_seed(0)
    shape = (cin, cout // groups, k, k) if transposed else (cout, cin // groups, k, k)
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    bias = torch.randn(cout, dtype=torch.float64).to(dtype)
    pixel = torch.randn(1, cin, 1, 1, dtype=torch.float64).to(dtype)
    x = pixel.expand(1, cin, *(n + dilation * (k - 1) for n in size)).contiguous(memory_format=packed)
    made = convolve(x, weight, bias, [stride] * 2, [0, 0], [dilation] * 2, transposed, [0, 0], groups)
    if transposed:
        edge = dilation * (k - 1)
        made = made[:, :, edge : made.shape[2] - edge, edge : made.shape[3] - edge]
        made = made[:, :, -edge % stride :: stride, -edge % stride :: stride]
    return made[0].flatten(1)


@pytest.mark.parametrize("packed", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channels", [(2, 5, 1), (16, 8, 1), (48, 16, 1), (6, 6, 6)], ids=str)
def test_equal_windows_give_equal_outputs(channels, geometry, dtype, packed):
    *channels, groups = channels
    made = [outputs(size, channels, geometry, groups, dtype, packed) for size in SIZES]
    for pixels in made:
        assert torch.equal(pixels, made[-1][:, :1].expand_as(pixels))


class UNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.up, self.last = nn.Conv2d(2 * width, width, 3, padding=1), nn.Conv2d(width, 3, 1)

    def forward(self, x):
        fine = F.relu(self.a(x))
        coarse = F.interpolate(F.relu(self.b(F.max_pool2d(fine, 2))), size=fine.shape[2:])
        return self.last(F.relu(self.up(torch.cat([fine, coarse], 1))))


def gradients(run, *images):
    images = [x.clone().requires_grad_() for x in images]
    made = run(*images)
    (made * torch.linspace(0, 1, made.numel(), dtype=made.dtype).view(made.shape)).sum().backward()
    return [x.grad for x in images]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tile", [4, 7, 11])
@pytest.mark.parametrize("width", [5, 8])
def test_the_first_of_equal_pixels_is_pooled_whatever_the_tile(width, tile, dtype):
    torch.manual_seed(width)
    net = UNet(width).to(dtype)
    x = torch.full((2, 2, 29, 45), 0.7, dtype=dtype)
    x[..., 9:14, 15:] = 0.2
    [want] = gradients(copy.deepcopy(net), x)
    [got] = gradients(fullframe.tile(copy.deepcopy(net), tile=tile, budget="1GB"), x)
    assert (got - want).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5) * want.abs().max()


@pytest.mark.parametrize("tile", [5, None])
def test_equal_parts_of_two_images_cancel_though_an_op_lies_between(tile):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

        def made(self, x):
            return self.b(torch.tanh(self.a(x)))

        def forward(self, x, y):
            return (self.made(x) - self.made(F.relu(y))).abs()

    torch.manual_seed(0)
    net, x = Pair().double(), torch.rand(2, 2, 24, 26, dtype=torch.float64)
    y = x.clone()
    y[..., 10:15, 8:14] += 0.3
    want = gradients(copy.deepcopy(net), x, y)
    got = gradients(fullframe.tile(copy.deepcopy(net), tile=tile, budget="1GB"), x, y)
    for a, b in zip(want, got, strict=True):
        assert (a - b).abs().max() <= 1e-12 * a.abs().max()
