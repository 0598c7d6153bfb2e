"""OME-Zarr: a channel of a large image read by its metadata, segmented whole, and the labels written beside it.

    pip install zarr
    python examples/ome_zarr.py

The file is made here, small, with two levels of resolution. The finest level is what the network sees: the choice of
a coarser one is where information is lost. The picture stays in its own type, two bytes a pixel, and becomes float
inside of the network, tile by tile. Labels go back by bands, with the axes and the scale of the picture.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor, nn

import fullframe

TILED = {"budget": "1 GB", "tile": 40}  # tile= so that this small picture is cut at all; leave it out for large ones
BAND = 64  # rows that are written at once


class Segmenter(nn.Module):
    """From whole numbers of a detector, (batch, 1, rows, columns), to two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))

    def forward(self, counts: Tensor) -> Tensor:
        return self.net(counts.float() / 1000).argmax(1, keepdim=True)


def make(path: Path) -> np.ndarray:
    """An image of axes t, c, z, y, x in two levels; what its second channel holds."""
    counts = np.random.default_rng(0).poisson(900, (1, 2, 1, 160, 200)).astype(np.uint16)
    group = zarr.open_group(path, mode="w")
    levels = []
    for level, data in enumerate((counts, counts[..., ::2, ::2])):
        array = group.create_array(str(level), shape=data.shape, chunks=(1, 1, 1, 64, 64), dtype=data.dtype)
        array[:] = data
        scale = [1.0, 1.0, 1.0, 0.25 * 2**level, 0.25 * 2**level]
        levels.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": levels}]}
    return counts[0, 1, 0]


def main() -> None:
    torch.manual_seed(0)
    net = Segmenter()
    with tempfile.TemporaryDirectory() as folder:
        truth = make(Path(folder, "image.zarr"))
        group = zarr.open_group(Path(folder, "image.zarr"), mode="r+")
        described: Any = group.attrs["ome"]
        scales = described["multiscales"][0]
        finest: Any = group[scales["datasets"][0]["path"]]
        names = [axis["name"] for axis in scales["axes"]]
        wanted = tuple({"t": 0, "c": 1, "z": 0}.get(name, slice(None)) for name in names)
        counts = torch.from_numpy(finest[wanted])[None, None]
        assert np.array_equal(counts[0, 0].numpy(), truth)

        with torch.no_grad():
            found = fullframe.tile(net, **TILED)(counts)
            assert torch.equal(found, net(counts))

        labels = group.create_group("labels/cells")
        array: Any = labels.create_array("0", shape=finest.shape[-2:], chunks=(64, 64), dtype=np.uint8)
        for top in range(0, array.shape[0], BAND):
            array[top : top + BAND] = found[0, 0, top : top + BAND].numpy().astype(np.uint8)
        steps = scales["datasets"][0]["coordinateTransformations"][0]["scale"][-2:]
        dataset = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": steps}]}
        multiscales = [{"axes": scales["axes"][-2:], "datasets": [dataset]}]
        labels.attrs["ome"] = {
            "version": "0.5",
            "multiscales": multiscales,
            "image-label": {"source": {"image": "../../"}},
        }
        assert np.array_equal(array[:], found[0, 0].numpy())
    print(
        f"{counts.shape[-2]} x {counts.shape[-1]} pixels of {steps[0]} micrometres, labelled as by the plain network"
    )


if __name__ == "__main__":
    main()
