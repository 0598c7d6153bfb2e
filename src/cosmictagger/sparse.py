"""Batches of events that stay as they are stored, pixel by pixel, until a tile of them is needed.

A full-size event takes 40 MB as arrays and one or two as stored pixels, so what a step holds of 32 events is small.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmictagger.data import DataError, Event, Pixels


class SparseBatch:
    """Stored pixels of events as something with a shape and a dtype whose regions are tensors.

    ``batch[events, planes, rows, columns]`` with four slices of step 1 is the region as a dense tensor, zero where
    nothing is stored; fullframe reads inputs and targets so, tile by tile. Shape (events, planes, rows, columns).

    >>> pixels = Pixels(np.array([1, 0]), np.array([2, 3]), np.array([7.0, 5.0], np.float32))
    >>> batch = SparseBatch([(pixels,)], (2, 4), torch.float32)
    >>> batch.shape, batch[0:1, 0:1, 1:2, 1:4].tolist()
    ((1, 1, 2, 4), [[[[0.0, 7.0, 0.0]]]])
    """

    thread_safe = True  # arrays are read, and nothing is changed

    def __init__(self, events: Sequence[Sequence[Pixels]], shape: tuple[int, int], dtype: torch.dtype) -> None:
        """events: of each, its planes; shape: rows and columns of every plane. Raises ValueError where the events
        differ in their number of planes or there is none."""
        if len({len(planes) for planes in events}) != 1:
            raise ValueError(f"events with {sorted({len(planes) for planes in events})} planes make no batch")
        self.shape = (len(events), len(events[0]), *shape)
        self.dtype = dtype
        self._planes = [[_by_row(plane) for plane in planes] for planes in events]

    def __getitem__(self, region: tuple[slice, ...]) -> Tensor:
        (e0, e1), (p0, p1), rows, columns = (
            (s.start or 0, n if s.stop is None else s.stop) for s, n in zip(region, self.shape, strict=True)
        )
        out = torch.zeros(e1 - e0, p1 - p0, rows[1] - rows[0], columns[1] - columns[0], dtype=self.dtype)
        array: NDArray[Any] = out.numpy()
        for i, planes in enumerate(self._planes[e0:e1]):
            for k, plane in enumerate(planes[p0:p1]):
                first, last = np.searchsorted(plane.rows, rows)
                wires = plane.columns[first:last]
                inside = (wires >= columns[0]) & (wires < columns[1])
                places = plane.rows[first:last][inside] - rows[0], wires[inside] - columns[0]
                array[i, k][places] = plane.values[first:last][inside]
        return out


def _by_row(pixels: Pixels) -> Pixels:
    order = np.argsort(pixels.rows, kind="stable")
    return Pixels(pixels.rows[order], pixels.columns[order], pixels.values[order])


def sparse_batch(events: Sequence[Event]) -> tuple[SparseBatch, SparseBatch]:
    """Charge, float32, and labels, uint8, of events with truth; both (events, planes, rows, columns).

    Raises DataError where an event has no labels, ValueError where events differ in shape or there is none.
    """
    shapes = {event.shape for event in events}
    if len(shapes) != 1:
        raise ValueError(f"events of {sorted(shapes)} (rows, columns) make no batch")
    labels = [event.label for event in events if event.label is not None]
    if len(labels) != len(events):
        raise DataError("an event has no labels")
    (shape,) = shapes
    charge = SparseBatch([event.charge for event in events], shape, torch.float32)
    return charge, SparseBatch(labels, shape, torch.uint8)
