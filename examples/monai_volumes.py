"""MONAI: whole volumes with their affine, through a tiled U-Net, without a sliding window.

    pip install monai
    python examples/monai_volumes.py

Transforms, loss and metric are MONAI's. A `MetaTensor` goes in and a `MetaTensor` with the same affine comes out, so
what follows (inverting transforms, writing a file with its place in the scanner) works as it does with the plain
network.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.transforms import AsDiscrete, Compose, EnsureChannelFirst, EnsureType, ScaleIntensity

import fullframe

TILED = {"budget": "2 GB", "tile": 16}  # tile= so that this small volume is cut at all; leave it out for large ones


def volume() -> tuple[MetaTensor, torch.Tensor]:
    """A ball in noise with an affine of 2 mm voxels, (1, 1, 32, 32, 32) float64, and its mask."""
    rng = np.random.default_rng(0)
    place = np.indices((32, 32, 32)) - 15.5
    mask = (place**2).sum(0) < 64
    affine = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    raw = MetaTensor(mask + 0.3 * rng.standard_normal(mask.shape), affine=affine)
    read = Compose([EnsureChannelFirst(channel_dim="no_channel"), ScaleIntensity(), EnsureType(dtype=torch.float64)])
    return read(raw)[None], torch.from_numpy(mask)[None, None].to(torch.float64)


def main() -> None:
    torch.manual_seed(0)
    net = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), num_res_units=1).double()
    plain, loss = copy.deepcopy(net), DiceCELoss(to_onehot_y=True, softmax=True)
    image, mask = volume()
    tiled = fullframe.tile(net, **TILED)

    optimizer, reference = (torch.optim.Adam(n.parameters(), lr=1e-2) for n in (net, plain))
    for _ in range(2):
        for model, updates in ((tiled, optimizer), (plain, reference)):
            updates.zero_grad()
            loss(model(image), mask).backward()
            updates.step()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)

    with torch.no_grad():
        found = tiled.eval()(image)
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.affine, image.affine)
    discrete, metric = AsDiscrete(argmax=True, to_onehot=2), DiceMetric(include_background=False)
    metric([discrete(one) for one in found], [AsDiscrete(to_onehot=2)(one) for one in mask])
    print(
        f"two steps on a whole volume as plain PyTorch makes them; Dice {metric.aggregate().item():.2f}, affine kept"
    )


if __name__ == "__main__":
    main()
