"""Which maps lie on a disk between which of their uses: what is near keeps to its room, what is far to its limit, and
copying a map on the way of a stage saves some of what is moved."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from disks import folder_on_disk
from test_plan import Residual, gradients

import fullframe
from fullframe.compiler import kept_plans, measures
from fullframe.ir.graph import Value
from fullframe.schedule import planner, tiling
from fullframe.schedule.clones import Draft
from fullframe.schedule.placement import Versions, spill
from fullframe.schedule.saved_plan import digest
from fullframe.storage import disk, unnamed_file


@dataclass
class Asked:
    draft: Draft
    maps: dict[Value, int]
    versions: Versions


@pytest.fixture
def case():
    torch.manual_seed(0)
    return Residual().double(), torch.randn(2, 1, 72, 92, dtype=torch.float64), torch.randint(0, 3, (2, 72, 92))


@pytest.fixture
def asked(case, monkeypatch) -> Asked:
    """What the planner asks to place, in a step that has a disk."""
    found = []

    def noted(draft, maps, room, limit, versions):
        found.append(Asked(draft, maps, versions))
        return spill(draft, maps, room, limit, versions)

    monkeypatch.setattr(planner, "spill", noted)
    monkeypatch.setattr(planner, "_tiers", lambda request, _: [request])
    step_of(case, 1 << 30).plan(*case[1:])
    return found[0]


def step_of(case, budget, **options):
    net = case[0]
    return fullframe.tile(
        net, loss=F.cross_entropy, budget=budget, disk="1 GB", folder=folder_on_disk(), workers=1, **options
    )


def lying(draft: Draft, far: frozenset[Value], maps: dict[Value, int]) -> tuple[int, int, int]:
    """The most bytes near and far at once, and what is moved, counted from the sections alone."""
    lives, count = draft.lifetimes(), len(draft.stages)
    tiles = {v: n for v, n in draft.sizes.items() if v in maps or "~" in v.name}
    near = lives.usage(count, {v: n for v, n in tiles.items() if v not in far})
    away = lives.usage(count, {v: n for v, n in tiles.items() if v in far})
    moved = sum(draft.sizes[v] for s in draft.stages for v in (*s.loads, *s.saves) if v in far)
    return max(near), max(away, default=0), moved


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4, 0.25])
def test_what_lies_near_keeps_to_its_room(asked, share):
    peak = lying(asked.draft, frozenset(), asked.maps)[0]
    room = int(share * peak)
    moved, far = spill(asked.draft, asked.maps, room, 1 << 40, asked.versions)
    near, away, traffic = lying(moved, far, asked.maps)
    assert near <= room < peak and far and away and traffic
    whole, all_far = spill(asked.draft, asked.maps, room, 1 << 40, Versions(None))  # no map in two memories
    assert whole is asked.draft or whole.stages == asked.draft.stages
    assert traffic <= lying(whole, all_far, asked.maps)[2]


def test_copies_are_made_where_they_save_something(asked):
    """Some share of the peak is such that a map is near for its first reader and far until the next."""
    peak = lying(asked.draft, frozenset(), asked.maps)[0]
    saved = []
    for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        moved, far = spill(asked.draft, asked.maps, int(share * peak), 1 << 40, asked.versions)
        whole, all_far = spill(asked.draft, asked.maps, int(share * peak), 1 << 40, Versions(None))
        saved.append(lying(whole, all_far, asked.maps)[2] - lying(moved, far, asked.maps)[2])
        assert all("~" in v.name or v in asked.maps for v in far)
    assert max(saved) > 0


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_what_lies_far_keeps_to_its_limit(asked, share):
    peak, _, _ = lying(asked.draft, frozenset(), asked.maps)
    limit = int(share * peak)
    moved, far = spill(asked.draft, asked.maps, 0, limit, asked.versions)
    assert lying(moved, far, asked.maps)[1] <= limit and far


def test_nothing_moves_where_all_has_room(asked):
    peak = lying(asked.draft, frozenset(), asked.maps)[0]
    assert spill(asked.draft, asked.maps, peak, 1 << 40, asked.versions) == (asked.draft, frozenset())


def test_a_step_with_copies_is_that_of_plain_pytorch_and_its_plan_is_kept(case, tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "PER_BYTE", 0)
    monkeypatch.setattr(planner, "LITTLE", 2)
    monkeypatch.setattr(planner, "_tiers", lambda request, _: [request])
    monkeypatch.setattr(tiling, "WINDOW", 100_000)
    for module in (planner, disk, unnamed_file):
        monkeypatch.setattr(module, "DISK_BUFFER", 1 << 15)
    monkeypatch.setattr(kept_plans, "folder", lambda: tmp_path)
    monkeypatch.setattr(kept_plans, "ON", True)
    monkeypatch.setattr(kept_plans, "SECONDS", 0)
    net, image, label = case
    plain = copy.deepcopy(net)
    with pytest.raises(fullframe.BudgetError) as refused:
        step_of(case, 1).plan(image, label)
    plans = []
    for more in range(0, 6_000_000, 300_000):
        step = step_of(case, refused.value.smallest + more)
        plans.append(step.plan(image, label))
        if any("~" in v.name for v in plans[-1].slots):
            break
    else:
        pytest.fail("no plan has a copy")
    expected = gradients(plain, lambda x, y: F.cross_entropy(plain(x), y), image, label)
    found = gradients(net, step, image, label)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-13, atol=0)
    scale = max(float(g.abs().max()) for g in expected[1])
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13 * scale)

    def refuse(*_):
        raise AssertionError("it is planned again")

    monkeypatch.setattr(kept_plans, "plan", refuse)
    again = step_of(case, plans[-1].limits.budget)
    assert digest(again.plan(image, label)) == digest(plans[-1])
    for a, b in zip(gradients(net, again, image, label)[1], found[1], strict=True):
        assert torch.equal(a, b)


def test_the_arithmetic_may_be_told(monkeypatch):
    monkeypatch.setenv(measures.VARIABLE, "1234")
    assert measures.arithmetic_rate(torch.float32) == 1234
    for wrong in ("fast", "0", "-1", "0.5"):
        monkeypatch.setenv(measures.VARIABLE, wrong)
        with pytest.raises(ValueError, match=measures.VARIABLE):
            measures.arithmetic_rate(torch.float32)


def test_the_arithmetic_is_measured_once(monkeypatch, tmp_path):
    monkeypatch.delenv(measures.VARIABLE, raising=False)
    monkeypatch.setattr(measures.kept_files, "directory", lambda: tmp_path)
    found = measures.arithmetic_rate(torch.float32)
    assert found > 0 and found & (found - 1) == 0
    monkeypatch.setattr(measures, "_convolution", lambda _: 1)
    assert measures.arithmetic_rate(torch.float32) == found
