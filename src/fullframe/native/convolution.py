"""A convolution of one window, in short chains of sums, where the library would make it in parts.

With channels innermost the library adds up all products of an output in one chain, and its rounding error grows with
the chain. The kernel's chains are short, and it pads nothing, copies nothing and looks nothing up, so that it is as
fast as the library on large windows and several times as fast on small ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from fullframe.device import CXX, device_of
from fullframe.native.loader import Words, own, run

CHAIN = 144  # products that may be added up one after the other: 16 channels of 3 x 3
LEAST = 8  # output channels: half a vector, on the widest processor
WIDEST = 16  # numbers of float32 in the widest vectors
ROWS = 64  # rows of taps, as the source has it


class Axis(NamedTuple):
    """A spatial axis of a window: ``extent`` of the output, ``stride``, ``dilation``, and how many pixels of padding
    the first window reaches ``before`` the input."""

    extent: int
    stride: int
    before: int
    dilation: int


class Parts(NamedTuple):
    """The products of a chain: of so many rows of taps (all axes but the last), and so many channels."""

    rows: int
    channels: int


def parts_of(taps: int, deep: int) -> Parts:
    """Chains of at most `CHAIN` products, or of one row of ``taps`` by 16 of ``deep`` channels."""
    rows = max(1, CHAIN // (taps * deep))
    return Parts(rows, deep if rows > 1 or taps * deep <= CHAIN else max(16, CHAIN // taps // 16 * 16))


def convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axes: Sequence[Axis], groups: int
) -> torch.Tensor | None:
    """The outputs of a window; None where the library should make them.

    Args:
        x: window of the input, (batch, in, ...) with two or three spatial axes, float32 or, where the processor
            multiplies it, bfloat16; outside of it are zeros.
        weight: (out, in / groups, ...); best with output channels innermost, as `for_convolution` lays it out.
        bias: (out), or None.
        axes: of each spatial axis, the extent of the output and how windows lie.
        groups: of the convolution.

    Returns:
        As ``x``, (batch, out, extents), channels innermost.
    """
    if not _suits(x, weight, bias, groups) or any(a.extent == 0 for a in axes):
        return None
    function = _kernel(x.dtype)
    if function is None:
        return None
    if alone(weight.shape, weight.dtype):
        x, weight = paired(x), paired(weight)
    x, made = innermost(x), outputs(x, weight.shape[0], axes)
    geometry = geometry_of(axes, x, weight.shape[2:])
    words = _words((x.shape[0], *weight.shape[:2]), geometry, x.stride(), made.stride(), weight.stride())
    run(function, words, (x, weight, made, bias))
    return made


def for_convolution(weight: torch.Tensor, flipped: bool = False) -> torch.Tensor:
    """A weight (out, in, ...) as `convolution` wants it: output channels innermost in memory, then input channels.

    ``flipped``: that of the convolution which is the input gradient (of stride 1), (in, out, ...): what went out
    comes in, and the taps are in the other order.
    """
    weight = weight.transpose(0, 1) if flipped else weight
    made = in_order(weight, weight.shape)
    name = {torch.float32: "pack", torch.bfloat16: "pack_halves"}.get(weight.dtype)
    some = device_of(weight.device).toolchain == CXX and weight.numel() and weight.dim() in (4, 5)
    function = own(name, "convolution") if name and some else None
    if function is None:
        return made.copy_(weight.flip(tuple(range(2, weight.dim()))) if flipped else weight)
    run(function, order(tuple(weight.shape), weight.stride(), flipped), (weight, made))
    return made


def suits(shape: Sequence[int], dtype: torch.dtype, groups: int) -> bool:
    """Whether the kernel is not worse than the library with a weight of this ``shape``, on a processor."""
    taps = shape[2:]
    wide = groups == 1 and shape[0] >= LEAST and prod(taps[:-1]) <= ROWS
    if not wide or len(taps) not in (2, 3) or (prod(taps) == 1 and not suits_pixels()):
        return False
    # Whether there is a kernel for halves is the processor's.
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _kernel(dtype) is not None)


def suits_pixels() -> bool:
    """Whether the kernel is not worse than the library for products of single pixels: with the widest vectors. On few
    pixels it is three times as fast, for the library lays their weight out anew at every call."""
    lanes = own("lanes", "convolution")
    return lanes is not None and lanes() == WIDEST


def alone(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the last input channel of a weight of this ``shape`` gets another of zeros: halves go by pairs."""
    return dtype == torch.bfloat16 and shape[1] % 2 == 1


