"""Averaged weights (EMA and SWA) by `torch.optim.swa_utils`, and the batch norms of the average made anew.

    python examples/averaged_weights.py

The averages are of the plain network, whose parameters the tiled step shares. `update_bn` walks over the pictures
with the averaged network; tiled, it takes whole pictures within the budget too.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fullframe

TILED = {
    "budget": "1 GB",
    "tile": 24,
}  # tile= so that these small pictures are cut at all; leave it out for large ones


def train(net: nn.Module, tiled: bool) -> list[torch.Tensor]:
    """Three steps; parameters and buffers of both averages."""
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    swa = AveragedModel(net)
    step = fullframe.tile(net, loss=F.mse_loss, **TILED) if tiled else lambda x, y: F.mse_loss(net(x), y)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(2, 1, 64, 64, generator=generator, dtype=torch.float64) for _ in range(3)]
    for image in images:
        optimizer.zero_grad()
        step(image, image.clamp(min=0)).backward()
        optimizer.step()
        ema.update_parameters(net)
        swa.update_parameters(net)
    for average in (ema, swa):
        update_bn(images, fullframe.tile(average, **TILED) if tiled else average)
    return [*ema.state_dict().values(), *swa.state_dict().values()]


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1),
    ).double()  # fmt: skip
    found = train(copy.deepcopy(net), tiled=True)
    for a, b in zip(train(copy.deepcopy(net), tiled=False), found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)
    print(f"two averages, {len(found)} parameters and buffers: the same as plain PyTorch's")


if __name__ == "__main__":
    main()
