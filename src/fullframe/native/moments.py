"""Count, mean and sum of squared deviations of two sets of numbers, as those of both together."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from fullframe.device import CXX, device_of
from fullframe.native.loader import Words, own, run


def combine_moments(total: torch.Tensor, partial: torch.Tensor) -> None:
    """Add the moments of more numbers to others, in place.

    The mean is taken about the first mean, so that equal means stay as they are to the last bit, and the squares
    about the new one, without cancellation (Chan, Golub and LeVeque, 1979). An infinite mean stays infinite.

    Args:
        total, partial: float64, (3, ...): count, mean, sum of squared deviations from that mean; all 0 of no numbers.
    """
    plain = total.is_contiguous() and partial.is_contiguous()
    function = own("moments") if plain and device_of(total.device).toolchain == CXX else None
    if function is not None:
        run(function, _words(total[0].numel()), (total, partial))
        return
    count, mean, square = total
    more, other, spread = partial
    n = count + more
    weight = n.clamp(min=n.new_ones(()))
    about = torch.where(torch.eq(mean - mean, mean.new_zeros(())), mean, 0)  # of finite ones
    middle = about + (count / weight * (mean - about) + more / weight * (other - about))
    square.add_(spread).add_(count * (mean - middle).square() + more * (other - middle).square())
    mean.copy_(middle)
    count.copy_(n)


@lru_cache(maxsize=1024)
def _words(count: int) -> Words:
    return (ctypes.c_int64 * 1)(count)
