"""The executor: threads of the caller, tiles kept and made anew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fullframe
from fullframe.ir.graph import Value
from fullframe.runtime import executor
from fullframe.runtime import tasks as task
from fullframe.runtime.fused import bind
from fullframe.runtime.tile import Tiles


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 3, padding=1)
    )


def _gradients(step: nn.Module, net: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad()
    step(image).square().sum().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def test_the_callers_threads_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        net = _net()
        _gradients(fullframe.tile(net, tile=16), net, torch.randn(1, 3, 40, 40))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kept", [0, 3, 1 << 14])
def test_same_bits_whether_tasks_are_kept(monkeypatch, kept):
    net, image = _net(), torch.randn(1, 3, 40, 40)
    truth = _gradients(fullframe.tile(net, tile=16), net, image)
    monkeypatch.setattr(executor, "room_of", lambda plan: (kept, kept))
    step = fullframe.tile(net, tile=16)
    for _ in range(2):
        assert all(map(torch.equal, _gradients(step, net, image), truth))


def test_what_a_plan_leaves_of_its_budget_is_for_tasks():
    """All tiles of a large image run from bytecode where there is memory for it; where there is not, some do."""
    net, image = _net(), torch.randn(1, 3, 400, 400)
    least = fullframe.tile(net, tile=4, budget="1 GB").plan(image).projected_bytes
    for spare in (0, 100 * task.NBYTES):
        plan = fullframe.tile(net, tile=4, budget=least + spare).plan(image)
        tiles = sum(len(stage.grid) for stage in plan.stages)
        assert plan.projected_bytes == least and tiles > task.KEPT
        count, tasks = task.room_of(plan)
        assert count == task.KEPT + spare // task.NBYTES // 2 and tasks >= sum(stage.kinds for stage in plan.stages)
        scheduled = [stage.scheduled for stage in Tiles(plan.stages, (count, tasks)).stages]
        assert any(scheduled) and not all(scheduled)
        assert all(stage.scheduled for stage in Tiles(plan.stages, (tiles, tasks)).stages)


def test_a_stored_part_that_is_a_window_too_is_looked_up_every_time():
    # A job made ready would store it, and not keep the window that a later job reads.
    value = Value("v", (4, 6), torch.float64, 8)
    stored = torch.zeros(4, 6, dtype=torch.float64)
    for keep in (False, True):
        target = task.Target(value, (slice(0, 2), slice(0, 6)), None, keep)
        job: Any = SimpleNamespace(reads=(), targets=(target,))
        made = bind(job, SimpleNamespace(reusable=True), {value: stored}, {}, [], {value: stored[:2]})  # type: ignore[arg-type]
        assert (made is None) is keep
