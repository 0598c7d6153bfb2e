"""Scores of a network on labelled events, and the classes it gives to pixels."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cosmictagger import engine
from cosmictagger.batches import Batch, batch_of, load_batch
from cosmictagger.data import SCORES, TAGS, DataError, Event, EventFile, Pixels, writing
from cosmictagger.files import Events, ahead
from cosmictagger.metrics import CLASSES, Scores, confusion, scores
from cosmictagger.model import UResNet, check_image_shape
from cosmictagger.objective import tags_of
from cosmictagger.progress import Say, silent
from cosmictagger.world import World, processors


@dataclass(frozen=True)
class Evaluation:
    """Scores over the events of a file."""

    events: int
    network: Scores
    """Of what `predict` writes: at full resolution, over pixels with charge."""
    baseline: Scores
    """Over the same pixels, of calling all of them cosmic."""
    ungated: Scores | None = None
    """Over all pixels of the images as the network takes them; None where only stored tags are known."""

    def as_dict(self) -> dict:
        out = {"events": self.events, "network": self.network.as_dict(), "baseline": self.baseline.as_dict()}
        return out if self.ungated is None else {**out, "ungated": self.ungated.as_dict()}


@dataclass(frozen=True)
class Running:
    """How a network runs: memory budget, arithmetic, shrinking, device, threads (None: one per core); bytes of a disk
    for maps that do not fit the budget, and a folder there (None: the temporary one)."""

    budget: str | None = None
    precision: str = "float32"
    downsample: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int | None = None
    world: World = field(default_factory=World)
    """The processes that train together."""
    disk: str | None = None
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1")

    @property
    def workers(self) -> int | None:
        """Threads of this process; None: one per core."""
        return self.threads or processors()

    @property
    def limits(self) -> engine.Limits:
        """What the engine keeps to."""
        return engine.Limits(self.budget, self.workers, self.disk, self.folder)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")


def check_suits(events: Events, net: UResNet, running: Running) -> None:
    """Raise DataError unless the network takes the file's images."""
    check_shape_suits(events, events.shape, net, running)


