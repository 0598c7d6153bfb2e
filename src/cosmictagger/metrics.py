"""Counts of right and wrong pixels, and the field's scores made of them.

Scores are taken per image and plane, then averaged over images, then over planes. A class that neither truth nor
prediction contains scores an intersection over union of 1; so does the accuracy over no pixels.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

CLASSES = 3


@dataclass(frozen=True)
class Scores:
    """Averages over images and planes, each between 0 and 1."""

    accuracy: float
    """Of all pixels."""
    nonzero_accuracy: float
    """Of the pixels that are cosmic or neutrino."""
    cosmic_iou: float
    """Intersection over union of the cosmic pixels."""
    neutrino_iou: float
    """Intersection over union of the neutrino pixels."""
    mean_iou: float
    """Mean of the two."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def confusion(tags: Tensor, label: Tensor) -> Tensor:
    """Count pixels by (truth, prediction).

    tags and label: integer (images, planes, rows, columns), values 0 to 2, same shape. Returns int64
    (images, planes, 3 truths, 3 predictions). Raises ValueError if shapes or values do not fit.
    """
    if tags.shape != label.shape or tags.dim() != 4:
        raise ValueError(f"tags {tuple(tags.shape)} and labels {tuple(label.shape)} must both be 4-d and equal")
    for values in (tags, label):
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >= CLASSES):
            raise ValueError(f"tags and labels must lie between 0 and {CLASSES - 1}")
    images, planes = tags.shape[:2]
    out = torch.zeros(images, planes, CLASSES, CLASSES, dtype=torch.int64)
    for i in range(images):
        for p in range(planes):
            # one plane at a time: the int64 copy that bincount needs stays small
            cell = label[i, p].long() * CLASSES + tags[i, p].long()
            counts = torch.bincount(cell.flatten(), minlength=CLASSES**2)
            out[i, p] = counts.view(CLASSES, CLASSES).cpu()
    return out


def scores(counts: Tensor) -> Scores:
    """Average scores from `confusion` counts, int64 (images, planes, 3, 3). Raises ValueError if there are none."""
    if counts.dim() != 4 or not counts.shape[0]:
        raise ValueError("no images to score")
    c = counts.double()
    right = c.diagonal(dim1=-2, dim2=-1)
    union = c.sum(-1) + c.sum(-2) - right
    iou = _mean(_ratio(right, union))
    return Scores(
        accuracy=float(_mean(_ratio(right.sum(-1), c.sum((-2, -1))))),
        nonzero_accuracy=float(_mean(_ratio(right[..., 1:].sum(-1), c[..., 1:, :].sum((-2, -1))))),
        cosmic_iou=float(iou[1]),
        neutrino_iou=float(iou[2]),
        mean_iou=float((iou[1] + iou[2]) / 2),
    )


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=1), torch.ones_like(whole))


def _mean(x: Tensor) -> Tensor:
    """Over images (axis 0), then planes."""
    return x.mean(0).mean(0)


def all_cosmic(image: Tensor) -> Tensor:
    """The baseline that any network must beat: every pixel with charge is called cosmic. Returns uint8 tags."""
    return (image > 0).to(torch.uint8)
