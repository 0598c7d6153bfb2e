"""BigTIFF: a picture that is never read as a whole, and a prediction written into a file of the same size.

    pip install tifffile
    python examples/bigtiff.py

An uncompressed TIFF can be mapped into memory: the tensor is the file, and the system reads the pages that a tile
asks for and forgets them. The budget is for what the step adds. A compressed file has to be read first
(`tifffile.imread`), a byte or two for each number; that too is far less than a single map of a network.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor, nn

import fullframe

TILED = {"budget": "1 GB", "tile": 40}  # tile= so that this small picture is cut at all; leave it out for large ones


class Denoiser(nn.Module):
    """From bytes to bytes, (batch, 1, rows, columns)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 1, 5, padding=2))

    def forward(self, picture: Tensor) -> Tensor:
        grey = picture.float() / 255
        return (255 * (grey + self.net(grey))).round().clamp(0, 255).to(torch.uint8)


def main() -> None:
    torch.manual_seed(0)
    net = Denoiser()
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "picture.tif"), Path(folder, "clean.tif")
        rng = np.random.default_rng(0)
        tifffile.imwrite(source, rng.integers(0, 256, (300, 400), dtype=np.uint8), bigtiff=True)

        picture = torch.from_numpy(tifffile.memmap(source, mode="r+"))[
            None, None
        ]  # r+: torch wants what can be written
        with torch.no_grad():
            found = fullframe.tile(net, **TILED)(picture)
            assert torch.equal(found, net(picture))
        pages = tifffile.memmap(result, shape=tuple(found.shape[2:]), dtype=np.uint8, bigtiff=True)
        pages[:] = found[0, 0].numpy()
        pages.flush()
        with tifffile.TiffFile(result) as file:
            assert file.is_bigtiff
            assert np.array_equal(file.asarray(), found[0, 0].numpy())
        del picture, pages  # before the folder goes
    print("a mapped picture gives the same bytes as the plain network, in a BigTIFF")


if __name__ == "__main__":
    main()
