"""A network of nnU-Net's on whole volumes, with deep supervision and two classes.

    pip install dynamic-network-architectures
    python examples/whole_volume.py

nnU-Net trains on patches and puts predictions together from overlapping windows, since the maps of a volume do not
fit in memory. Here the volume is one sample: instance norms see all of it, and prediction is one call, no windows.
With deep supervision the network returns a list, and the loss takes it; nothing else is needed.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

import fullframe

TILED = {"budget": "2 GB", "tile": 16}  # tile= so that this small volume is cut at all; leave it out for large ones


def deep_loss(outputs: list[Tensor], target: Tensor) -> Tensor:
    """Cross entropy at every resolution, coarser ones for half as much; labels are taken at every second voxel."""
    total = torch.zeros((), dtype=torch.float64)
    for level, output in enumerate(outputs):
        total = total + 0.5**level * F.cross_entropy(output, target[:, :: 2**level, :: 2**level, :: 2**level])
    return total


def main() -> None:
    torch.manual_seed(0)
    net = PlainConvUNet(
        input_channels=1, n_stages=3, features_per_stage=(4, 8, 8), conv_op=nn.Conv3d, kernel_sizes=3,
        strides=(1, 2, 2), n_conv_per_stage=1, num_classes=2, n_conv_per_stage_decoder=1, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=True,
    ).double()  # fmt: skip
    plain = copy.deepcopy(net)
    volume = torch.randn(1, 1, 24, 28, 32, dtype=torch.float64)
    target = (volume[:, 0] > 0.5).long()
    expected = deep_loss(plain(volume), target)
    expected.backward()
    loss = fullframe.tile(net, loss=deep_loss, **TILED)(volume, target)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for (name, a), b in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            a.grad, b.grad, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )

    net.decoder.deep_supervision = plain.decoder.deep_supervision = False
    with torch.no_grad():
        torch.testing.assert_close(fullframe.tile(net, **TILED)(volume), plain(volume), rtol=1e-7, atol=1e-9)
    print(f"a whole volume of {tuple(volume.shape[2:])} voxels: loss, gradients and prediction of plain PyTorch")


if __name__ == "__main__":
    main()
