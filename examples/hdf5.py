"""HDF5: whole pictures of a data set in training, one at a time, and scores written back into the file.

    pip install h5py
    python examples/hdf5.py

A `Dataset` reads one picture when it is asked for; nothing cuts it. The file is opened where it is read, so that
workers of a `DataLoader` have handles of their own. The training is that of plain PyTorch.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fullframe

TILED = {
    "budget": "1 GB",
    "tile": 40,
}  # tile= so that these small pictures are cut at all; leave it out for large ones


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Pictures (1, rows, columns) float64 and the class of each pixel (rows, columns) of one file."""

    def __init__(self, path: Path):
        self.path = path
        with h5py.File(path) as file:
            self.count = len(file["picture"])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with h5py.File(self.path) as file:
            picture, classes = file["picture"][index], file["class"][index]
        return torch.from_numpy(picture)[None], torch.from_numpy(classes).long()


def make(path: Path) -> None:
    pictures = np.random.default_rng(0).standard_normal((2, 96, 130))
    with h5py.File(path, "w") as file:
        file.create_dataset("picture", data=pictures, chunks=(1, 32, 130), compression="gzip")
        file.create_dataset("class", data=(pictures > 0.5).astype(np.uint8), chunks=(1, 32, 130), compression="gzip")


def train(net: nn.Module, tiled: bool, pictures: Pictures) -> nn.Module:
    model = fullframe.tile(net, **TILED) if tiled else net
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for picture, classes in DataLoader(pictures, batch_size=1):
        optimizer.zero_grad()
        F.cross_entropy(model(picture), classes).backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pictures.h5")
        make(path)
        pictures = Pictures(path)
        plain, tiled = train(copy.deepcopy(net), False, pictures), train(net, True, pictures)
        for a, b in zip(tiled.state_dict().values(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)

        with h5py.File(path, "r+") as file, torch.no_grad():
            shape = (len(pictures), *pictures[0][1].shape)
            scores = file.create_dataset("score", shape, "f4", chunks=(1, 32, shape[2]), compression="gzip")
            for k, (picture, _) in enumerate(pictures):
                scores[k] = tiled(picture[None])[0].softmax(0)[1].numpy()
            expected = plain(pictures[1][0][None])[0].softmax(0)[1]
            assert np.abs(scores[1] - expected.numpy()).max() < 1e-6
    print(f"{len(pictures)} whole pictures trained on and scored as by plain PyTorch")


if __name__ == "__main__":
    main()
