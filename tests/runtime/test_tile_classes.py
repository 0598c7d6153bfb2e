"""Classes of tiles: how many there are, what tells tiles apart, and that a recording of one is right for all."""

from __future__ import annotations

from typing import Any

import fuzzing
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.bytecode.libtorch import bytecode_available
from fullframe.runtime.executor import runtime_of
from fullframe.runtime.tile import Tiles
from fullframe.schedule import verify

pytestmark = pytest.mark.skipif(not bytecode_available(), reason="no compiler: nothing is recorded")


class _Net(nn.Module):
    """Convolutions, pooling and enlargement, so that places in several resolutions move on together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down, self.up = nn.Conv2d(6, 8, 3, 2, 1), nn.ConvTranspose2d(8, 6, 2, 2)
        self.last = nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.first(x)))
        z = F.interpolate(F.max_pool2d(self.down(y), 2), scale_factor=2)
        return self.last(torch.cat([y, self.up(z)], 1))


def _tiles(step: Any, *images: torch.Tensor) -> Tiles:
    return runtime_of(step.plan(*images), torch.device("cpu")).tiles


def _stepped(net: nn.Module, side: int, **how: Any) -> tuple[Tiles, list[torch.Tensor], fullframe.Plan]:
    torch.manual_seed(0)
    net = net.double()
    image, target = torch.randn(1, 3, side, side).double(), torch.randn(1, 2, side, side).double()
    step = fullframe.tile(net, loss=F.mse_loss, tile=8, **how)
    for _ in range(2):
        net.zero_grad()
        loss = step(image, target)
        loss.backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    return _tiles(step, image, target), [loss.detach(), *grads], step.plan(image, target)


def test_classes_do_not_grow_with_the_image():
    """Of a grid of 8 x 8 tiles and one of 20 x 20 the same tiles are unlike each other."""
    counts = [len(list(_stepped(_Net(), side)[0].classes())) for side in (64, 160)]
    assert counts[0] == counts[1]


def test_all_of_a_class_run_from_its_bytecode():
    tiles, _, plan = _stepped(_Net(), 96)
    classes = [alike for alike in tiles.classes() if alike.steps is not None]
    assert classes and all(alike.recorded for alike in classes)
    assert all(stage.kinds <= 25 for stage in plan.stages)


def test_right_beside_plain_pytorch():
    torch.manual_seed(1)
    found = fullframe.check(
        _Net().double(), torch.randn(1, 3, 96, 80).double(), torch.randn(1, 2, 96, 80).double(), F.mse_loss, tile=8,
        tolerance=1e-10,
    )  # fmt: skip
    assert found.passed, str(found)


class _Noisy(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.dropout(x, 0.3, training=True))


@pytest.mark.rest
def test_tiles_that_draw_are_unlike_each_other():
    """The random numbers of a tile depend on where it is; what does not draw is alike all the same."""
    _, _, plan = _stepped(_Noisy(), 96)
    kinds = [stage.kinds for stage in plan.stages if len(stage.grid) > 1]
    assert max(kinds) == 12 * 12 and min(kinds) <= 25


def test_odd_tiles_are_seen():
    """Rows of three taps make their outputs in couples: a tile that begins in the middle of one is another kind."""
    torch.manual_seed(0)
    net, image = nn.Conv2d(3, 8, 3, padding=1), torch.randn(1, 3, 63, 63)
    for _ in range(2):
        made = fullframe.tile(net, tile=7)(image)
    torch.testing.assert_close(made, net(image), rtol=0, atol=1e-5)


def test_tiles_that_read_sources_are_recorded():
    """Once each class has been recorded, no tile of a step that reads and writes objects runs in Python."""
    torch.manual_seed(0)
    net = _Net().double().eval()
    image = np.random.default_rng(0).standard_normal((1, 3, 96, 96))
    out = np.zeros((1, 2, 96, 96))
    tiled = fullframe.tile(net, tile=8)
    with torch.no_grad():
        for _ in range(2):
            tiled(image, out=out)
        wanted = fullframe.tile(net, tile=8)(torch.from_numpy(image))
        plan = tiled.plan(image, out=out)
    assert torch.equal(torch.from_numpy(out), wanted)
    assert all(alike.recorded for alike in runtime_of(plan, torch.device("cpu")).tiles.classes() if alike.steps)


@pytest.mark.parametrize("seed", [910664, 911035])
def test_tiles_without_a_part_of_a_small_map_are_told_apart(monkeypatch, seed):
    """Of a map with fewer pixels than there are tiles most tiles have nothing. The first two and the last two of a row
    were alike in that, and one between them, which had the pixel, was taken for another of them."""
    monkeypatch.setattr(verify, "ON", False)  # which would compare all tiles
    case = fuzzing.draw(seed)
    assert case is not None and fuzzing.judged(case, seed).outcome == "right"
