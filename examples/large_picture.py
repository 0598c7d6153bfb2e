"""A picture and its labels that stay in files: a U-Net is trained on them and writes its prediction to a third file.

    python examples/large_picture.py                  # 208 x 208 pixels, held against plain PyTorch
    python examples/large_picture.py --side 20000     # 1.6 GB of files: planned within 4 GB, not run

Nothing is read as a whole: each tile reads its part of the files, as bytes, and the network's first op makes floats
of them. The budget counts those parts, and not the files. An HDF5 data set, a Zarr array or an object of one's own
would do as well: anything that has a shape, a dtype and slices.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullframe

SMALL = 512  # pixels of a side up to which plain PyTorch is asked too
BAND = 256  # rows that are drawn at once
STEPS = 12
DTYPES = {"picture": np.uint8, "labels": np.uint8, "found": np.bool_}


class UNet(nn.Module):
    """From bytes (batch, 3, rows, columns) to scores of two classes, with two levels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def block(inner: int, outer: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1), nn.GroupNorm(2, outer), nn.ReLU(inplace=True))

        self.top, self.bottom, self.joined = block(3, width), block(width, 2 * width), block(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, picture: Tensor) -> Tensor:
        top = self.top(picture.float() / 255)
        bottom = self.bottom(F.max_pool2d(top, 2))
        return self.head(self.joined(torch.cat([top, F.interpolate(bottom, scale_factor=2.0)], 1)))


class Decided(nn.Module):
    """The same network with its decision as output, a byte a pixel."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, picture: Tensor) -> Tensor:
        scores = self.net(picture)
        return scores[:, 1] > scores[:, 0]


def criterion(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores, labels.long())


def draw(picture: np.ndarray, labels: np.ndarray) -> None:
    """Bright discs at the points of a lattice on a noisy ground, band by band."""
    rng = np.random.default_rng(0)
    columns = np.arange(picture.shape[3])
    for top in range(0, picture.shape[2], BAND):
        band = slice(top, min(top + BAND, picture.shape[2]))
        rows = np.arange(band.start, band.stop)[:, None]
        inside = (rows % 52 - 26) ** 2 + (columns % 52 - 26) ** 2 < 300
        noise = rng.integers(0, 120, (3, *inside.shape), dtype=np.uint8)
        picture[0, :, band], labels[0, band] = noise + 60 * inside.astype(np.uint8), inside


def train(step: fullframe.Tiled, net: nn.Module, picture: object, labels: object) -> list[float]:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = step(picture, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=208, help="rows and columns of the picture, an even number")
    parser.add_argument("--budget", default="4 GB", help="bytes that a step may take")
    parser.add_argument("--folder", help="where the files lie for as long as it runs")
    options = parser.parse_args()
    torch.manual_seed(0)
    net, side = UNet(), options.side
    plain = copy.deepcopy(net)
    # tile= so that a small picture is cut at all; large ones are without it
    tiling = {"budget": options.budget} | ({"tile": 48} if side <= SMALL else {})
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        shapes = {"picture": (1, 3, side, side), "labels": (1, side, side), "found": (1, side, side)}
        picture, labels, found = (np.memmap(Path(folder, k), DTYPES[k], "w+", shape=s) for k, s in shapes.items())
        draw(picture, labels)

        step = fullframe.tile(net, loss=criterion, **tiling)
        print("\n".join(line.strip() for line in str(step.plan(picture, labels)).splitlines() if "regions" in line))
        losses = train(step, net, picture, labels)
        with torch.no_grad():
            fullframe.tile(Decided(net.eval()), **tiling)(picture, out=found)
        bands = [slice(top, top + BAND) for top in range(0, side, BAND)]
        right = sum(int((found[0, band] == labels[0, band]).sum()) for band in bands) / side**2
        print(f"loss from {losses[0]:.3f} to {losses[-1]:.3f}, and {right:.1%} of the pixels right")
        assert losses[-1] < losses[0]

        if side <= SMALL:
            whole = torch.from_numpy(picture), torch.from_numpy(labels)
            for expected, loss in zip(train_plainly(plain, *whole), losses, strict=True):
                assert abs(expected - loss) < 1e-4 * expected
            scores = plain.eval()(whole[0])
            margin = scores.diff(dim=1)[:, 0].detach().numpy()
            assert (((margin > 0) == found) | (np.abs(margin) < 1e-3)).all()


def train_plainly(net: nn.Module, picture: Tensor, labels: Tensor) -> list[float]:
    return train(lambda x, y: criterion(net(x), y), net, picture, labels)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
