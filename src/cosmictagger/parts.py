"""The parts of a training step: one batch, or several whose gradients are added up.

With `accumulate` parts a step is that of one batch of all their events: the same events in the same order, and the
loss and gradients of that batch as its loss defines them, also where a weighted mean over all its pixels is no mean
over the parts. Weights by class need the classes of all parts, which are counted first; those of `focal` need the
network's answer to all parts, for which it runs forward once more. What differs is batch norm: its statistics are
those of each part, and its running statistics move once a part. A network without batch norm takes the very step of
the large batch.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from cosmictagger import engine
from cosmictagger.batches import Batch, Crop, batch_of, cut, flipped_at_random, indices_of_step
from cosmictagger.data import DataError, Event, shrink_labels
from cosmictagger.evaluate import Running
from cosmictagger.files import Events
from cosmictagger.objective import FocalTotals, PlaneLoss, ShareLoss, TaggedLoss, class_weights
from cosmictagger.recipe import Recipe

CLASSES = 3


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
    """Part `number` of a training, `recipe.accumulate` of which make a step."""
    step, position = divmod(number, recipe.accumulate)
    first = position * recipe.batch
    indices = indices_of_step(step, recipe.batch * recipe.accumulate, len(events), recipe.seed)
    mine = range(first, first + recipe.batch)
    found = [_event(recipe, step, k, indices[k], events) for k in mine]
    batch = batch_of(found, downsample=running.downsample, device=running.device)
    if recipe.accumulate == 1 or position or recipe.loss == "focal":
        return Part(batch)
    counts = _counts(found, running.downsample)
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


class Steps:
    """Forward and backward of a step, part by part, in the engine's budget."""

    def __init__(self, net: nn.Module, recipe: Recipe, running: Running) -> None:
        self._net, self._recipe, self._running = net, recipe, running
        several = recipe.accumulate > 1
        loss = ShareLoss(recipe.loss) if several else PlaneLoss(recipe.loss)
        self._step = self._made(TaggedLoss(loss))
        self._totals = self._made(FocalTotals()) if several and recipe.loss == "focal" else None

    def _made(self, criterion: nn.Module) -> engine.Step:
        return engine.training_step(self._net, criterion, self._running.budget, self._running.threads)

    def plan(self, part: Part) -> tuple[str, int | None]:
        """The printed plan of a part and the bytes it promises. Raises ValueError if the budget is too small."""
        target = part.label
        if self._recipe.accumulate > 1:  # any weights do, for the plan knows shapes alone
            planes = part.label.shape[1]
            target = self._target(part, (torch.ones(planes, CLASSES), torch.ones(planes)))
        with self._running.autocast():
            plan = self._step.plan(part.batch.image, target)
        return str(plan), plan.projected_bytes

    def weights(self, parts: list[Part]) -> tuple[Tensor, Tensor] | None:
        """What all parts of a step have in common; None for a step of one part."""
        return None if self._recipe.accumulate == 1 else self._weights(parts)

    def __call__(self, part: Part, weights: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """(loss, tags) of a part; the losses and the gradients of all parts of a step are to be added up."""
        with self._running.autocast():
            loss, tags = self._step(part.batch.image, part.label if weights is None else self._target(part, weights))
        loss.backward()
        return loss.detach(), tags

    def _target(self, part: Part, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        table, totals = (x.to(part.label.device) for x in weights)
        return part.label, table, totals

    def _weights(self, parts: list[Part]) -> tuple[Tensor, Tensor]:
        planes = parts[0].label.shape[1]
        if self._totals is None:
            counts = parts[0].counts
            assert counts is not None  # the first part of a step has them
            return class_weights(self._recipe.loss, counts)
        kept = {name: value.clone() for name, value in self._net.named_buffers()}
        total = torch.zeros(planes)
        with torch.no_grad(), self._running.autocast():
            for part in parts:
                total += torch.stack([x.float().cpu() for x in self._totals(part.batch.image, part.label)])
            for name, value in self._net.named_buffers():
                value.copy_(kept[name])  # they move when the parts come in earnest
        return torch.ones(planes, CLASSES), total
