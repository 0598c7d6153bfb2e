"""A folder on a disk for tests, and networks whose maps go there."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from fullframe.storage.unnamed_file import disk_folder

HERE = Path(__file__).parent


def folder_on_disk() -> Path:
    """The temporary folder, or this one where that is in memory: what is written there has no name."""
    for folder in (tempfile.gettempdir(), HERE):
        try:
            return disk_folder(folder)
        except (OSError, ValueError):
            continue
    pytest.skip("no folder on a disk")


class UNet(nn.Module):
    """Two levels, with batch norms, a max pool, a transposed convolution and a skip."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())

        self.top, self.bottom, self.joined = block(1, width), block(width, 2 * width), block(2 * width, width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.top(x)
        low = self.bottom(nn.functional.max_pool2d(kept, 2))
        return self.head(self.joined(torch.cat([kept, self.up(low)], 1)))
