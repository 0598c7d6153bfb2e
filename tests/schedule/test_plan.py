"""Plans: budgets are kept or refused with the number that would do, places do not overlap, tiles cover once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.ir.graph import Value
from fullframe.partition.tile_axes import own_region, tiled
from fullframe.schedule.memory import Lifetimes, lifetimes, place


class Residual(nn.Module):
    """Enough stored maps with a gap between their uses that dropping some pays."""

    def __init__(self, width: int = 8, blocks: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(blocks))
        self.down = nn.Conv2d(width, width, 2, 2)
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, x):
        x = self.first(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)) + x, 0.01)
        return self.last(F.interpolate(self.down(x), scale_factor=2, mode="bilinear"))


@pytest.fixture
def case():
    torch.manual_seed(0)
    net = Residual().double()
    return net, torch.randn(2, 1, 70, 94, dtype=torch.float64)[:, :, :, :92], torch.randint(0, 3, (2, 70, 92))


def gradients(net, step, image, label):
    for p in net.parameters():
        p.grad = None
    loss = step(image, label)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in net.parameters()]


def smallest(net, image, label):
    with pytest.raises(fullframe.BudgetError) as caught:
        fullframe.tile(net, loss=F.cross_entropy, budget="1 kB").plan(image, label)
    assert f"{caught.value.smallest:,}" in str(caught.value)
    return caught.value.smallest


def test_the_smallest_budget_named_is_enough_and_exact(case):
    net, image, label = case
    plain = copy.deepcopy(net)
    loss, truth = gradients(plain, lambda x, y: F.cross_entropy(plain(x), y), image, label)
    scale = max(float(g.abs().max()) for g in truth)
    least = smallest(net, image, label)
    plenty = fullframe.tile(net, loss=F.cross_entropy).plan(image, label).projected_bytes
    assert least < plenty
    for budget in (least, (least + plenty) // 2, plenty):
        tried = copy.deepcopy(net)
        step = fullframe.tile(tried, loss=F.cross_entropy, budget=budget)
        assert step.plan(image, label).projected_bytes <= budget
        made, grads = gradients(tried, step, image, label)
        assert abs(float(made - loss)) < 1e-13
        assert max(float((a - b).abs().max()) for a, b in zip(grads, truth, strict=True)) < 1e-11 * scale
        for a, b in zip(tried.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_byte_less_than_the_smallest_is_refused(case):
    net, image, label = case
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(fullframe.BudgetError):
        fullframe.tile(net, loss=F.cross_entropy, budget=smallest(net, image, label) - 1)(image, label)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_maps_alive_together_do_not_overlap(case):
    net, image, label = case
    plan = fullframe.tile(net, loss=F.cross_entropy, budget=smallest(net, image, label)).plan(image, label)
    lives = lifetimes([s.section for s in plan.stages], [v for v in plan.graph.outputs if v is not None])
    placed = sorted(plan.slots.items(), key=lambda item: item[1].offset)
    for k, (a, first) in enumerate(placed):
        assert first.offset + first.nbytes <= plan.bytes.arena
        for b, second in placed[k + 1 :]:
            disjoint = lives.last[a] < lives.first[b] or lives.last[b] < lives.first[a]
            assert disjoint or first.offset + first.nbytes <= second.offset


def test_places_leave_no_gap_that_another_order_fills():
    # (first step, last step, size); by the first step alone they take 4.
    maps = [(5, 5, 2), (4, 5, 1), (0, 3, 1), (1, 4, 1), (0, 1, 1)]
    values = [Value(str(k), (1,), torch.float32, 4) for k in range(len(maps))]
    first, last, size = ({v: m[k] for v, m in zip(values, maps, strict=True)} for k in range(3))
    offsets, arena = place(Lifetimes(first, last), size)
    assert arena == 3 and all(offsets[v] + size[v] <= arena for v in values)


@pytest.mark.parametrize("tile", [None, 13, (32, 7)])
def test_saved_tiles_are_a_disjoint_cover(case, tile):
    net, image, label = case
    plan = fullframe.tile(net, loss=F.cross_entropy, tile=tile).plan(image, label)
    for stage in plan.stages:
        for value in stage.section.saves:
            if not tiled(value, plan.tile_axes):
                continue
            seen = torch.zeros(value.shape, dtype=torch.int32)
            for part in stage.grid.tiles():
                seen[tuple(slice(*i) for i in own_region(value, plan.tile_axes, part))] += 1
            assert bool((seen == 1).all())


@pytest.mark.rest
def test_same_bits_for_any_number_of_workers(case):
    net, image, label = case
    found = []
    for workers in (1, 2, 3):
        tried = copy.deepcopy(net)
        step = fullframe.tile(tried, loss=F.cross_entropy, tile=16, workers=workers)
        found.append(gradients(tried, step, image, label))
    for loss, grads in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0][1], strict=True))


def test_a_branch_ends_before_the_next_begins():
    """Planes that meet only in the loss: the peak is that of one plane, not of three."""
    torch.manual_seed(0)
    net = Residual()

    class Planes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x):
            return [self.net(p) for p in x.split(1, dim=1)]

    def loss(outputs, label):
        return torch.stack([F.cross_entropy(o, label) for o in outputs]).sum()

    label = torch.zeros(1, 64, 64, dtype=torch.long)
    sizes = []
    for planes in (1, 3):
        step = fullframe.tile(Planes(), loss=loss)
        sizes.append(step.plan(torch.zeros(1, planes, 64, 64), label).bytes.arena)
    assert sizes[1] < 1.5 * sizes[0]


def test_a_plan_prints_its_sections(case):
    net, image, label = case
    text = str(fullframe.tile(net, loss=F.cross_entropy, budget="1 GB").plan(image, label))
    for word in ("sections", "saved", "sums", "projected", "budget of 1.00 GB", "tiles", "halo", "save", "free"):
        assert word in text


def test_a_small_map_on_which_much_is_spent_is_cut_and_its_weight_gradient_made_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 256, 3, padding=1), nn.Conv2d(256, 256, 5, padding=2), nn.Conv2d(256, 3, 1))
    step = fullframe.tile(net, loss=F.cross_entropy, workers=2)
    plan = step.plan(torch.zeros(1, 3, 10, 16), torch.zeros(1, 10, 16, dtype=torch.long))
    heavy = {s: [op.target for op in s.section.ops if op.rule.heavy] for s in plan.stages}
    assert any(len(s.grid) == 2 and "tile.conv" in found for s, found in heavy.items())
    (alone,) = (s for s in plan.stages if any(v.nbytes > 6_000_000 for v in (op.output for op in s.section.sums)))
    assert len(alone.grid) == 1 and heavy[alone] == ["tile.conv_weight_grad"]


def test_a_section_begins_where_the_one_before_it_ended(case):
    net, image, label = case
    plan = fullframe.tile(net, loss=F.cross_entropy, tile=16).plan(image, label)
    maker = {v: s for s in plan.stages for v in s.section.outputs}
    reversals = 0
    for stage in plan.stages:
        read = [v for v in stage.section.loads if v in plan.slots and v in maker]
        if len(read) == 1:
            assert stage.reversed != maker[read[0]].reversed
            reversals += stage.reversed
        elif not read:
            assert not stage.reversed
    assert reversals > 1


def test_weights_are_laid_out_when_they_are_needed():
    """Not all at once when the step begins, to lie in memory until the backward pass."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Conv2d(64, 64, 3, padding=1) for _ in range(8)])
    plan = fullframe.tile(net, loss=F.mse_loss).plan(torch.zeros(1, 64, 64, 64), torch.zeros(1, 64, 64, 64))
    assert plan.bytes.untiled < 4 * net[0].weight.nbytes


def test_a_sum_much_larger_than_its_map_is_made_in_one_tile() -> None:
    """Each tile would have one of its own: the weight's gradient of a linear layer behind a small map."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64 * 64, 256))
    step = fullframe.tile(net, loss=F.mse_loss, budget="2 GB", workers=2)
    plan = step.plan(torch.randn(8, 1, 64, 64), torch.randn(8, 256))
    weight = net[3].weight
    sums = [(s, op) for s in plan.stages for op in s.section.sums if op.output.nbytes >= weight.nbytes]
    assert sums and all(len(stage.grid) == 1 for stage, _ in sums)
