"""The table of budgets: each does what it says, and the smallest is the smallest."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3), nn.SiLU(), nn.Conv2d(16, 3, 3)
    )


@pytest.mark.rest
def test_every_budget_of_the_table_fits_and_costs_more_as_it_falls():
    net, image, label = network(), torch.zeros(1, 1, 512, 512), torch.zeros(1, 506, 506, dtype=torch.long)
    found = fullframe.tile(net, loss=F.cross_entropy, budget=1).budgets(image, label)
    assert len(found) > 2 and found[0].arithmetic == 1.0
    assert [c.projected for c in found] == sorted((c.projected for c in found), reverse=True)
    for choice in (found[0], found[-1]):
        plan = fullframe.tile(net, loss=F.cross_entropy, budget=choice.budget).plan(image, label)
        assert plan.projected_bytes == choice.projected <= choice.budget
    assert str(found).splitlines()[0].split()[:3] == ["budget", "projected", "arithmetic"]
    assert len(str(found).splitlines()) == len(found) + 1


def test_a_forward_alone_has_a_table():
    with torch.no_grad():
        found = fullframe.tile(network(), budget="1 GB").budgets(torch.zeros(1, 1, 256, 256))
    assert found[0].arithmetic == 1.0 and found[-1].budget <= found[0].budget and found[0].read == 0
