"""Everyday networks on small images, float32, beside plain PyTorch in the better of its two layouts.

    python bench/small.py [--only NAME ...] [--rounds 15]

Both kinds of step are taken in turns in one process, after some that are not timed (what is recorded and compiled is
then there). A ratio is the median of the rounds' own: ours over the faster layout's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pairs import UNet
from record import setting, write
from rivals import resnet50
from torch import Tensor, nn

import fullframe

WARM = 5
Step = Callable[[], None]
Case = tuple[nn.Module, Callable[..., Tensor], Tensor, Tensor]


class Basic(nn.Module):
    """Block of ResNet-18: two 3 x 3 convolutions with batch norm, and a shortcut (He et al., 2016)."""

    def __init__(self, cin: int, width: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(cin, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        same = cin == width and stride == 1
        short = nn.Conv2d(cin, width, 1, stride, bias=False)
        self.short = nn.Identity() if same else nn.Sequential(short, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


def resnet18(classes: int = 1000) -> nn.Sequential:
    """ResNet-18, a classifier of images (batch, 3, rows, columns)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    cin = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Basic(cin, width, stride), Basic(width, width, 1)]
        cin = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, classes))


class Inverted(nn.Module):
    """Block of MobileNetV2: 1 x 1 wider, 3 x 3 by channel, 1 x 1 back (Sandler et al., 2018)."""

    def __init__(self, cin: int, cout: int, stride: int, wider: int = 6):
        super().__init__()
        width = cin * wider
        self.body = nn.Sequential(
            nn.Conv2d(cin, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(),
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU6(),
            nn.Conv2d(width, cout, 1, bias=False), nn.BatchNorm2d(cout),
        )  # fmt: skip
        self.adds = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x if self.adds else self.body(x)


def mobilenet(classes: int = 1000) -> nn.Sequential:
    """A network of inverted blocks, of MobileNetV2's widths."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    cin = 32
    for width, count, stride in ((16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2)):
        for k in range(count):
            layers.append(Inverted(cin, width, stride if k == 0 else 1))
            cin = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, classes))


class UNet3d(nn.Module):
    """Three levels of two convolutions with instance norm, in three dimensions."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32)):
        super().__init__()
        pairs = list(zip((1, *widths), widths, strict=False))
        self.down = nn.ModuleList(self.double(a, b) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, 2) for a, b in pairs[1:])
        self.joined = nn.ModuleList(self.double(2 * a, a) for a, _ in pairs[1:])
        self.head = nn.Conv3d(widths[0], 2, 1)

    @staticmethod
    def double(cin: int, cout: int) -> nn.Sequential:
        first = nn.Conv3d(cin, cout, 3, padding=1), nn.InstanceNorm3d(cout, affine=True), nn.LeakyReLU(0.01)
        return nn.Sequential(
            *first, nn.Conv3d(cout, cout, 3, padding=1), nn.InstanceNorm3d(cout, affine=True), nn.LeakyReLU(0.01)
        )

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for k, block in enumerate(self.down):
            x = block(F.max_pool3d(x, 2) if k else x)
            skips.append(x)
        for up, joined, skip in reversed(list(zip(self.up, self.joined, skips[:-1], strict=True))):
            x = joined(torch.cat([skip, up(x)], 1))
        return self.head(x)


def generator() -> nn.Sequential:
    """The generator of a GAN for 64 x 64 pictures (Radford et al., 2016)."""
    layers: list[nn.Module] = [nn.ConvTranspose2d(100, 256, 4, 1, 0, bias=False), nn.BatchNorm2d(256), nn.ReLU()]
    for a, b in ((256, 128), (128, 64), (64, 32)):
        layers += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(32, 3, 4, 2, 1, bias=False), nn.Tanh())


def unet(side: int, batch: int) -> Case:
    image, label = torch.randn(batch, 3, side, side), torch.randint(0, 3, (batch, side, side))
    return UNet(), F.cross_entropy, image, label


def classifier(net: nn.Module, batch: int) -> Case:
    return net, F.cross_entropy, torch.randn(batch, 3, 224, 224), torch.arange(batch)


def volume() -> Case:
    return UNet3d(), F.cross_entropy, torch.randn(1, 1, 64, 64, 64), torch.randint(0, 2, (1, 64, 64, 64))


CASES: dict[str, Callable[[], Case]] = {
    **{f"U-Net {side}, batch {n}": (lambda s=side, n=n: unet(s, n)) for side in (64, 128, 256) for n in (1, 8)},
    "ResNet-18 224, batch 1": lambda: classifier(resnet18(), 1),
    "ResNet-18 224, batch 16": lambda: classifier(resnet18(), 16),
    "ResNet-50 224, batch 1": lambda: classifier(resnet50(), 1),
    "ResNet-50 224, batch 16": lambda: classifier(resnet50(), 16),
    "3-D U-Net 64, batch 1": volume,
    "MobileNetV2 224, batch 8": lambda: classifier(mobilenet(), 8),
    "DCGAN generator 64, batch 16": lambda: (
        generator(), F.mse_loss, torch.randn(16, 100, 1, 1), torch.randn(16, 3, 64, 64)
    ),
}  # fmt: skip


def plain(made: Callable[[], Case], channels_last: bool) -> Step:
    """A step of plain PyTorch in one of its layouts."""
    torch.manual_seed(0)
    net, loss, image, target = made()
    if channels_last:
        layout = torch.channels_last_3d if image.dim() == 5 else torch.channels_last
        net, image = net.to(memory_format=layout), image.to(memory_format=layout)

    def step() -> None:
        net.zero_grad(set_to_none=True)
        loss(net(image), target).backward()

    return step


def ours(made: Callable[[], Case]) -> Step:
    """A tiled step."""
    torch.manual_seed(0)
    net, loss, image, target = made()
    tiled: Any = fullframe.tile(net, loss=loss, budget="8 GB")

    def step() -> None:
        net.zero_grad(set_to_none=True)
        tiled(image, target).backward()

    return step


def measured(made: Callable[[], Case], rounds: int) -> tuple[float, float, float, float]:
    """Seconds of a step: ours, plain PyTorch's in both layouts; and the median ratio of ours to the faster layout."""
    steps = [ours(made), plain(made, False), plain(made, True)]
    times: list[list[float]] = [[], [], []]
    for k in range(WARM + rounds):
        for step, found in zip(steps, times, strict=True):
            started = time.perf_counter()
            step()
            if k >= WARM:
                found.append(time.perf_counter() - started)
    middle = [statistics.median(found) for found in times]
    best = times[1] if middle[1] < middle[2] else times[2]
    return *middle, statistics.median(a / b for a, b in zip(times[0], best, strict=True))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    lines = ["| | tiled | plain | plain, channels_last | tiled, times the faster |", "|---|---|---|---|---|"]
    ratios = []
    for name in options.only:
        times = measured(CASES[name], options.rounds)
        ratios.append(times[3])
        lines.append(f"| {name} | {' | '.join(f'{t * 1e3:.1f} ms' for t in times[:3])} | {times[3]:.2f} |")
        print(lines[-1], flush=True)
    summary = f"Ratios: median {statistics.median(ratios):.2f}, highest {max(ratios):.2f}."
    write("small", "\n".join(["# Everyday networks on small images", "", setting(), "", *lines, "", summary]))


if __name__ == "__main__":
    main()
