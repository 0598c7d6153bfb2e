"""Networks for large images: a U-Net of few channels, and a decoder of residual blocks."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Level(nn.Module):
    """Two 3 x 3 convolutions, each with batch norm and ReLU."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n, width, 3, padding=1, bias=False) for n in (inputs, width))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return x


class UNet(nn.Module):
    """Levels down by max pooling and up by a 1 x 1 convolution and enlargement, joined with the skip."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32, 64, 128), inputs: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList(Level(a, b) for a, b in pairwise((inputs, *widths)))
        self.smaller = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(Level(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for k, level in enumerate(self.down):
            x = level(F.max_pool2d(x, 2) if k else x)
            skips.append(x)
        for k in reversed(range(len(self.up))):
            enlarged = F.interpolate(self.smaller[k](x), scale_factor=2, mode="nearest")
            x = self.up[k](torch.cat([skips[k], enlarged], 1))
        return self.head(x)


class Block(nn.Module):
    """Group norm, SiLU and a 3 x 3 convolution, twice, beside a short cut."""

    def __init__(self, inputs: int, width: int, groups: int = 8) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(groups, n) for n in (inputs, width))
        self.convs = nn.ModuleList(nn.Conv2d(n, width, 3, padding=1) for n in (inputs, width))
        self.short = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.silu(norm(y)))
        return self.short(x) + y


class Decoder(nn.Module):
    """Two blocks at each resolution, each twice the one before."""

    def __init__(self, widths: tuple[int, ...] = (128, 128, 64, 32), inputs: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 3, padding=1)]
        for k, (a, b) in enumerate(pairwise((widths[0], *widths))):
            layers += [nn.Upsample(scale_factor=2)] * (k > 0) + [Block(a, b), Block(b, b)]
        self.layers = nn.Sequential(
            *layers, nn.GroupNorm(8, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
