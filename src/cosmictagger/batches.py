"""From events to tensors: which events make a batch, and the batch itself."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cosmictagger.data import Event, shrink, shrink_labels
from cosmictagger.files import Events

CLASSES = (1, 2)  # cosmic, neutrino
ALIGNED = 8
"""Parts of events begin at multiples of this, so that the same part is cut for every resolution."""


@dataclass(frozen=True)
class Batch:
    """image: float32 (batch, planes, rows, columns); label: uint8 of the same shape, None without truth."""

    image: Tensor
    label: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        return self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same made of image and label."""
        return Batch(change(self.image), None if self.label is None else change(self.label))


@dataclass(frozen=True)
class Crop:
    """A part of each event: `shape` (rows, columns) before shrinking, about a labelled pixel that `seed` chooses.

    `about`: the class of that pixel where the event has it; None: either one, as often as the other.
    """

    shape: tuple[int, int]
    seed: tuple[int, ...]
    about: int | None = None


def load_batch(
    events: Events, indices: list[int], *, downsample: int, device: torch.device, crop: Crop | None = None
) -> Batch:
    """Read events and shrink them `downsample` times by two. Raises DataError if one of them is not usable."""
    found = [events[index] for index in indices]
    if crop is not None:
        found = [cut(event, crop, index) for event, index in zip(found, indices, strict=True)]
    return batch_of(found, downsample=downsample, device=device)


def batch_of(events: list[Event], *, downsample: int, device: torch.device) -> Batch:
    """Events that have been read, shrunk `downsample` times by two."""
    images, labels = [], []
    for event in events:
        images.append(shrink(event.image(), downsample))
        if event.label is not None:
            labels.append(shrink_labels(event.truth(), downsample))
    label = torch.from_numpy(np.stack(labels)).to(device) if labels else None
    return Batch(torch.from_numpy(np.stack(images)).to(device), label)


def indices_of_step(step: int, batch: int, events: int, seed: int, shard: tuple[int, int] = (0, 1)) -> list[int]:
    """Events of training step `step` (from 0): every event once per epoch, in an order that changes with the epoch.

    `shard`: rank and number of the processes that share the events; each takes `batch` others of the same order.
    Depends on its arguments alone, so a resumed training goes on with the events it would have had. Raises ValueError
    for a rank that is none.
    """
    rank, ranks = shard
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}; it must be from 0 to {ranks - 1}")
    out = []
    first = (step * ranks + rank) * batch
    for k in range(first, first + batch):
        epoch, position = divmod(k, events)
        out.append(int(np.random.default_rng([seed, epoch]).permutation(events)[position]))
    return out


def cut(event: Event, crop: Crop, number: int) -> Event:
    """The part of an event that `crop` asks for; `number` is the event's, so that others are cut elsewhere.

    Only stored pixels are looked at. Raises ValueError where the part is larger than the event.
    """
    return event.part(place(event, crop, number), crop.shape)


def place(event: Event, crop: Crop, number: int) -> tuple[int, int]:
    """First row and column of that part.

    It lies about a pixel of one of the classes that the event has, within the image; in the middle of the image where
    there are none.
    """
    if any(part > size for part, size in zip(crop.shape, event.shape, strict=True)):
        raise ValueError(f"parts of {crop.shape} (rows, columns) do not fit into events of {event.shape}")
    draws = np.random.default_rng([*crop.seed, number])
    row, column = (
        min(max(m - n // 2, 0), size - n) // ALIGNED * ALIGNED
        for m, n, size in zip(_middle(event, crop.about, draws), crop.shape, event.shape, strict=True)
    )
    return row, column


def flipped_at_random(event: Event, seed: tuple[int, ...]) -> Event:
    """The event or one of its three mirror images, each as often."""
    drift, wires = np.random.default_rng([*seed, 1]).integers(2, size=2)
    return event.flipped(drift=bool(drift), wires=bool(wires))


def _middle(event: Event, about: int | None, draws: np.random.Generator) -> tuple[int, int]:
    of = {}
    for tag in CLASSES:
        found = [np.stack([p.rows, p.columns], axis=1)[p.values == tag] for p in event.label or ()]
        if found and sum(map(len, found)):
            of[tag] = np.concatenate(found)
    if about in of:
        of = {about: of[about]}
    if not of:
        return event.shape[0] // 2, event.shape[1] // 2
    places = list(of.values())[draws.integers(len(of))]
    row, column = places[draws.integers(len(places))]
    return int(row), int(column)
