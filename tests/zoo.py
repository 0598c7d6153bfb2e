"""Published networks, small: how to make each, and an image size that it takes and that does not divide."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Entry:
    """A network of the zoo: ``shape`` of its image batch, ``tiles`` in pixels, and whether it is slow."""

    name: str
    make: Callable[[Any], nn.Module]
    shape: tuple[int, ...]
    tiles: tuple[int, ...] = (8, 13, 24)
    slow: bool = False


def _dynunet(n: Any, **options: Any) -> nn.Module:
    return n.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 6, 8], norm_name="batch", **options)


def _plain_conv(dim: int, kind: str, norm: Any, **options: Any) -> nn.Module:
    from dynamic_network_architectures.architectures import unet

    conv = nn.Conv2d if dim == 2 else nn.Conv3d
    blocks = "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage"
    return getattr(unet, kind)(
        input_channels=1, n_stages=3, features_per_stage=[4, 6, 8], conv_op=conv, kernel_sizes=3, strides=[1, 2, 2],
        num_classes=3, n_conv_per_stage_decoder=1, conv_bias=True, norm_op=norm, norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, **{blocks: 2}, **options,
    )  # fmt: skip


def _resnet(kind: str, **options: Any) -> nn.Module:
    from dynamic_network_architectures.architectures import resnet

    return getattr(resnet, kind)(n_classes=3, **options)


def _vgg() -> nn.Module:
    from dynamic_network_architectures.architectures import vgg

    return vgg.VGG16_cifar(n_classes=3, n_input_channel=3)


class First(nn.Module):
    """The first output of a network that also returns what only its own training needs."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)[0]


