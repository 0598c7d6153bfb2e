"""Particles on their way, and the energy that they leave: the data that the parts of the simulator exchange."""

from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from cosmictagger.simulate.detector import Detector

Array = NDArray[np.float64]

NOBODY, COSMIC, NEUTRINO = 0, 1, 2
SLOWEST_DELTA = 0.02
"""MeV from which collisions with electrons are drawn one by one; softer ones are part of the mean loss."""
TRACKED_DELTA = 0.5
"""MeV from which a delta ray goes its own way: a range of 0.2 cm, the size of a pixel. Softer ones stay on the
track."""


@dataclass(frozen=True)
class Particle:
    """Something that starts somewhere. Kinds: muon+, muon-, pion+, pion-, proton, neutron, electron, positron,
    photon."""

    kind: str
    kinetic: float
    """MeV."""
    start: Array
    direction: Array
    time: float
    """After the beam, us."""
    owner: int
    """COSMIC or NEUTRINO, or NOBODY for what the truth does not know of."""


@dataclass
class Light:
    """Electrons, positrons and photons that wait for the shower: rows of (place 3, direction 3, energy, time,
    owner)."""

    electrons: list[Array] = field(default_factory=list)
    positrons: list[Array] = field(default_factory=list)
    photons: list[Array] = field(default_factory=list)

    def add(self, particle: Particle) -> None:
        row = [*particle.start, *particle.direction, particle.kinetic, particle.time, particle.owner]
        getattr(self, particle.kind + "s").append(np.array([row]))


@dataclass
class Deposits:
    """Energy left in the argon. Rows of (place 3, energy, loss per cm, cosine to the field, time, owner)."""

    rows: list[Array] = field(default_factory=list)

    def add(self, places: Array, energy: Array, loss: Array, cosine: Array, clock: Array) -> None:
        """`clock` (n, 2) or (2,) holds time and owner."""
        out = np.empty((len(energy), 8))
        out[:, :3], out[:, 3], out[:, 4], out[:, 5], out[:, 6:] = places, energy, loss, cosine, clock
        self.rows.append(out)

    def together(self) -> Array:
        return np.concatenate(self.rows) if self.rows else np.empty((0, 8))


def seen(places: Array, time: Array | float, detector: Detector, margin: float = 0.0) -> NDArray[np.bool_]:
    """Which places (n, 3) lie in the detector and drift to the wires while the image is taken, give or take
    `margin`."""
    low, high = detector.box()
    inside = ((places > low - margin) & (places < high + margin)).all(axis=1)
    depth = detector.drift - np.abs(places[:, 0]) + detector.drift_speed * time
    return inside & (depth > -margin) & (depth < detector.drift + margin)


def isotropic(rng: Generator, count: int) -> Array:
    """Unit vectors (count, 3)."""
    out = rng.standard_normal((count, 3))
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def turned(rng: Generator, directions: Array, angles: Array) -> Array:
    """Unit vectors (n, 3) at the given angles to `directions`, around them at random."""
    around = rng.standard_normal(directions.shape)
    around -= (around * directions).sum(axis=1, keepdims=True) * directions
    around /= np.linalg.norm(around, axis=1, keepdims=True)
    return np.cos(angles)[:, None] * directions + np.sin(angles)[:, None] * around
