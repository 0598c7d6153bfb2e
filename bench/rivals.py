"""The networks and the plain variants that bench/speed.py compares."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from uresnet import event

import fullframe
from cosmictagger.memory import PeakMemory
from cosmictagger.model import VARIANTS, ResidualBlock, UResNet
from cosmictagger.objective import PlaneLoss

Case = tuple[nn.Module, Callable[..., Tensor], Tensor, Tensor]
NETWORKS = ("uresnet", "a21", "resnet50", "unet")


class Bottleneck(nn.Module):
    """Block of ResNet-50: 1x1, 3x3, 1x1, each with batch norm, and a shortcut (He et al., 2016)."""

    def __init__(self, cin: int, width: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(cin, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        same = cin == 4 * width and stride == 1
        short = nn.Conv2d(cin, 4 * width, 1, stride, bias=False)
        self.short = nn.Identity() if same else nn.Sequential(short, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


def resnet50(classes: int = 1000) -> nn.Sequential:
    """ResNet-50, a classifier of images (batch, 3, rows, columns)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    cin = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for k in range(count):
            layers.append(Bottleneck(cin, width, stride if k == 0 else 1))
            cin = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, classes))


def case(name: str, halvings: int, size: int) -> Case:
    """Network, loss, image and target, from a fixed seed."""
    torch.manual_seed(0)
    if name in VARIANTS:
        image, label, _ = event(halvings)
        return UResNet(VARIANTS[name]), PlaneLoss("light"), image, label
    image = torch.randn(1, 3, size, size)
    if name == "resnet50":
        return resnet50(), F.cross_entropy, image, torch.tensor([7])
    from monai.networks.nets.unet import UNet

    net = UNet(2, 3, 2, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2, norm="batch")
    return net, F.cross_entropy, image, torch.randint(0, 2, (1, size, size))


def checkpointed(net: nn.Module) -> nn.Module:
    """Every residual block computed again in backward."""
    kinds: tuple[type[nn.Module], ...] = (ResidualBlock, Bottleneck)
    found = [m for m in net.modules() if isinstance(m, kinds) or type(m).__name__ in ("ResidualUnit", "Series")]
    inner = {id(c) for m in found for c in m.modules() if c is not m}
    for module in found:
        if id(module) not in inner:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return net


def serve(name: str, variant: str, halvings: int, size: int, budget: str, half: bool) -> None:
    """Take a step for every line of standard input; answer with seconds, bytes added (first step) and loss."""
    net, criterion, image, label = case(name, halvings, size)
    if variant == "tiled-one-core":
        torch.set_num_threads(1)
    if variant.startswith("tiled"):
        step = fullframe.tile(net, loss=criterion, budget=budget, workers=torch.get_num_threads())
    else:
        net, image = net.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
        model = checkpointed(net) if variant == "checkpoint" else net
        model = torch.compile(model) if variant == "compile" else model

        def step(x: Tensor, y: Tensor) -> Tensor:
            return criterion(model(x), y)

    print("ready", flush=True)
    for line in sys.stdin:
        net.zero_grad(set_to_none=True)
        with PeakMemory(image.device, wanted=line.strip() == "first") as peak:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = step(image, label)
            loss.backward()
            seconds = time.perf_counter() - start
        print(seconds, peak.added or 0, loss.item(), flush=True)
