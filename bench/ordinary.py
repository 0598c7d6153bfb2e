"""Twenty ordinary networks in their smallest budget, beside what plain PyTorch adds.

    python bench/ordinary.py [--only NAME ...]

Each network takes its steps in a process of its own (tests/support/budgeting.py says what is measured): several steps
within the smallest budget that it is told, and the same steps of plain PyTorch in the layout that takes less. In both
there is an optimiser of torch.optim, as in every training, which imports what a recording needs too. A row is held if
the smallest plan, and what it measures, are at most what plain PyTorch adds, or 100 MB where that is less, and if
plan and measurement are within the bounds of bench/budgets.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import setting, write
from rivals import resnet50
from small import UNet3d, generator, mobilenet, resnet18, unet
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from budgeting import CLEAR, STEPS, Asked, measured, status

FLOOR = 100_000_000  # bytes: where plain PyTorch adds less, this is compared with


def alexnet() -> nn.Sequential:
    """Five convolutions and three large linear layers (Krizhevsky, 2014)."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
        nn.Dropout(), nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, 1000),
    )  # fmt: skip


def vgg11() -> nn.Sequential:
    """Eight convolutions and three large linear layers (Simonyan and Zisserman, 2014)."""
    layers: list[nn.Module] = []
    cin = 3
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        layers += [nn.Conv2d(cin, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        cin = width or cin
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(25088, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, 1000),
    )  # fmt: skip


def smp(name: str, encoder: str, side: int, batch: int = 1) -> Asked:
    """A network of segmentation-models-pytorch."""
    import segmentation_models_pytorch as models

    net = getattr(models, name)(encoder_name=encoder, encoder_weights=None, classes=3)
    return Asked(net, torch.randn(batch, 3, side, side), torch.randint(0, 3, (batch, side, side)), F.cross_entropy, 2)


def monai(name: str, side: int, axes: int, **given: Any) -> Asked:
    """A network of MONAI with two classes."""
    import monai.networks.nets as nets

    net = getattr(nets, name)(spatial_dims=axes, in_channels=1, out_channels=2, **given)
    label = torch.randint(0, 2, (1, *[side] * axes))
    return Asked(net, torch.randn(1, 1, *[side] * axes), label, F.cross_entropy, 2)


def classifier(net: nn.Module, batch: int, side: int = 224) -> Asked:
    return Asked(net, torch.randn(batch, 3, side, side), torch.arange(batch), F.cross_entropy, 2)


def segments(side: int, batch: int) -> Asked:
    net, loss, image, label = unet(side, batch)
    return Asked(net, image, label, loss, 2)


CASES: dict[str, Callable[[], Asked]] = {
    **{f"U-Net {side}, batch {n}": (lambda s=side, n=n: segments(s, n)) for side in (64, 128, 256) for n in (1, 8)},
    "AlexNet 224, batch 8": lambda: classifier(alexnet(), 8),
    "VGG-11 224, batch 2": lambda: classifier(vgg11(), 2),
    "ResNet-18 224, batch 1": lambda: classifier(resnet18(), 1),
    "ResNet-18 224, batch 16": lambda: classifier(resnet18(), 16),
    "ResNet-50 224, batch 1": lambda: classifier(resnet50(), 1),
    "ResNet-50 224, batch 8": lambda: classifier(resnet50(), 8),
    "MobileNetV2 224, batch 8": lambda: classifier(mobilenet(), 8),
    "FPN on a ResNet-50 512": lambda: smp("FPN", "resnet50", 512),
    "U-Net on a ResNet-34 512": lambda: smp("Unet", "resnet34", 512),
    "DeepLabV3+ on a ResNet-18 512": lambda: smp("DeepLabV3Plus", "resnet18", 512, 2),
    "3-D U-Net 64": lambda: Asked(
        UNet3d(), torch.randn(1, 1, 64, 64, 64), torch.randint(0, 2, (1, 64, 64, 64)), F.cross_entropy, 2
    ),
    "3-D SegResNet 64": lambda: monai("SegResNet", 64, 3, init_filters=8),
    "3-D BasicUNet 64": lambda: monai("BasicUNet", 64, 3, features=(16, 16, 32, 64, 128, 16)),
    "DCGAN generator 64, batch 16": lambda: Asked(
        generator(), torch.randn(16, 100, 1, 1), torch.randn(16, 3, 64, 64), F.mse_loss, 2
    ),
}  # fmt: skip


def plain(asked: Asked, last: bool) -> int:
    """Bytes that plain PyTorch grows by, as the only thing that this process does."""
    torch.set_num_threads(asked.workers)
    net, image = asked.net, asked.input
    torch.optim.SGD(net.parameters(), lr=0.1)
    if last:
        layout = torch.channels_last_3d if image.dim() == 5 else torch.channels_last
        net, image = net.to(memory_format=layout), image.to(memory_format=layout)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    CLEAR.write_text("5")
    before = status("VmRSS")
    for _ in range(STEPS):
        net.zero_grad(set_to_none=True)
        assert asked.loss is not None
        asked.loss(net(image), asked.target).backward()
    return status("VmHWM") - before


def row(name: str) -> tuple[str, bool]:
    """A line of the table, and whether it is held."""
    torch.manual_seed(0)
    asked = CASES[name]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.pt"
        torch.save(asked, path)
        added = min(
            int(subprocess.run(
                [sys.executable, __file__, "--plain", str(path), *["--last"] * last],
                capture_output=True, text=True, check=True,
            ).stdout.split()[-1])
            for last in (False, True)
        )  # fmt: skip
        grown = measured(replace(asked, optimiser=True), Path(folder))
    most = max(added, FLOOR)
    held = grown.held and max(grown.projected, grown.measured) <= most
    megabytes = " | ".join(f"{n / 1e6:.0f} MB" for n in (added, grown.projected, grown.fixed, grown.measured))
    return f"| {name} | {megabytes} | {'' if held else 'no'} |", held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--last", action="store_true")
    options = parser.parse_args()
    if options.plain is not None:
        print(plain(torch.load(options.plain, weights_only=False), options.last))
        return
    rows = []
    for name in options.only:
        rows.append(row(name))
        print(rows[-1][0], flush=True)
    lines = [
        "# Twenty ordinary networks in their smallest budget", "", f"{setting()}; {STEPS} steps each", "",
        "| | plain PyTorch adds | smallest plan | of it fixed | measured | held |", "|---|---|---|---|---|---|",
        *(line for line, _ in rows), "", f"{sum(held for _, held in rows)} of {len(rows)} held.",
    ]  # fmt: skip
    write("ordinary", "\n".join(lines))


if __name__ == "__main__":
    main()
