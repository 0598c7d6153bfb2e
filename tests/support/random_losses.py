"""Losses for random networks, in any number of spatial axes: of class scores, of maps, and of several outputs.

`CLASSES` take scores (n, 3, *size) and labels (n, *size) or (n,); `MAPS` take two maps of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from random_draws import Draws, fit, resize
from torch import nn

IGNORED = 255


def spatial(y: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(2, y.dim()))


def onehot(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.one_hot(t.clamp(max=2), 3).movedim(-1, 1).to(y.dtype)


def cross_entropy(y, t):
    return F.cross_entropy(y, t, ignore_index=IGNORED)


def weighted(y, t):
    return F.cross_entropy(y, t, weight=y.new_tensor([1.0, 2.0, 5.0]), ignore_index=IGNORED)


def smooth(y, t):
    return F.cross_entropy(y, t, ignore_index=IGNORED, label_smoothing=0.1)


def everything(y, t):
    w = y.new_tensor([1.0, 2.0, 5.0])
    return F.cross_entropy(y, t, weight=w, ignore_index=IGNORED, label_smoothing=0.2, reduction="sum") / 100


def nll(y, t):
    return F.nll_loss(y.log_softmax(1), t, ignore_index=IGNORED)


def probabilities(y, t):
    return F.cross_entropy(y, 0.9 * onehot(y, t) + 0.1 / 3)


def flat(y, t):
    return F.cross_entropy(y.movedim(1, -1).reshape(-1, 3), t.reshape(-1), ignore_index=IGNORED)


def weight_map(y, t):
    """Per-pixel weights that follow from the labels."""
    each = F.cross_entropy(y, t, ignore_index=IGNORED, reduction="none")
    w = 1 + (t == 1).to(y.dtype) * 3
    return (each * w).sum() / w.sum()


def balanced(y, t):
    counts = torch.stack([(t == k).sum() for k in range(3)]).to(y.dtype)
    w = (counts.sum() / (counts + 1))[t.clamp(max=2)]
    return (F.cross_entropy(y, t, ignore_index=IGNORED, reduction="none") * w).sum() / w.sum()


def focal(y, t):
    each = F.cross_entropy(y, t, ignore_index=IGNORED, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


def focal_by_hand(y, t):
    p = y.softmax(1)
    with torch.no_grad():
        w = (onehot(y, t) * (1 - p) ** 2).mean(1)
        w = w / w.sum()
    return (F.cross_entropy(y, t, ignore_index=IGNORED, reduction="none") * w).sum()


def dice(y, t):
    p, q = y.softmax(1), onehot(y, t)
    axes = (0, *spatial(y))
    return 1 - ((2 * (p * q).sum(axes) + 1) / ((p + q).sum(axes) + 1)).mean()


def generalised_dice(y, t):
    p, q = y.softmax(1).flatten(2), onehot(y, t).flatten(2)
    w = 1 / q.sum(-1).square().clamp(min=1)
    return 1 - 2 * (w * (p * q).sum(-1)).sum() / (w * (p + q).sum(-1)).sum()


def jaccard(y, t):
    p = y.softmax(1).transpose(0, 1).reshape(3, -1)
    q = F.one_hot(t.clamp(max=2).reshape(-1), 3).t().to(y.dtype)
    both = (p * q).sum(1)
    return 1 - ((both + 1) / (p.sum(1) + q.sum(1) - both + 1)).mean()


def tversky(y, t):
    p, q = y.softmax(1), torch.stack([t == k for k in range(3)], 1).to(y.dtype)
    hit, miss, false = (p * q).sum(spatial(y)), ((1 - p) * q).sum(spatial(y)), (p * (1 - q)).sum(spatial(y))
    return (1 - (hit + 0.1) / (hit + 0.3 * false + 0.7 * miss + 0.1)).clamp(min=1e-3).pow(0.75).mean()


def mined(y, t):
    """Only what is harder than the mean counts."""
    each = F.cross_entropy(y, t, ignore_index=IGNORED, reduction="none")
    keep = (each.detach() > each.detach().mean() + 1e-4).to(y.dtype)
    return (each * keep).sum() / (keep.sum() + 1)


def binary(y, t):
    return F.binary_cross_entropy_with_logits(y[:, 1], (t == 1).to(y.dtype), pos_weight=y.new_tensor(3.0))


def image_label(y, t):
    """A label of the image from pooled scores."""
    return F.cross_entropy(y.mean(spatial(y)), t.flatten(1)[:, 0].clamp(max=2))


def combined(y, t):
    return 0.5 * cross_entropy(y, t) + dice(y, t) + 0.1 * total_variation(y, y)


def with_terms(y, t):
    a, b = cross_entropy(y, t), jaccard(y, t)
    return a + b, {"cross entropy": a, "jaccard": b, "accuracy": (y.argmax(1) == t).to(y.dtype).mean()}


POINTS: list[Callable[..., Any]] = [
    cross_entropy, weighted, smooth, everything, nll, probabilities, flat, weight_map, balanced, focal, focal_by_hand,
    dice, generalised_dice, jaccard, tversky, mined, binary, combined, with_terms,
]  # fmt: skip
CLASSES = [*POINTS, image_label]
VECTORS = [cross_entropy, weighted, smooth, everything, nll, probabilities, focal]


# Maps ----------------------------------------------------------------------------------------------


def bce(y, t):
    return F.binary_cross_entropy_with_logits(y, t, weight=1 + t)


def bce_of_sigmoid(y, t):
    return F.binary_cross_entropy(y.sigmoid(), t)


def total_variation(y, t):
    terms = [y.diff(dim=axis).abs().mean() if axis % 2 else y.diff(dim=axis).square().mean() for axis in spatial(y)
             if y.shape[axis] > 1]  # fmt: skip
    return F.mse_loss(y, t) + sum(terms)


def gradient(y, t):
    axis = y.dim() - 1
    a, b = (x.narrow(axis, 1, x.shape[axis] - 1) - x.narrow(axis, 0, x.shape[axis] - 1) for x in (y, t))
    return F.l1_loss(a, b) + 2 * F.mse_loss(y, t)


def charbonnier(y, t):
    return ((y - t).square() + 1e-3).sqrt().mean()


def masked(y, t):
    each = F.mse_loss(y, t, reduction="none")
    mask = (t > 0.3).to(y.dtype)
    return (each * mask).sum() / (mask.sum() + 1)


def ssim(y, t):
    d, c = y.dim() - 2, y.shape[1]
    a = torch.arange(3, dtype=y.dtype) - 1
    g = torch.exp(-a * a / 2)
    kernel = g
    for _ in range(d - 1):
        kernel = kernel[..., None] * g
    kernel = (kernel / kernel.sum()).expand(c, 1, *[3] * d)
    conv = getattr(F, f"conv{d}d")
    m = [conv(x, kernel, padding=1, groups=c) for x in (y, t, y * y, t * t, y * t)]
    vx, vy, cov = m[2] - m[0] ** 2, m[3] - m[1] ** 2, m[4] - m[0] * m[1]
    top = (2 * m[0] * m[1] + 1e-2) * (2 * cov + 9e-2)
    return 1 - (top / ((m[0] ** 2 + m[1] ** 2 + 1e-2) * (vx + vy + 9e-2))).mean()


def spectrum_free_cosine(y, t):
    return 1 - F.cosine_similarity(y + 0.1, t + 0.1, dim=1).mean()


def kl(y, t):
    return F.kl_div(y.log_softmax(1), t.softmax(1), reduction="batchmean") / y.shape[-1]


def pyramid_l1(y, t):
    """Differences at two resolutions."""
    pool = getattr(F, f"avg_pool{y.dim() - 2}d")
    return F.l1_loss(y, t) + F.smooth_l1_loss(pool(y, 2, 1), pool(t, 2, 1))


def weighted_sum(y, t):
    return (F.huber_loss(y, t, reduction="none", delta=0.5) * t).sum() / t.sum()


def l1_and_ssim(y, t):
    a, b = F.l1_loss(y, t), ssim(y, t)
    return 0.2 * a + 0.8 * b, [a, b]


MAPS: list[Callable[..., Any]] = [
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, bce, bce_of_sigmoid, total_variation, gradient, charbonnier,
    masked, ssim, spectrum_free_cosine, kl, pyramid_l1, weighted_sum, l1_and_ssim, F.poisson_nll_loss, F.soft_margin_loss,
]  # fmt: skip


# Several outputs -----------------------------------------------------------------------------------


class Over:
    """A loss summed over several outputs: each has a target of its own, or all have one (`resized`).

    ``resized``: 'output' or 'target' says which of the two is brought to the other's size.
    """

    def __init__(self, base: Callable[..., Any], weights: Sequence[float], resized: str | None):
        self.base, self.weights, self.resized = base, list(weights), resized

    def __call__(self, outputs: Any, target: Any) -> torch.Tensor:
        outputs = list(outputs.values()) if isinstance(outputs, dict) else list(outputs)
        total = outputs[0].new_zeros(())
        for k, (y, w) in enumerate(zip(outputs, self.weights, strict=False)):
            t = target if self.resized else target[k]
            if self.resized == "output":
                y = resize(y, t.shape[-(y.dim() - 2) :])
            elif self.resized == "target":
                t = self._shrunk(t, y)
            made = self.base(y, t)
            total = total + w * (made[0] if isinstance(made, tuple) else made)
        return total

    def _shrunk(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if t.is_floating_point():
            return resize(t, y.shape[2:])
        return resize(t[:, None].to(y.dtype), y.shape[2:])[:, 0].long()


class Criterion(nn.Module):
    """A loss as a module, with class weights as a buffer and, it may be, a learnt temperature."""

    def __init__(self, base: Callable[..., Any], learnt: bool):
        super().__init__()
        self.base = base
        self.register_buffer("gain", torch.tensor(1.5, dtype=torch.float64))
        self.temperature = nn.Parameter(torch.tensor(0.8, dtype=torch.float64)) if learnt else None

    def forward(self, y: Any, t: Any) -> Any:
        if self.temperature is not None and isinstance(y, torch.Tensor):
            y = y * self.temperature
        made = self.base(y, t)
        if isinstance(made, tuple):
            return made[0] * self.gain, made[1]
        return made * self.gain


def torch_modules(p: Draws) -> Callable[..., Any]:
    """One of torch.nn's criteria for class scores."""
    w = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    return p.pick([
        nn.CrossEntropyLoss(weight=w, ignore_index=IGNORED), nn.CrossEntropyLoss(ignore_index=IGNORED, label_smoothing=0.1),
        nn.CrossEntropyLoss(ignore_index=IGNORED),
    ])  # fmt: skip


def labels(shape: Sequence[int], generator: torch.Generator, ignored: bool) -> torch.Tensor:
    """Random labels 0 to 2 (int64), some of them `IGNORED`; the first is 0."""
    made = torch.randint(0, 3, tuple(shape), generator=generator)
    if ignored:
        made[torch.rand(made.shape, generator=generator) < 0.2] = IGNORED
    made.view(-1)[0] = 0
    return made


__all__ = ["CLASSES", "MAPS", "VECTORS", "Criterion", "Over", "fit", "labels", "torch_modules"]
