"""The compiled convolution against the library's in float64: exact for small integers."""

from __future__ import annotations

import itertools
import platform

import pytest
import torch
import torch.nn.functional as F

from fullframe.codegen.toolchain import cxx as compiler
from fullframe.native import convolution as convolutions
from fullframe.native import loader as loading
from fullframe.native.convolution import Axis, convolution, for_convolution, parts_of
from fullframe.native.loader import own
from fullframe.native.weight_gradient import weight_grad
from fullframe.native.winograd import for_winograd, winograd
from fullframe.ops.numerics.convolve import convolve

CASES = [
    # out, in, pixels, kernel, stride, padding, dilation
    (16, 16, (9, 70), (3, 3), (1, 1), (1, 1), (1, 1)),
    (8, 1, (7, 140), (3, 5), (1, 1), (1, 2), (1, 1)),
    (17, 19, (11, 13), (3, 3), (2, 1), (1, 1), (1, 1)),
    (48, 80, (12, 17), (5, 5), (2, 3), (2, 0), (1, 1)),
    (24, 16, (21, 200), (3, 3), (1, 1), (3, 3), (3, 2)),
    (100, 150, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    (256, 130, (5, 16), (5, 5), (1, 1), (2, 2), (1, 1)),
    (32, 3, (40, 40), (7, 7), (2, 2), (3, 3), (1, 1)),
    (16, 16, (2, 2), (3, 3), (1, 1), (2, 2), (1, 1)),
    (24, 16, (4, 6, 9), (3, 3, 3), (1, 2, 1), (1, 1, 0), (1, 1, 1)),
    (16, 40, (3, 5, 130), (2, 1, 3), (1, 1, 2), (1, 0, 1), (2, 1, 1)),
    (64, 300, (7, 7), (1, 1), (1, 1), (0, 0), (1, 1)),
    (40, 33, (9, 12), (1, 1), (2, 3), (1, 0), (1, 1)),
    (24, 16, (3, 4, 5), (1, 1, 1), (1, 2, 1), (0, 0, 0), (1, 1, 1)),
]


TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    """Products of pixels, too, on every processor."""
    if own("convolution") is None:
        pytest.skip("no compiler")
    monkeypatch.setattr(convolutions, "suits_pixels", lambda: True)


def _known(dtype):
    """Skip where the processor has no products of this type."""
    if dtype == torch.bfloat16 and own("convolution_of_halves", "convolution") is None:
        pytest.skip("no products of bfloat16 on this processor")


def _made(x, weight, bias, *geometry):
    """``geometry``: extents, stride, padding before and dilation, and how many groups."""
    *columns, groups = geometry
    return convolution(x, weight, bias, [Axis(*numbers) for numbers in zip(*columns, strict=True)], groups)


def _like(spatial):
    return F.conv2d if len(spatial) == 2 else F.conv3d


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", ["innermost", "outermost", "part"])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_exact_for_integers(case, layout, ordered, dtype):
    _known(dtype)
    out, deep, pixels, kernel, stride, padding, dilation = case
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (2, deep, *pixels)).to(dtype)
    weight, bias = torch.randint(-3, 4, (out, deep, *kernel)).to(dtype), torch.randint(-9, 9, (out,)).to(dtype)
    truth = _like(pixels)(x.double(), weight.double(), bias.double(), stride, padding, dilation)
    if layout != "outermost":
        x = x.contiguous(memory_format=torch.channels_last if len(pixels) == 2 else torch.channels_last_3d)
    if layout == "part":  # of more channels, as from a concatenation
        x = torch.cat([x, x, x], 1)[:, deep : 2 * deep]
    weight = for_convolution(weight) if ordered else weight
    found = _made(x, weight, bias, truth.shape[2:], stride, padding, dilation, 1)
    assert found is not None and torch.equal(found, truth.to(dtype))


def test_uneven_padding():
    """A window at the border of the image has padding on one side only."""
    torch.manual_seed(0)
    x, weight = torch.randint(-3, 4, (1, 16, 10, 40)).float(), torch.randint(-3, 4, (32, 16, 3, 3)).float()
    for (top, bottom), (left, right) in itertools.product([(0, 0), (1, 0), (0, 1), (2, 1)], repeat=2):
        truth = F.conv2d(F.pad(x, (left, right, top, bottom)).double(), weight.double())
        found = _made(x, weight, None, truth.shape[2:], (1, 1), (top, left), (1, 1), 1)
        assert found is not None and torch.equal(found.double(), truth)


