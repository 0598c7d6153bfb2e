"""What published networks showed: small networks that once gave a wrong number or were refused; each stays right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import agree
from torch import nn

import fullframe


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


READS = {
    "tolist": lambda x: x.sum(torch.arange(2, x.dim()).tolist()),
    "item": lambda x: x / torch.tensor(x.shape).prod().item(),
    "float": lambda x: x * float(torch.linspace(0, 1, 5)[2]),
    "iter": lambda x: torch.stack([x * int(v) for v in torch.arange(1, 3)]),
    "bool": lambda x: x if (torch.tensor([1.0, 2.0]) > 0).all() else -x,
    "view": lambda x: x * torch.zeros(2, 3).view(-1).tolist()[4] + x,
}


class Reads(nn.Module):
    """A convolution, and a function that reads numbers of a small tensor while it runs."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.read = nn.Conv2d(1, 2, 3), read

    def forward(self, x):
        return self.read(self.conv(x))


@pytest.mark.parametrize("name", READS)
def test_numbers_that_follow_from_the_code_can_be_read(name):
    # A Dice loss that listed its axes with arange was refused as depending on data.
    agree(Reads(READS[name]), torch.randn(1, 1, 9, 11), tile=4)


def changed(x):
    """Numbers of a tensor changed through a view, by another that has no numbers."""
    steps = torch.zeros(3)
    steps.view(-1)[1:].add_(x.detach().mean())
    return x * steps[2].item()


def drawn(x):
    return x * torch.zeros(3).uniform_()[0].item()


def indexed(x):
    steps = torch.arange(3.0)
    steps[1] = x.detach().sum()
    return x * steps.sum().item()


@pytest.mark.parametrize("read", [changed, drawn, indexed, lambda x: x * x.detach().max().item()])
def test_numbers_that_depend_on_data_cannot_be_read(read):
    with pytest.raises(fullframe.CaptureError, match="depends on the data"):
        fullframe.tile(Reads(read), tile=4)(torch.randn(1, 1, 9, 11))


class Resized(nn.Module):
    """A convolution, and an interpolation of it that may leave axes as they are."""

    def __init__(self, conv, mode, size):
        super().__init__()
        self.conv, self.mode, self.size = conv, mode, size

    def forward(self, x):
        return F.interpolate(self.conv(x), size=self.size, mode=self.mode)


@pytest.mark.parametrize("size", [(4, 5, 6), (8, 5, 6), (4, 10, 18), (4, 7, 6), (8, 5, 11)])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_interpolation_to_a_size_that_an_axis_has_already(mode, size):
    # The gradient of a bilinear or trilinear resize to the same size was read from the wrong place.
    for rank in (1, 2, 3):
        name = ("linear", "bilinear", "trilinear")[rank - 1] if mode == "linear" else mode
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](1, 2, 3, padding=1)
        image = torch.randn(1, 1, *(4, 5, 6)[:rank]).requires_grad_()
        agree(Resized(conv, name, size[:rank]), image, tile=3)


class Inception(nn.Module):
    """Branches over a map much smaller than the image, whose gradients are added up and stored."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(8))
        self.branches = nn.ModuleList(self._branch(k) for k in (1, 3, 3))
        self.pool, self.last = nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 4, 1)

    def _branch(self, k):
        first = nn.Conv2d(8, 4, 1, bias=False)
        return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, k, padding=k // 2))

    def forward(self, x):
        x = self.stem(x)
        return torch.cat([*(b(x) for b in self.branches), self.last(self.pool(x))], 1)


@pytest.mark.parametrize("tile", [3, 8])
@pytest.mark.rest
def test_a_tile_without_a_pixel_of_a_map_that_others_need_of_it(tile):
    # Such a tile makes a halo of the map and has nothing of it to store; storing nothing failed.
    agree(Inception(), torch.randn(2, 1, 17, 19), tile=tile)
