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


def load_batch(events: EventFile, indices: list[int], *, downsample: int, device: torch.device) -> Batch:
    """Read events and shrink them `downsample` times by two. Raises DataError if one of them is not usable."""
    images, labels = [], []
    for index in indices:
        event = events[index]
        images.append(shrink(event.image(), downsample))
        if event.label is not None:
            labels.append(shrink_labels(event.truth(), downsample))
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