def check_shape_suits(events: Events, shape: tuple[int, int], net: UResNet, running: Running) -> None:
    """Raise DataError unless the network takes parts of the file's images of a shape (rows, columns)."""
    side = 2**running.downsample
    rows, columns = shape
    if rows > events.shape[0] or columns > events.shape[1]:
        raise DataError(f"{events.path}: images of {events.shape} (rows, columns) have no parts of {shape}")
    if rows % side or columns % side:
        raise DataError(f"{events.path}: images of {rows} x {columns} pixels cannot be shrunk {side} times")
    try:
        check_image_shape((1, 3, rows // side, columns // side), net.config)
    except ValueError as error:
        raise DataError(f"{events.path}: {error}") from error


class Tagger:
    """A network in evaluation mode, ready to tag images within a budget; its training mode comes back at the end."""

    def __init__(self, net: UResNet, running: Running) -> None:
        self.running = running
        self._net = net.to(running.device)
        self._tiled: nn.Module = engine.tiled(net, running.limits)

    def __enter__(self) -> "Tagger":
        self._was_training = self._net.training
        self._tiled.eval()
        return self

    def __exit__(self, *_: object) -> None:
        self._tiled.train(self._was_training)

    def load(self, events: Events, index: int) -> Batch:
        """One event, as the network takes it."""
        return load_batch(events, [index], downsample=self.running.downsample, device=self.running.device)

    def __call__(self, image: Tensor) -> Tensor:
        """float32 (batch, planes, rows, columns) to uint8 tags of the same shape."""
        with torch.no_grad(), self.running.autocast():
            return tags_of(self._tiled(image))

    def probable(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Tags as above, and float32 (batch, planes, classes, rows, columns): how probable each class is."""
        with torch.no_grad(), self.running.autocast():
            logits = self._tiled(image)
            return tags_of(logits), torch.stack([x.float().softmax(dim=1) for x in logits], dim=1)


Also = Callable[[Event, tuple[Pixels, ...], tuple[Pixels, ...]], None]
"""also(event, tags, probable): what the network makes of an event's stored pixels, the latter with values float32
(pixels, classes)."""


def evaluate(
    tagger: Tagger, events: Events, say: Say = silent, *, first: int | None = None, also: Also | None = None
) -> Evaluation:
    """Score every event, or the `first` so many, and tell `also` of each. Raises DataError without labels.

    Processes that train together each score some of them, and have the same scores then.
    """
    count = len(events) if first is None else min(first, len(events))
    world = tagger.running.world
    indices, found_here = world.dealt(range(count)), []
    with tagger, closing(ahead(events.__getitem__, indices)) as found:
        for index, event in zip(indices, found, strict=True):
            _check_labelled(events, event)
            batch = batch_of([event], downsample=tagger.running.downsample, device=tagger.running.device)
            assert batch.label is not None
            tags, probable = (tagger(batch.image), None) if also is None else tagger.probable(batch.image)
            mine = pixel_tags(event, tags[0], tagger.running.downsample)
            kinds = stored_counts(event, mine), stored_counts(event, _all_cosmic(event))
            found_here.append((confusion(tags, batch.label), *kinds))
            if also is not None and probable is not None:
                also(event, mine, _pixel_classes(event, probable[0], tagger.running.downsample))
            say(min(index + world.size, count), count, "")
    counts, gated, baseline = (torch.cat(of) for of in zip(*world.gathered(found_here), strict=True))
    return Evaluation(count, scores(gated), scores(baseline), scores(counts))


def evaluate_tags(events: Events, say: Say = silent) -> Evaluation:
    """Score the tags that `predict` has written into a file. Raises DataError without labels or without tags."""
    gated, baseline = [], []
    for index, event in enumerate(events):
        _check_labelled(events, event)
        gated.append(stored_counts(event, events.tags(index)))
        baseline.append(stored_counts(event, _all_cosmic(event)))
        say(index + 1, len(events), "")
    return Evaluation(len(events), scores(torch.cat(gated)), scores(torch.cat(baseline)))


def predict(tagger: Tagger, events: EventFile, out: Path, say: Say = silent) -> None:
    """Write the events with all that their file holds, and the class and the probabilities of every stored pixel.

    The file appears whole. Tags of an earlier prediction are replaced.
    """
    halvings = tagger.running.downsample
    with ExitStack() as held, tagger, writing(out) as file:
        file.copy_from(events, without=(TAGS, *SCORES))
        found = held.enter_context(closing(ahead(events.__getitem__, range(len(events)))))
        for index, event in enumerate(found):
            batch = batch_of([event], downsample=halvings, device=tagger.running.device)
            tags, probable = tagger.probable(batch.image)
            products = {TAGS: pixel_tags(event, tags[0], halvings)}
            for k, group in enumerate(SCORES):
                products[group] = pixel_tags(event, probable[0, :, k], halvings)
            file.append_products(products, event.shape)
            say(index + 1, len(events), "")


def pixel_tags(event: Event, values: Tensor, downsample: int) -> tuple[Pixels, ...]:
    """What a map (planes, rows, columns), shrunk or not, says of each stored pixel."""
    maps = values.cpu().numpy()
    return tuple(
        Pixels(p.rows, p.columns, maps[k, p.rows >> downsample, p.columns >> downsample].astype(np.float32))
        for k, p in enumerate(event.charge)
    )


def _pixel_classes(event: Event, values: Tensor, downsample: int) -> tuple[Pixels, ...]:
    """The same of a map (planes, classes, rows, columns): values (pixels, classes)."""
    classes = [pixel_tags(event, values[:, k], downsample) for k in range(values.shape[1])]
    return tuple(
        Pixels(p[0].rows, p[0].columns, np.stack([x.values for x in p], axis=1)) for p in zip(*classes, strict=True)
    )


def _check_labelled(events: Events, event: Event) -> None:
    if event.label is None:
        raise DataError(f"{events.path}: no labels to score against")


def _all_cosmic(event: Event) -> tuple[Pixels, ...]:
    """The baseline that any network must beat."""
    return tuple(Pixels(p.rows, p.columns, np.ones(len(p.rows), np.float32)) for p in event.charge)


def stored_counts(event: Event, tags: tuple[Pixels, ...]) -> Tensor:
    """Counts by (truth, tag) over the pixels with charge, int64 (1, planes, 3, 3)."""
    truth = event.truth()
    out = np.zeros((1, len(tags), CLASSES, CLASSES), np.int64)
    for plane, (counts, pixels) in enumerate(zip(out[0], tags, strict=True)):
        np.add.at(counts, (truth[plane, pixels.rows, pixels.columns], pixels.values.astype(np.int64)), 1)
    return torch.from_numpy(out)
