"""What makes an event hard or easy to tag, in numbers: to compare simulated events with real ones.

All are of one event at full resolution. A pixel is *stored* if it has charge, *labelled* if its label is 1 (cosmic)
or 2 (neutrino), and *background* if it is stored and not labelled.

    rule     A pixel is called labelled if it is stored and has at least three stored neighbours of eight, or a charge
             above 12. IoU with the labelled pixels, mean of the planes. A network is needed where this is low.
    oracle   Labels are max-pooled over squares of 2 x 2 pixels and repeated to full resolution; each is kept where a
             pixel is stored: the best answer at half resolution. IoU per class and plane, mean of those with a union.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cosmictagger.data import Event, shrink_labels

COSMIC, NEUTRINO = 1, 2
RULE_NEIGHBOURS, RULE_CHARGE = 3, 12.0
SMALL_CLUSTER = 5
NEAR = 2
QUIET_HALF = {0: 0, 1: 1}
"""Half of the rows of a slanted plane in which its wires are not the first that the charge meets."""

PER_PLANE = {
    "near": "share of the background within 2 pixels (rows and columns together) of a labelled one",
    "background_p99": "99th percentile of the charge of the background",
    "small_cosmic": "cosmic clusters (of eight neighbours) under 5 pixels",
    "neutrino_clusters": "neutrino clusters",
    "quiet": "background pixels in the quiet half; in all of the collection plane",
    "run": "mean length of runs of cosmic pixels along the drift",
    "neutrino_charge": "mean charge of a neutrino pixel",
    "highest": "highest charge",
}
"""Quantities that each plane has, by name."""

BANDS = {"rule": (0.78, 0.85), "oracle": (0.89, 0.93)}
"""Where the mean of simulated events must lie: neither easier nor dustier than the data."""
COMPARED = (
    "near/1",
    "near/2",
    "background_p99/1",
    "background_p99/2",
    "small_cosmic/2",
    "neutrino_clusters/2",
    "quiet/1",
    "run/0",
    "run/2",
    "neutrino_charge/1",
    "highest/1",
)
"""Quantities whose mean over the real events must be near that of simulated ones, and no rarity among them."""
MEANS_WITHIN = 1.3
CENTRAL = (5.0, 95.0)


@dataclass(frozen=True)
class Comparison:
    """One quantity of real and of simulated events. Events without the thing in question are left out."""

    name: str
    real: NDArray[np.float64]
    simulated: NDArray[np.float64]

    @property
    def central(self) -> tuple[float, float]:
        """Between which values nine of ten simulated events lie."""
        low, high = np.percentile(self.simulated, CENTRAL)
        return float(low), float(high)

    @property
    def gated(self) -> bool:
        return self.name in BANDS or self.name in COMPARED

    @property
    def holds(self) -> bool:
        """Whether the means agree, and the real one is nothing unusual among simulated events."""
        real, simulated = self.real.mean(), self.simulated.mean()
        if self.name in BANDS:
            low, high = BANDS[self.name]
            return bool(low <= simulated <= high)
        low, high = self.central
        return bool(low <= real <= high and 1 / MEANS_WITHIN <= simulated / real <= MEANS_WITHIN)


def compare(real: Iterable[Event], simulated: Iterable[Event]) -> list[Comparison]:
    """Every quantity of real beside that of simulated events."""
    one, other = collect(real), collect(simulated)
    return [Comparison(k, one[k][~np.isnan(one[k])], other[k][~np.isnan(other[k])]) for k in one]


def measure(event: Event) -> dict[str, float]:
    """All quantities of an event, those of a plane as `name/plane`. NaN where there is nothing to measure."""
    charge, truth = event.image(), event.truth()
    out = {"rule": rule(charge, truth), "oracle": oracle(charge, truth)}
    for plane in range(len(charge)):
        for name, value in _of_plane(charge[plane], truth[plane], plane).items():
            out[f"{name}/{plane}"] = value
    return out


def collect(events: Iterable[Event]) -> dict[str, NDArray[np.float64]]:
    """Each quantity for all events."""
    found = [measure(event) for event in events]
    return {name: np.array([one[name] for one in found]) for name in found[0]}


def rule(charge: NDArray, truth: NDArray) -> float:
    """IoU of the rule above; both (planes, rows, columns)."""
    return float(np.mean([_iou(_by_rule(c), t > 0) for c, t in zip(charge, truth, strict=True)]))


def oracle(charge: NDArray, truth: NDArray) -> float:
    """IoU of the best answer at half resolution; both (planes, rows, columns)."""
    best = shrink_labels(truth, 1).repeat(2, 1).repeat(2, 2) * (charge > 0)
    scores = [
        _iou(b == which, t == which)
        for which in (COSMIC, NEUTRINO)
        for b, t in zip(best, truth, strict=True)
        if (b == which).any() or (t == which).any()
    ]
    return float(np.mean(scores)) if scores else np.nan


def _iou(a: NDArray, b: NDArray) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def _by_rule(charge: NDArray) -> NDArray[np.bool_]:
    stored = charge > 0
    return stored & ((_neighbours(stored) >= RULE_NEIGHBOURS) | (charge > RULE_CHARGE))


def _neighbours(stored: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """How many of the eight neighbours are stored."""
    padded = np.pad(stored, 1).astype(np.uint8)
    across = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return across[:-2] + across[1:-1] + across[2:] - stored


def _of_plane(charge: NDArray, truth: NDArray, plane: int) -> dict[str, float]:
    stored, labelled = charge > 0, truth > 0
    background = stored & ~labelled
    cosmic, neutrino = truth == COSMIC, truth == NEUTRINO
    sizes = cluster_sizes(*np.nonzero(cosmic))
    half = QUIET_HALF.get(plane)
    rows = slice(None) if half is None else slice(half * len(charge) // 2, (half + 1) * len(charge) // 2)
    beginnings = np.count_nonzero(cosmic[0]) + np.count_nonzero(cosmic[1:] & ~cosmic[:-1])
    values = charge[background]
    return {
        "near": np.count_nonzero(background & _around(labelled)) / max(len(values), 1),
        "background_p99": float(np.percentile(values, 99)) if len(values) else np.nan,
        "small_cosmic": float(np.count_nonzero(sizes < SMALL_CLUSTER)),
        "neutrino_clusters": float(len(cluster_sizes(*np.nonzero(neutrino)))) if neutrino.any() else np.nan,
        "quiet": float(np.count_nonzero(background[rows])),
        "run": np.count_nonzero(cosmic) / beginnings if beginnings else np.nan,
        "neutrino_charge": float(charge[neutrino].mean()) if neutrino.any() else np.nan,
        "highest": float(charge.max()),
    }


def _around(labelled: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels at most NEAR steps along rows and columns from a labelled one, itself included."""
    for _ in range(NEAR):
        wider = labelled.copy()
        wider[1:] |= labelled[:-1]
        wider[:-1] |= labelled[1:]
        wider[:, 1:] |= labelled[:, :-1]
        wider[:, :-1] |= labelled[:, 1:]
        labelled = wider
    return labelled


def cluster_sizes(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sizes of the groups of pixels that touch, corners included. (n,) each, no pixel twice."""
    return np.unique(clusters(rows, columns), return_counts=True)[1]


def clusters(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number for each pixel, the same for those of a group that touches, corners included. (n,) each, no pixel
    twice."""
    if not len(rows):
        return np.empty(0, np.int64)
    wide = int(columns.max()) + 3
    keys = (rows + 1) * wide + columns + 1
    order = np.argsort(keys)
    ids = keys[order]
    pairs = []
    for step in (1, wide - 1, wide, wide + 1):
        at = np.minimum(np.searchsorted(ids, ids + step), len(ids) - 1)
        touching = np.flatnonzero(ids[at] == ids + step)
        pairs.append(np.stack([touching, at[touching]]))
    one, other = np.concatenate(pairs, axis=1)
    root = np.arange(len(ids))
    while True:  # every pixel takes the lowest number among its own and its neighbours', and then that one's
        before = root.copy()
        np.minimum.at(root, root[one], root[other])
        np.minimum.at(root, root[other], root[one])
        while not np.array_equal(root, root[root]):
            root = root[root]
        if np.array_equal(root, before):
            break
    out = np.empty_like(root)
    out[order] = root
    return out
