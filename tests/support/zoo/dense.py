"""Decoders of segmentation-models-pytorch, and restoration and super-resolution networks of spandrel."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import nn

from zoo.entry import Entry, Part

STRIPS = (19, 32, 50)
PAIR = (2, 1, 512, 512)  # a batch norm after global pooling has no variance over one image


def _smp(
    kind: str, loss: str, shape: tuple[int, ...] = (2, 1, 64, 96), usual: tuple[int, ...] = (), **options: Any
) -> Entry:
    """A decoder on a ResNet-18, narrowed where its options allow; their sizes must divide by 32."""

    def make(n: Any, **sizes: Any) -> nn.Module:
        return getattr(n, kind)("resnet18", encoder_weights=None, in_channels=1, classes=3, **sizes)

    return Entry(
        kind,
        "segmentation_models_pytorch",
        partial(make, **options),
        shape,
        STRIPS,
        loss=loss,
        usual=usual,
        full=make,
    )


NARROW: dict[str, Any] = {"decoder_channels": (32, 16, 16, 16, 16)}
SEGMENTATION = [
    _smp("Unet", "dice ce", **NARROW, decoder_attention_type="scse"),
    _smp("UnetPlusPlus", "dice", **NARROW),
    _smp("MAnet", "focal", **NARROW),
    _smp("Linknet", "tversky"),
    _smp("FPN", "dice focal", decoder_pyramid_channels=16, decoder_segmentation_channels=32),
    _smp("PSPNet", "cross entropy", psp_out_channels=16),
    _smp("DeepLabV3", "dice", usual=PAIR, decoder_channels=16),
    _smp("DeepLabV3Plus", "generalised dice", usual=PAIR, decoder_channels=16),
    _smp("PAN", "dice ce", shape=(2, 1, 128, 160), usual=PAIR, decoder_channels=16),
    _smp("UPerNet", "dice ce", usual=PAIR, decoder_channels=16),
    _smp("Segformer", "dice ce", decoder_segmentation_channels=16),
]  # fmt: skip


def _from(path: str, name: str, **options: Any) -> Any:
    """A maker of a class found in one of spandrel's modules."""
    return lambda n: getattr(importlib.import_module(f"spandrel.architectures.{path}"), name)(**options)


def _rcan(n: Any) -> nn.Module:
    made = _from("RCAN.__arch.rcan_arch", "RCAN", scale=2, n_resgroups=2, n_resblocks=2, n_feats=8, reduction=2)
    return Part(made(n), lambda m, x: m(x.clone()))  # it writes into its input


def _restore(name: str, make: Any, shape: tuple[int, ...] = (1, 3, 23, 29), tiles: tuple[int, ...] = (7, 11, 18),
             loss: str = "charbonnier", **options: Any) -> Entry:  # fmt: skip
    return Entry(name, "spandrel", make, shape, tiles, loss=loss, **options)


RRDB, SRVGG = "ESRGAN.__arch.RRDB", "Compact.__arch.SRVGG"
RESTORATION = [
    _restore("ESRGAN (RRDB)", _from(RRDB, "RRDBNet", num_filters=8, num_blocks=2, scale=2), loss="ssim",
             full=_from(RRDB, "RRDBNet"), usual=(1, 3, 128, 128)),
    _restore("Real-ESRGAN compact", _from(SRVGG, "SRVGGNetCompact", num_feat=8, num_conv=3, upscale=2),
             full=_from(SRVGG, "SRVGGNetCompact"), usual=(1, 3, 256, 256), quick=True),
    _restore("RCAN", _rcan,
             full=_from("RCAN.__arch.rcan_arch", "RCAN"), usual=(1, 3, 128, 128)),
    _restore("PLKSR", _from("PLKSR.__arch.PLKSR", "PLKSR", dim=8, n_blocks=2, upscaling_factor=2, kernel_size=9),
             full=_from("PLKSR.__arch.PLKSR", "PLKSR"), usual=(1, 3, 128, 128), modes=("training",)),
    _restore("Real-CUGAN", _from("RealCUGAN.__arch.upcunet_v3", "UpCunet2x"), (1, 3, 38, 46), (13, 20, 30),
             usual=(1, 3, 256, 256)),
    _restore("SPAN", _from("SPAN.__arch.span", "SPAN", num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2),
             full=_from("SPAN.__arch.span", "SPAN", num_in_ch=3, num_out_ch=3), usual=(1, 3, 256, 256)),
    _restore("SAFMN", _from("SAFMN.__arch.safmn", "SAFMN", dim=8, n_blocks=2, ffn_scale=2.0, upscaling_factor=2), (1, 3, 24, 32),
             full=_from("SAFMN.__arch.safmn", "SAFMN", dim=36, n_blocks=8), usual=(1, 3, 256, 256)),
    _restore("NAFNet", _from("NAFNet.__arch.NAFNet_arch", "NAFNet", width=4, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]),
             (1, 3, 29, 35), (8, 13, 24), loss="ssim",
             full=_from("NAFNet.__arch.NAFNet_arch", "NAFNet", width=32, enc_blk_nums=[1, 1, 1, 28], dec_blk_nums=[1, 1, 1, 1])),
    _restore("DnCNN", _from("DnCNN.__arch.network_dncnn", "DnCNN", in_nc=3, out_nc=3, nc=8, nb=5), (1, 3, 29, 35), (8, 13, 24),
             full=_from("DnCNN.__arch.network_dncnn", "DnCNN", in_nc=3, out_nc=3)),
    _restore("DRUNet", _from("DRUNet.__arch.network_unet", "DRUNet", in_nc=3, out_nc=3, nc=[4, 6, 8, 8], nb=1), (1, 3, 40, 48),
             (8, 13, 24), full=_from("DRUNet.__arch.network_unet", "DRUNet", in_nc=3, out_nc=3)),
    _restore("FBCNN", _from("FBCNN.__arch.FBCNN", "FBCNN", nc=[4, 6, 8, 512], nb=1), (1, 3, 29, 35), (8, 13, 24), loss="mse",
             full=_from("FBCNN.__arch.FBCNN", "FBCNN")),
    _restore("KBNet", _from("KBNet.__arch.kbnet_s", "KBNet_s", width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1],
             lightweight=True), (1, 3, 32, 40), (8, 13, 24)),
]  # fmt: skip

ENTRIES = [*SEGMENTATION, *RESTORATION]
