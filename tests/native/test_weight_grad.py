"""The compiled weight gradient against the library's in float64: exact for small integers."""

from __future__ import annotations

import itertools

import pytest
import torch

from fullframe.native import weight_gradient as gradient
from fullframe.native.loader import own
from fullframe.native.weight_gradient import weight_grad

CASES = [
    # out, in, groups, pixels, kernel, stride, padding, dilation
    (16, 16, 1, (9, 33), (3, 3), (1, 1), (1, 1), (1, 1)),
    (32, 3, 1, (7, 140), (3, 5), (1, 1), (1, 2), (1, 1)),
    (3, 32, 1, (5, 19), (1, 1), (1, 1), (0, 0), (1, 1)),
    (17, 19, 1, (11, 13), (3, 3), (2, 1), (1, 1), (1, 1)),
    (48, 80, 1, (12, 17), (5, 5), (2, 3), (2, 0), (1, 1)),
    (16, 24, 1, (21, 200), (3, 3), (1, 1), (3, 3), (3, 2)),
    (64, 48, 2, (8, 10), (3, 3), (1, 1), (1, 1), (1, 1)),
    (32, 1, 1, (40, 40), (7, 7), (2, 2), (3, 3), (1, 1)),
    (16, 16, 1, (2, 2), (3, 3), (1, 1), (1, 1), (1, 1)),
    (24, 16, 1, (4, 6, 9), (3, 3, 3), (1, 2, 1), (1, 1, 0), (1, 1, 1)),
    (16, 40, 1, (3, 5, 130), (2, 1, 3), (1, 1, 2), (1, 0, 1), (2, 1, 1)),
    # With output channels in shares, too many for a cache at once.
    (300, 260, 1, (9, 21), (3, 3), (1, 1), (1, 1), (1, 1)),
    (304, 259, 1, (5, 8), (3, 3), (1, 1), (1, 2), (1, 1)),
    (600, 560, 2, (4, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
]


def _whole(g, x, shape, stride, padding, dilation, groups):
    weight = torch.zeros(shape, dtype=x.dtype)
    mask = [False, True, False]
    zeros = [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, zeros, groups, mask
    )[1]


@pytest.fixture(autouse=True)
def _compiled():
    if own("gradient") is None:
        pytest.skip("no compiler")


def _known(dtype):
    if dtype == torch.bfloat16 and gradient.of_halves() is None:
        pytest.skip("no products of bfloat16 on this processor")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", ["innermost", "outermost", "part"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_for_integers(case, layout, dtype):
    _known(dtype)
    out, deep, groups, pixels, kernel, stride, padding, dilation = case
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (2, deep, *pixels)).float()
    shape = (out, deep // groups, *kernel)
    like = torch.nn.functional.conv2d if len(pixels) == 2 else torch.nn.functional.conv3d
    g = like(x, torch.zeros(shape), None, stride, padding, dilation, groups)
    g = torch.randint(-3, 4, g.shape).float()
    truth = _whole(g.double(), x.double(), shape, stride, padding, dilation, groups)
    if layout != "outermost":
        form = torch.channels_last if len(pixels) == 2 else torch.channels_last_3d
        g, x = g.contiguous(memory_format=form), x.contiguous(memory_format=form)
    if layout == "part":  # of more channels, as from a concatenation
        g, x = (torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]] for t in (g, x))
    found = weight_grad(g.to(dtype), x.to(dtype), shape, stride, padding, dilation, groups)
    assert found is not None and found.shape == shape
    assert torch.equal(found.double(), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uneven_padding(dtype):
    """A window at the border of the image has padding on one side only."""
    _known(dtype)
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (1, 16, 10, 20)).float()
    for (top, bottom), (left, right) in itertools.product([(0, 0), (1, 0), (0, 1), (2, 1)], repeat=2):
        padded = torch.nn.functional.pad(x, (left, right, top, bottom))
        g = torch.randint(-3, 4, (1, 32, padded.shape[2] - 2, padded.shape[3] - 2)).float()
        truth = _whole(g.double(), padded.double(), (32, 16, 3, 3), (1, 1), (0, 0), (1, 1), 1)
        found = weight_grad(g.to(dtype), x.to(dtype), (32, 16, 3, 3), (1, 1), (top, left), (1, 1), 1)
        assert found is not None
        assert torch.equal(found.double(), truth)


def test_rounds_no_more_than_the_library():
    torch.manual_seed(0)
    x, g = torch.randn(1, 32, 48, 256), torch.randn(1, 32, 48, 256)
    args = ((32, 32, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    truth = _whole(g.double(), x.double(), *args)
    found = weight_grad(g, x, *args)
    assert found is not None
    assert (found - truth).abs().max() <= (_whole(g, x, *args) - truth).abs().max()


def test_bfloat16_is_summed_in_float32():
    _known(torch.bfloat16)
    torch.manual_seed(0)
    x, g = torch.randn(1, 16, 20, 64).bfloat16(), torch.randn(1, 16, 20, 64).bfloat16()
    args = ((16, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    found = weight_grad(g, x, *args)
    assert found is not None and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), _whole(g.double(), x.double(), *args), rtol=1e-4, atol=1e-4)


def test_left_to_the_library():
    x = torch.zeros(1, 4, 8, 8)
    args = ((4, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert weight_grad(x, x, *args) is None
    wide = torch.zeros(1, 16, 8, 8, dtype=torch.float64)
    assert weight_grad(wide, wide, (16, 16, 3, 3), *args[1:]) is None
