"""Plans that are broken by hand are found out; every test's own plans are checked as they are made."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.ir.graph import GraphSignature, verify
from fullframe.schedule import verify as checks
from fullframe.schedule.plan import Grid, Plan
from fullframe.schedule.verify import verify_plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4),
        nn.ReLU(), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    step = fullframe.tile(net, loss=F.cross_entropy, tile=8)
    return step.plan(torch.randn(1, 1, 24, 20), torch.zeros(1, 24, 20, dtype=torch.long))


def broken(plan: Plan, what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        verify_plan(plan)


def test_every_plan_of_the_tests_is_checked(plan):
    assert checks.ON
    verify_plan(plan)


def test_a_section_that_reads_what_is_not_there(plan):
    broken(replace(plan, stages=plan.stages[1:]), "which is not there")
    stages = [*plan.stages[:-1], replace(plan.stages[-1], section=replace(plan.stages[-1].section, loads=()))]
    broken(replace(plan, stages=tuple(stages)), "which the section does not have")


def test_a_value_freed_before_its_last_reader(plan):
    read = next(v for s in plan.stages[1:] for v in s.section.loads if v in plan.slots)
    at = next(k for k, s in enumerate(plan.stages) if read in s.section.outputs)
    stages = [replace(s, frees=(*s.frees, read)) if k == at else s for k, s in enumerate(plan.stages)]
    broken(replace(plan, stages=tuple(stages)), "which is not there")


class Short(Grid):
    """Without the last tile along the last axis."""

    def counts(self) -> list[int]:
        return [*super().counts()[:-1], super().counts()[-1] - 1]


def test_tiles_that_leave_some_of_a_map_out(plan):
    at = next(k for k, s in enumerate(plan.stages) if len(s.grid) > 1 and s.section.saves)
    grid = Short(plan.stages[at].grid.axes)
    stages = [replace(s, grid=grid) if k == at else s for k, s in enumerate(plan.stages)]
    broken(replace(plan, stages=tuple(stages)), "tiles")


def test_maps_in_one_place(plan):
    assert len(plan.slots) > 1
    broken(replace(plan, slots={v: replace(s, offset=0) for v, s in plan.slots.items()}), "in the same place")
    broken(replace(plan, bytes=replace(plan.bytes, arena=1)), "of 1 bytes")


def test_more_bytes_than_the_budget(plan):
    broken(replace(plan, budget=plan.projected_bytes - 1), "beyond the budget")


def test_outputs_that_the_signature_does_not_tell_apart(plan):
    with pytest.raises(AssertionError, match="are not GraphSignature"):
        verify(replace(plan.graph, signature=GraphSignature(handed_out=1)))
