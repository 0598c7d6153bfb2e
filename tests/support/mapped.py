"""A process that reads a picture and its labels from files and writes a prediction to one, which together are larger
than the budget; it prints what its resident set grew by, and what the plans had counted.

Run by ``python tests/support/mapped.py FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from budgeting import CLEAR, status
from torch import nn

CHANNELS, SIDE, TILE = 64, 1200, 80  # 92 MB of bytes each


class Net(nn.Module):
    """Little to compute for each number that is read."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(CHANNELS, 2, 1), nn.Conv2d(2, CHANNELS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x.float() / 255))


class Bytes(Net):
    """The same, with bytes as output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (super().forward(x) * 255).to(torch.uint8)


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target.float()).abs().mean()


def main(folder: Path) -> None:
    shape = 1, CHANNELS, SIDE, SIDE
    image, target, out = (np.memmap(folder / name, np.uint8, "w+", shape=shape) for name in ("x", "y", "out"))
    torch.manual_seed(0)
    net = Net()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    CLEAR.write_text("5")
    before = status("VmRSS")
    import fullframe

    step = fullframe.tile(net, loss=loss, tile=TILE, budget="200 MB", workers=2)
    plans = [step.plan(image, target)]
    step(image, target).backward()
    bytes_ = Bytes()
    bytes_.load_state_dict(net.state_dict())
    predict = fullframe.tile(bytes_, tile=TILE, budget="200 MB", workers=2)
    with torch.no_grad():
        plans.append(predict.plan(image, out=out))
        predict(image, out=out)
    grown = status("VmHWM") - before
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    print({"grown": grown, "projected": max(p.projected_bytes for p in plans), "whole": 3 * image.nbytes})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
