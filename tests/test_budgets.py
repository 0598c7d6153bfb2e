"""Measured both ways: a step grows the process by no more than its smallest budget, nor is much more counted."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from budgeting import Asked, Grown, measured, run
from disks import UNet, folder_on_disk
from torch import nn

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peaks")


def line():
    """No norm: all is in the windows of convolutions along one axis."""
    widths = [(1, 12), *[(12, 12)] * 3, (12, 1)]
    net = nn.Sequential(*[m for a, b in widths for m in (nn.Conv1d(a, b, 9, padding=4), nn.ReLU())])
    return Asked(net, torch.randn(1, 1, 150_000), torch.randn(1, 1, 150_000), F.mse_loss, 2)


def columns():
    """In float64 the library makes convolutions by matrix products, with many columns for each pixel."""
    net = nn.Sequential(nn.Conv2d(2, 4, 5, padding=2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 5, padding=2), nn.ReLU())
    image = torch.randn(1, 2, 260, 260, dtype=torch.float64)
    return Asked(net.double(), image, torch.zeros(1, 4, 260, 260, dtype=torch.float64), F.mse_loss, 1)


def disk():
    """Nearly all maps are on disk: the windows of tiles, and the buffers by which they come from there, are left."""
    net = UNet(8)
    return Asked(net, torch.randn(1, 1, 560, 640), torch.zeros(1, 560, 640).long(), F.cross_entropy, 2, disk=10**9)


@pytest.mark.parametrize("make", [line, columns, disk])
def test_the_smallest_budget_is_kept_and_needed(make, tmp_path):
    if make is disk:
        folder_on_disk()
    grown = measured(make(), tmp_path)
    assert grown.projected <= grown.budget
    assert grown.held, grown


@pytest.mark.slow
@pytest.mark.parametrize("seed", [210, *range(5_000, 5_030)])  # 210: long rows, which the library prepares for
def test_random_networks_keep_their_smallest_budget(seed, tmp_path):
    path = tmp_path / "network.pt"
    try:
        done = run("draw", path, str(seed))
    except RuntimeError as error:
        if "CaptureError" in str(error):
            pytest.skip("refused by name")
        raise
    if done == "unusable":
        pytest.skip("plain PyTorch cannot run it")
    grown = Grown(**eval(run("take", path)))
    assert grown.held, grown
