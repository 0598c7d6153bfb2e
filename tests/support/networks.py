"""Small networks and losses that several tests use; and the comparison they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fullframe


def plain_net(width: int = 4, classes: int = 3) -> nn.Sequential:
    """Convolution, batch norm, pooling, up-sampling: 2-D, one input channel, shape kept if even."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(width, classes, 1),
    ).double()


def batch(size: int = 18, n: int = 2, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """An image batch (n, 1, size, size) in float64 and class labels (n, size, size)."""
    generator = torch.Generator().manual_seed(size)
    image = torch.randn(n, 1, size, size, generator=generator, dtype=torch.float64)
    return image, torch.randint(0, classes, (n, size, size), generator=generator)


class Mean(nn.Module):
    """Mean squared output; a loss of (output, target) that ignores the target."""

    def forward(self, output: torch.Tensor, target: Any) -> torch.Tensor:
        return output.square().mean()


def agree(
    net: nn.Module, input: Any, target: Any = None, loss: Callable[..., Any] | None = None, **options: Any
) -> None:
    """Assert that the tiled net equals the plain one in float64 (tolerance 1e-10 of scale)."""
    found = fullframe.check(net, input, target, loss, **{"tolerance": 1e-10, **options})
    assert found.passed, str(found)


def grads(net: nn.Module) -> list[torch.Tensor | None]:
    """Copies of all gradients."""
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def close(a: Any, b: Any, tolerance: float = 1e-10) -> bool:
    """Whether two (lists of) tensors agree within a tolerance of the largest number in them."""
    if isinstance(a, torch.Tensor):
        a, b = [a], [b]
    assert len(a) == len(b)
    if any((x is None) != (y is None) for x, y in zip(a, b, strict=True)):
        return False
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None]
    scale = max((float(x.detach().abs().max()) for x, _ in pairs if x.numel()), default=0.0)
    return all(
        x.shape == y.shape and float((x - y).detach().abs().max()) <= tolerance * scale for x, y in pairs if x.numel()
    )


cross_entropy = F.cross_entropy
