"""Losses for the zoo: each a criterion of (outputs, target) and the target it wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Loss:
    """``make`` builds the criterion; ``kind`` says what its target is.

    "like": random numbers like every output; "unit": in [0, 1] like the first; "labels": class per pixel, a float as
    MONAI has it, with a channel axis; "pixels": an integer without; "class": per image; "bits": zeros and ones like
    the first.
    """

    make: Callable[[], Callable[[Any, Any], torch.Tensor]]
    kind: str


class Reported(nn.Module):
    """A criterion that also returns what it was given, so that outputs can be compared."""

    def __init__(self, criterion: Callable[[Any, Any], torch.Tensor]):
        super().__init__()
        self.criterion = criterion

    def forward(self, output: Any, target: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self.criterion(output, target), tensors(output)


def tensors(tree: Any) -> list[torch.Tensor]:
    """The floating tensors in an output, dataclasses and named tuples included."""
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def every(output: Any, targets: list[torch.Tensor]) -> torch.Tensor:
    """Mean squared error over every output."""
    made = tensors(output)
    total = made[0].new_zeros(())
    for o, t in zip(made, targets, strict=True):
        total = total + F.mse_loss(o.to(t.dtype), t)
    return total


def weighted(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy with class weights, an ignored class and label smoothing."""
    weight = torch.linspace(0.5, 2, output.shape[1], dtype=output.dtype)
    return F.cross_entropy(output, target, weight, ignore_index=1, label_smoothing=0.1)


def auxiliary(output: Any, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every output, the first in full and the others at 0.4."""
    terms = [F.cross_entropy(o, target) for o in tensors(output)]
    return terms[0] + 0.4 * sum(terms[1:], terms[0].new_zeros(()))


def stacked(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Deep supervision whose outputs are stacked on axis 1 in training and single in evaluation."""
    return supervised(list(output.unbind(1)) if output.dim() > target.dim() else [output], target)


def supervised(output: Any, target: torch.Tensor) -> torch.Tensor:
    """MONAI's deep supervision over outputs of falling resolution, added up in their dtype, not in float32."""
    from monai.losses import DeepSupervisionLoss

    loss = DeepSupervisionLoss(_monai("DiceCELoss", squared_pred=True)())
    heads = tensors(output)
    return sum(w * loss.get_loss(o, target) for w, o in zip(loss.get_weights(len(heads)), heads, strict=True))


def focal(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """MONAI's focal loss in the dtype of the output; its module computes in float32 whatever that is."""
    from monai.losses.focal_loss import softmax_focal_loss
    from monai.networks import one_hot

    return softmax_focal_loss(output, one_hot(target, output.shape[1], output.dtype), 2.0, 0.75).mean()


def dice_focal(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Dice over the whole batch, and focal loss."""
    return _monai("DiceLoss", batch=True)()(output, target) + 0.5 * focal(output, target)


def charbonnier(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Smooth L1 of image restoration, and total variation."""
    near = ((output - target).square() + 1e-6).sqrt().mean()
    return near + 0.1 * (output.diff(dim=-1).abs().mean() + output.diff(dim=-2).abs().mean())


def _monai(name: str, **options: Any) -> Callable[[], Any]:
    """A loss of MONAI's on softmax outputs and class labels, one-hot in the dtype of the output.

    Left to itself it makes them in float32, which float64 results would then be rounded by.
    """

    def make() -> Any:
        import monai.losses
        from monai.networks import one_hot

        loss = getattr(monai.losses, name)(softmax=True, **options)
        return lambda output, target: loss(output, one_hot(target, output.shape[1], output.dtype))

    return make


def similarity(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """One minus structural similarity (Wang et al. 2004, uniform windows of 7 pixels), and L1."""
    x, y = output.sigmoid(), target
    mx, my, xx, yy, xy = (F.avg_pool2d(t, 7, 1) for t in (x, y, x * x, y * y, x * y))
    top = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
    return 1 - (top / ((mx * mx + my * my + 1e-4) * (xx - mx * mx + yy - my * my + 9e-4))).mean() + F.l1_loss(x, y)


LOSSES: dict[str, Loss] = {
    "mse": Loss(lambda: every, "like"),
    "l1": Loss(lambda: F.l1_loss, "unit"),
    "charbonnier": Loss(lambda: charbonnier, "unit"),
    "ssim": Loss(lambda: similarity, "unit"),
    "cross entropy": Loss(lambda: weighted, "pixels"),
    "auxiliary": Loss(lambda: auxiliary, "pixels"),
    "classes": Loss(lambda: auxiliary, "class"),
    "bce": Loss(lambda: F.binary_cross_entropy_with_logits, "bits"),
    "dice": Loss(_monai("DiceLoss", squared_pred=True), "labels"),
    "generalised dice": Loss(_monai("GeneralizedDiceLoss"), "labels"),
    "dice ce": Loss(_monai("DiceCELoss", include_background=False), "labels"),
    "dice focal": Loss(lambda: dice_focal, "labels"),
    "focal": Loss(lambda: focal, "labels"),
    "tversky": Loss(_monai("TverskyLoss", alpha=0.3, beta=0.7), "labels"),
    "deep supervision": Loss(lambda: supervised, "labels"),
    "stacked supervision": Loss(lambda: stacked, "labels"),
}


def target_of(loss: Loss, output: Any, rank: int) -> Any:
    """A random target for an output of the network, in float64 where floating; ``rank`` is that of the image."""
    made = tensors(output)
    first, generator = made[0], torch.Generator().manual_seed(2)
    if loss.kind == "like":
        return [torch.randn(t.shape, generator=generator).double() for t in made]
    if loss.kind == "unit":
        return torch.rand(first.shape, generator=generator).double()
    if loss.kind == "bits":
        return torch.randint(0, 2, first.shape, generator=generator).double()
    at = 2 if first.dim() > rank else 1  # where outputs are stacked, their classes come one axis later
    classes, spatial = first.shape[at], first.shape[at + 1 :]
    shape = {"class": (), "pixels": spatial, "labels": (1, *spatial)}[loss.kind]
    made = torch.randint(0, classes, (first.shape[0], *shape), generator=generator)
    return made.double() if loss.kind == "labels" else made
