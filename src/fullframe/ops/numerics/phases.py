"""Transposed convolutions as convolutions of stride 1.

An output at place o reads input i through tap t where o + padding = i * stride + t * dilation. So outputs whose
place, plus padding, leaves the same remainder by the stride read through the same taps, and inputs that lie in a row:
they are a convolution of their own. Remainders of as many taps that begin as far back are channels of one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from math import gcd, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fullframe.native.convolution import suits_pixels

Convolve = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, list[int], int], torch.Tensor]
"""convolve(x, weight, bias, dilation, groups), of stride 1 and without padding."""


class Axis(NamedTuple):
    """A spatial axis of a transposed convolution; ``extent`` of its input."""

    extent: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def made(self) -> int:
        """Extent of the output."""
        return (self.extent - 1) * self.stride - 2 * self.padding + self.dilation * (self.kernel - 1) + 1

    @property
    def quotients(self) -> tuple[int, int]:
        """From the first to behind the last of the outputs' places, plus padding, by the stride."""
        return self.padding // self.stride, (self.padding + self.made - 1) // self.stride + 1


class Class(NamedTuple):
    """``remainders`` whose outputs read ``taps`` inputs that lie ``step`` apart, the last of them ``shift`` before
    the quotient; and the tap that reads that one, for each remainder."""

    taps: int
    shift: int
    step: int
    remainders: tuple[tuple[int, int], ...]


@cache
def classes(kernel: int, stride: int, dilation: int) -> tuple[Class, ...]:
    """The classes of the remainders that a tap reaches."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    common = gcd(stride, dilation)
    for remainder in range(0, stride, common):
        taps = [t for t in range(kernel) if t * dilation % stride == remainder]
        if taps:
            found.setdefault((len(taps), taps[0] * dilation // stride), []).append((remainder, taps[0]))
    return tuple(Class(*key, dilation // common, tuple(some)) for key, some in found.items())


def by_kernel(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether our kernel makes the outputs: where some read more than one tap, or it makes products of pixels too."""
    axes = zip(kernel, stride, dilation, strict=True)
    return suits_pixels() or any(c.taps > 1 for axis in axes for c in classes(*axis))


def taps_outermost(weight: torch.Tensor, ours: bool) -> torch.Tensor:
    """The weight (in, out / groups, ...) with taps outermost in memory: what is cut out of it then lies in long runs.
    Behind them come input and output channels, as our kernel wants them, else output and input channels, as the
    library wants products of pixels. The weight itself where it lies so."""
    axes = tuple(range(2, weight.dim()))
    first = tuple(range(len(axes)))
    made = weight if ours else weight.transpose(0, 1)
    made = made.movedim(axes, first).contiguous().movedim(first, axes)
    return made if ours else made.transpose(0, 1)


def transposed(
    convolve: Convolve, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axes: Sequence[Axis],
    groups: int,
) -> torch.Tensor:  # fmt: skip
    """A transposed convolution of a weight (in, out / groups, ...); outputs have their channels innermost."""
    sizes = (x.shape[0], *(a.made for a in axes), groups * weight.shape[1])
    made = x.new_empty(sizes).movedim(-1, 1)
    parts = list(product(*(classes(a.kernel, a.stride, a.dilation) for a in axes)))
    if sum(prod(len(c.remainders) for c in part) for part in parts) < prod(a.stride for a in axes):
        made.zero_()  # outputs that nothing reaches
        if bias is not None:
            made += bias.view(-1, *[1] * len(axes))
    rank = len(axes)
    geometry = zip(*((a.kernel, a.stride, a.dilation) for a in axes), strict=True)
    weight = taps_outermost(weight, by_kernel(*geometry)).unflatten(0, (groups, -1))
    weight = weight.movedim(tuple(range(3, 3 + rank)), tuple(range(rank)))
    for part in parts:
        found = _outputs(convolve, x, weight, bias, axes, part)
        for values, remainders in zip(found, product(*(c.remainders for c in part)), strict=True):
            _put(made, values, axes, [r for r, _ in remainders])
    return made


def _outputs(
    convolve: Convolve, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axes: Sequence[Axis],
    part: Sequence[Class],
) -> Sequence[torch.Tensor]:  # fmt: skip
    """The outputs of a class on each axis: (batch, groups, out / groups, quotients) for each of their remainders. The
    weight is (taps, groups, in / groups, out / groups)."""
    rank, pads = len(axes), list[int]()
    groups = weight.shape[rank]
    for axis, c in zip(reversed(axes), reversed(part), strict=True):
        low, high = axis.quotients
        pads += [(c.taps - 1) * c.step + c.shift - low, high - c.shift - axis.extent]
    remainders = list(product(*(c.remainders for c in part)))
    taps = [_taps(weight, axes, part, [first for _, first in some]) for some in remainders]
    count = len(taps)
    if bias is not None and count > 1:
        bias = bias.view(groups, 1, -1).repeat(1, count, 1).flatten()
    x = F.pad(x, pads) if any(pads) else x
    if count == 1:
        (stacked,) = taps
    elif not suits_pixels() and all(c.taps == 1 for c in part):  # input channels innermost, as the library wants them
        stacked = torch.stack([some.transpose(-1, -2) for some in taps], rank + 1)
        stacked = stacked.flatten(rank + 1, rank + 2).transpose(-1, -2)
    else:
        stacked = torch.stack(taps, rank + 2).flatten(rank + 2)
    stacked = stacked.transpose(rank + 1, rank + 2).flatten(rank, rank + 1).movedim(rank, 0).movedim(-1, 1)
    found = convolve(x, stacked, bias, [c.step for c in part], groups)
    return found.unflatten(1, (groups, count, -1)).unbind(2)


def _taps(weight: torch.Tensor, axes: Sequence[Axis], part: Sequence[Class], first: Sequence[int]) -> torch.Tensor:
    """The taps of outputs whose first ones are given, the last tap first, where a window has several."""
    for k, (axis, c, tap) in enumerate(zip(axes, part, first, strict=True)):
        spacing = axis.stride // gcd(axis.stride, axis.dilation)
        weight = weight[(slice(None),) * k + (slice(tap, tap + (c.taps - 1) * spacing + 1, spacing),)]
    turned = [k for k, c in enumerate(part) if c.taps > 1]
    return weight.flip(turned) if turned else weight


def _put(made: torch.Tensor, values: torch.Tensor, axes: Sequence[Axis], remainders: Sequence[int]) -> None:
    """Put the outputs of some remainders into their places."""
    target = made.unflatten(1, (values.shape[1], -1))
    for k, (axis, remainder) in enumerate(zip(axes, remainders, strict=True), 3):
        low, _ = axis.quotients
        skipped = max(0, -((low * axis.stride + remainder - axis.padding) // axis.stride))
        first = (low + skipped) * axis.stride + remainder - axis.padding
        target = target[(slice(None),) * k + (slice(first, None, axis.stride),)]
        values = values.narrow(k, skipped, target.shape[k])
    target.copy_(values)