SMALL = {"channels": (4, 6, 8), "strides": (2, 2)}
BASIC = (4, 4, 6, 8, 8, 4)
MED = {"blocks_down": (1, 1, 1, 1), "blocks_bottleneck": 1, "blocks_up": (1, 1, 1, 1), "init_filters": 4}
ENTRIES = [
    Entry("UNet", lambda n: n.UNet(2, 1, 3, **SMALL, norm="batch"), (2, 1, 28, 36)),
    Entry("UNet residual", lambda n: n.UNet(2, 1, 3, **SMALL, num_res_units=2), (1, 1, 36, 28)),
    Entry("UNet 3-D", lambda n: n.UNet(3, 1, 2, **SMALL, num_res_units=1), (1, 1, 12, 16, 20), (5, 7, 9)),
    Entry("UNet 1-D", lambda n: n.UNet(1, 1, 2, **SMALL, norm="batch"), (2, 1, 76)),
    Entry("BasicUNet", lambda n: n.BasicUNet(2, 1, 2, BASIC, norm="batch"), (1, 1, 37, 45)),
    Entry("BasicUNet 3-D", lambda n: n.BasicUNet(3, 1, 2, BASIC, upsample="nontrainable"), (1, 1, 17, 18, 19), (7, 9, 11),
          slow=True),
    Entry("BasicUNetPlusPlus", lambda n: n.BasicUNetPlusPlus(2, 1, 2, BASIC), (1, 1, 48, 32), (11, 24)),
    Entry("AttentionUnet", lambda n: n.AttentionUnet(2, 1, 2, **SMALL), (1, 1, 36, 44)),
    Entry("SegResNet", lambda n: n.SegResNet(2, 8, 1, 2, norm="batch"), (1, 1, 40, 24)),
    Entry("SegResNet 3-D", lambda n: n.SegResNet(3, 8, 1, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1)), (1, 1, 12, 16, 20),
          (5, 7, 9), slow=True),
    Entry("SegResNetDS", lambda n: n.SegResNetDS(2, 4, 1, 2, blocks_down=(1, 1, 1)), (1, 1, 36, 28)),
    Entry("VNet", lambda n: n.VNet(2, 1, 2, dropout_prob_down=None, dropout_prob_up=(None, None)), (1, 1, 48, 32), slow=True),
    Entry("DynUNet", lambda n: _dynunet(n, res_block=True), (2, 1, 28, 36)),
    Entry("DynUNet deep supervision", lambda n: _dynunet(n, deep_supervision=True, deep_supr_num=1), (1, 1, 36, 28)),
    Entry("DenseNet", lambda n: n.DenseNet(2, 1, 3, 8, 4, (2, 3, 2)), (2, 1, 45, 51)),
    Entry("ResNet basic", lambda n: n.ResNet("basic", [1, 1, 1, 1], [4, 6, 8, 8], 2, 1, num_classes=3), (2, 1, 45, 51)),
    Entry("ResNet bottleneck 3-D", lambda n: n.ResNet("bottleneck", [1, 1, 1, 1], [4, 4, 6, 6], 3, 1, num_classes=3),
          (2, 1, 17, 19, 21), (7, 9, 11), slow=True),
    Entry("SE-ResNeXt50", lambda n: n.SEResNext50(spatial_dims=2, in_channels=1, num_classes=3), (2, 1, 67, 71),
          (19, 32), slow=True),
    Entry("HighResNet", lambda n: n.HighResNet(2, 1, 2), (1, 1, 29, 35), slow=True),
    Entry("EfficientNet-b0", lambda n: n.EfficientNetBN("efficientnet-b0", False, False, 2, 1, 3).eval(), (1, 1, 65, 71),
          (19, 32), slow=True),
    Entry("FlexibleUNet", lambda n: n.FlexibleUNet(1, 2, "resnet18", decoder_channels=(16, 12, 8, 8, 4)), (1, 1, 64, 96),
          (32, 50), slow=True),
    Entry("RegUNet", lambda n: n.RegUNet(2, 1, 4, 2), (1, 1, 36, 28)),
    Entry("LocalNet", lambda n: n.LocalNet(2, 1, 4, (0, 1, 2)), (1, 1, 36, 28)),
    Entry("VoxelMorphUNet", lambda n: n.VoxelMorphUNet(2, 2, 4, (4, 6, 8, 6, 4, 4), (4, 4)), (1, 2, 32, 40)),
    Entry("AutoEncoder", lambda n: n.AutoEncoder(2, 1, 1, **SMALL, inter_channels=[8], num_res_units=1), (1, 1, 36, 28)),
    Entry("Regressor", lambda n: n.Regressor((1, 36, 28), (2,), **SMALL), (2, 1, 36, 28)),
    Entry("Discriminator", lambda n: n.Discriminator((1, 37, 29), **SMALL, dropout=0.0), (2, 1, 37, 29)),
    Entry("PatchDiscriminator", lambda n: n.PatchDiscriminator(2, 4, 1), (2, 1, 45, 51)),
    Entry("MedNeXt", lambda n: n.MedNeXt(2, in_channels=1, out_channels=2, **MED), (1, 1, 48, 80)),
    Entry("Quicknat", lambda n: n.Quicknat(3, 1, 6, 3), (1, 1, 48, 32), slow=True),
    Entry("AHNet", lambda n: n.AHNet(spatial_dims=2, in_channels=3, out_channels=2, upsample_mode="bilinear",
                                     psp_block_num=0), (1, 3, 128, 96), (50,), slow=True),
    Entry("HoVerNet", lambda n: n.HoVerNet("fast", 3, decoder_padding=True), (1, 3, 256, 256), (100,), slow=True),
    Entry("AutoencoderKL", lambda n: n.AutoencoderKL(2, 1, 1, (1, 1), (4, 8), (False, False), 3, 2,
          with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False).eval().encoder, (1, 1, 38, 30)),
    Entry("VQVAE encoder", lambda n: n.VQVAE(2, 1, 1, (4, 6), 1, (4, 6), ((2, 4, 1, 1),) * 2, ((2, 4, 1, 1, 0),) * 2).encoder,
          (1, 1, 36, 28)),
    Entry("UNETR", lambda n: n.UNETR(1, 2, (32, 48), 4, 16, 16, 2, spatial_dims=2), (1, 1, 32, 48), slow=True),
    Entry("SwinUNETR", lambda n: n.SwinUNETR(1, 2, feature_size=12, spatial_dims=2, depths=(1, 1, 1, 1)), (1, 1, 64, 96),
          (30,), slow=True),
    Entry("DiNTS", lambda n: n.DiNTS(n.TopologyInstance(spatial_dims=2, num_blocks=2, num_depths=2, channel_mul=0.2,
          device="cpu"), 1, 2, spatial_dims=2, use_downsample=False), (1, 1, 36, 28)),
    Entry("nnU-Net plain", lambda n: _plain_conv(2, "PlainConvUNet", nn.InstanceNorm2d), (2, 1, 36, 28)),
    Entry("nnU-Net plain 3-D", lambda n: _plain_conv(3, "PlainConvUNet", nn.BatchNorm3d, deep_supervision=True),
          (1, 1, 12, 16, 20), (5, 7, 9)),
    Entry("nnU-Net residual encoder", lambda n: _plain_conv(2, "ResidualEncoderUNet", nn.BatchNorm2d), (1, 1, 28, 36)),
    Entry("nnU-Net residual", lambda n: _plain_conv(2, "ResidualUNet", nn.InstanceNorm2d), (1, 1, 28, 36)),
    Entry("ResNet18-D", lambda n: _resnet("ResNet18", squeeze_excitation=True), (2, 3, 65, 71), (19, 32), slow=True),
    Entry("ResNet50 (CIFAR)", lambda n: _resnet("ResNet50bn_CIFAR"), (2, 3, 33, 35), (13,), slow=True),
    Entry("VGG16 (CIFAR)", lambda n: _vgg(), (2, 3, 67, 71), (19, 32), slow=True),
]  # fmt: skip


def build(entry: Entry, seed: int = 0) -> nn.Module:
    """The network in float64, without its libraries' chatter."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import monai.networks.nets as nets

        torch.manual_seed(seed)
        return entry.make(nets).double()


def image_of(entry: Entry) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(entry.shape, generator=generator, dtype=torch.float64)


def targets_of(net: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """A random target like each output; the network's buffers are left as they were."""
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        outputs = [t for t in pytree.tree_leaves(net(image)) if isinstance(t, torch.Tensor)]
    net.load_state_dict(state)
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]


def loss(output: Any, targets: list[torch.Tensor]) -> torch.Tensor:
    """Mean squared error over every output."""
    outputs = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    total = outputs[0].new_zeros(())
    for o, t in zip(outputs, targets, strict=True):
        total = total + F.mse_loss(o.to(t.dtype), t)
    return total
