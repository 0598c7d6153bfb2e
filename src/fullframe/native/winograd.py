"""A float32 convolution with rows of three neighbouring taps, by two thirds of its products.

Two neighbouring outputs of three taps need four products instead of six (S. Winograd, Arithmetic Complexity of
Computations, 1980: F(2, 3)). They are of sums and differences of two pixels, and of sums of taps that are made once a
step; so the rounding error is about 1.3 times that of the direct way, in chains of the same length.

The couples of outputs begin at even pixels of the whole image. So an output depends on what its window holds, and on
whether it is the first or the second of its couple, but not on where the tile is cut; and where a row of pixels is
constant, not on that either.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F

from fullframe.native.convolution import LEAST as OUT
from fullframe.native.convolution import (
    ROWS,
    Axis,
    array,
    geometry_of,
    in_order,
    innermost,
    numbers,
    order,
    outputs,
    parts_of,
)
from fullframe.native.loader import Words, own, run

TAPS = 3  # of a row
LEAST = 16  # channels in, so that vectors are full
PRODUCTS = 48  # rows of taps times channels in, from which on sums and differences cost little beside the products


def suits_winograd(
    shape: Sequence[int], dtype: torch.dtype, groups: int, stride: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Whether a weight of this ``shape`` is convolved so, on a processor: by a compiled kernel, and faster."""
    plain = dtype == torch.float32 and groups == 1 and len(shape) in (4, 5)
    (out, deep), rows = shape[:2], prod(shape[2:-1])
    fits = plain and by_couples(shape, stride, dilation) and out >= OUT and deep >= LEAST and rows <= ROWS
    return fits and rows * deep >= PRODUCTS and own("winograd", "convolution") is not None


def by_couples(shape: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether rows of taps are three neighbours."""
    return shape[-1] == TAPS and stride[-1] == dilation[-1] == 1


def for_winograd(weight: torch.Tensor, flipped: bool = False) -> torch.Tensor:
    """A weight (out, in, ..., 3) as `winograd` wants it: (out, in, ..., 4), output channels innermost in memory.

    A row of taps g0, g1, g2 is g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2. ``flipped``: that of the convolution
    which is the input gradient (of stride 1), (in, out, ..., 4), with the taps in the other order.
    """
    weight = weight.transpose(0, 1) if flipped else weight
    made = in_order(weight, (*weight.shape[:-1], TAPS + 1))
    function = own("pack_winograd", "convolution") if weight.dtype == torch.float32 else None
    if function is None:
        a, b, c = (weight.flip(tuple(range(2, weight.dim()))) if flipped else weight).unbind(-1)
        return made.copy_(torch.stack([a, (a + b + c) / 2, (a - b + c) / 2, c], -1))
    run(function, order(tuple(weight.shape), weight.stride(), flipped), (weight, made))
    return made


def winograd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axes: Sequence[Axis], first: int
) -> torch.Tensor:
    """The outputs of a window.

    Args:
        x: window of the input, (batch, in, ...) with two or three spatial axes, float32; outside of it are zeros.
        weight: (out, in, ..., 4), as `for_winograd` makes it.
        bias: (out), or None.
        axes: of each spatial axis, the extent of the output and how windows lie; the last has stride and dilation 1.
        first: the pixel of the last axis, of the whole image, at which the outputs begin.

    Returns:
        As ``x``, (batch, out, extents), channels innermost.
    """
    x, made = innermost(x), outputs(x, weight.shape[0], axes)
    if not made.numel():
        return made
    function = own("winograd", "convolution")
    if function is None:
        return made.copy_(_plain(x, weight, bias, axes, first))
    bias = None if bias is None else bias.contiguous()
    geometry = geometry_of(axes, x, (*weight.shape[2:-1], TAPS))
    words = _words((x.shape[0], *weight.shape[:2]), geometry, x.stride(), made.stride(), weight.stride(), first % 2)
    run(function, words, (x, weight, made, bias))
    return made


@lru_cache(maxsize=4096)
def _words(channels: tuple[int, ...], geometry: tuple[tuple[int, ...], ...], x: tuple[int, ...],
           made: tuple[int, ...], weight: tuple[int, ...], phase: int) -> Words:  # fmt: skip
    """What the kernel is told of a call. Kept, since to make it takes as long as a small window."""
    return array([*numbers(channels, geometry, x, made, weight), *parts_of(1, channels[2]), phase])


def _plain(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axes: Sequence[Axis], first: int
) -> torch.Tensor:
    """The same by the library: each product a convolution of windows one pixel wide."""
    phase, couples = first % 2, (first % 2 + axes[-1].extent + 1) // 2
    pads, reach = [], []
    for a, n, kernel in zip(axes, x.shape[2:], weight.shape[2:], strict=True):
        last = (a.extent - 1) * a.stride + (kernel - 1) * a.dilation + 1
        pads.append((a.before, last - n - a.before))
        reach.append((a.stride, a.dilation))
    pads[-1] = (axes[-1].before + phase, 2 * couples + 2 - x.shape[-1] - axes[-1].before - phase)
    x = F.pad(x, [n for pair in reversed(pads) for n in pair])
    d = [x[..., k : k + 2 * couples : 2] for k in range(4)]
    stride, dilation = zip(*reach, strict=True)
    convolve = F.conv2d if x.dim() == 4 else F.conv3d
    p, q, r, s = (
        convolve(of, weight[..., k : k + 1], None, (*stride[:-1], 1), 0, dilation)
        for k, of in enumerate((d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]))
    )
    made = torch.stack([p + q + r, q - r - s], -1).flatten(-2)[..., phase : phase + axes[-1].extent]
    return made if bias is None else made + bias.view(-1, *[1] * (x.dim() - 2))
