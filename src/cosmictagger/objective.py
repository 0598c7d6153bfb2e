"""Losses for pixel tagging, one term per plane, summed over planes.

Cosmic and neutrino pixels are a third of a percent of the image, so three of the four schemes weigh pixels:
`light` by fixed class weights, `even` by the inverse number of pixels of the class, `focal` by how wrong the
network still is (after Lin et al. 2017, arXiv:1708.02002). Each weighted loss is a weighted mean, so its size does
not depend on the number of pixels. What they do badly: `even` is dominated by the few neutrino pixels of a sparse
event, and `focal` weighs nothing once every pixel is right.

All is made of ordinary tensor operations whose shapes depend on shapes alone, so the losses can be traced.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOSSES = ("none", "light", "even", "focal")

LIGHT_COSMIC = 1.5
LIGHT_NEUTRINO = 10.0
EVEN_SHARE = 0.3333


class PlaneLoss(nn.Module):
    """criterion(logits, label) -> scalar loss.

    logits: one float tensor (batch, 3 classes, rows, columns) per plane; label: integer
    (batch, planes, rows, columns) with 0 background, 1 cosmic, 2 neutrino. Half-precision logits are
    promoted to float32 first. Raises ValueError for an unknown name or if planes do not match.
    """

    def __init__(self, name: str = "light") -> None:
        super().__init__()
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(LOSSES)}")
        self.name = name

    def forward(self, logits: tuple[Tensor, ...], label: Tensor) -> Tensor:
        if label.shape[1] != len(logits):
            raise ValueError(f"{len(logits)} planes of logits but {label.shape[1]} planes of labels")
        # unbind, not indexing: one operation whose outputs are the planes
        terms = [plane_loss(self.name, x, y) for x, y in zip(logits, label.unbind(1), strict=True)]
        return torch.stack(terms).sum()

    def extra_repr(self) -> str:
        return self.name


class ShareLoss(nn.Module):
    """criterion(logits, (label, table, totals)) -> what a part of a batch adds to the batch's loss.

    logits and label as in PlaneLoss, of the part. table: float (planes, 3 classes), the weight of a pixel by its
    class, not read where `focal` asks the network. totals: float (planes,), the sum of the weights of all pixels of
    the batch. The shares of all parts sum to the PlaneLoss of the batch, and so do their gradients. Raises as
    PlaneLoss does.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = PlaneLoss(name).name

    def forward(self, logits: tuple[Tensor, ...], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        label, table, totals = target
        terms = []
        for x, y, weights, total in zip(logits, label.unbind(1), table.unbind(0), totals.unbind(0), strict=True):
            entropy = _entropy(x, y)
            if self.name == "focal":
                weight = _focal(entropy.detach())
            else:
                background, cosmic, neutrino = weights.unbind(0)
                weight = torch.where(y == 2, neutrino, torch.where(y == 1, cosmic, background))
            terms.append((weight * entropy).sum() / total)
        return torch.stack(terms).sum()


class FocalTotals(nn.Module):
    """criterion(logits, label) -> the sum of `focal`'s weights in each plane, scalars; arguments as in PlaneLoss."""

    def forward(self, logits: tuple[Tensor, ...], label: Tensor) -> tuple[Tensor, ...]:
        return tuple(_focal(_entropy(x, y).detach()).sum() for x, y in zip(logits, label.unbind(1), strict=True))


def class_weights(name: str, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The table and the totals that ShareLoss takes, for pixels counted by class: int64 (planes, 3). For `focal` the
    totals are those of FocalTotals instead."""
    table = torch.ones(counts.shape, dtype=torch.float64)
    if name == "light":
        table = table * torch.tensor([1.0, LIGHT_COSMIC, LIGHT_NEUTRINO], dtype=torch.float64)
    elif name == "even":
        table = EVEN_SHARE / (counts + 1).double()
    return table.float(), (table * counts).sum(1).float()


class TaggedLoss(nn.Module):
    """A loss that also hands back what the network chose: criterion(logits, label) -> (loss, tags).

    tags: uint8 (batch, planes, rows, columns), the most likely class of each pixel, for logging.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: tuple[Tensor, ...], label: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(logits, label), tags_of(logits)


def tags_of(logits: tuple[Tensor, ...]) -> Tensor:
    """The most likely class of each pixel: uint8 (batch, planes, rows, columns), without gradient."""
    return torch.stack([x.detach().argmax(dim=1).to(torch.uint8) for x in logits], dim=1)


def plane_loss(name: str, logits: Tensor, label: Tensor) -> Tensor:
    """Loss of one plane: logits (batch, classes, rows, columns), integer label (batch, rows, columns)."""
    entropy = _entropy(logits, label)
    if name == "none":
        return entropy.mean()
    weight = _weight(name, entropy.detach(), label)
    return (weight * entropy).sum() / weight.sum()


def _entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Of each pixel, (batch, rows, columns)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, label.long(), reduction="none")


def _focal(entropy: Tensor) -> Tensor:
    """The mean over the classes of onehot * (1 - softmax)^2, where softmax of the true class is exp(-entropy)."""
    return (1 - torch.exp(-entropy)).square() / 3


def _weight(name: str, entropy: Tensor, label: Tensor) -> Tensor:
    """Weight of each pixel, (batch, rows, columns), without gradient."""
    one = torch.ones_like(entropy)
    if name == "light":
        return torch.where(label == 2, LIGHT_NEUTRINO, torch.where(label == 1, LIGHT_COSMIC, one))
    if name == "even":
        weight = torch.zeros_like(entropy)
        for k in range(3):
            member = (label == k).to(entropy.dtype)
            weight = weight + member * (EVEN_SHARE / (member.sum() + 1))
        return weight
    return _focal(entropy)
