"""A plain training loop with accumulated gradients, clipping and a schedule; the weights are those of plain PyTorch.

    python examples/accumulate_and_clip.py

Nothing in the loop knows of tiles. Two batches are added up to one step of the optimiser, and gradients are clipped
by their common norm. The same loop runs with the plain network, in float64, and both end with the same weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fullframe

TILED = {
    "budget": "1 GB",
    "tile": 24,
}  # tile= so that these small pictures are cut at all; leave it out for large ones


def network() -> nn.Module:
    """A small segmentation network, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1),
    ).double()  # fmt: skip


def train(net: nn.Module, tiled: bool) -> nn.Module:
    """Two steps of two batches each; the network is changed and returned."""
    model = fullframe.tile(net, **TILED) if tiled else net
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for _ in range(2):
            image = torch.randn(2, 1, 64, 64, generator=generator, dtype=torch.float64)
            loss = F.cross_entropy(model(image), (image[:, 0] > 0.5).long())
            (loss / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net


def main() -> None:
    plain, tiled = train(network(), tiled=False), train(network(), tiled=True)
    for (name, a), b in zip(plain.state_dict().items(), tiled.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    print("two steps of two batches, clipped: the same weights as plain PyTorch's")


if __name__ == "__main__":
    main()
