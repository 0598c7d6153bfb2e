"""A step made of several batches is that of one large batch, in the convention of each loss."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cosmictagger import parts
from cosmictagger.data import EventFile
from cosmictagger.evaluate import Running
from cosmictagger.model import UResNet
from cosmictagger.objective import LOSSES, PlaneLoss, ShareLoss, class_weights
from cosmictagger.parts import Part, Steps, part_of
from cosmictagger.recipe import Recipe
from cosmictagger.train import read_log, train


@pytest.fixture
def recipe(small) -> Recipe:
    network = replace(small, depth=1, normalization="none")
    return Recipe(
        network, batch=1, accumulate=3, crop=(16, 32), flips=True, steps=1, optimizer="SGD", learning_rate=0.1
    )


def gradients(net: nn.Module, recipe: Recipe, events, running: Running) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the second step, which is of other events than the first."""
    steps = Steps(net, recipe, running)
    made = (part_of(k, recipe, events, running) for k in steps.numbers(1, 2))
    taken = steps.take(Part(replace(p.batch, image=p.batch.image.double()), p.counts) for p in made)
    return taken.loss, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
@pytest.mark.parametrize("downsample", [0, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_three_parts_are_one_batch_of_three(loss, downsample, engine, recipe, small_events, monkeypatch):
    exact = torch.float64
    monkeypatch.setattr(parts, "class_weights", lambda *a: tuple(x.to(exact) for x in class_weights(*a)))
    recipe, found = replace(recipe, loss=loss), []
    for r in (recipe, replace(recipe, batch=3, accumulate=1)):
        torch.manual_seed(0)
        net = UResNet(recipe.network).double()
        with EventFile(small_events) as events:
            found.append(gradients(net, r, events, Running(downsample=downsample)))
    # weights and their sums are kept in float32
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, value in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], value, rtol=1e-6, atol=1e-6 * float(value.abs().max()))


@pytest.mark.parametrize("loss", ["light", "focal"])
def test_a_training_takes_the_step_of_the_large_batch(loss, engine, recipe, small_events, tmp_path):
    with EventFile(small_events) as events:
        for name, r in (("a", recipe), ("b", replace(recipe, batch=3, accumulate=1))):
            train(replace(r, loss=loss, steps=2), events, tmp_path / name, Running())
    a, b = (read_log(tmp_path / name) for name in "ab")
    assert [line["step"] for line in a] == [1, 2]
    for mine, theirs in zip(a, b, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["train"]["accuracy"] == pytest.approx(theirs["train"]["accuracy"], abs=1e-3)


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_batch_norm_sees_each_part_once(engine, recipe, small, small_events):
    """Its running statistics move once a part, and not in the pass that `focal` needs first."""
    recipe, net = replace(recipe, network=replace(small, depth=1), loss="focal"), UResNet(replace(small, depth=1))
    steps = Steps(net, recipe, Running())
    with EventFile(small_events) as events:
        made = [part_of(k, recipe, events, Running()) for k in steps.numbers(0, 1)]
    assert len(made) == 3 + 3
    before = {name: value.clone() for name, value in net.named_buffers()}

    def first_looked_at():
        yield from made[:3]
        assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
        yield from made[3:]

    steps.take(first_looked_at())
    assert net.initial_convolution.norm.num_batches_tracked == 3 * 3  # planes


def test_shares_of_a_loss_are_for_its_own_weights():
    logits = tuple(torch.randn(1, 3, 2, 2, dtype=torch.float64) for _ in range(3))
    label = torch.tensor([0, 1, 2, 2]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    counts = torch.tensor([[1, 1, 2]] * 3)
    for name in ("none", "light", "even"):
        table, totals = class_weights(name, counts)
        torch.testing.assert_close(
            ShareLoss(name)(logits, (label, table.double(), totals.double())),
            PlaneLoss(name)(logits, label),
            rtol=1e-6,
            atol=0,
        )
    with pytest.raises(ValueError, match="unknown loss"):
        ShareLoss("heavy")
