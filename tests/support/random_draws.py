"""A source of choices, and the few functions that every random layer uses."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MODES = ["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Draws:
    """Choices from a source of random numbers; the simplest choice is always the first.

    ``used`` counts the parts by name.
    """

    def __init__(self, source: random.Random):
        self.source = source
        self.used: Counter[str] = Counter()

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.source.randrange(len(options))]

    def whole(self, low: int, high: int) -> int:
        return self.source.randint(low, high)

    def chance(self, percent: int) -> bool:
        return self.source.randrange(100) >= 100 - percent

    def part(self, table: dict[str, Any]) -> Any:
        name = self.pick(list(table))
        self.used[name] += 1
        return table[name]


class Apply(nn.Module):
    """A function of the input and of modules."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module, **options: Any):
        super().__init__()
        self.function, self.parts, self.options = function, nn.ModuleList(parts), options

    def forward(self, *x: torch.Tensor) -> Any:
        return self.function(*x, *self.parts, **self.options)

    def extra_repr(self) -> str:
        return f"{self.function.__qualname__} {self.options}"


def nd(name: str, d: int) -> Any:
    """The class of torch.nn for ``d`` spatial axes."""
    return getattr(nn, f"{name}{d}d")


def fit(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Crop or pad the far side of each spatial axis."""
    pads: list[int] = []
    for have, want in zip(reversed(x.shape[2:]), reversed(size), strict=True):
        pads += [0, want - have]
    return F.pad(x, pads) if any(pads) else x


def resize(x: torch.Tensor, size: Sequence[int], mode: str = "nearest") -> torch.Tensor:
    """Interpolate to a size."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=False if mode in LINEAR.values() else None)
