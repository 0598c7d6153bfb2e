"""Devices: nothing outside of their module asks which kind it has, and a third kind is one class and one entry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.budget import host_bytes
from fullframe.codegen.kernel import Plain
from fullframe.device import DEVICES, Device, device_of
from fullframe.runtime.executor import runtime_of

CPU = torch.device("cpu")
ASKED = re.compile(r"\.is_(cuda|cpu|xpu|mps)\b|\.type\s*(==|!=|in|not in)\s*[(\[{]?\s*[\"'](cpu|cuda|meta|mps|xpu)")


def test_only_the_devices_module_knows_kinds():
    root = Path(fullframe.__file__).parent
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in sorted(root.rglob("*.py"))
        if path.name != "device.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if ASKED.search(line)
    ]
    assert not found, "\n".join(found)
    for line in ("x.device.type == 'cpu'", "t.is_cuda", 'place.type not in ("cpu", "cuda")'):
        assert ASKED.search(line)


class Reference(Device):
    """The processor, op by op and tile by tile: nothing compiled, nothing fused, nothing recorded."""

    on_host = True

    def free_bytes(self, place: torch.device) -> int:
        return host_bytes()


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.GELU(), nn.Conv2d(16, 3, 1),
    ).double()  # fmt: skip


def test_a_third_device(monkeypatch):
    monkeypatch.setitem(DEVICES, "cpu", Reference())
    image, target = torch.randn(2, 2, 40, 44, dtype=torch.float64), torch.randn(2, 3, 20, 22, dtype=torch.float64)
    found = fullframe.check(_net(), image, target, F.mse_loss, tile=8, tolerance=1e-10)
    assert found.passed, str(found)
    step = fullframe.tile(_net(), loss=F.mse_loss, tile=8, budget="1 GB", workers=2)
    losses = [step(image, target).item() for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]
    runtime = runtime_of(step.plan(image, target), CPU)
    assert all(isinstance(kernel, Plain) for kernel in runtime.kernels.values())
    assert not any(alike.recorded for alike in runtime.tiles.classes())


def test_a_device_that_nobody_knows_asks_for_a_budget():
    with pytest.raises(NotImplementedError, match="give a budget"):
        device_of(torch.device("meta")).free_bytes(torch.device("meta"))


@pytest.mark.parametrize("budget", ["1 GB", None])
def test_tensors_on_other_devices_are_refused_by_name(budget: str | None):
    net, image = nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 16, 16)
    with pytest.raises(fullframe.CaptureError, match=r"input0 is on meta, and a tiled step runs on cpu or cuda"):
        fullframe.tile(net, budget=budget)(image.to("meta"))
    with pytest.raises(fullframe.CaptureError, match="weight is on meta"):
        fullframe.tile(net.to("meta"), budget=budget).plan(image)
