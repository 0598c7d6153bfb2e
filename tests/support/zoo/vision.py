"""Classifiers, feature pyramids and dense heads of torchvision and timm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from zoo.entry import Entry

STRIPS = (19, 32, 50)


class Picked(nn.Module):
    """A network whose output (a dataclass or a dict of names) becomes a list of tensors."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        made = self.net(x)
        made = made._asdict() if hasattr(made, "_asdict") else made
        return list(made.values()) if isinstance(made, dict) else [made]


def _deeplab(n: Any, small: bool = True) -> nn.Module:
    if not small:
        return Picked(
            n.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
        )
    return Picked(n.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3))


def _alexnet(n: Any) -> nn.Module:
    net = n.alexnet(weights=None)
    net.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(9216, 3))  # its hidden layers have 54 million weights
    return net


def _convnext(n: Any) -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    sizes = [CNBlockConfig(8, 12, 1), CNBlockConfig(12, 16, 2), CNBlockConfig(16, None, 1)]
    return ConvNeXt(sizes, stochastic_depth_prob=0.3, num_classes=3)


def _pyramid(n: Any) -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return Picked(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)
    )


def _plain(name: str, **options: Any) -> Any:
    def make(n: Any) -> nn.Module:
        made = n
        for part in name.split("."):
            made = getattr(made, part)
        return Picked(made(weights=None, num_classes=3, **options))

    return make


