"""Grad-CAM by hooks: which parts of a whole picture speak for a class.

    python examples/grad_cam.py

Hooks on a tiled module are hooks on its outputs, as anywhere in PyTorch. So what lies before the layer of interest is
tiled, which is nearly all of the memory, and put back in its place; hooks on it see whole maps and their gradients. A
hook *inside* of a tiled module may keep maps of the forward too, but a gradient that it keeps is refused by name,
since the backward is made tile by tile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullframe

TILED = {"budget": "1 GB", "tile": 24}  # tile= so that this small picture is cut at all; leave it out for large ones


class Classifier(nn.Module):
    """Maps, their mean, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features: nn.Module = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).mean((2, 3)))


def grad_cam(net: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
    """How much each place of a layer's maps speaks for the class, not negative: (batch, rows, columns)."""
    kept: dict[str, Any] = {}
    hooks = (
        layer.register_forward_hook(lambda module, inputs, output: kept.update(maps=output)),
        layer.register_full_backward_hook(lambda module, inputs, outputs: kept.update(gradient=outputs[0])),
    )
    net(image.requires_grad_())[:, target].sum().backward()
    for hook in hooks:
        hook.remove()
    weights = kept["gradient"].mean((2, 3), keepdim=True)
    return F.relu((weights * kept["maps"]).sum(1)).detach()


def main() -> None:
    torch.manual_seed(0)
    net, image = Classifier().double().eval(), torch.randn(1, 1, 64, 64, dtype=torch.float64)
    plain = grad_cam(net, net.features, image, target=1)
    net.features = fullframe.tile(net.features, **TILED)
    tiled = grad_cam(net, net.features, image, target=1)
    torch.testing.assert_close(tiled, plain, rtol=1e-9, atol=1e-12)
    print(f"a map of {tuple(tiled.shape[1:])} places: the same as plain PyTorch's")


if __name__ == "__main__":
    main()
