"""Equal windows give equal numbers, wherever they lie: what is a tie in plain PyTorch is one here."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.ops.numerics.convolve import convolve

SIZES = [(5, 7), (4, 4), (16, 16), (30, 37), (47, 101)]
GEOMETRIES = list(product((1, 2, 3), (1, 2), (1, 2), (False, True)))
FORMS = [
    # in, out, kernel, stride, dilation, groups, transposed: of each, some library's way has a last column of its own
    (12, 24, (3,), (2,), (1,), 12, True),
    (48, 4, (5,), (2,), (2,), 4, True),
    (48, 8, (4,), (1,), (1,), 1, True),
    (64, 3, (5,), (2,), (2,), 1, True),
    (96, 9, (4,), (4,), (2,), 3, True),
    (6, 6, (7, 1), (2, 3), (1, 1), 3, True),
    (2, 1, (7, 7), (1, 1), (1, 1), 1, True),
    (48, 48, (2, 7), (1, 1), (2, 1), 2, True),
    (8, 14, (1, 1), (4, 4), (1, 3), 2, True),
    (144, 12, (7, 7), (4, 4), (3, 1), 3, True),
    (64, 28, (4, 4), (1, 1), (1, 2), 4, False),
    (128, 8, (3, 3), (4, 4), (1, 1), 4, False),
    (1, 2, (1, 1), (4, 2), (1, 1), 1, False),
    (1, 4, (1, 1), (1, 1), (1, 1), 1, False),
    (16, 7, (2, 1, 3), (2, 2, 2), (3, 3, 2), 1, True),
    (36, 24, (4, 4, 5), (2, 3, 1), (1, 2, 1), 3, False),
    (48, 12, (3, 5, 3), (4, 2, 2), (1, 1, 1), 3, False),
]
PLACES = {1: [(5,), (37,), (101,)], 2: [(1, 1), (2, 3), (5, 7), (17, 19), (30, 37)], 3: [(3, 5, 7), (8, 11, 21)]}

pytestmark = pytest.mark.usefixtures("one_thread")


def outputs(size, form, dtype, packed=torch.contiguous_format):
    """Outputs of an image that is the same everywhere: one column for each pixel, but for those at the ends."""
    cin, cout, kernel, stride, dilation, groups, transposed = form
    torch.manual_seed(0)
    shape = (cin, cout // groups, *kernel) if transposed else (cout, cin // groups, *kernel)
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    bias = torch.randn(cout, dtype=torch.float64).to(dtype)
    pixel = torch.randn(1, cin, *[1] * len(size), dtype=torch.float64).to(dtype)
    edges = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    x = pixel.expand(1, cin, *(n + e for n, e in zip(size, edges, strict=True))).contiguous(memory_format=packed)
    none = [0] * len(size)
    made = convolve(x, weight, bias, list(stride), none, list(dilation), transposed, none, groups)
    if transposed:
        for axis, (edge, step) in enumerate(zip(edges, stride, strict=True), 2):
            made = made.narrow(axis, edge, made.shape[axis] - 2 * edge).movedim(axis, 0)[-edge % step :: step]
            made = made.movedim(0, axis)
    return made[0].flatten(1)


@pytest.mark.parametrize("packed", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channels", [(2, 5, 1), (16, 8, 1), (48, 16, 1), (6, 6, 6)], ids=str)
def test_equal_windows_give_equal_outputs(channels, geometry, dtype, packed):
    cin, cout, groups = channels
    kernel, stride, dilation, transposed = geometry
    form = (cin, cout, (kernel,) * 2, (stride,) * 2, (dilation,) * 2, groups, transposed)
    all_equal([outputs(size, form, dtype, packed) for size in SIZES])


def all_equal(made):
    for pixels in made:
        assert torch.equal(pixels, made[-1][:, :1].expand_as(pixels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_equal_windows_give_equal_outputs_whatever_the_form(form, dtype):
    all_equal([outputs(size, form, dtype) for size in PLACES[len(form[2])]])


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_convolutions_are_exact_for_integers(form, padding):
    cin, cout, kernel, stride, dilation, groups, transposed = form
    torch.manual_seed(0)
    n = len(kernel)
    x = torch.randint(-3, 4, (2, cin, *(9, 7, 8)[:n])).float()
    weight = torch.randint(
        -3, 4, (cin, cout // groups, *kernel) if transposed else (cout, cin // groups, *kernel)
    ).float()
    geometry = (list(stride), [padding] * n, list(dilation), transposed, [0] * n, groups)
    for bias in (None, torch.randint(-9, 9, (2 * cout,)).float()[::2]):
        try:
            want = torch.convolution(x.double(), weight.double(), None if bias is None else bias.double(), *geometry)
        except RuntimeError:  # nothing is left of it
            continue
        assert torch.equal(convolve(x, weight, bias, *geometry).double(), want)


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
@pytest.mark.rest
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
