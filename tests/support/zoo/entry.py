"""What an entry of the zoo is, and how its network, image and target are made."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Sizes = tuple[int, ...]
TILES = (8, 13, 24)


@dataclass(frozen=True)
class Entry:
    """A published network, small enough to be compared in float64.

    ``make`` takes the library (see `library`) and returns the network; ``shape`` is its image batch, of sizes that do
    not divide where the network allows; ``tiles`` are pixels of the image; ``loss`` names one of `zoo.losses`.
    ``usual`` is the shape it is used with and ``full`` makes it in its published width and depth, for planning only.
    ``quick`` entries belong to the ordinary tests. ``modes``: those in which plain PyTorch can differentiate it.
    ``refused``: words of the error that refuses it, where one does.
    """

    name: str
    family: str
    make: Callable[[Any], nn.Module]
    shape: Sizes
    tiles: Sizes = TILES
    loss: str = "mse"
    usual: Sizes = ()
    full: Callable[[Any], nn.Module] | None = None
    quick: bool = False
    modes: tuple[str, ...] = ("training", "evaluation")
    refused: str = ""

    @property
    def usual_shape(self) -> Sizes:
        """The shape it is planned with: two images of 512 x 512 or of 96 x 96 x 96, unless said otherwise.

        Two, because batch norm cannot train on a single value, as a global pool makes of one image.
        """
        if self.usual:
            return self.usual
        channels = self.shape[1]
        return {1: (4, channels, 16384), 2: (2, channels, 512, 512), 3: (2, channels, 96, 96, 96)}[
            len(self.shape) - 2
        ]


class Part(nn.Module):
    """A network, or one method of it, whose output is picked by a function."""

    def __init__(self, net: nn.Module, pick: Any):
        super().__init__()
        self.net, self.pick = net, pick

    def forward(self, x: torch.Tensor) -> Any:
        return self.pick(self.net, x)


def declare_torchvision() -> None:
    """Let torchvision and what stands on it be imported beside a torch that its compiled part was not made for.

    Importing registers fake versions of two ops which only the compiled part declares; no network here uses
    them, so declaring their schema is enough.
    """
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _VISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_VISION = torch.library.Library("torchvision", "FRAGMENT")


def library(family: str) -> Any:
    """The module that the entries of a family are made from."""
    import importlib

    declare_torchvision()
    names = {"monai": "monai.networks.nets", "torchvision": "torchvision.models",
             "dynamic_network_architectures": "dynamic_network_architectures.architectures",
             "spandrel": "spandrel.architectures"}  # fmt: skip
    return importlib.import_module(names.get(family, family))


def build(entry: Entry, seed: int = 0, full: bool = False) -> nn.Module:
    """The network in float32 and training mode, every parameter and statistic moved off its initial value.

    Networks start with zeros and ones (biases, gains, layer scales of 1e-6, running statistics) behind
    which a wrong gradient would not be seen.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        net = (entry.full if full and entry.full else entry.make)(library(entry.family))
    if not full:
        _stir(net, seed)
    return net.float().train()


def _stir(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(3 + seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() <= 1 or not p.any() or p.numel() == max(p.shape):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for module in net.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if mean is not None and var is not None:
                mean.copy_(0.1 * torch.randn(mean.shape, generator=generator))
                var.copy_(0.5 + torch.rand(var.shape, generator=generator))


def image_of(shape: Sizes, seed: int = 0) -> torch.Tensor:
    """A standard normal image batch in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1 + seed))
