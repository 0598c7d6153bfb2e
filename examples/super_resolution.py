"""Super-resolution of whole pictures: residual blocks and a pixel shuffle, trained and used without patches.

    python examples/super_resolution.py

The output has twice the pixels each way and is where the memory goes. Trained on whole pictures, tile by tile, the
weights are those of plain PyTorch. Then the same network makes a picture in two ways: whole, and from patches that
are made one by one, as is usual where memory is short. Patches end in padding that the picture does not have, so they
differ along every seam; the tiles do not.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullframe

TILED = {"budget": "1 GB", "tile": 24}  # tile= so that this small picture is cut at all; leave it out for large ones


class Block(nn.Module):
    """Two convolutions beside a short cut."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def network() -> nn.Module:
    """From (batch, 1, rows, columns) to twice the rows and columns."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), Block(8), Block(8), nn.Conv2d(8, 4, 3, padding=1), nn.PixelShuffle(2)
    )


def pictures() -> tuple[Tensor, Tensor]:
    """Ripples and edges, (1, 1, 128, 128) float64, and the same seen by half as many pixels each way."""
    along = torch.linspace(0, 12, 128, dtype=torch.float64)
    fine = torch.sin(along[:, None] * along[None]) + (along[:, None] > along[None]).double()
    return F.avg_pool2d(fine[None, None], 2), fine[None, None]


def by_patches(net: nn.Module, coarse: Tensor, size: int) -> Tensor:
    """Each patch by itself, put together."""
    rows = [torch.cat([net(part) for part in band.split(size, 3)], 3) for band in coarse.split(size, 2)]
    return torch.cat(rows, 2)


def main() -> None:
    torch.manual_seed(0)
    net, (coarse, fine) = network().double(), pictures()
    plain = copy.deepcopy(net)
    step = fullframe.tile(net, loss=F.l1_loss, **TILED)
    losses = []
    for model, run in ((plain, lambda x, y: F.l1_loss(plain(x), y)), (net, step)):
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(4):
            optimizer.zero_grad()
            loss = run(coarse, fine)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert losses[-1] < losses[0]

    with torch.no_grad():
        whole, tiled, patched = plain(coarse), fullframe.tile(net, **TILED)(coarse), by_patches(net, coarse, 16)
    torch.testing.assert_close(tiled, whole, rtol=1e-7, atol=1e-9)
    seam = (patched - whole).abs()
    largest, inside = float(seam.max()), float(seam[..., 12:20, 12:20].max())
    assert largest > 1e-2 and inside < 1e-9
    print(f"tiles: no seam; patches of 16: up to {largest:.2f} away along their seams, in a picture from -1 to 2")


if __name__ == "__main__":
    main()
