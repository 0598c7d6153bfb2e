"""Convolutions of one window by the library, in the one of its ways that makes equal outputs of equal windows.

The library chooses between several ways by the size of its input, and a general matrix product adds up its last
columns in another order than the others. So pixels that are equal in plain PyTorch (a constant background, the parts
of a picture that repeat) would differ in a last bit from tile to tile, and a max pool or a comparison after them
would choose another one. Here the order in which an output is added up depends on nothing but the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fullframe import torch_compat
from fullframe.device import device_of
from fullframe.ir.region import Interval
from fullframe.native.convolution import CHAIN, convolution, parts_of
from fullframe.native.convolution import Axis as Placed
from fullframe.ops.numerics import phases


def spread(value: Sequence[int] | int, rank: int) -> list[int]:
    """One number per spatial axis, from a list of one or ``rank`` numbers."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def pad_window(x: torch.Tensor, pads: Sequence[Interval], value: float = 0.0) -> torch.Tensor:
    """Pad the trailing axes by (before, after) pairs given first axis first."""
    flat = [n for pair in reversed(pads) for n in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def innermost(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with channels innermost in memory; ``x`` itself where they are."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _fast(x: torch.Tensor) -> bool:
    """Whether oneDNN convolves it, whatever its size."""
    here = device_of(x.device).on_host and x.dtype == torch.float32 and x.numel() > 0
    there = torch_compat.onednn_convolution() and torch_compat.onednn_convolution_added()
    return here and there is not None and torch_compat.onednn_enabled()


DOT = ([1, 1], [0, 0], [1, 1], False, [0, 0])  # the geometry of one pixel
BATCH = 16  # images, from which on torch gives the gradients of one pixel to its fast library


@cache
def _pieces(pixels: int) -> int:
    """The least number of equal pieces that makes a batch; 0 where there is none."""
    return next((k for k in range(BATCH, min(pixels, BATCH * BATCH) + 1) if pixels % k == 0), 0)


def in_pieces(*maps: torch.Tensor) -> list[torch.Tensor] | None:
    """Maps of the same pixels, channels innermost, as batches of `BATCH` images or more; None where not needed.

    The weight gradient of a window of one pixel does not care where the pixels lie. In one thread torch makes it by a
    general matrix product, at half the speed, unless the batch is large; so it is made to look large.
    """
    flat = [x.movedim(1, -1) for x in maps]
    pixels = maps[0].numel() // max(maps[0].shape[1], 1)
    slow = maps[0].dtype == torch.float32 and device_of(maps[0].device).on_host and torch.get_num_threads() == 1
    if not slow or maps[0].shape[0] >= BATCH or not _pieces(pixels) or not all(x.is_contiguous() for x in flat):
        return None
    return [x.view(_pieces(pixels), 1, -1, x.shape[-1]).movedim(-1, 1) for x in flat]


class _Geometry(NamedTuple):
    """How a convolution steps, with a number for each spatial axis."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    groups: int


def _in_chains(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: _Geometry) -> torch.Tensor:
    """A float32 convolution, channels innermost, in short sums where they would be long (see `parts_of`).

    With channels innermost the library adds up all products of an output in one chain, and its rounding error grows
    with the chain: for 192 channels of 3 x 3 it is three times that of the layout of plain PyTorch. So a wide
    convolution is made in parts, group by group, or, where it has one spatial axis, in that layout.
    """
    taps = prod(weight.shape[2:])
    if taps == 1 and max(how.stride) > 1:  # the library has several ways of steps; what they read is all that is kept
        x = pad_window(x, [(p, p) for p in how.padding])[(..., *(slice(None, None, s) for s in how.stride))]
        how = how._replace(stride=[1] * len(how.stride), padding=[0] * len(how.padding))
    if taps == weight.shape[1] == how.groups == 1 and not any(how.padding):  # one product, which it may round, or not
        some = innermost(x * weight.view(1, -1, *[1] * len(how.stride)))
        return some if bias is None else some + bias.view(-1, *[1] * len(how.stride))
    if taps == 1 and all(n == 1 for n in x.shape[2:]) and not any(how.padding):  # one pixel has a way of its own
        return innermost(_in_chains(torch.cat([x, x], -1), weight, bias, how).narrow(-1, 0, 1))
    wide = taps > 1 and taps * weight.shape[1] > CHAIN
    if wide and how.groups > 1:
        return _by_groups(x, weight, bias, how)
    if wide and x.dim() > 3:
        return _in_parts(innermost(x), weight, bias, how)
    if wide:
        return innermost(_by_onednn(x.contiguous(), weight.contiguous(), bias, how))
    return _by_onednn(innermost(x), weight, bias, how)


def _by_groups(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: _Geometry) -> torch.Tensor:
    """A convolution for each group: of wide ones the library makes matrix products, whose last columns differ."""
    n, each = how.groups, how._replace(groups=1)
    biases = [None] * n if bias is None else bias.chunk(n)
    pieces = zip(x.chunk(n, 1), weight.chunk(n), biases, strict=True)
    return innermost(torch.cat([_in_chains(part, taps, b, each) for part, taps, b in pieces], 1))


def _by_phases(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: _Geometry) -> torch.Tensor:
    """A transposed convolution, as convolutions of stride 1.

    Which ways the library has for a transposed one depends on the processor, and in some of them the order in which
    an output is added up depends on its place.
    """

    def plain(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, step: list[int], n: int
    ) -> torch.Tensor:
        sizes = zip(x.shape[2:], weight.shape[2:], step, strict=True)
        placed = [Placed(e - s * (k - 1), 1, 0, s) for e, k, s in sizes]
        made = convolution(x, weight, bias, placed, n)
        if made is not None:
            return made
        return _in_chains(x, weight, bias, _Geometry([1] * len(step), [0] * len(step), step, False, n))

    axes = zip(x.shape[2:], weight.shape[2:], how.stride, how.padding, how.dilation, strict=True)
    return phases.transposed(plain, x, weight, bias, [phases.Axis(*a) for a in axes], how.groups)


def _in_parts(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: _Geometry) -> torch.Tensor:
    """The sum of convolutions by some rows of the window each, and by some channels where a row has too many.

    What some rows read is a view of the image, what some channels read is a copy.
    """
    rank, (_, deep, rows, *rest) = x.dim() - 2, weight.shape
    x = pad_window(x, [(how.padding[0], how.padding[0]), *[(0, 0)] * (rank - 1)])
    how = how._replace(padding=[0, *how.padding[1:]])
    stride, dilation = how.stride[0], how.dilation[0]
    height = (x.shape[2] - dilation * (rows - 1) - 1) // stride + 1
    some, step = parts_of(prod(rest), deep)
    made: torch.Tensor | None = None
    for c in range(0, deep, step):
        part = x if step >= deep else innermost(x[:, c : c + step])
        for r in range(0, rows, some):
            taps = weight[:, c : c + step, r : r + some]
            read = (height - 1) * stride + (taps.shape[2] - 1) * dilation + 1
            seen = part.narrow(2, r * dilation, read)
            made = _by_onednn(seen, taps, bias, how) if made is None else _added(made, seen, taps, how)
    assert made is not None
    return made


def _added(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, how: _Geometry) -> torch.Tensor:
    """A convolution added to a total, in the same pass: the library adds each finished sum."""
    direct = torch_compat.onednn_convolution_added()
    assert direct is not None
    geometry = (how.padding, how.stride, how.dilation, how.groups)
    direct(total, x, weight, None, *geometry, "add", None, None, [], None)
    return total


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: _Geometry) -> torch.Tensor:
    """A convolution as `torch.convolution` makes large ones: it gives small ones, and small windows, to others."""
    stride, padding, dilation, _, groups = how
    bias = None if bias is None else bias.contiguous()  # the library does not look at its stride
    if x.dim() == 3:
        flat = how._replace(stride=[1, *stride], padding=[0, *padding], dilation=[1, *dilation])
        return _by_onednn(x.unsqueeze(2), weight.unsqueeze(2), bias, flat).squeeze(2)
    direct = torch_compat.onednn_convolution()
    assert direct is not None
    return direct(x, weight, bias, padding, stride, dilation, groups, "none", [], None)


EVEN = 24  # columns that the kernels of matrix products take at a time, or a multiple


def _filled(sizes: Sequence[int]) -> int:
    """How many columns more make the pixels of an image a multiple of `EVEN`."""
    return next(k for k in range(EVEN) if prod(sizes[:-1]) * (sizes[-1] + k) % EVEN == 0)


def _by_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: _Geometry) -> torch.Tensor:
    """A float64 convolution, which the library makes by a matrix product with a column for each pixel.

    The last columns are added up in another order unless they fill a kernel; so the image gets more, of zeros.
    """
    stride, padding, dilation, transposed, groups = how
    shape, none = x.shape[2:], [0] * len(stride)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    pads, x = [(p, p) for p in padding], x.contiguous()
    if transposed:
        width = (shape[-1] - 1) * stride[-1] + reach[-1] - 2 * padding[-1]
        x = pad_window(x, [*[(0, 0)] * (len(shape) - 1), (0, _filled(shape))])
    else:
        sizes = [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(shape, padding, reach, stride, strict=True)]
        width, padding = sizes[-1], none
        read = (width + _filled(sizes) - 1) * stride[-1] + reach[-1]
        pads[-1] = (pads[-1][0], max(read - shape[-1] - pads[-1][0], pads[-1][1]))
        x = pad_window(x, pads)
    made = torch.convolution(x, weight.contiguous(), bias, stride, padding, dilation, transposed, none, groups)
    return innermost(made.narrow(-1, 0, width))


def _beyond(padding: Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether whole windows may lie in the padding: there the library may read beyond the image (oneDNN 3.12)."""
    return any(n > d * (k - 1) for n, k, d in zip(padding, kernel, dilation, strict=True))


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *geometry: Any) -> torch.Tensor:
    """`torch.convolution`, its outputs added up in an order that depends on neither their place nor the window's
    size."""
    stride, padding, dilation, transposed, more, groups = geometry
    if device_of(x.device).on_host and x.numel():
        stride, padding, dilation = (spread(n, x.dim() - 2) for n in (stride, padding, dilation))
        if not transposed and _beyond(padding, weight.shape[2:], dilation):
            x, padding = pad_window(x, [(n, n) for n in padding]), [0] * len(padding)
        geometry = (stride, padding, dilation, transposed, more, groups)
        how = _Geometry(stride, padding, dilation, transposed, groups)
        if _fast(x):
            return (_by_phases if transposed else _in_chains)(x, weight, bias, how)
        if x.dtype == torch.float64:
            return _by_product(x, weight, bias, how)
    return torch.convolution(x, weight, bias, *geometry)


class Axis(NamedTuple):
    kernel: int
    stride: int
    padding: int
    dilation: int


def geometry(numbers: Sequence[Sequence[int]]) -> list[Axis]:
    """Spatial axes from (kernel, stride, padding, dilation), each but the first of one or of as many numbers."""
    return [Axis(*a) for a in zip(*(spread(n, len(numbers[0])) for n in numbers), strict=True)]