def _regnet(n: Any) -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    params = BlockParams.from_init_params(depth=6, w_0=16, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return RegNet(params, num_classes=3)


def _video(name: str) -> Any:
    return lambda n: getattr(n.video, name)(weights=None, num_classes=3)


def _vision(
    name: str, make: Any, shape: tuple[int, ...] = (2, 3, 65, 71), tiles: tuple[int, ...] = STRIPS, **options: Any
) -> Entry:
    return Entry(name, "torchvision", make, shape, tiles, **({"loss": "classes"} | options))


TORCHVISION = [
    _vision("ResNet18", _plain("resnet18")),
    _vision("ResNeXt50", _plain("resnext50_32x4d"), (1, 3, 65, 71)),
    _vision("ConvNeXt", _convnext, (2, 3, 45, 51), (9, 17, 28), full=_plain("convnext_tiny")),
    _vision("EfficientNetV2-S", _plain("efficientnet_v2_s"), (2, 3, 65, 71), (32, 40, 50)),
    _vision("RegNetY", _regnet, (2, 3, 67, 71), full=_plain("regnet_y_400mf")),
    _vision("ShuffleNetV2", _plain("shufflenet_v2_x0_5"), (2, 3, 67, 71)),
    _vision("SqueezeNet", _plain("squeezenet1_1"), (2, 3, 67, 71)),
    _vision("MNASNet", _plain("mnasnet0_5"), (2, 3, 67, 71)),
    _vision("MobileNetV2", _plain("mobilenet_v2", width_mult=0.25), (2, 3, 67, 71)),
    _vision("MobileNetV3", _plain("mobilenet_v3_small"), (2, 3, 67, 71)),
    _vision("GoogLeNet", _plain("googlenet", init_weights=False), (2, 3, 69, 75)),
    _vision("InceptionV3", _plain("inception_v3", init_weights=False, aux_logits=False), (2, 3, 93, 99), (40, 60, 80)),
    _vision("AlexNet", _alexnet, (2, 3, 67, 71), full=_plain("alexnet")),
    _vision("DeepLabV3", _deeplab, (2, 3, 65, 71), loss="auxiliary", usual=(2, 3, 512, 512), full=partial(_deeplab, small=False)),
    _vision("FCN", _plain("segmentation.fcn_resnet50", weights_backbone=None, aux_loss=True), (1, 3, 49, 55), (20, 32, 40),
            loss="auxiliary"),
    _vision("LR-ASPP", _plain("segmentation.lraspp_mobilenet_v3_large", weights_backbone=None), (2, 3, 65, 71),
            loss="auxiliary"),
    _vision("FPN ResNet18", _pyramid, (1, 3, 65, 71), loss="mse"),
    _vision("R3D-18 video", _video("r3d_18"), (1, 3, 17, 29, 33), (11, 17, 24), usual=(1, 3, 16, 112, 112)),
    _vision("R(2+1)D-18 video", _video("r2plus1d_18"), (1, 3, 17, 29, 33), (11, 17, 24), usual=(1, 3, 16, 112, 112)),
]  # fmt: skip


def _timm(name: str, model: str, shape: tuple[int, ...] = (2, 3, 65, 71), *, tiles: tuple[int, ...] = STRIPS,
          small: dict[str, Any] | None = None, cls: str = "", **options: Any) -> Entry:  # fmt: skip
    """A timm model, made small by ``small`` (as arguments of its class, where the model fixes them)."""

    def make(n: Any, **sizes: Any) -> nn.Module:
        return n.create_model(model, pretrained=False, num_classes=3, **sizes)

    def direct(n: Any, **sizes: Any) -> nn.Module:
        module, _, kind = cls.partition(".")
        return getattr(getattr(n.models, module), kind)(num_classes=3, **sizes)

    return Entry(name, "timm", partial(direct if cls else make, **(small or {})), shape, tiles,
                 full=make if small else None, **({"loss": "classes"} | options))  # fmt: skip


FOUR: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}
TIMM = [
    _timm("ConvNeXtV2 (GRN)", "convnextv2_atto", (2, 3, 69, 75), small=FOUR | {"drop_path_rate": 0.2}),
    _timm("HRNet-W18", "hrnet_w18_small", (1, 3, 64, 96), tiles=(32, 44, 56)),
    _timm("Res2Net", "res2net50_26w_4s", (1, 3, 65, 71), small={"layers": (1, 1, 1, 1)}),
    _timm("ResNeSt", "resnest14d", (2, 3, 65, 71), small={"layers": (1, 1, 1, 1)}),
    _timm("SKNet", "skresnet18", (2, 3, 65, 71)),
    _timm("ECA-ResNet", "ecaresnet26t", (1, 3, 65, 71), small={"layers": (1, 1, 1, 1)}),
    _timm("NFNet", "nf_regnet_b1", (1, 3, 65, 71), tiles=(32, 44, 56)),
    _timm("ResNetV2 (BiT)", "resnetv2_50x1_bit", (1, 3, 65, 71), cls="resnetv2.ResNetV2",
          small={"layers": (1, 1, 1, 1), "channels": (128, 128, 128, 256), "stem_chs": 32, "stem_type": "fixed"}),
    _timm("ConvMixer", "convmixer_768_32", (2, 3, 45, 51), tiles=(9, 17, 28), cls="convmixer.ConvMixer",
          small={"dim": 16, "depth": 3}),
    _timm("PoolFormer", "poolformer_s12", (2, 3, 69, 75), cls="metaformer.MetaFormer", small=FOUR),
    _timm("FasterNet", "fasternet_t0", (2, 3, 69, 75), small={"embed_dim": 8, "depths": (1, 1, 1, 1)}),
    _timm("InceptionNeXt", "inception_next_atto", (2, 3, 69, 75), small={"depths": (1, 1, 1, 1), "dims": (16, 16, 24, 32)}),
    _timm("StarNet", "starnet_s1", (2, 3, 69, 75), small={"base_dim": 8, "depths": [1, 1, 1, 1]}),
    _timm("MambaOut", "mambaout_femto", (2, 3, 69, 75), small=FOUR),
    _timm("GhostNet", "ghostnet_050", (2, 3, 65, 71)),
    _timm("ReXNet", "rexnetr_100", (2, 3, 65, 71), small={"width_mult": 0.25, "depth_mult": 0.5}),
    _timm("DLA", "dla46_c", (2, 3, 64, 96), loss="mse"),
    _timm("DPN", "dpn48b", (1, 3, 65, 71), small={"k_sec": (1, 1, 1, 1)}),
    _timm("DenseNet-BC blur", "densenetblur121d", (1, 3, 65, 71), small={"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    _timm("VoVNet (eSE)", "ese_vovnet19b_slim_dw", (1, 3, 65, 71)),
    _timm("CSP-DarkNet", "cs3darknet_s", (1, 3, 65, 71)),
    _timm("FocalNet", "focalnet_tiny_srf", (1, 3, 65, 71), cls="focalnet.FocalNet", small={"embed_dim": 8, "depths": (1, 1, 1, 1)}),
    _timm("RepVGG", "repvgg_a0", (1, 3, 65, 71)),
    _timm("RepViT", "repvit_m0_9", (2, 3, 65, 71), small={"embed_dim": (8, 16, 24, 32), "depth": (1, 1, 2, 1)}),
    _timm("RDNet", "rdnet_tiny", (1, 3, 64, 96), small={"num_init_features": 16, "growth_rates": [8] * 7}),
    _timm("HGNetV2", "hgnetv2_b0", (1, 3, 65, 71)),
    _timm("TResNet", "tresnet_m", (1, 3, 64, 96), small={"layers": [1, 1, 1, 1]}),
    _timm("Xception", "legacy_xception", (1, 3, 65, 71), tiles=(32, 44, 56)),
    _timm("NASNet-A", "nasnetalarge", (1, 3, 95, 99), tiles=(60, 70, 80), cls="nasnet.NASNetALarge",
          small={"stem_size": 8, "num_features": 192, "channel_multiplier": 2}),
]  # fmt: skip

ENTRIES = [*TORCHVISION, *TIMM]
