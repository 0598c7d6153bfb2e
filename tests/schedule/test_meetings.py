"""When ranks meet: before what is read, after what is made, and no oftener than that."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.schedule import meetings
from fullframe.schedule.shares import Shares, shares_of
from fullframe.schedule.split import Split


class Branches(nn.Module):
    """Two branches with batch norm, whose sums may go round together, and a loss over both."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=1) for _ in range(2))
        self.deeper = nn.ModuleList(nn.Conv2d(4, 4, 5, padding=2) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = []
        for k, (conv, deeper) in enumerate(zip(self.convs, self.deeper, strict=True)):
            y = self.norms[k](conv(x)).relu()
            made.append(self.norms[k + 2](deeper(y)).relu())
        return torch.cat(made, 1)


@pytest.fixture(scope="module")
def divided() -> tuple[fullframe.Plan, Shares]:
    """A plan, and what two ranks have of it."""
    torch.manual_seed(0)
    step = fullframe.tile(Branches(), loss=F.mse_loss, budget="2 GB", tile=(8, 32), workers=2)
    image, target = torch.randn(1, 3, 64, 32), torch.randn(1, 8, 64, 32)
    plan = step.plan(image, target)
    given = [v for v in plan.graph.inputs if v.shape in (image.shape, target.shape)]
    bounds = (0, 32, 64)
    split = Split("domain", (given[0], 2), bounds, tuple((v, 2, bounds) for v in given), (), {})
    return plan, shares_of(plan.graph, plan.stages, plan.early, plan.tile_axes, split)


def test_all_moves_once_between_its_maker_and_its_reader(divided: tuple[fullframe.Plan, Shares]) -> None:
    plan, shares = divided
    (found,) = shares.meetings.values()
    rows = [(n, m.number) for m in found for n in m.rows]
    sums = {n: m.number for m in found for n in m.sums}
    assert sorted(n for n, _ in rows) == [n for n, moves in enumerate(shares.before) if moves]
    assert sorted(sums) == [n for n, s in enumerate(plan.stages) if s.section.sums and shares.tiles[n] is not None]
    for reader, at in rows:
        makers = [
            k for k in range(reader) for move in shares.before[reader] if move[0] in plan.stages[k].section.outputs
        ]
        assert all(k < at for k in makers) and at <= reader
    for maker, at in sums.items():
        made = {op.output for op in plan.stages[maker].section.sums}
        readers = [k for k, stage in enumerate(plan.stages) if not made.isdisjoint(stage.section.loads)]
        assert maker < at <= min(readers, default=len(plan.stages))


@pytest.mark.parametrize("rank", range(2))
def test_a_stage_waits_for_meetings_that_bring_what_it_reads(
    divided: tuple[fullframe.Plan, Shares], rank: int
) -> None:
    plan, shares = divided
    (found,) = shares.meetings.values()
    share = shares.of(rank)
    waits = meetings.gates(plan.stages, share, range(len(plan.stages)))
    for number, stage in enumerate(plan.stages):
        assert all(m.number <= number for m in found[: waits[number]]), "a meeting that waits for the stage"
        reads = set(stage.section.loads)
        rows = {
            n
            for n, e in enumerate(share.before[: number + 1])
            if e and reads & {p.value for r in e.receives for p in r}
        }
        sums = {n for n, s in enumerate(plan.stages) if reads & {op.output for op in s.section.sums}}
        for k, meeting in enumerate(found):
            if rows.intersection(meeting.rows) or sums.intersection(meeting.sums):
                assert k < waits[number]
    assert 0 in waits.values() and len(set(waits.values())) > 2


def test_ranks_meet_less_often_than_something_moves(divided: tuple[fullframe.Plan, Shares]) -> None:
    plan, shares = divided
    (found,) = shares.meetings.values()
    moved = sum(len(m.rows) + len(m.sums) for m in found)
    assert len(found) <= 2 / 3 * moved and found[-1].number == len(plan.stages)


def test_sums_do_not_wait_for_ever(divided: tuple[fullframe.Plan, Shares], monkeypatch: pytest.MonkeyPatch) -> None:
    """They take memory."""
    plan, shares = divided
    monkeypatch.setattr(meetings, "WAITING", 0)
    (before,) = shares.meetings.values()
    shares.meet(plan.stages, [range(len(plan.stages))])
    (found,) = shares.meetings.values()
    assert all(len(m.sums) <= 1 for m in found) and len(found) > len(before)
