"""Counts of right and wrong pixels of one unit of bench/headline.py, in every way that they are scored."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmictagger.data import Event, EventFile, shrink_labels
from cosmictagger.evaluate import Tagger
from cosmictagger.metrics import CLASSES, confusion
from cosmictagger.quantities import clusters
from cosmictagger.simulate import Detector, Mix
from cosmictagger.simulate.neutrinos import interaction

COSMIC, NEUTRINO = 1, 2
NEAR = 3
"""Rows and columns within which a pixel of the other class makes a crossing."""
FEW = 3
"""Pixels of the smallest clusters."""
RINGS = {
    "vertex to 8": (0, 8),
    "vertex 8 to 32": (8, 32),
    "vertex 32 to 128": (32, 128),
    "vertex from 128": (128, 1e9),
}
"""Neutrino pixels by their distance to the vertex, in pixels."""
BINS = (*RINGS, "crossings", "clusters of 1 to 3")
KINDS = ("charged", "own", "upsampled", "oracle", "oracle upsampled")


@dataclass(frozen=True)
class Scored:
    """Counts by (truth, prediction) of every part.

    kinds: int64 (parts, planes, 3, 3) each, by name:
        charged           full resolution, pixels with charge alone
        own               the network's own resolution, all pixels
        upsampled         full resolution, all pixels
        oracle            as `charged`, of the best answer that a halved network can give
        oracle upsampled  as `upsampled`, of the same
    bins: int64 (parts, bins, 3, 3), of labelled pixels that lie in a bin, all planes together.
    """

    kinds: dict[str, NDArray[np.int64]]
    bins: NDArray[np.int64]

    def arrays(self) -> dict[str, NDArray]:
        return {**self.kinds, "bins": self.bins}


def score(tagger: Tagger, events: EventFile, places: list) -> Scored:
    """Tag every part and count. `places`: the vertex of each part as `vertices` gives it."""
    kinds: dict[str, list[NDArray]] = {name: [] for name in KINDS}
    bins = []
    with tagger:
        for index, event in enumerate(events):
            small = tagger(tagger.load(events, index).image)[0].cpu().numpy()
            for name, counts in _counts(event, small, tagger.running.downsample).items():
                kinds[name].append(counts)
            bins.append(_bins(event, _repeated(small, tagger.running.downsample), places[index]))
    return Scored({name: np.stack(found) for name, found in kinds.items()}, np.stack(bins))


def vertices(seed: int, number: int, detector: Detector, start: tuple[int, int]) -> list[tuple[float, float]] | None:
    """Row and column of an event's vertex in each plane of a part that begins at `start`; None without a neutrino.

    The interaction is the first that an event draws, so it can be drawn again without the rest.
    """
    particles = interaction(np.random.default_rng([seed, number]), detector, Mix())
    if not particles:
        return None
    x, y, z = particles[0].start
    volume = int(x > 0)
    depth = (detector.drift - abs(x)) / detector.row_pitch
    row = depth if volume == 0 else 2 * detector.rows_per_volume - depth
    columns = [float(detector.column(k, volume, np.array(y), np.array(z))) for k in range(3)]
    return [(float(row) - start[0], column - start[1]) for column in columns]


def _counts(event: Event, small: NDArray, halvings: int) -> dict[str, NDArray]:
    charge, truth = event.image() > 0, event.truth()
    full, best = _repeated(small, halvings), _repeated(shrink_labels(truth, 1), 1)
    return {
        "charged": _confusion(full, truth, charge),
        "own": _confusion(small, shrink_labels(truth, halvings)),
        "upsampled": _confusion(full, truth),
        "oracle": _confusion(best, truth, charge),
        "oracle upsampled": _confusion(best, truth),
    }


def _repeated(small: NDArray, halvings: int) -> NDArray:
    return small.repeat(2**halvings, 1).repeat(2**halvings, 2)


def _confusion(tags: NDArray, truth: NDArray, where: NDArray[np.bool_] | None = None) -> NDArray:
    """(planes, 3, 3). Elsewhere than `where` both count as background, and are taken off again."""
    if where is None:
        return _plain(tags, truth)
    out = _plain(np.where(where, tags, 0), np.where(where, truth, 0))
    out[:, 0, 0] -= np.count_nonzero(~where, axis=(1, 2))
    return out


def _plain(tags: NDArray, truth: NDArray) -> NDArray:
    def tensor(x: NDArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, np.uint8))[None]

    return confusion(tensor(tags), tensor(truth))[0].numpy()


def _bins(event: Event, tags: NDArray, vertex: list | None) -> NDArray:
    truth = event.truth()
    out = np.zeros((len(BINS), CLASSES, CLASSES), np.int64)
    for plane in range(len(truth)):
        label = truth[plane]
        rows, columns = np.nonzero(label)
        tag, true = tags[plane, rows, columns], label[rows, columns]
        for k, inside in enumerate(_members(label, rows, columns, None if vertex is None else vertex[plane])):
            np.add.at(out[k], (true[inside], tag[inside]), 1)
    return out


def _members(label: NDArray, rows: NDArray, columns: NDArray, vertex: list | None) -> list[NDArray[np.bool_]]:
    """For every bin which of the labelled pixels lie in it."""
    true = label[rows, columns]
    distance = np.full(len(rows), -1.0)
    if vertex is not None:
        distance = np.hypot(rows + 0.5 - vertex[0], columns + 0.5 - vertex[1])
    out = [(true == NEUTRINO) & (low <= distance) & (distance < high) for low, high in RINGS.values()]
    crossing, small = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    for which, other in ((COSMIC, NEUTRINO), (NEUTRINO, COSMIC)):
        mine = true == which
        crossing[mine] = _around(label == other)[rows[mine], columns[mine]]
        _, group, sizes = np.unique(clusters(rows[mine], columns[mine]), return_inverse=True, return_counts=True)
        small[mine] = sizes[group] <= FEW
    return [*out, crossing, small]


def _around(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(mask, NEAR)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * NEAR + 1, 2 * NEAR + 1))
    return windows.any(axis=(2, 3)) if mask.any() else mask
