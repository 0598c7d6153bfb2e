"""Pictures for docs/simulator.md: crops of a real event beside a simulated one, charge and truth.

python bench/displays.py --real sbnd_events.h5 --out docs/images
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.image import imsave

from cosmictagger.data import Event, EventFile
from cosmictagger.simulate import Mix, simulate_numbered

GAP = 6
NIGHT = (0x10, 0x14, 0x1A)
PALETTE = np.array([NIGHT, (0x6B, 0x74, 0x80), (0x3F, 0xA7, 0xFF), (0xFF, 0xB0, 0x00)], np.uint8)
"""Of nothing, charge without a label, cosmic, neutrino."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with EventFile(args.real) as events:
        real = events[2]
    simulated = simulate_numbered(3, 6, mix=Mix(0, 1, 0, 0))
    for plane, name in ((2, "collection"), (1, "induction")):
        rows = [_both(_shower(e, plane, 180, 300), scale=2) for e in (real, simulated)]
        imsave(args.out / f"shower-{name}.png", _stack(rows, axis=0))
        whole = [_both(_halved(e, plane), scale=1) for e in (real, simulated)]
        imsave(args.out / f"whole-{name}.png", _stack(whole, axis=0))


def _shower(event: Event, plane: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Charge and truth around the middle of the neutrino's pixels."""
    charge, truth = event.image()[plane], event.truth()[plane]
    row, column = (int(np.median(x)) for x in np.nonzero(truth == 2))
    top = min(max(row - height // 2, 0), charge.shape[0] - height)
    left = min(max(column - width // 2, 0), charge.shape[1] - width)
    window = slice(top, top + height), slice(left, left + width)
    return charge[window], truth[window]


def _halved(event: Event, plane: int, factor: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Largest charge and most telling label of each square."""

    def largest(x: np.ndarray) -> np.ndarray:
        rows, columns = x.shape
        return x.reshape(rows // factor, factor, columns // factor, factor).max(axis=(1, 3))

    return largest(event.image()[plane]), largest(event.truth()[plane])


def _both(pair: tuple[np.ndarray, np.ndarray], scale: int) -> np.ndarray:
    charge, truth = (x.repeat(scale, 0).repeat(scale, 1) for x in pair)
    return _stack([_charge_colours(charge), PALETTE[_codes(charge, truth)]], axis=1)


def _codes(charge: np.ndarray, tags: np.ndarray) -> np.ndarray:
    """0 nothing, 1 charge without a tag, 2 cosmic, 3 neutrino: the more telling, the larger."""
    return np.where(tags > 0, tags + 1, charge > 0).astype(np.uint8)


def _charge_colours(charge: np.ndarray, *, faint: float = 5.0, bright: float = 300.0) -> np.ndarray:
    """Logarithmic colours between two charges, night where there is none."""
    level = np.log(np.clip(charge, faint, bright) / faint) / np.log(bright / faint)
    colours = matplotlib.colormaps["plasma"](0.3 + 0.7 * level, bytes=True)[..., :3]
    return np.where((charge > 0)[..., None], colours, np.array(NIGHT, np.uint8))


def _stack(pictures: list[np.ndarray], axis: int) -> np.ndarray:
    shape = list(pictures[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, np.uint8)
    return np.concatenate([pictures[0], gap, pictures[1]], axis=axis)


if __name__ == "__main__":
    main()
