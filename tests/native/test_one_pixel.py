"""Convolutions with windows of one pixel, whose gradients run as large batches: same numbers, any shape."""

import pytest
import torch

from fullframe.ops.numerics import convolve
from fullframe.ops.numerics.convolve import innermost
from fullframe.ops.primitives.pooling import FEW, passed

SHAPES = [(1, 5, 48), (1, 4, 6, 20), (3, 4, 6, 20), (1, 4, 3, 8, 6), (1, 4, 7, 13), (2, 4, 1, 3), (0, 4, 6, 6)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_convolution_of_one_pixel(shape, groups):
    torch.manual_seed(0)
    cin, rank = shape[1] // groups * groups, len(shape) - 2
    x = innermost(torch.randn(shape))[:, :cin]
    weight, bias = torch.randn(6, cin // groups, *[1] * rank), torch.randn(6)
    geometry = ([1] * rank, [0] * rank, [1] * rank, False, [0] * rank, groups)
    made = convolve.convolve(x, weight, bias, *geometry)
    truth = torch.convolution(x.double(), weight.double(), bias.double(), *geometry)
    assert made.shape == truth.shape and made.dtype == torch.float32
    torch.testing.assert_close(made.double(), truth, rtol=0, atol=1e-5)


def test_a_strip_of_rows_needs_no_copy():
    rows = innermost(torch.randn(1, 8, 30, 24))[:, :, 3:21]
    pieces = convolve.in_pieces(rows)
    assert pieces is not None and pieces[0].shape[0] >= convolve.BATCH
    assert pieces[0].data_ptr() == rows.data_ptr()
    assert convolve.in_pieces(rows[..., 1:-1]) is None  # lies with gaps: left as it is


def test_what_is_left_as_it_is():
    assert convolve.in_pieces(innermost(torch.randn(1, 3, 1, 1021))) is None  # no equal pieces
    assert convolve.in_pieces(innermost(torch.randn(1, 3, 2, 3))) is None  # too few pixels
    assert convolve.in_pieces(torch.randn(1, 3, 8, 8, dtype=torch.float64)) is None


@pytest.mark.parametrize("count", [1, 4, FEW, FEW + 1, 60])
def test_how_many_steps_are_passed(count):
    steps = sorted(torch.randperm(200)[:count].tolist())
    values = torch.randint(0, 220, (2, 3, 40), dtype=torch.int32)
    truth = sum((values >= s).to(torch.int64) for s in steps)
    assert torch.equal(passed(values, steps, torch.uint8).to(torch.int64), truth)
