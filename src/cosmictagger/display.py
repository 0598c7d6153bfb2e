"""Pictures of wire planes, small enough for a page, in which a single pixel can still be seen."""

import io
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.image import imsave
from numpy.typing import NDArray

MAX_COLUMNS = 1024
NIGHT = (0x10, 0x14, 0x1A)
NOISE = (0x6B, 0x74, 0x80)
COSMIC = (0x3F, 0xA7, 0xFF)
NEUTRINO = (0xFF, 0xB0, 0x00)
PALETTE = np.array([NIGHT, NOISE, COSMIC, NEUTRINO], np.uint8)


@dataclass(frozen=True)
class Panel:
    """One picture: a PNG and what it shows."""

    title: str
    png: bytes


def event_panels(image: NDArray, truth: NDArray, tags: NDArray) -> list[list[Panel]]:
    """Charge, truth and prediction (across) of each plane (down). All arrays are (planes, rows, columns)."""
    return [
        [
            Panel(f"plane {k}, charge", _png(_charge_colours(_shrink(image[k])))),
            Panel(f"plane {k}, truth", _png(PALETTE[_shrink(_codes(image[k], truth[k]))])),
            Panel(f"plane {k}, prediction", _png(PALETTE[_shrink(_codes(image[k], tags[k]))])),
        ]
        for k in range(len(image))
    ]


def _codes(charge: NDArray, tags: NDArray) -> NDArray[np.uint8]:
    """0 nothing, 1 charge without a tag, 2 cosmic, 3 neutrino: the more telling, the larger."""
    return np.where(tags > 0, tags + 1, charge > 0).astype(np.uint8)


def _shrink(x: NDArray) -> NDArray:
    """Largest value of each square: an average would make single pixels vanish."""
    factor = -(-x.shape[1] // MAX_COLUMNS)
    rows, columns = (-(-n // factor) for n in x.shape)
    padded = np.zeros((rows * factor, columns * factor), x.dtype)
    padded[: x.shape[0], : x.shape[1]] = x
    return padded.reshape(rows, factor, columns, factor).max(axis=(1, 3))


def _charge_colours(charge: NDArray, *, faint: float = 5.0, bright: float = 300.0) -> NDArray[np.uint8]:
    """Logarithmic colours between two charges, night where there is none."""
    level = np.log(np.clip(charge, faint, bright) / faint) / np.log(bright / faint)
    colours = matplotlib.colormaps["plasma"](0.3 + 0.7 * level, bytes=True)[..., :3]
    return np.where((charge > 0)[..., None], colours, np.array(NIGHT, np.uint8))


def _png(colours: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    imsave(out, np.ascontiguousarray(colours), format="png")
    return out.getvalue()
