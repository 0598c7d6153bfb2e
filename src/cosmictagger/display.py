"""Events for a page: every stored pixel with its charge, truth and tag, at full resolution, packed small."""

import base64
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmictagger.data import DataError, Event, Pixels
from cosmictagger.simulate import Detector

FINEST = 1 / 16
"""Charge is kept in steps of this, or larger ones where it would not fit into 16 bits."""


@dataclass(frozen=True)
class Display:
    """An event with the tags of each plane's stored pixels, in their order, and what it is called."""

    event: Event
    index: int
    """In the events that were looked at."""
    tags: tuple[NDArray[np.uint8], ...]
    name: str
    caption: str


def packed(display: Display) -> dict[str, Any]:
    """The event in JSON's types, as page/report.js reads it.

    Each plane's `data` is base64 of zlib of, all little-endian: uint16 pixels of each row; uint16 columns, row after
    row; uint16 charges in units of `unit`; uint8 truth + 4 * tag. Raises DataError for an event without truth, or of
    65,536 rows or columns.
    """
    event = display.event
    rows, columns = event.shape
    if max(event.shape) >= 2**16:
        raise DataError(f"images of {event.shape} (rows, columns) are too large for a page")
    truth = event.truth()
    planes = [
        _plane(charge, truth[k][charge.rows, charge.columns], tags, rows)
        for k, (charge, tags) in enumerate(zip(event.charge, display.tags, strict=True))
    ]
    about = {"name": display.name, "caption": display.caption, "rows": rows, "columns": columns}
    return {**about, "geometry": geometry(event.shape), "planes": planes}


def geometry(shape: tuple[int, int]) -> dict[str, Any] | None:
    """How pixels lie in SBND; None for images of another shape, of which that is not known.

    offsets: first column with a wire, by plane. ticks: of the readout, to a row.
    """
    detector = Detector()
    if shape != detector.shape:
        return None
    offsets = [detector.wires(plane)[0] for plane in range(3)]
    ticks = round(detector.row_pitch / detector.drift_speed / 0.5)
    return {"offsets": offsets, "wire_pitch": detector.wire_pitch, "row_pitch": detector.row_pitch, "ticks": ticks}


def _plane(charge: Pixels, truth: NDArray, tags: NDArray, rows: int) -> dict[str, Any]:
    order = np.lexsort((charge.columns, charge.rows))
    highest = float(charge.values.max(initial=0.0))
    unit = max(FINEST, highest / 65535)
    numbers = (
        np.bincount(charge.rows, minlength=rows).astype("<u2"),
        charge.columns[order].astype("<u2"),
        np.round(charge.values[order].clip(0) / unit).astype("<u2"),
        truth[order].astype(np.uint8) + 4 * tags[order].astype(np.uint8),
    )
    data = zlib.compress(b"".join(x.tobytes() for x in numbers), 9)
    return {"pixels": len(order), "unit": unit, "data": base64.b64encode(data).decode()}