def paired(x: torch.Tensor) -> torch.Tensor:
    """A copy with a channel of zeros behind the others, channels innermost."""
    made = x.new_zeros((x.shape[0], *x.shape[2:], x.shape[1] + 1)).movedim(-1, 1)
    made[:, :-1].copy_(x)
    return made


def _kernel(dtype: torch.dtype) -> Callable[..., int] | None:
    return own("convolution") if dtype == torch.float32 else own("convolution_of_halves", "convolution")


def _suits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int) -> bool:
    plain = bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
    some = (
        bool(x.numel()) and bool(weight.numel()) and device_of(x.device).toolchain == CXX and x.dtype == weight.dtype
    )
    return some and plain and suits(weight.shape, weight.dtype, groups)


def in_order(weight: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Room for a weight of a ``shape`` (out, in, ...): output channels innermost in memory, then input channels."""
    out, deep, *kernel = shape
    steps = [prod(kernel[k + 1 :]) * out * deep for k in range(len(kernel))]
    return weight.new_empty_strided(tuple(shape), (1, out, *steps))


def innermost(x: torch.Tensor) -> torch.Tensor:
    """With neighbouring channels; ``x`` itself where they are."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=_channels_last(x))


def outputs(x: torch.Tensor, channels: int, axes: Sequence[Axis]) -> torch.Tensor:
    """Room for the outputs of a window, channels innermost."""
    shape = (x.shape[0], channels, *(a.extent for a in axes))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_channels_last(x))


def geometry_of(axes: Sequence[Axis], x: torch.Tensor, kernel: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Of each spatial axis, as a kernel takes it."""
    sizes = zip(axes, x.shape[2:], kernel, strict=True)
    return tuple((a.extent, n, k, a.stride, a.before, a.dilation) for a, n, k in sizes)


def _channels_last(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


_Strides = tuple[int, ...]


@lru_cache(maxsize=4096)
def _words(channels: tuple[int, ...], geometry: tuple[tuple[int, ...], ...], x: _Strides, made: _Strides,
           weight: _Strides) -> Words:  # fmt: skip
    """What the kernel is told of a call. Kept, since to make it takes as long as a small window."""
    return array([*numbers(channels, geometry, x, made, weight), *parts_of(geometry[-1][2], channels[2])])


@lru_cache(maxsize=4096)
def order(shape: tuple[int, ...], strides: _Strides, flipped: bool) -> Words:
    """What `pack` is told of a weight."""
    out, deep, *kernel = shape
    none = (0,) * (len(kernel) + 2)
    words = numbers((0, out, deep), [(0, 0, n, 1, 0, 1) for n in kernel], none, none, strides)
    return array([*words, 0, 0, int(flipped)])


def array(words: Sequence[int]) -> Words:
    """Numbers as a kernel takes them."""
    return (ctypes.c_int64 * len(words))(*words)


def numbers(channels: Sequence[int], geometry: Sequence[tuple[int, ...]], x: _Strides, made: _Strides,
             weight: _Strides) -> list[int]:  # fmt: skip
    """The sizes and strides of a convolution, as a kernel takes them: ``channels`` begin with the batch."""
    lead = 3 - len(geometry)
    words = [*channels]
    for axis in (((1, 1, 1, 1, 0, 1),) * lead, geometry):
        for numbers in axis:
            words += numbers
    none = (0,) * lead
    for steps, head in ((x, 1), (made, 1), (weight, 2)):
        words += (*(steps[:1] if head == 1 else steps[:2]), *none, *steps[2:])
    return words
