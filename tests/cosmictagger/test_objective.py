"""The losses against their definitions, written out pixel by pixel."""

import pytest
import torch
import torch.nn.functional as F

from cosmictagger.objective import LOSSES, PlaneLoss, TaggedLoss


def by_definition(name: str, logits: tuple[torch.Tensor, ...], label: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for p, x in enumerate(logits):
        y = label[:, p]
        p_class = x.softmax(1)
        truth = F.one_hot(y, 3).movedim(-1, 1)
        entropy = -(truth * x.log_softmax(1)).sum(1)
        if name == "none":
            total = total + entropy.mean()
            continue
        if name == "light":
            w = torch.tensor([1, 1.5, 10], dtype=torch.float64)[y]
        elif name == "even":
            w = torch.tensor([0.3333 / (int((y == k).sum()) + 1) for k in range(3)], dtype=torch.float64)[y]
        else:
            w = (truth * (1 - p_class) ** 2).mean(1).detach()
        total = total + (w * entropy).sum() / w.sum()
    return total


@pytest.fixture
def case() -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    torch.manual_seed(1)
    logits = tuple(3 * torch.randn(2, 3, 6, 7, dtype=torch.float64) for _ in range(3))
    label = torch.randint(0, 3, (2, 3, 6, 7))
    label[:, 2] = 0  # a plane without any charge
    return tuple(x.requires_grad_() for x in logits), label


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_follow_the_definition(name, case):
    logits, label = case
    ours = PlaneLoss(name)(logits, label)
    theirs = by_definition(name, logits, label)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_small_label_types_give_the_same_loss(name, case):
    logits, label = case
    assert torch.equal(PlaneLoss(name)(logits, label), PlaneLoss(name)(logits, label.to(torch.uint8)))


def test_half_precision_logits_are_summed_in_float32(case):
    logits, label = case
    assert PlaneLoss("light")(tuple(x.bfloat16() for x in logits), label).dtype == torch.float32


def test_tags_come_with_the_loss(case):
    logits, label = case
    loss, tags = TaggedLoss(PlaneLoss("focal"))(logits, label)
    assert torch.equal(loss, PlaneLoss("focal")(logits, label))
    assert tags.dtype == torch.uint8
    assert not tags.requires_grad
    assert torch.equal(tags[:, 1], logits[1].argmax(1).to(torch.uint8))


def test_unknown_loss_and_missing_plane_are_named(case):
    logits, label = case
    with pytest.raises(ValueError, match="choose one of none, light, even, focal"):
        PlaneLoss("heavy")
    with pytest.raises(ValueError, match="3 planes of logits but 2"):
        PlaneLoss("none")(logits, label[:, :2])
