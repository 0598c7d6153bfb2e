"""A GeoTIFF by rasterio: a whole scene with its holes, and a map in the same projection.

    pip install rasterio
    python examples/geotiff.py

Pixels without data are no part of the loss (`ignore_index`), which is normalised over the pixels of the whole scene
that have data, as in plain PyTorch; a mean over patches would weigh each patch alike, however few of its pixels
count. The map is written with the scene's transform and coordinate system.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from rasterio.transform import from_origin
from torch import nn

import fullframe

TILED = {"budget": "1 GB", "tile": 40}  # tile= so that this small scene is cut at all; leave it out for large ones
NOTHING, UNLABELLED = -9999.0, -100


def make(path: Path) -> None:
    """A scene of four bands, 10 m a pixel, with a corner that the satellite has not seen."""
    bands = np.random.default_rng(0).normal(0.3, 0.1, (4, 120, 150)).astype(np.float32)
    rows, columns = np.indices(bands.shape[1:])
    bands[:, rows + columns < 60] = NOTHING
    profile = {"driver": "GTiff", "width": 150, "height": 120, "count": 4, "dtype": "float32", "nodata": NOTHING,
               "crs": "EPSG:32632", "transform": from_origin(500000, 5500000, 10, 10), "tiled": True,
               "blockxsize": 64, "blockysize": 64}  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(bands)


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    plain = copy.deepcopy(net)
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "scene.tif"), Path(folder, "map.tif")
        make(source)
        with rasterio.open(source) as file:
            bands, profile = torch.from_numpy(file.read()).double(), file.profile
            seen = torch.from_numpy(file.dataset_mask() > 0)
        image = torch.where(seen, bands, 0.0)[None]
        target = (bands[3] > bands[2]).long().masked_fill(~seen, UNLABELLED)[None]

        step = fullframe.tile(net, loss=F.cross_entropy, **TILED)
        expected = F.cross_entropy(plain(image), target)
        expected.backward()
        loss = step(image, target)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        for a, b in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9)

        with torch.no_grad():
            classes = fullframe.tile(net, **TILED).eval()(image)[0].argmax(0).to(torch.uint8)
        classes = torch.where(seen, classes, 255).numpy()
        profile.update(count=1, dtype="uint8", nodata=255)
        with rasterio.open(result, "w", **profile) as file:
            file.write(classes, 1)
        with rasterio.open(source) as before, rasterio.open(result) as after:
            assert (before.crs, before.transform, before.bounds) == (after.crs, after.transform, after.bounds)
            assert np.array_equal(after.read(1), classes)
    share = float((~seen).double().mean())
    print(f"a scene, {share:.0%} of it unseen: loss and gradients of plain PyTorch, and a map in the same place")


if __name__ == "__main__":
    main()
