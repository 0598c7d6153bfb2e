"""The weight gradient of a convolution over one window, where the library's own is slower.

float32, and bfloat16 where the processor adds up its products in float32.

Without AVX-512 the library reaches a fifth to a third of its forward speed here (channels innermost), with it as
much or a tenth less than this kernel, which makes no padded copy. And the kernel adds up at most a few hundred
products in one float32 sum before the next. The library adds up all pixels of a window in one, and where most of an
image is one constant, each of these sums is rounded the same way: ten times the error of a random image.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from fullframe.device import CXX, device_of
from fullframe.native.convolution import innermost
from fullframe.native.loader import Words, own, run
from fullframe.native.winograd import by_couples

LEAST = 16  # channels of a vector, on the widest processor
PRODUCTS = 32  # rows of taps times channels, from which on it is worth it to take two pixels at once


def weight_grad(
    g: torch.Tensor,
    x: torch.Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor | None:
    """The sum over batch and pixels of ``g`` times ``x``, per tap; None where the library should make it.

    Args:
        g: window of the output's gradient, (batch, out, ...) with two or three spatial axes.
        x: window of the input; outside of it are zeros.
        shape: of the weight, (out, in / groups, ...).
        stride, dilation: per spatial axis.
        before: per spatial axis, how many pixels of padding the first window reaches before ``x``.
        groups: of the convolution.

    Returns:
        float32 of ``shape``.
    """
    if not _suits(g, x, shape, groups):
        return None
    few = min(shape[0] // groups, shape[1])
    couples = by_couples(shape, stride, dilation) and few >= LEAST and prod(shape[2:-1]) * few >= PRODUCTS
    if g.dtype == torch.bfloat16:
        function = of_halves()
    else:
        function = own("winograd_gradient" if couples else "gradient", "gradient")
    if function is None:
        return None
    g, x = innermost(g), innermost(x)
    geometry = tuple(zip(shape[2:], stride, before, dilation, strict=True))
    form = _form((tuple(g.shape), g.stride()), (tuple(x.shape), x.stride()), geometry, (*shape[:2], groups))
    made = g.new_zeros(form.made, dtype=torch.float32)
    run(function, form.words, (g, x, made))
    if not form.swapped:
        return made.movedim(-1, 1)
    return made.movedim(-1, 1).flatten(0, 1).movedim(-1, 1)


class _Form(NamedTuple):
    """What the kernel is told of a call, the shape it makes, and whether that has output channels innermost."""

    words: Words
    made: tuple[int, ...]
    swapped: bool


_Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


@lru_cache(maxsize=4096)
def _form(g: _Layout, x: _Layout, geometry: tuple[tuple[int, ...], ...], channels: tuple[int, int, int]) -> _Form:
    """The call for windows of these layouts, (kernel, stride, padding before, dilation) of each axis, and channels
    (out, in / groups, groups). Kept, since to make it takes as long as a small window."""
    lead = 5 - len(g[0])
    ones, zeros = (1,) * lead, (0,) * lead
    kernel, stride, before, dilation = zip(*geometry, strict=True)
    columns = zip(
        (*ones, *g[0][2:]), (*ones, *x[0][2:]), (*ones, *kernel), (*ones, *stride), (*zeros, *before),
        (*ones, *dilation), strict=True,
    )  # fmt: skip
    thick, deep, groups = channels
    out = thick // groups
    swapped = deep < LEAST or (out % LEAST == 0 and deep % LEAST != 0)
    words = [g[0][0], groups, out, deep]
    for column in columns:
        words += column
    for _, steps in (g, x):
        words += (steps[0], *zeros, *steps[2:])
    words.append(int(swapped))
    made = (groups, *kernel, deep, out) if swapped else (thick, *kernel, deep)
    return _Form((ctypes.c_int64 * len(words))(*words), made, swapped)


def suits_gradient(shape: Sequence[int], dtype: torch.dtype, groups: int) -> bool:
    """Whether the kernel is better than the library for a weight of this ``shape``, on a processor."""
    wide = max(shape[0] // groups, shape[1]) >= LEAST
    halves = dtype == torch.bfloat16 and of_halves() is not None
    return wide and len(shape) in (4, 5) and (dtype == torch.float32 or halves)


def _suits(g: torch.Tensor, x: torch.Tensor, shape: Sequence[int], groups: int) -> bool:
    known = g.dtype == x.dtype and device_of(g.device).toolchain == CXX and bool(g.numel()) and bool(x.numel())
    return known and suits_gradient(shape, g.dtype, groups)


def of_halves() -> Callable[..., int] | None:
    """The kernel for bfloat16; None on a processor without its products, where bfloat16 is cast before it."""
    return own("gradient_of_halves", "gradient")
