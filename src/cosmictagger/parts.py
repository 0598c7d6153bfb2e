"""The parts of a training step: one batch, or several whose gradients are added up.

With `accumulate` parts a step is that of one batch of all their events: the same events in the same order, and the
loss and gradients of that batch as its loss defines them, also where a weighted mean over all its pixels is no mean
over the parts. Weights by class need the classes of all parts, which are counted first; those of `focal` need the
network's answer to all parts, for which it runs forward once more. What differs is batch norm: its statistics are
those of each part, and its running statistics move once a part. A network without batch norm takes the very step of
the large batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from cosmictagger import engine
from cosmictagger.batches import Batch, Crop, batch_of, cut, flipped_at_random, indices_of_step
from cosmictagger.data import DataError, Event, shrink_labels
from cosmictagger.evaluate import Running
from cosmictagger.files import Events
from cosmictagger.memory import PeakMemory
from cosmictagger.metrics import CLASSES, confusion
from cosmictagger.objective import FocalTotals, PlaneLoss, ShareLoss, TaggedLoss, class_weights
from cosmictagger.recipe import Recipe


@dataclass(frozen=True)
class Part:
    """A batch, and how often each class is met in all parts of its step: int64 (planes, 3).

    None where that is not needed; it comes with the first part of a step.
    """

    batch: Batch
    counts: Tensor | None = None

    def to(self, device: torch.device) -> "Part":
        return replace(self, batch=self.batch.to(device))

    @property
    def label(self) -> Tensor:
        if self.batch.label is None:
            raise DataError("training needs events with labels")
        return self.batch.label


def part_of(number: int, recipe: Recipe, events: Events, running: Running) -> Part:
    """Part `number` of a training, `recipe.accumulate` of which make a step; of it this process's rows."""
    step, position = divmod(number, recipe.accumulate)
    first = position * recipe.batch
    indices = indices_of_step(step, recipe.batch * recipe.accumulate, len(events), recipe.seed)
    mine = range(first, first + recipe.batch)
    found = [_event(recipe, step, k, indices[k], events) for k in mine]
    batch = batch_of(found, downsample=running.downsample, device=running.device).mapped(running.world.rows)
    if recipe.accumulate == 1 or position or recipe.loss == "focal":
        return Part(batch)
    counts = _counts(found, running.downsample)
    if recipe.loss == "none":  # which asks for the number of pixels alone
        return Part(batch, counts * recipe.accumulate)
    for k in range(len(indices)):
        if k not in mine:
            counts += _counts([_event(recipe, step, k, indices[k], events)], running.downsample)
    return Part(batch, counts)


def _event(recipe: Recipe, step: int, position: int, index: int, events: Events) -> Event:
    event = events[index]
    if recipe.crop is not None:
        event = cut(event, Crop(recipe.crop, (recipe.seed, step)), index)
    return flipped_at_random(event, (recipe.seed, step, position)) if recipe.flips else event


def _counts(events: list[Event], downsample: int) -> Tensor:
    labels = [shrink_labels(event.truth(), downsample) for event in events]
    counted = [[np.bincount(plane.ravel(), minlength=CLASSES) for plane in label] for label in labels]
    return torch.from_numpy(np.sum(counted, axis=0).astype(np.int64))


@dataclass(frozen=True)
class Taken:
    """What a step came to, before the optimiser's."""

    loss: float
    counts: Tensor
    """As `confusion` counts them, of all events of the step."""
    added: int | None
    """Bytes that the first part added, its gradients included, where that was asked and is known."""


class Steps:
    """Forward and backward of a step, part by part, in the engine's budget. One part is held at a time."""

    def __init__(self, net: nn.Module, recipe: Recipe, running: Running) -> None:
        self._net, self._recipe, self._running = net, recipe, running
        several = recipe.accumulate > 1
        loss = ShareLoss(recipe.loss) if several else PlaneLoss(recipe.loss)
        self._step = self._made(TaggedLoss(loss))
        self._totals = self._made(FocalTotals()) if several and recipe.loss == "focal" else None

    def _made(self, criterion: nn.Module) -> engine.Step:
        running = self._running
        return engine.training_step(self._net, criterion, running.limits, running.world.mesh)

    def plan(self, part: Part) -> tuple[str, int | None]:
        """The printed plan of a part and the bytes it promises. Raises ValueError if the budget is too small."""
        planes = part.label.shape[1]
        any_weights = (torch.ones(planes, CLASSES), torch.ones(planes))  # the plan knows shapes alone
        with self._running.autocast():
            plan = self._step.plan(part.batch.image, self._target(part, any_weights))
            if self._totals is not None:
                with torch.no_grad():
                    self._totals.plan(part.batch.image, part.label)
        return str(plan), plan.projected_bytes

    @property
    def before(self) -> int:
        """Parts that a step looks at before those that it learns from."""
        return 0 if self._totals is None else self._recipe.accumulate

    def numbers(self, first: int, end: int) -> Iterator[int]:
        """Which parts `take` asks for, for the steps from `first` to before `end`, in their order."""
        for step in range(first, end):
            parts = range(step * self._recipe.accumulate, (step + 1) * self._recipe.accumulate)
            yield from parts if self.before else ()
            yield from parts

    def take(self, coming: Iterator[Part], *, measure: bool = False) -> Taken:
        """Take the parts of a step from `coming`, and add up their gradients."""
        weights = self._focal_weights(coming) if self.before else None
        loss, counts, added = 0.0, [], None
        for k in range(self._recipe.accumulate):
            part = next(coming)
            if part.counts is not None:
                weights = class_weights(self._recipe.loss, part.counts)
            with PeakMemory(self._running.device, wanted=measure and k == 0) as peak:
                with self._running.autocast():
                    value, tags = self._step(part.batch.image, self._target(part, weights))
                value.backward()
            added = peak.added if k == 0 else added
            loss += value.item()
            counts.append(self._running.world.total(confusion(tags, part.label)))
        return Taken(loss, torch.cat(counts), added)

    def _target(self, part: Part, weights: tuple[Tensor, Tensor] | None) -> engine.Target:
        if self._recipe.accumulate == 1:
            return part.label
        assert weights is not None  # the first part of a step brings the counts
        return (part.label, *(x.to(part.label.device) for x in weights))

    def _focal_weights(self, coming: Iterator[Part]) -> tuple[Tensor, Tensor]:
        assert self._totals is not None
        kept = {name: value.clone() for name, value in self._net.named_buffers()}
        totals = []
        with torch.no_grad(), self._running.autocast():
            for _ in range(self.before):
                part = next(coming)
                totals.append(torch.stack([x.float().cpu() for x in self._totals(part.batch.image, part.label)]))
            for name, value in self._net.named_buffers():
                value.copy_(kept[name])  # they move when the parts come in earnest
        total = torch.stack(totals).sum(0)
        return torch.ones(len(total), CLASSES), total
