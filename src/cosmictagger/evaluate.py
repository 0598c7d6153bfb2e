"""Scores of a network on labelled events, and the classes it gives to pixels."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cosmictagger import engine
from cosmictagger.batches import Batch, load_batch
from cosmictagger.data import DataError, Event, EventFile, Pixels, writing
from cosmictagger.metrics import Scores, all_cosmic, confusion, scores
from cosmictagger.model import UResNet, check_image_shape
from cosmictagger.objective import tags_of
from cosmictagger.progress import Say, silent


@dataclass(frozen=True)
class Evaluation:
    """Scores over the events of a file, and those of calling every charged pixel cosmic."""

    events: int
    network: Scores
    baseline: Scores

    def as_dict(self) -> dict:
        return {"events": self.events, "network": self.network.as_dict(), "baseline": self.baseline.as_dict()}


@dataclass(frozen=True)
class Running:
    """How a network runs: memory budget, arithmetic, shrinking, device, threads (None: one per core)."""

    budget: str | None = None
    precision: str = "float32"
    downsample: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int | None = None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")


def check_suits(events: EventFile, net: UResNet, running: Running) -> None:
    """Raise DataError unless the network takes the file's images."""
    check_shape_suits(events, events.shape, net, running)


def check_shape_suits(events: EventFile, shape: tuple[int, int], net: UResNet, running: Running) -> None:
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
        self._tiled: nn.Module = engine.tiled(net, running.budget, running.threads)

    def __enter__(self) -> "Tagger":
        self._was_training = self._net.training
        self._tiled.eval()
        return self

    def __exit__(self, *_: object) -> None:
        self._tiled.train(self._was_training)

    def load(self, events: EventFile, index: int) -> Batch:
        """One event, as the network takes it."""
        return load_batch(events, [index], downsample=self.running.downsample, device=self.running.device)

    def __call__(self, image: Tensor) -> Tensor:
        """float32 (batch, planes, rows, columns) to uint8 tags of the same shape."""
        with torch.no_grad(), self.running.autocast():
            return tags_of(self._tiled(image))


def evaluate(tagger: Tagger, events: EventFile, say: Say = silent) -> Evaluation:
    """Score every event of the file. Raises DataError without labels."""
    counts, baseline = [], []
    with tagger:
        for index in range(len(events)):
            batch = tagger.load(events, index)
            if batch.label is None:
                raise DataError(f"{events.path}: no labels to score against")
            counts.append(confusion(tagger(batch.image), batch.label))
            baseline.append(confusion(all_cosmic(batch.image), batch.label))
            say(index + 1, len(events), "")
    return Evaluation(len(events), scores(torch.cat(counts)), scores(torch.cat(baseline)))


def predict(tagger: Tagger, events: EventFile, out: Path, say: Say = silent) -> None:
    """Write the events again with one more product, the class of every stored pixel. The file appears whole."""
    with tagger, writing(out) as file:
        for index, event in enumerate(events):
            tags = tagger(tagger.load(events, index).image)[0]
            file.append(event, pixel_tags(event, tags, tagger.running.downsample))
            say(index + 1, len(events), "")


def pixel_tags(event: Event, tags: Tensor, downsample: int) -> tuple[Pixels, ...]:
    """The class of each stored pixel from a map of tags, uint8 (planes, rows, columns), shrunk or not."""
    maps = tags.cpu().numpy()
    return tuple(
        Pixels(p.rows, p.columns, maps[k, p.rows >> downsample, p.columns >> downsample].astype(np.float32))
        for k, p in enumerate(event.charge)
    )
