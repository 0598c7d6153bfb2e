"""Hold the decisions of a network: the side of every leaky ReLU, the pixel of every maximum.

A rounding decides them where it is close, and then a pixel counts a hundred times as much or not at all. With the
decisions of a float64 run held, what is left of an error is rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def replaced(**functions: Callable[..., Tensor]) -> Iterator[None]:
    """These functions of torch.nn.functional are others meanwhile."""
    usual = {name: getattr(F, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(F, name, function)
        yield
    finally:
        for name, function in usual.items():
            setattr(F, name, function)


@contextmanager
def recorded(masks: list[Tensor]) -> Iterator[None]:
    """Meanwhile every leaky ReLU and 2 x 2 maximum adds its decisions (bool, of its input's shape) to `masks`."""
    relu, pool = F.leaky_relu, F.max_pool2d

    def leaky_relu(x: Tensor, slope: float) -> Tensor:
        masks.append(x.detach() > 0)
        return relu(x, slope)

    def max_pool2d(x: Tensor, window: int) -> Tensor:
        found, places = pool(x, window, return_indices=True)  # pyright: ignore[reportGeneralTypeIssues]
        mask = torch.zeros_like(x, dtype=torch.bool).flatten(2)
        masks.append(mask.scatter_(2, places.flatten(2), True).view(x.shape))
        return found

    with replaced(leaky_relu=leaky_relu, max_pool2d=max_pool2d):
        yield


class Held(nn.Module):
    """The network, with decisions given: called with (image, *masks), the masks in the order of `recorded`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, given: Sequence[Tensor]) -> Any:
        image, *masks = given
        left = iter(masks)

        def leaky_relu(x: Tensor, slope: float) -> Tensor:
            return torch.where(next(left), x, x * slope)

        def max_pool2d(x: Tensor, window: int) -> Tensor:
            chosen = torch.where(next(left), x, 0.0)
            return F.avg_pool2d(chosen, window) * window**2  # of one number and zeros, and powers of two: exact

        with replaced(leaky_relu=leaky_relu, max_pool2d=max_pool2d):
            return self.net(image)
