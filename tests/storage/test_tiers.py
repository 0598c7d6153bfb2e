"""Maps in a second tier: a plan that does not fit otherwise, the same numbers, and every part where it belongs."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_plan import Residual, gradients

import fullframe
from fullframe.compiler import pipeline
from fullframe.schedule import planner, tiling


@pytest.fixture
def second_tier(monkeypatch):
    """Plans may use the host's memory as if the processor were a device with a memory of its own; and values are made
    again by sections of their own only, which leaves maps for it."""
    monkeypatch.setattr(planner, "LITTLE", 2)
    made = pipeline.request_for
    monkeypatch.setattr(pipeline, "request_for", lambda *args: replace(made(*args), host=10**9))
    return monkeypatch


def case():
    torch.manual_seed(0)
    return Residual().double(), torch.randn(2, 1, 70, 92, dtype=torch.float64), torch.randint(0, 3, (2, 70, 92))


@pytest.mark.parametrize("tile", [None, 16, (70, 13)])
def test_maps_in_the_second_tier_give_the_same_numbers(second_tier, tile):
    net, image, label = case()
    second_tier.setattr(tiling, "WINDOW", 100_000)
    second_tier.setattr(tiling, "MORE", 1)
    here, away = copy.deepcopy(net), copy.deepcopy(net)
    expected = gradients(
        here, fullframe.tile(here, loss=F.cross_entropy, tile=tile, budget="1 GB", workers=2), image, label
    )
    plenty = fullframe.tile(here, loss=F.cross_entropy, tile=tile, budget="1 GB", workers=2).plan(image, label)
    assert not plenty.offloaded
    with pytest.raises(fullframe.BudgetError) as refused:  # below what dropping and making again can reach
        fullframe.tile(here, loss=F.cross_entropy, tile=tile, budget=1, workers=2).plan(image, label)
    budget = refused.value.smallest
    step = fullframe.tile(away, loss=F.cross_entropy, tile=tile, budget=budget, workers=2)
    plan = step.plan(image, label)
    assert plan.offloaded and plan.bytes.host and plan.projected_bytes <= budget
    assert "in the host's memory" in str(plan)
    found = gradients(away, step, image, label)
    # The last bits may differ: a part that was copied lies otherwise in memory than one cut out of a map.
    scale = max(float(g.abs().max()) for g in expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-14, atol=0)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14 * scale)
    for a, b in zip(away.buffers(), here.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-16)


def test_without_room_in_either_tier_the_step_is_refused(second_tier):
    net, image, label = case()
    with pytest.raises(fullframe.BudgetError, match="smallest"):
        fullframe.tile(net, loss=F.cross_entropy, budget="1 MB").plan(image, label)
