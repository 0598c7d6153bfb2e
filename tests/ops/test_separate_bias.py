"""A convolution's bias as an op of its own, as it is on devices: the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from networks import agree
from torch import nn

from fullframe.ops.decompositions import windows as windows


class Both(nn.Module):
    """Convolutions with a bias before a norm, before a bend, transposed and strided."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 6, 3, 2, 1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        return self.last(F.leaky_relu(self.up(self.down(x)), 0.1) + x)


@pytest.mark.parametrize("tile", [7, 100])
def test_a_bias_apart_gives_the_same_numbers(monkeypatch, tile):
    monkeypatch.setattr(windows, "separate_bias", lambda device: True)
    agree(Both(), torch.randn(2, 1, 24, 20), tile=tile)
    agree(nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 2, 3)), torch.randn(2, 1, 30), tile=tile)
