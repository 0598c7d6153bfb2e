"""From events to tensors: which events make a batch, and the batch itself."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cosmictagger.data import EventFile, shrink, shrink_labels


@dataclass(frozen=True)
class Batch:
    """image: float32 (batch, planes, rows, columns); label: uint8 of the same shape, None without truth."""

    image: Tensor
    label: Tensor | None


@dataclass(frozen=True)
class Crop:
    """A part of each event: `shape` (rows, columns) after shrinking, about a labelled pixel that `seed` chooses."""

    shape: tuple[int, int]
    seed: tuple[int, ...]


def load_batch(
    events: EventFile, indices: list[int], *, downsample: int, device: torch.device, crop: Crop | None = None
) -> Batch:
    """Read events and shrink them `downsample` times by two. Raises DataError if one of them is not usable."""
    images, labels = [], []
    for index in indices:
        event = events[index]
        images.append(shrink(event.image(), downsample))
        if event.label is not None:
            labels.append(shrink_labels(event.truth(), downsample))
        if crop is not None and labels:
            window = _window(labels[-1], crop.shape, np.random.default_rng([*crop.seed, index]))
            images[-1], labels[-1] = images[-1][window], labels[-1][window]
    label = torch.from_numpy(np.stack(labels)).to(device) if labels else None
    return Batch(torch.from_numpy(np.stack(images)).to(device), label)


def indices_of_step(step: int, batch: int, events: int, seed: int) -> list[int]:
    """Events of training step `step` (from 0): every event once per epoch, in an order that changes with the epoch.

    Depends on its arguments alone, so a resumed training goes on with the events it would have had.
    """
    out = []
    for k in range(step * batch, (step + 1) * batch):
        epoch, position = divmod(k, events)
        out.append(int(np.random.default_rng([seed, epoch]).permutation(events)[position]))
    return out


def _window(label: np.ndarray, shape: tuple[int, int], draws: np.random.Generator) -> tuple[slice, ...]:
    """Where a crop lies: about a pixel of one of the classes that the event has, each as often, within the image."""
    found = [np.argwhere(label == tag) for tag in (1, 2)]
    found = [places for places in found if len(places)]
    sizes = label.shape[1:]
    if found:
        places = found[draws.integers(len(found))]
        middle = places[draws.integers(len(places))][1:]
    else:
        middle = [n // 2 for n in sizes]
    starts = [min(max(int(m) - n // 2, 0), size - n) for m, n, size in zip(middle, shape, sizes, strict=True)]
    return (slice(None), *(slice(a, a + n) for a, n in zip(starts, shape, strict=True)))
