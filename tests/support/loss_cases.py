"""The table of small networks goes on: losses, and the activations and layers that draw random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rule_cases import CASES, LINE, PLANE, SOLID, case, layer
from torch import nn

# Losses ------------------------------------------------------------------------------------------


def classes(*shape: int, ignore: int | None = None) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        target = torch.randint(0, 4, shape)
        if ignore is not None:
            target[..., ::3] = ignore
        return target

    return make


def loss_case(
    name: str, loss: Callable[..., torch.Tensor], target: Callable[[], Any], shape: tuple[int, ...] = PLANE,
    whole: tuple[str, ...] = (),
) -> None:  # fmt: skip
    case(f"loss {name}", lambda x: x, shape=shape, loss=loss, target=target, whole=whole)


def weights_of(x: torch.Tensor, rank: int = 0) -> torch.Tensor:
    """One weight per class, none of them equal."""
    return torch.tensor([0.3, 1.0, 2.0, 0.7], dtype=x.dtype).view(4, *[1] * rank)


PIXELS = classes(2, 9, 11)
for _reduction in ("mean", "sum", "none"):

    def _reduced(loss: Any, reduction: str = _reduction, **args: Any) -> Any:
        def made(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            each = loss(x, t, reduction=reduction, **args)
            return (each * each.detach().sin()).sum() if reduction == "none" else each

        return made

    loss_case(f"cross entropy {_reduction}", _reduced(F.cross_entropy), PIXELS)
    loss_case(f"cross entropy ignore {_reduction}", _reduced(F.cross_entropy, ignore_index=1), PIXELS)
    loss_case(f"cross entropy ignore -100 {_reduction}", _reduced(F.cross_entropy), classes(2, 9, 11, ignore=-100))
    loss_case(
        f"cross entropy weights {_reduction}",
        lambda x, t, r=_reduced: r(F.cross_entropy, weight=weights_of(x))(x, t),
        PIXELS,
    )
    loss_case(f"cross entropy smooth {_reduction}", _reduced(F.cross_entropy, label_smoothing=0.1), PIXELS)
    loss_case(
        f"cross entropy all {_reduction}",
        lambda x, t, r=_reduced: r(F.cross_entropy, weight=weights_of(x), label_smoothing=0.2, ignore_index=2)(x, t),
        PIXELS,
    )
    loss_case(
        f"cross entropy probabilities {_reduction}",
        _reduced(F.cross_entropy),
        lambda: torch.rand(2, 4, 9, 11, dtype=torch.float64).softmax(1),
    )
    loss_case(f"nll {_reduction}", lambda x, t, r=_reduced: r(F.nll_loss)(x.log_softmax(1), t), PIXELS)
    for _name in [
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "binary_cross_entropy_with_logits",
        "soft_margin_loss",
        "poisson_nll_loss",
    ]:
        loss_case(
            f"{_name} {_reduction}", _reduced(getattr(F, _name)), lambda: torch.rand(2, 4, 9, 11, dtype=torch.float64)
        )
    loss_case(
        f"bce {_reduction}",
        lambda x, t, r=_reduced: r(F.binary_cross_entropy)(x.sigmoid(), t),
        lambda: torch.rand(2, 4, 9, 11, dtype=torch.float64),
    )
    loss_case(
        f"kl {_reduction}",
        lambda x, t, r=_reduced: r(F.kl_div)(x.log_softmax(1), t),
        lambda: torch.rand(2, 4, 9, 11, dtype=torch.float64),
    )
loss_case(
    "kl batchmean",
    lambda x, t: F.kl_div(x.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True),
    lambda: torch.rand(2, 4, 9, 11, dtype=torch.float64),
)
loss_case(
    "bce weights",
    lambda x, t: F.binary_cross_entropy_with_logits(x, t, weight=t.sin(), pos_weight=weights_of(x, 2)),
    lambda: torch.rand(2, 4, 9, 11, dtype=torch.float64),
)
loss_case("cross entropy 3d", F.cross_entropy, classes(1, 5, 6, 7), shape=SOLID)
loss_case(
    "cross entropy 3d weights", lambda x, t: F.cross_entropy(x, t, weights_of(x)), classes(1, 5, 6, 7), shape=SOLID
)
loss_case("cross entropy 1d", F.cross_entropy, classes(2, 23), shape=LINE)
loss_case(
    "cross entropy pixels", lambda x, t: F.cross_entropy(x.permute(0, 2, 3, 1).reshape(-1, 4), t.reshape(-1)), PIXELS
)
loss_case(
    "cross entropy map",
    lambda x, t: (F.cross_entropy(x, t[0], reduction="none") * t[1]).mean(),
    lambda: (PIXELS(), torch.rand(2, 9, 11, dtype=torch.float64)),
)
loss_case("image label", lambda x, t: F.cross_entropy(x.mean((2, 3)), t), classes(2))
case(
    "loss multi margin",
    lambda x: x,
    loss=lambda x, t: F.multi_margin_loss(x.mean((2, 3)), t),
    target=classes(2),
    whole=("multi_margin",),
)
loss_case(
    "cosine",
    lambda x, t: 1 - F.cosine_similarity(x, t, dim=1).mean(),
    lambda: torch.rand(2, 4, 9, 11, dtype=torch.float64),
)


def focal(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    nll = F.cross_entropy(x, t, reduction="none")
    return ((1 - torch.exp(-nll)) ** 2 * nll).mean()


def dice(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p, y = x.softmax(1), F.one_hot(t, 4).movedim(-1, 1).to(x.dtype)
    both, either = (p * y).sum((0, 2, 3)), (p + y).sum((0, 2, 3))
    return 1 - ((2 * both + 1) / (either + 1)).mean()


def dice_flat(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p = x.softmax(1).permute(1, 0, 2, 3).contiguous().view(4, -1)
    y = F.one_hot(t.reshape(-1), 4).t().to(x.dtype)
    return 1 - (2 * (p * y).sum(-1) / (p.pow(2).sum(-1) + y.sum(-1))).mean()


def dice_batch(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p, y = x.sigmoid().flatten(1), torch.zeros_like(x).scatter_(1, t[:, None], 1).view(2, -1)
    return 1 - ((2 * (p * y).sum(1) + 1) / ((p * p).sum(1) + y.sum(1) + 1)).mean()


def tversky(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p, y = x.softmax(1), torch.stack([t == k for k in range(4)], 1).to(x.dtype)
    hit, miss, false = (p * y).sum((2, 3)), ((1 - p) * y).sum((2, 3)), (p * (1 - y)).sum((2, 3))
    return (1 - hit / (hit + 0.3 * false + 0.7 * miss + 1e-6)).pow(0.75).mean()


def generalised_dice(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p, y = x.softmax(1).flatten(2), F.one_hot(t, 4).permute(0, 3, 1, 2).to(x.dtype).flatten(2)
    w = 1 / y.sum(-1).square().clamp(min=1)
    return 1 - 2 * (w * (p * y).sum(-1)).sum() / (w * (p + y).sum(-1)).sum()


def ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    a = torch.arange(5, dtype=x.dtype) - 2
    g = torch.exp(-a * a / 4.5)
    kernel = (torch.outer(g, g) / g.sum() ** 2).expand(4, 1, 5, 5)
    mean = [F.conv2d(t, kernel, groups=4) for t in (x, y, x * x, y * y, x * y)]
    vx, vy, cov = mean[2] - mean[0] ** 2, mean[3] - mean[1] ** 2, mean[4] - mean[0] * mean[1]
    top = (2 * mean[0] * mean[1] + 1e-4) * (2 * cov + 9e-4)
    return 1 - (top / ((mean[0] ** 2 + mean[1] ** 2 + 1e-4) * (vx + vy + 9e-4))).mean()


def balanced(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Weights that follow from the counts of the classes in the image."""
    counts = torch.stack([(t == k).sum() for k in range(4)]).to(x.dtype)
    weights = counts.sum() / (counts + 1)
    return (F.cross_entropy(x, t, reduction="none") * weights[t]).sum() / weights[t].sum()


