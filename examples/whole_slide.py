"""A whole slide by OpenSlide: read at full resolution, mapped to tissue classes, written as a pyramid.

    pip install openslide-python openslide-bin tifffile
    python examples/whole_slide.py

The slide is made here, small, as a tiled pyramid that OpenSlide reads. Its finest level becomes one tensor of bytes,
three for each pixel: 30 GB for 100,000 x 100,000, where one float map of 8 channels would be 320 GB. It is read in
bands, so that no second copy of it exists.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import openslide
import tifffile
import torch
from torch import Tensor, nn

import fullframe

TILED = {"budget": "1 GB", "tile": 64}  # tile= so that this small slide is cut at all; leave it out for large ones
BAND = 128  # rows that are read at once
GLASS = (255, 255, 255)  # where the scanner has seen nothing, pixels are transparent


class Tissue(nn.Module):
    """From bytes (batch, 3, rows, columns) to classes of the same places (batch, rows, columns), as bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.up = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(8, 3, 2, stride=2))

    def forward(self, slide: Tensor) -> Tensor:
        return self.up(self.down(slide.float() / 127.5 - 1)).argmax(1).to(torch.uint8)


def make(path: Path) -> np.ndarray:
    """A slide of 256 x 320 pixels in two levels."""
    picture = np.random.default_rng(0).integers(0, 256, (256, 320, 3), dtype=np.uint8)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level, step in enumerate((1, 4)):
            file.write(picture[::step, ::step], tile=(128, 128), photometric="rgb", subfiletype=min(level, 1))
    return picture


def read(path: Path) -> Tensor:
    """The finest level, (1, 3, rows, columns) uint8."""
    with openslide.OpenSlide(path) as slide:
        columns, rows = slide.dimensions
        whole = torch.empty(1, 3, rows, columns, dtype=torch.uint8)
        for top in range(0, rows, BAND):
            height = min(BAND, rows - top)
            band = slide.read_region((0, top), 0, (columns, height))
            flat = openslide.Image.new("RGB", band.size, GLASS)
            flat.paste(band, mask=band.getchannel("A"))
            whole[0, :, top : top + height] = torch.from_numpy(np.array(flat)).permute(2, 0, 1)
    return whole


def main() -> None:
    torch.manual_seed(0)
    net = Tissue()
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "slide.tif"), Path(folder, "classes.tif")
        picture = make(source)
        slide = read(source)
        assert np.array_equal(slide[0].permute(1, 2, 0).numpy(), picture)
        with torch.no_grad():
            found = fullframe.tile(net, **TILED)(slide)
            assert torch.equal(found, net(slide))
        classes = found[0].numpy()
        with tifffile.TiffWriter(result, bigtiff=True) as file:
            for level, step in enumerate((1, 4)):
                file.write(classes[::step, ::step], tile=(128, 128), compression="zlib", subfiletype=min(level, 1))
        assert np.array_equal(tifffile.imread(result, key=0), classes)
    print(f"a slide of {slide.shape[2]} x {slide.shape[3]}: every pixel's class is the plain network's")


if __name__ == "__main__":
    main()
