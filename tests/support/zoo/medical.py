"""MONAI's networks and nnU-Net's dynamic-network-architectures."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from zoo.entry import Entry, Part

SOLID = (5, 7, 9)  # tiles of 3-D images
SMALL: dict[str, Any] = {"channels": (4, 6, 8), "strides": (2, 2)}
LARGE: dict[str, Any] = {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2)}
BASIC = (4, 4, 6, 8, 8, 4)
FULL = (32, 32, 64, 128, 256, 32)
MED: dict[str, Any] = {
    "blocks_down": (1, 1, 1, 1),
    "blocks_bottleneck": 1,
    "blocks_up": (1, 1, 1, 1),
    "init_filters": 4,
}
FIVE = {"kernel_size": [3] * 6, "strides": [1, 2, 2, 2, 2, 2], "upsample_kernel_size": [2] * 5}
VAE: dict[str, Any] = {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}


def _dynunet(n: Any, **options: Any) -> nn.Module:
    return n.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 6, 8], norm_name="batch", **options)


def _vnet(n: Any) -> nn.Module:
    return n.VNet(2, 1, 2, dropout_prob_down=0.5, dropout_prob_up=(0.5, 0.5), dropout_dim=2)


def _vqvae(n: Any) -> nn.Module:
    net = n.VQVAE(2, 1, 1, (4, 6), 1, (4, 6), ((2, 4, 1, 1),) * 2, ((2, 4, 1, 1, 0),) * 2)
    return Part(net, lambda m, x: m.decode(m.encode(x)))


def _kl(n: Any) -> nn.Module:
    net = n.AutoencoderKL(2, 1, 1, (1, 1), (4, 8), (False, False), 3, 2, **VAE)
    return Part(net, lambda m, x: m.decode(m.encode(x)[0]))


def _diffusion(n: Any, channels: tuple[int, ...] = (4, 8), groups: int = 2) -> nn.Module:
    net = n.DiffusionModelUNet(2, 1, 1, 1, channels, (False,) * len(channels), norm_num_groups=groups)
    return Part(net, lambda m, x: m(x, torch.full((x.shape[0],), 7)))


def _controlnet(n: Any) -> nn.Module:
    net = n.ControlNet(2, 1, 1, (4, 8), (False, False), norm_num_groups=2, conditioning_embedding_in_channels=1,
                       conditioning_embedding_num_channels=(4,))  # fmt: skip
    return Part(net, lambda m, x: m(x, torch.full((x.shape[0],), 7), x))


def _spade(n: Any) -> nn.Module:
    net = n.SPADENet(2, 1, 1, 2, (32, 48), [8, 16], is_vae=False, spade_intermediate_channels=4)
    return Part(net, lambda m, x: m(torch.cat([x, -x], 1))[0])


def _voxelmorph(n: Any) -> nn.Module:
    unet = n.VoxelMorphUNet(2, 2, 4, (4, 6, 8, 6, 4, 4), (4, 4))
    net = n.VoxelMorph(unet, integration_steps=3, half_res=False, spatial_dims=2)
    return Part(net, lambda m, x: m(x[:, :1], x[:, 1:]))


def _dints(n: Any) -> nn.Module:
    space = n.TopologyInstance(spatial_dims=2, num_blocks=2, num_depths=2, channel_mul=0.25, device="cpu")
    return n.DiNTS(space, 1, 2, spatial_dims=2, use_downsample=True)


def _senet(n: Any) -> nn.Module:
    from monai.networks.blocks import SEResNetBottleneck

    return n.SENet(2, 1, SEResNetBottleneck, (1, 1, 1, 1), 1, 16, dropout_prob=0.2, num_classes=3)


def _monai(
    name: str, make: Any, shape: tuple[int, ...], tiles: tuple[int, ...] = (8, 13, 24), **options: Any
) -> Entry:
    return Entry(name, "monai", make, shape, tiles, **options)


SEGMENTATION = [
    _monai("UNet", lambda n: n.UNet(2, 1, 3, **SMALL, norm="batch"), (2, 1, 28, 36), loss="cross entropy", quick=True,
           full=lambda n: n.UNet(2, 1, 3, **LARGE, norm="batch")),
    _monai("UNet residual", lambda n: n.UNet(2, 1, 3, **SMALL, num_res_units=2), (1, 1, 36, 28), loss="dice ce",
           full=lambda n: n.UNet(2, 1, 3, **LARGE, num_res_units=2)),
    _monai("UNet 3-D", lambda n: n.UNet(3, 1, 2, **SMALL, num_res_units=1), (1, 1, 12, 16, 20), SOLID, loss="dice",
           full=lambda n: n.UNet(3, 1, 2, **LARGE, num_res_units=2)),
    _monai("UNet 1-D", lambda n: n.UNet(1, 1, 2, **SMALL, norm="batch"), (2, 1, 76), loss="focal", quick=True,
           full=lambda n: n.UNet(1, 1, 2, **LARGE, norm="batch")),
    _monai("BasicUNet", lambda n: n.BasicUNet(2, 1, 2, BASIC, norm="batch"), (1, 1, 37, 45), loss="generalised dice",
           full=lambda n: n.BasicUNet(2, 1, 2, FULL)),
    _monai("BasicUNet 3-D", lambda n: n.BasicUNet(3, 1, 2, BASIC, upsample="nontrainable", norm=("group", {"num_groups": 2})),
           (1, 1, 17, 18, 19), (7, 9, 11), loss="tversky", full=lambda n: n.BasicUNet(3, 1, 2, FULL)),
    _monai("BasicUNetPlusPlus", lambda n: n.BasicUNetPlusPlus(2, 1, 2, BASIC, deep_supervision=True), (1, 1, 48, 32),
           (11, 17, 24), loss="deep supervision", full=lambda n: n.BasicUNetPlusPlus(2, 1, 2, FULL)),
    _monai("AttentionUnet", lambda n: n.AttentionUnet(2, 1, 2, **SMALL), (1, 1, 36, 44), loss="dice focal",
           full=lambda n: n.AttentionUnet(2, 1, 2, **LARGE)),
    _monai("SegResNet", lambda n: n.SegResNet(2, 8, 1, 2, norm="batch"), (1, 1, 40, 24), loss="dice",
           full=lambda n: n.SegResNet(2, 16, 1, 2)),
    _monai("SegResNet 3-D", lambda n: n.SegResNet(3, 8, 1, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1)), (1, 1, 12, 16, 20),
           SOLID, loss="dice ce", full=lambda n: n.SegResNet(3, 16, 1, 2)),
    _monai("SegResNetDS", lambda n: n.SegResNetDS(2, 4, 1, 2, blocks_down=(1, 1, 1), dsdepth=2), (1, 1, 36, 28),
           loss="deep supervision", full=lambda n: n.SegResNetDS(2, 32, 1, 2, dsdepth=4)),
    _monai("SegResNetVAE", lambda n: n.SegResNetVAE((48, 32), False, 0.3, 8, 2, 8, 1, 2), (1, 1, 48, 32),
           full=lambda n: n.SegResNetVAE((512, 512), spatial_dims=2, init_filters=8)),
    _monai("VNet", _vnet, (1, 1, 48, 32), loss="dice"),
    _monai("DynUNet", partial(_dynunet, res_block=True), (2, 1, 28, 36), loss="dice ce", quick=True,
           full=lambda n: n.DynUNet(2, 1, 2, **FIVE, res_block=True)),
    _monai("DynUNet deep supervision", partial(_dynunet, deep_supervision=True, deep_supr_num=1), (1, 1, 36, 28),
           loss="stacked supervision",
           full=lambda n: n.DynUNet(3, 1, 2, **FIVE, deep_supervision=True, deep_supr_num=3), usual=(1, 1, 96, 96, 96)),
    _monai("HighResNet", lambda n: n.HighResNet(2, 1, 2), (1, 1, 29, 35), loss="generalised dice"),
    _monai("FlexibleUNet", lambda n: n.FlexibleUNet(1, 2, "resnet18", decoder_channels=(16, 12, 8, 8, 4)), (1, 1, 64, 96),
           (25, 32, 50), loss="dice", full=lambda n: n.FlexibleUNet(1, 2, "efficientnet-b0")),
    _monai("MedNeXt", lambda n: n.MedNeXt(2, in_channels=1, out_channels=2, **MED), (1, 1, 48, 80), loss="dice",
           full=lambda n: n.MedNeXt(2, in_channels=1, out_channels=2)),
    _monai("MedNeXt GRN", lambda n: n.MedNeXt(2, in_channels=1, out_channels=2, global_resp_norm=True,
           use_residual_connection=True, **MED), (1, 1, 48, 32), (11, 17, 24), loss="dice"),
    _monai("Quicknat", lambda n: n.Quicknat(3, 1, 6, 3, drop_out=0.1), (1, 1, 48, 32), (13, 20, 30),
           loss="dice ce", full=lambda n: n.Quicknat(28, 1, 64, 5)),
    _monai("AHNet", lambda n: n.AHNet(spatial_dims=2, in_channels=1, out_channels=2, upsample_mode="bilinear", psp_block_num=4),
           (1, 1, 128, 96), (50, 70, 90), loss="dice"),
    _monai("HoVerNet", lambda n: n.HoVerNet("fast", 3, decoder_padding=True), (1, 3, 256, 256), (100, 130, 180),
           usual=(1, 3, 256, 256)),
    _monai("DAF3D", lambda n: n.DAF3D(1, 2), (1, 1, 16, 16, 24), (9, 11, 16), usual=(1, 1, 96, 96, 96)),
    _monai("UNETR", lambda n: n.UNETR(1, 2, (32, 48), 4, 16, 16, 2, spatial_dims=2), (1, 1, 32, 48), loss="dice ce",
           full=lambda n: n.UNETR(1, 2, (96, 96, 96)), usual=(1, 1, 96, 96, 96)),
    _monai("SwinUNETR", lambda n: n.SwinUNETR(1, 2, feature_size=12, spatial_dims=2, depths=(1, 1, 1, 1)), (1, 1, 64, 96),
           (20, 30, 50), loss="dice ce", full=lambda n: n.SwinUNETR(1, 2, feature_size=24), usual=(1, 1, 96, 96, 96)),
    _monai("DiNTS", _dints, (1, 1, 48, 32), loss="dice ce", refused="depends on the data"),
]  # fmt: skip

OTHERS = [
    _monai("DenseNet", lambda n: n.DenseNet(2, 1, 3, 8, 4, (2, 3, 2), dropout_prob=0.1), (2, 1, 45, 51), loss="classes",
           quick=True, full=lambda n: n.DenseNet121(spatial_dims=2, in_channels=1, out_channels=3)),
    _monai("ResNet basic", lambda n: n.ResNet("basic", [1, 1, 1, 1], [4, 6, 8, 8], 2, 1, num_classes=3), (2, 1, 45, 51),
           loss="classes", full=lambda n: n.resnet34(spatial_dims=2, n_input_channels=1, num_classes=3)),
    _monai("ResNet bottleneck 3-D", lambda n: n.ResNet("bottleneck", [1, 1, 1, 1], [4, 4, 6, 6], 3, 1, num_classes=3),
           (2, 1, 17, 19, 21), (7, 9, 11), loss="classes",
           full=lambda n: n.resnet50(spatial_dims=3, n_input_channels=1, num_classes=3)),
    _monai("SENet", _senet, (2, 1, 67, 71), (19, 32, 50), loss="classes",
           full=lambda n: n.SEResNet50(spatial_dims=2, in_channels=1, num_classes=3)),
    _monai("EfficientNet-b0", lambda n: n.EfficientNetBN("efficientnet-b0", False, False, 2, 1, 3), (2, 1, 65, 71),
           (19, 32, 50), loss="classes"),
    _monai("RegUNet", lambda n: n.RegUNet(2, 1, 4, 2), (1, 1, 36, 28), full=lambda n: n.RegUNet(2, 1, 16, 4)),
    _monai("LocalNet", lambda n: n.LocalNet(2, 1, 4, (0, 1, 2)), (1, 1, 36, 28),
           full=lambda n: n.LocalNet(2, 1, 16, (0, 1, 2, 3, 4))),
    _monai("VoxelMorph", _voxelmorph, (1, 2, 32, 48)),
    _monai("AutoEncoder", lambda n: n.AutoEncoder(2, 1, 1, (4, 6, 8), (2, 2, 1), inter_channels=(8,), num_res_units=1),
           (1, 1, 36, 28), loss="l1"),
    _monai("Regressor", lambda n: n.Regressor((1, 36, 28), (2,), **SMALL), (2, 1, 36, 28),
           full=lambda n: n.Regressor((1, 512, 512), (2,), **LARGE), usual=(1, 1, 512, 512)),
    _monai("Discriminator", lambda n: n.Discriminator((1, 37, 29), **SMALL), (2, 1, 37, 29),
           full=lambda n: n.Discriminator((1, 512, 512), **LARGE), usual=(1, 1, 512, 512)),
    _monai("PatchDiscriminator", lambda n: n.MultiScalePatchDiscriminator(2, 2, 2, 4, 1), (2, 1, 61, 67),
           full=lambda n: n.MultiScalePatchDiscriminator(2, 3, 2, 64, 1)),
    _monai("AutoencoderKL", _kl, (1, 1, 38, 30)),
    _monai("VQVAE", _vqvae, (1, 1, 36, 28)),
    _monai("DiffusionModelUNet", _diffusion, (1, 1, 38, 30), full=partial(_diffusion, channels=(32, 64, 64), groups=32)),
    _monai("ControlNet", _controlnet, (1, 1, 36, 28)),
    _monai("SPADENet", _spade, (1, 1, 32, 48), usual=(1, 1, 32, 48)),
]  # fmt: skip


def _plain_conv(
    n: Any, dim: int, kind: str, norm: Any, *, widths: tuple[int, ...] = (4, 6, 8), **options: Any
) -> nn.Module:
    from dynamic_network_architectures.architectures import unet

    conv, stages = nn.Conv2d if dim == 2 else nn.Conv3d, len(widths)
    blocks = "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage"
    return getattr(unet, kind)(
        input_channels=1, n_stages=stages, features_per_stage=list(widths), conv_op=conv, kernel_sizes=3,
        strides=[1, *[2] * (stages - 1)], num_classes=3, n_conv_per_stage_decoder=1, conv_bias=True, norm_op=norm,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, **{blocks: 2}, **options,
    )  # fmt: skip


def _resnet(n: Any, kind: str, **options: Any) -> nn.Module:
    from dynamic_network_architectures.architectures import resnet

    return getattr(resnet, kind)(n_classes=3, **options)


def _vgg(n: Any) -> nn.Module:
    from dynamic_network_architectures.architectures import vgg

    return vgg.VGG16_cifar(n_classes=3, n_input_channel=3)


def _nnunet(
    name: str, make: Any, shape: tuple[int, ...], tiles: tuple[int, ...] = (8, 13, 24), **options: Any
) -> Entry:
    return Entry(name, "dynamic_network_architectures", make, shape, tiles, **options)


WIDE = (32, 64, 128, 256, 320, 320)
NNUNET = [
    _nnunet("nnU-Net plain", partial(_plain_conv, dim=2, kind="PlainConvUNet", norm=nn.InstanceNorm2d), (2, 1, 36, 28),
            loss="dice ce",
            full=partial(_plain_conv, dim=2, kind="PlainConvUNet", norm=nn.InstanceNorm2d, widths=WIDE)),
    _nnunet("nnU-Net plain 3-D", partial(_plain_conv, dim=3, kind="PlainConvUNet", norm=nn.BatchNorm3d, deep_supervision=True),
            (1, 1, 12, 16, 20), SOLID, loss="deep supervision", usual=(2, 1, 96, 96, 96),
            full=partial(_plain_conv, dim=3, kind="PlainConvUNet", norm=nn.InstanceNorm3d, widths=WIDE, deep_supervision=True)),
    _nnunet("nnU-Net residual encoder", partial(_plain_conv, dim=2, kind="ResidualEncoderUNet", norm=nn.BatchNorm2d),
            (1, 1, 28, 36), loss="dice ce",
            full=partial(_plain_conv, dim=2, kind="ResidualEncoderUNet", norm=nn.InstanceNorm2d, widths=WIDE)),
    _nnunet("nnU-Net residual", partial(_plain_conv, dim=2, kind="ResidualUNet", norm=nn.InstanceNorm2d), (1, 1, 28, 36),
            loss="cross entropy"),
    _nnunet("ResNet18-D", partial(_resnet, kind="ResNet18", squeeze_excitation=True), (2, 3, 64, 96), (19, 32, 50),
            loss="classes"),
    _nnunet("ResNet50-D bottleneck", partial(_resnet, kind="ResNet50bn_CIFAR"), (2, 3, 32, 48), (13, 20, 30), loss="classes"),
    _nnunet("VGG16", _vgg, (2, 3, 67, 71), (19, 32, 50), loss="classes"),
]  # fmt: skip

ENTRIES = [*SEGMENTATION, *OTHERS, *NNUNET]