def hard_mining(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    each = F.cross_entropy(x, t, reduction="none")
    keep = (each.detach() > each.detach().mean()).to(x.dtype)
    return (each * keep).sum() / keep.sum()


for _loss in (focal, dice, dice_flat, dice_batch, tversky, generalised_dice, balanced, hard_mining):
    loss_case(_loss.__name__, _loss, PIXELS)
loss_case("ssim", ssim, lambda: torch.rand(2, 4, 9, 11, dtype=torch.float64))
loss_case("combined", lambda x, t: focal(x, t) + dice(x, t) + 0.1 * (x[..., 1:] - x[..., :-1]).abs().mean(), PIXELS)
loss_case(
    "gradient",
    lambda x, y: F.l1_loss(x.diff(dim=3), y.diff(dim=3)) + math.pi * F.mse_loss(x, y),
    lambda: torch.rand(2, 4, 9, 11, dtype=torch.float64),
)


# Randomness --------------------------------------------------------------------------------------

layer("dropout", lambda: nn.Dropout(0.3), lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.Dropout(0.5))
layer("dropout eval", lambda: nn.Dropout(0.3), train=False)
layer("dropout all", lambda: nn.Dropout(1.0))
layer("dropout inplace", lambda: nn.Dropout(0.3, inplace=True), nn.ReLU)
layer("dropout channels", lambda: nn.Dropout2d(0.4), lambda: nn.Conv2d(4, 4, 3))
layer("dropout channels 1d", lambda: nn.Dropout1d(0.4), shape=LINE)
layer("dropout channels 3d", lambda: nn.Dropout3d(0.4), shape=SOLID)
layer("dropout alpha", lambda: nn.AlphaDropout(0.3))
layer("dropout alpha channels", lambda: nn.FeatureAlphaDropout(0.4))
layer("activation RReLU", nn.RReLU)
case("noise", lambda x: x + 0.1 * torch.randn_like(x) * torch.rand_like(x))
case("noise of a shape", lambda x: x * torch.rand(2, 1, 9, 11, dtype=x.dtype) + torch.randn(11, dtype=x.dtype))
case(
    "drop path",
    lambda x, c: x + c(x) * torch.empty(2, 1, 1, 1, dtype=x.dtype).bernoulli_(0.7) / 0.7,
    lambda: nn.Conv2d(4, 4, 1),
)
case("reparameterise", lambda x: x[:, :2] + torch.randn_like(x[:, :2]) * (0.5 * x[:, 2:]).exp())
case("gumbel softmax", lambda x: F.softmax((x - torch.log(-torch.log(torch.rand_like(x) + 1e-9) + 1e-9)) / 0.7, 1))
case("random mask", lambda x: x * (torch.rand_like(x[:, :1]) > 0.25))

__all__ = ["CASES", "PLANE"]
