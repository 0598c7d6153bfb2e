"""Checkpoints and copies: `state_dict`, `torch.save` and `torch.load`, `copy.deepcopy`, and a notebook's cells.

    python examples/save_and_copy.py

Parameter names are those of the plain network, so weights go both ways. A copy shares nothing with what it was copied
from. What a step keeps between calls (plans, memory for maps) goes when the step does: deleting it, or running a
notebook's cell again, gives it back.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fullframe

TILED = {
    "budget": "1 GB",
    "tile": 24,
}  # tile= so that these small pictures are cut at all; leave it out for large ones


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))


def main() -> None:
    torch.manual_seed(0)
    net, image, target = network(), torch.randn(1, 1, 64, 64), torch.randint(2, (1, 64, 64))
    step = fullframe.tile(net, loss=F.cross_entropy, **TILED)
    before = step(image, target)
    before.backward()

    with tempfile.TemporaryDirectory() as folder:
        weights, whole = Path(folder, "weights.pt"), Path(folder, "step.pt")
        torch.save(step.state_dict(), weights)
        plain = network()
        plain.load_state_dict(torch.load(weights, weights_only=True))  # into the plain network
        torch.save(step, whole)
        loaded = torch.load(whole, weights_only=False)  # a file of one's own: pickles run code
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.parameters(), strict=True))
    assert torch.equal(loaded(image, target), step(image, target))

    other = copy.deepcopy(step)
    with torch.no_grad():
        other.module[0].weight.zero_()
    assert net[0].weight.any()  # the copy's weights are its own
    assert not torch.equal(other(image, target), step(image, target))

    gone = weakref.ref(step)
    del step, before
    gc.collect()
    assert gone() is None  # and with it its plans and its memory
    print("weights went to a plain network, a step to a file and back, and a copy is on its own")


if __name__ == "__main__":
    main()