@pytest.mark.parametrize("deep, kernel", [(16, 3), (40, 3), (200, 5), (300, 1)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_an_output_does_not_depend_on_where_its_window_is_cut(deep, kernel, dtype):
    _known(dtype)
    torch.manual_seed(0)
    x = torch.randn(1, deep, 20, 90).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(40, deep, kernel, kernel).to(dtype)
    n = kernel - 1
    whole = _made(x, weight, None, (20 - n, 90 - n), (1, 1), (0, 0), (1, 1), 1)
    for top, left, rows, columns in [(0, 0, 9, 50), (3, 7, 8, 31), (5, 1, 6, 80), (9, 40, 11, 17)]:
        part = x[:, :, top : top + rows, left : left + columns]
        made = _made(part, for_convolution(weight), None, (rows - n, columns - n), (1, 1), (0, 0), (1, 1), 1)
        assert whole is not None and made is not None
        assert torch.equal(made, whole[:, :, top : top + rows - n, left : left + columns - n])


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (20, 33, 5, 2), (8, 3, 2, 3, 3)])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_weight_in_order_is_the_same_weight(shape, flipped, dtype, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    weight = weight.flip(2).transpose(2, 3) if flipped else weight
    flipped = weight.transpose(0, 1).flip(tuple(range(2, len(shape))))
    for _ in ("compiled", "plain"):
        assert torch.equal(for_convolution(weight), weight)
        assert torch.equal(for_convolution(weight, flipped=True), flipped)
        assert for_convolution(weight).stride()[:2] == (1, shape[0])
        assert for_convolution(weight, flipped=True).stride()[:2] == (1, shape[1])
        monkeypatch.setattr(loading, "_LOADED", {"pack": None, "pack_halves": None})


def test_halves_are_added_up_in_float32_and_rounded_once():
    _known(torch.bfloat16)
    torch.manual_seed(0)
    x, weight = torch.randn(1, 96, 12, 40).bfloat16(), torch.randn(24, 96, 3, 3).bfloat16()
    bias = torch.randn(24).bfloat16()
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    made = _made(x, weight, bias, (12, 40), (1, 1), (1, 1), (1, 1), 1)
    assert made is not None
    # Half a unit in the last place, and what float32 may have moved a sum before.
    assert ((made.double() - truth).abs() <= truth.abs() * 2**-8 + 1e-4).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_halves_that_are_not_finite_stay_so(bad):
    _known(torch.bfloat16)
    x, weight = torch.ones(1, 16, 6, 30).bfloat16(), torch.ones(16, 16, 3, 3).bfloat16()
    x[0, 3, 2, 11] = bad
    made = _made(x, weight, None, (6, 30), (1, 1), (1, 1), (1, 1), 1)
    truth = F.conv2d(x.float(), weight.float(), padding=1).bfloat16()
    torch.testing.assert_close(made, truth, equal_nan=True, rtol=0, atol=0)


def test_chains_are_short():
    assert parts_of(3, 16) == (3, 16)
    assert parts_of(3, 96) == (1, 48)
    for taps, deep in itertools.product(range(1, 8), range(1, 300)):
        rows, channels = parts_of(taps, deep)
        assert rows * taps * channels <= 144 or (rows == 1 and channels == 16)
        assert rows == 1 or channels == deep


@pytest.mark.parametrize("deep", [16, 100])
def test_without_a_compiler_the_library_makes_the_same(deep, monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(1, deep, 12, 30), torch.randn(24, deep, 3, 3)
    ours = _made(x, weight, None, (12, 30), (1, 1), (1, 1), (1, 1), 1)
    monkeypatch.setattr(loading, "_LOADED", {"convolution": None})
    assert ours is not None and _made(x, weight, None, (12, 30), (1, 1), (1, 1), (1, 1), 1) is None
    theirs = convolve(x, for_convolution(weight), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    for made in (ours, theirs):
        assert (made - truth).abs().max() < 2e-6 * truth.abs().max()


def test_what_is_not_its_business_is_left_to_the_library(monkeypatch):
    monkeypatch.setattr(convolutions, "suits_pixels", lambda: False)
    x, weight = torch.randn(1, 16, 9, 9), torch.randn(16, 16, 3, 3)
    same = ((9, 9), (1, 1), (1, 1), (1, 1))
    assert _made(x, weight[:, :8], None, *same, 2) is None
    assert _made(x.double(), weight.double(), None, *same, 1) is None
    assert _made(x, weight.bfloat16(), None, *same, 1) is None
    assert _made(x, torch.randn(16, 16, 1, 1), None, (9, 9), (1, 1), (0, 0), (1, 1), 1) is None
    assert _made(x[:0], weight, None, *same, 1) is None


def test_the_default_dtype_is_not_that_of_the_outputs():
    torch.manual_seed(0)
    x, weight = torch.randint(-3, 4, (1, 16, 9, 9)).float(), torch.randint(-3, 4, (16, 16, 3, 3)).float()
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        made = _made(x, weight, None, (9, 9), (1, 1), (1, 1), (1, 1), 1)
    finally:
        torch.set_default_dtype(before)
    assert made is not None and made.dtype == torch.float32 and torch.equal(made.double(), truth)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="another architecture")
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_processors_with_shorter_vectors(processor, monkeypatch):
    """Compiled for an older processor, which has no products of bfloat16."""
    older = compiler.for_isa(processor)
    monkeypatch.setattr(compiler, "find", lambda: older)
    monkeypatch.setattr(loading, "_LOADED", {})
    assert own("convolution_of_halves", "convolution") is None and own("gradient_of_halves", "gradient") is None
    torch.manual_seed(0)
    x, weight = torch.randint(-3, 4, (2, 40, 9, 30)).float(), torch.randint(-3, 4, (24, 40, 3, 3)).float()
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    made = _made(x, weight, None, (9, 30), (1, 1), (1, 1), (1, 1), 1)
    assert made is not None and torch.equal(made.double(), truth)
    assert own("winograd", "convolution") is not None
    axes = [Axis(9, 1, 1, 1), Axis(30, 1, 1, 1)]
    assert torch.equal(winograd(x, for_winograd(weight), None, axes, 1).double(), truth)
    g = torch.randint(-3, 4, truth.shape).float()
    made = weight_grad(g, x, weight.shape, (1, 1), (1, 1), (1, 1), 1)
    back, mask = torch.ops.aten.convolution_backward, [False, True, False]
    truth = back(g.double(), x.double(), weight.double(), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)[1]
    assert made is not None and torch.equal(made.double(), truth)
