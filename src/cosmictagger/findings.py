"""What a network does well and badly on events with truth: counts by class, how sure it is, and its worst events."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmictagger.data import Event, Pixels
from cosmictagger.evaluate import Evaluation, Tagger, evaluate, stored_counts
from cosmictagger.files import Events
from cosmictagger.metrics import Scores, scores
from cosmictagger.progress import Say, silent

CERTAIN = 14.0
"""Logits beyond this are counted as this: float32 tells probabilities near 1 apart to about there."""
BINS = 1120


@dataclass(frozen=True, eq=False)
class Found:
    """An event as the network tags it, pixels with charge alone: tags as `predict` writes them."""

    number: tuple[int, int, int]
    index: int
    tags: tuple[NDArray[np.uint8], ...]
    """Of each plane's stored pixels, in their order."""
    counts: Tensor
    """int64 (1, planes, 3 truths, 3 tags)."""

    @property
    def scores(self) -> Scores:
        return scores(self.counts)


@dataclass(frozen=True, eq=False)
class Findings:
    """Of all events that were looked at."""

    evaluation: Evaluation
    events: list[Found]
    sure: NDArray[np.int64]
    """(class, whether a pixel is of it, bin): pixels by the logit of the probability that the network gives the
    class, evenly from -CERTAIN to CERTAIN."""

    @property
    def counts(self) -> Tensor:
        """int64 (events, planes, 3 truths, 3 tags)."""
        return torch.cat([event.counts for event in self.events])

    def worst(self) -> list[Found]:
        """By mean IoU, the worst first."""
        return sorted(self.events, key=lambda event: event.scores.mean_iou)


def look(tagger: Tagger, events: Events, say: Say = silent, *, first: int | None = None) -> Findings:
    """Tag every event, or the `first` so many. Raises DataError without labels."""
    found: list[Found] = []
    sure = np.zeros((3, 2, BINS), np.int64)

    def also(event: Event, tags: tuple[Pixels, ...], probable: tuple[Pixels, ...]) -> None:
        truth = event.truth()
        for plane, pixels in enumerate(probable):
            _count(sure, truth[plane, pixels.rows, pixels.columns], pixels.values)
        small = tuple(p.values.astype(np.uint8) for p in tags)
        found.append(Found(event.number, len(found), small, stored_counts(event, tags)))

    evaluation = evaluate(tagger, events, say, first=first, also=also)
    return Findings(evaluation, found, sure)


def _count(sure: NDArray[np.int64], truth: NDArray, probable: NDArray) -> None:
    """Add pixels of classes `truth` (pixels,), with probabilities (pixels, classes)."""
    p = probable.astype(np.float64)
    with np.errstate(divide="ignore"):
        logit = np.clip(np.log(p) - np.log1p(-p), -CERTAIN, CERTAIN)
    places = np.minimum(((logit + CERTAIN) * (BINS / (2 * CERTAIN))).astype(np.int64), BINS - 1)
    for k in range(sure.shape[0]):
        for of in (0, 1):
            sure[k, of] += np.bincount(places[(truth == k) == of, k], minlength=BINS)


def precision_recall(sure: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall of calling every pixel of a class that is more probable than a bin's lower end.

    From the highest bin down; `sure` is that of the class, (2, bins). Bins without pixels are left out. Empty without
    pixels of the class.
    """
    wrong, right = sure[:, ::-1].cumsum(axis=1)
    kept = (sure[:, ::-1].sum(axis=0) > 0) & (right[-1] > 0)
    return right[kept] / (right + wrong)[kept], right[kept] / max(right[-1], 1)


def average_precision(sure: NDArray[np.int64]) -> float | None:
    """Mean of the precision over recall, by steps; None without pixels of the class."""
    precision, recall = precision_recall(sure)
    return float((precision * np.diff(recall, prepend=0.0)).sum()) if len(recall) else None
