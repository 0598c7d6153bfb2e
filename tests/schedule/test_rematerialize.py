"""Values made again through any number of expensive ops: exact, within the limit, and never what is pinned."""

import copy

import pytest
import torch
import torch.nn.functional as F
from forcing import storing
from fuzzing import uncompiled
from torch import nn

import fullframe
from fullframe.compiler import kept_plans
from fullframe.ir.graph import Graph
from fullframe.partition.saved_values import choose_saved_values
from fullframe.schedule import within
from fullframe.schedule.plan import Plan, arithmetic
from fullframe.schedule.planner import computed


class Net(nn.Module):
    """Two levels with batch norm, max pooling and a skip."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        pairs = [(1, width), (width, width), (width, 2 * width), (2 * width, 2 * width), (3 * width, width)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        self.last = nn.Conv2d(width, 3, 1)

    def part(self, k, x):
        return torch.relu(self.norms[k](self.convs[k](x)))

    def forward(self, x):
        skip = self.part(1, self.part(0, x))
        low = self.part(3, self.part(2, F.max_pool2d(skip, 2)))
        return self.last(self.part(4, torch.cat([skip, F.interpolate(low, scale_factor=2.0)], 1)))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def stepped(net, step, image, label):
    """Loss, gradients and buffers of one step."""
    loss = step(image, label)
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters()), *net.buffers()]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= 1e-9 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize(
    ("share", "join", "fill", "train"), [(0.5, False, 0.0, True), (0.0, True, 0.0, True), (0.0, False, 0.5, False)]
)
def test_a_step_that_stores_little_is_exact(share, join, fill, train):
    net, image, label = (
        Net().double().train(train),
        torch.randn(1, 1, 24, 32).double(),
        torch.randint(0, 3, (1, 24, 32)),
    )
    plain, whole = copy.deepcopy(net), copy.deepcopy(net)
    expected = stepped(plain, lambda x, y: F.cross_entropy(plain(x), y), image, label)
    stored = fullframe.tile(whole, loss=F.cross_entropy, workers=1).plan(image, label)
    with storing(share, join=join, fill=fill, window=20_000), uncompiled():
        step = fullframe.tile(net, loss=F.cross_entropy, workers=1)
        plan = step.plan(image, label)
        found = stepped(net, step, image, label)
    assert plan.bytes.arena < stored.bytes.arena
    assert sum(s.section.recompute for s in plan.stages) > 2
    same(found, expected)


def test_a_forward_without_gradients_stores_little_and_is_exact():
    net, image = Net().double().eval(), torch.randn(1, 1, 24, 32).double()
    with torch.no_grad(), storing(0.0, join=True, window=20_000), uncompiled():
        tiled = fullframe.tile(net, workers=1)
        assert tiled.plan(image).bytes.arena < 3 * image.nbytes
        same([tiled(image)], [net(image)])


@pytest.mark.rest
def test_outputs_that_come_before_their_gradients_are_exact():
    net, image = Net().double(), torch.randn(1, 1, 24, 32).double()
    plain = copy.deepcopy(net)
    (plain(image) ** 2).sum().backward()
    with storing(0.0, join=True, window=20_000), uncompiled():
        (fullframe.tile(net, workers=1)(image) ** 2).sum().backward()
    same([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("join", [False, True])
def test_what_is_pinned_is_made_once(join):
    net, image, label = Net(), torch.randn(1, 1, 24, 32), torch.randint(0, 3, (1, 24, 32))
    with storing(0.0, join=join, window=20_000):
        plan = fullframe.tile(net, loss=F.cross_entropy, workers=1).plan(image, label)
    pinned = choose_saved_values(plan.graph, plan.tile_axes).pinned
    assert pinned
    for value in pinned:
        assert sum(op.output.name.split("'")[0] == value.name for s in plan.stages for op in s.section.ops) == 1


def test_every_stage_reads_what_is_stored_when_it_runs():
    net, image, label = Net(), torch.randn(1, 1, 24, 32), torch.randint(0, 3, (1, 24, 32))
    with storing(0.2, join=True, fill=0.6, window=20_000):
        plan = fullframe.tile(net, loss=F.cross_entropy, workers=1).plan(image, label)
    known = set(plan.graph.inputs) | set(plan.graph.constants)
    for stage in plan.stages:
        assert known.issuperset(stage.section.loads)
        known |= set(stage.section.outputs)
        known -= set(stage.frees)


def test_the_plan_says_what_is_made_again():
    net, image, label = Net(), torch.zeros(1, 1, 24, 32), torch.zeros(1, 24, 32, dtype=torch.long)
    with storing(0.0, join=True, window=20_000):
        plan = fullframe.tile(net, loss=F.cross_entropy, workers=1).plan(image, label)
    assert "times that of the fastest plan" in str(plan) and "again" in str(plan)
    assert isinstance(plan, Plan) and isinstance(plan.graph, Graph) and arithmetic(plan) > 0


@pytest.mark.rest
def test_what_a_rung_leaves_of_the_budget_is_used():
    """A plan that was found for one budget, or one that is as fast, is found for the bytes that it takes."""
    net = Net(8)
    image, label = torch.zeros(()).expand(1, 1, 4096, 4096), torch.zeros((), dtype=torch.long).expand(1, 4096, 4096)

    def planned(budget: int) -> Plan:
        return fullframe.tile(net, loss=F.cross_entropy, workers=1, budget=budget).plan(image, label)

    everything = planned(1 << 40).projected_bytes
    for share in (0.7, 0.5, 0.35):
        first = planned(int(share * everything))
        assert computed(planned(first.projected_bytes + 1)) < 1.1 * computed(first)  # cheap ops, too: it is minimised


@pytest.mark.rest
def test_windows_are_larger_where_that_is_cheaper(monkeypatch):
    """What is found within a budget is never dearer than what the first state that fits had."""
    net, image = Net(8), torch.zeros(()).expand(1, 1, 4096, 4096)
    label = torch.zeros((), dtype=torch.long).expand(1, 4096, 4096)
    roomier, seen = within._roomier, []

    def noting(found, finish, over, price):
        made = roomier(found, finish, over, price)
        seen.append((found.most, price(found.plan), made.most, price(made.plan), over(made.plan)))
        return made

    monkeypatch.setattr(within, "_roomier", noting)
    monkeypatch.setattr(kept_plans, "ON", False)
    with pytest.raises(fullframe.BudgetError) as caught:
        fullframe.tile(net, loss=F.cross_entropy, budget=1).plan(image, label)
    for more in (1.02, 1.1):
        fullframe.tile(net, loss=F.cross_entropy, budget=int(more * caught.value.smallest)).plan(image, label)
    assert seen
    for most, before, larger, after, over in seen:
        assert over <= 0 and larger >= most and (after < before or larger == most)


@pytest.mark.rest
def test_one_worker_needs_no_more_than_two():
    """A map that one worker would have in one piece is cut where the budget is small."""
    net, image, label = Net(8), torch.zeros(1, 1, 256, 256), torch.zeros(1, 256, 256, dtype=torch.long)
    smallest = []
    for workers in (1, 2):
        with pytest.raises(fullframe.BudgetError) as refused:
            fullframe.tile(net, loss=F.cross_entropy, workers=workers, budget=1).plan(image, label)
        smallest.append(refused.value.smallest)
    assert smallest[0] <= smallest[1]
