"""A plan that another process has made is read from disk, and only that of the same step, limits and code."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.codegen.toolchain import cxx, kept_files
from fullframe.compiler import kept_plans
from fullframe.schedule import planner
from fullframe.schedule.saved_plan import digest


def network(width=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1),
    )  # fmt: skip


def inputs(side=64):
    torch.manual_seed(1)
    return torch.randn(1, 1, side, side), torch.randint(0, 3, (1, side // 2, side // 2))


def step(width=8, side=64, budget="300 MB"):
    """The plan, and the loss with all gradients."""
    net = network(width)
    tiled = fullframe.tile(net, loss=F.cross_entropy, budget=budget, workers=2)
    plan = tiled.plan(*inputs(side))
    loss = tiled(*inputs(side))
    loss.backward()
    return plan, [loss.detach(), *(p.grad for p in net.parameters())]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_plans, "folder", lambda: tmp_path)
    monkeypatch.setattr(kept_plans, "ON", True)
    monkeypatch.setattr(kept_plans, "SECONDS", 0)
    return tmp_path


@pytest.fixture
def planned(folder, monkeypatch):
    """How often it is planned."""
    calls, inner = [], kept_plans.plan

    def counted(*args):
        calls.append(1)
        return inner(*args)

    monkeypatch.setattr(kept_plans, "plan", counted)
    return calls


def files(folder):
    return sorted(folder.glob("*.plan"))


def test_it_is_read_and_gives_the_same_bits(folder, planned):
    first, numbers = step()
    second, others = step()
    assert len(planned) == 1 and len(files(folder)) == 1
    assert digest(first) == digest(second) and first.limits == second.limits and first.bytes == second.bytes
    assert all(torch.equal(a, b) for a, b in zip(numbers, others, strict=True))


def test_a_plan_that_makes_again_too(folder, planned):
    with pytest.raises(fullframe.BudgetError) as refused:
        step(budget=1)
    smallest = refused.value.smallest
    first, numbers = step(budget=smallest)
    made = len(planned)
    second, others = step(budget=smallest)
    assert len(planned) == made and digest(first) == digest(second)
    assert all(torch.equal(a, b) for a, b in zip(numbers, others, strict=True))


@pytest.mark.parametrize("other", [{"width": 16}, {"side": 96}, {"budget": "400 MB"}])
def test_another_call_is_planned(folder, planned, other):
    step()
    step(**other)
    assert len(planned) == 2 and len(files(folder)) == 2


def test_other_code_another_compiler_and_another_torch_plan_again(folder, planned, monkeypatch):
    step()
    for owner, name, value in (
        (kept_plans, "_code", lambda: "other"), (cxx, "isa", lambda: "other"), (torch, "__version__", "2.99.0"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, value)
        step()
    assert len(planned) == len(files(folder)) == 4


def test_other_numbers_in_the_planner_plan_again(folder, planned, monkeypatch):
    step()
    monkeypatch.setattr(planner, "PER_FORM", 2 * planner.PER_FORM)
    step()
    assert len(planned) == len(files(folder)) == 2


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "of another kind", "open to others"])
def test_a_damaged_file_is_planned_again(folder, planned, damage):
    _, numbers = step()
    [path] = files(folder)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "of another kind":
        kept_files.keep(pickle.dumps({"a": 1}), path)
    else:
        path.chmod(0o666)
    _, others = step()
    assert len(planned) == 2
    assert all(torch.equal(a, b) for a, b in zip(numbers, others, strict=True))
    step()
    assert len(planned) == 2


def test_where_none_can_be_kept_it_is_planned(folder, planned, monkeypatch):
    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(kept_files, "keep", full)
    step(), step()
    assert len(planned) == 2 and not files(folder)


def test_no_more_are_kept_than_so_many(folder, planned, monkeypatch):
    monkeypatch.setattr(kept_plans, "COUNT", 2)
    for side in (64, 96, 128):
        step(side=side)
    assert len(files(folder)) == 2


def test_quick_ones_are_not_kept(folder, planned, monkeypatch):
    monkeypatch.setattr(kept_plans, "SECONDS", 60)
    step()
    assert not files(folder)
