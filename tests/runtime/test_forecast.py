"""How long a step will take, by its plan: said for every network, and about right."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from randomnets import draw
from torch import nn

import fullframe
from fullframe.runtime import forecast as forecasts
from fullframe.runtime.forecast import forecast
from fullframe.schedule.plan import Traffic


def network(width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 2, 1),
    )  # fmt: skip


def test_a_plan_says_how_long_a_step_takes():
    image, label = torch.randn(1, 1, 512, 512), torch.randint(0, 2, (1, 256, 256))
    step = fullframe.tile(network(), loss=F.cross_entropy, budget="1 GB")
    plan = step.plan(image, label)
    assert plan.predicted_seconds is not None and "predicted" in str(plan)
    assert step.plan(image, label) is plan
    taken = []
    for _ in range(6):
        start = time.perf_counter()
        step(image, label).backward()
        taken.append(time.perf_counter() - start)
    assert plan.predicted_seconds / 20 < min(taken) < plan.predicted_seconds * 20  # whatever else runs here


def test_what_was_measured_is_measured_once(monkeypatch):
    image = torch.randn(1, 1, 256, 256)
    module = fullframe.tile(network(), budget="1 GB")
    first = forecast(module.plan(image))
    monkeypatch.setattr(forecasts, "_timed", None)
    assert forecast(module.plan(image)) == first and first.seconds == sum(first)


def test_what_is_large_is_counted_and_not_measured(monkeypatch):
    image = torch.randn(1, 1, 256, 256)
    plan = fullframe.tile(network(24), budget="1 GB").plan(image)
    measured = forecast(plan).seconds
    monkeypatch.setattr(forecasts, "LARGE", 0)
    monkeypatch.setattr(forecasts, "_seconds", None)
    counted = forecast(plan).seconds
    assert counted > 0 and measured > 0


def test_a_disk_counts_for_what_it_takes_longer_than_the_rest():
    plan = fullframe.tile(network(), budget="1 GB").plan(torch.randn(1, 1, 256, 256))
    assert plan.limits is not None and forecast(plan).disk == 0
    slow = replace(plan, bytes=replace(plan.bytes, disk=1), limits=plan.limits._replace(rate=100))
    slow.__dict__["disk_traffic"] = Traffic(3_000_000_000, 1_000_000_000)  # as if it had been counted
    found = forecast(slow)
    assert found.seconds == pytest.approx(40) and found.disk == pytest.approx(
        40 - found.ops - found.fused - found.calls
    )


def test_a_table_of_budgets_has_the_time_of_each():
    image, label = torch.zeros(1, 1, 256, 256), torch.zeros(1, 128, 128, dtype=torch.long)
    found = fullframe.tile(network(), loss=F.cross_entropy, budget="1 GB").budgets(image, label)
    assert all(choice.seconds is not None and choice.seconds > 0 for choice in found)
    assert "predicted" in str(found).splitlines()[0]


@pytest.mark.parametrize("seed", range(12))
def test_every_op_can_be_measured(seed):
    """Of random networks, though what an op is given are numbers of no meaning."""
    case = draw(31_000 + seed)
    if case is None:
        pytest.skip("no network of that number")
    step = fullframe.tile(case.net, loss=case.loss, tile=case.tile, budget="4 GB", workers=1)
    given = (case.input,) if case.loss is None else (case.input, case.target)
    try:
        plan = step.plan(*given)
    except RuntimeError as error:
        pytest.skip(f"plain PyTorch makes no gradients of it: {error}")
    assert forecast(plan).seconds > 0
