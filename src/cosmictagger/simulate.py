"""A quick simulator of three-plane wire images: cosmic muons over one neutrino interaction, with noise.

Two drift volumes share a cathode at x = 0; the wires stand at x = -drift and x = +drift. A charged particle loses
energy along a track bent by multiple scattering; the charge drifts to the wires (rows count drift distance, columns
count wires) and is spread by the pulse shape. Cosmic muons come at any time, which moves them along the drift.

Sources: multiple scattering after Highland (Review of Particle Physics, 34.3); the rise of the energy loss towards
the end of a track as a power law of the residual range (ArgoNeuT, arXiv:1306.1712).

What it does badly: no showers, no delta rays, no nuclear physics, no bipolar pulses, no dead wires, a flat noise
rate; the numbers of tracks are set so that pixel counts resemble those of SBND events. Lengths in cm, momenta in
MeV/c, x along the drift, y up, z along the beam.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from cosmictagger.data import Event, Pixels

Array = NDArray[np.float64]

CHARGE_PER_MEV = 160.0  # in the units of the images
RADIATION_LENGTH = 14.0
MINIMUM_LOSS = 2.1  # MeV per cm
STEP = 0.1
PULSE = 0.6  # standard deviation of the pulse along the drift, in rows


@dataclass(frozen=True)
class Detector:
    """Geometry and noise. The defaults resemble SBND: three planes of 1280 x 2048 pixels."""

    drift: float = 200.0
    """Depth of each of the two drift volumes, cm."""
    height: float = 400.0
    length: float = 500.0
    row_pitch: float = 0.3125
    """Drift distance per row, cm."""
    wire_pitch: float = 0.3
    """Distance of wires, cm; also the width of a column."""
    columns: int = 2048
    angles: tuple[float, float, float] = (60.0, -60.0, 0.0)
    """Of the wires to the vertical, degrees, in the first volume; the second is its mirror image."""
    threshold: float = 5.0
    """Pixels with less charge are not kept."""
    cosmic_muons: float = 7.0
    """Mean number that cross the detector in a readout."""
    noise: tuple[float, float] = (0.008, 0.0006)
    """Share of pixels with noise above threshold, on the first induction wires and on the others."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a plane."""
        return 2 * self.rows_per_volume, self.columns

    @property
    def rows_per_volume(self) -> int:
        return round(self.drift / self.row_pitch)

    def angle(self, plane: int, volume: int) -> float:
        """Wire angle in radians."""
        degrees = self.angles[plane]
        return np.radians(degrees if volume == 0 else -degrees)

    def coarser(self, factor: int) -> "Detector":
        """The same detector with pixels `factor` times as large, for quick trials."""
        return Detector(
            row_pitch=self.row_pitch * factor, wire_pitch=self.wire_pitch * factor, columns=self.columns // factor
        )


@dataclass(frozen=True)
class Particle:
    momentum: float
    """MeV/c, where it starts."""
    range: float
    """Path after which it stops, cm."""
    loss_at_end: float
    """Energy loss at a residual range of 1 cm, MeV/cm."""


@dataclass(frozen=True)
class Track:
    """Energy deposits: points (n, 3) in cm, charge (n,) and the drift distance added by the particle's time."""

    points: Array
    charge: Array
    late: float


def simulate(rng: Generator, detector: Detector | None = None) -> Event:
    """One event with its truth. The same generator state gives the same event."""
    detector = detector or Detector()
    cosmic = _cosmic_muons(rng, detector)
    neutrino = _neutrino(rng, detector)
    charge, label = [], []
    for plane in range(len(detector.angles)):
        from_cosmic = _project(rng, cosmic, plane, detector)
        from_neutrino = _project(rng, neutrino, plane, detector)
        deposited = from_cosmic + from_neutrino
        noisy = deposited * rng.normal(1, 0.05, deposited.shape[0]) + _noise(rng, plane, detector)
        kept = np.flatnonzero(noisy > detector.threshold)
        rows, columns = kept % detector.shape[0], kept // detector.shape[0]
        # a pixel belongs to whoever left most of its charge; noise to nobody
        real = deposited[kept] > 0.5 * detector.threshold
        tag = np.where(from_neutrino[kept] > from_cosmic[kept], 2, 1) * real
        charge.append(Pixels(rows, columns, noisy[kept].astype(np.float32)))
        label.append(Pixels(rows, columns, tag.astype(np.float32)))
    return Event(detector.shape, tuple(charge), tuple(label))


def simulate_numbered(seed: int, number: int, detector: Detector | None = None) -> Event:
    """Event `number` of the sample `seed`, the same whatever was simulated before."""
    event = simulate(np.random.default_rng([seed, number]), detector)
    return Event(event.shape, event.charge, event.label, (seed, 0, number))


def _cosmic_muons(rng: Generator, detector: Detector) -> list[Track]:
    tracks: list[Track] = []
    wanted = rng.poisson(detector.cosmic_muons)
    box = _box(detector)
    while len(tracks) < wanted:
        cosine = rng.random() ** (1 / 4)  # flux through a horizontal plane of an intensity that goes with cos^2
        azimuth = rng.uniform(0, 2 * np.pi)
        sine = np.sqrt(1 - cosine**2)
        direction = np.array([sine * np.cos(azimuth), -cosine, sine * np.sin(azimuth)])
        reach = detector.height
        above = rng.uniform(box[0] - reach, box[1] + reach)
        above[1] = box[1][1]
        first, last = _crossing(above, direction, box)
        if last - first < 10:  # cm
            continue
        momentum = rng.lognormal(np.log(3000), 0.8)
        muon = Particle(momentum, momentum / MINIMUM_LOSS, 8.0)
        late = rng.uniform(-0.8, 0.8) * detector.drift
        tracks.append(_track(rng, detector, (above + first * direction, direction), muon, late))
    return tracks


def _neutrino(rng: Generator, detector: Detector) -> list[Track]:
    """A muon and a few hadrons from one vertex, in time with the beam."""
    low, high = _box(detector)
    vertex = rng.uniform(low + 20, high - [20, 20, 120])
    momentum = rng.lognormal(np.log(450), 0.5)
    particles = [(Particle(momentum, momentum / MINIMUM_LOSS, 8.0), 0.5)]
    for _ in range(1 + rng.poisson(1.5)):
        if rng.random() < 0.5:
            particles.append((Particle(700.0, 3 + rng.exponential(12), 17.0), 0.9))  # proton
        else:
            particles.append((Particle(300.0, 5 + rng.exponential(40), 8.0), 0.7))  # pion
    return [_track(rng, detector, (vertex, _around_beam(rng, spread)), p, 0) for p, spread in particles]


def _around_beam(rng: Generator, spread: float) -> Array:
    """A unit vector at a typical angle of `spread` radians to the beam."""
    polar, azimuth = abs(rng.normal(0, spread)), rng.uniform(0, 2 * np.pi)
    return np.array([np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)])


def _track(
    rng: Generator, detector: Detector, start_and_direction: tuple[Array, Array], particle: Particle, late: float
) -> Track:
    """Follow a particle until it stops or leaves the detector."""
    start, direction = start_and_direction
    low, high = _box(detector)
    along = np.arange(0, min(particle.range, float(np.linalg.norm(high - low))), STEP)
    left = np.maximum(particle.momentum - MINIMUM_LOSS * along, 30)
    kick = 13.6 / left * np.sqrt(STEP / RADIATION_LENGTH)
    across = np.linalg.svd(direction[None])[2][1:]  # two unit vectors at right angles to the direction
    slopes = np.cumsum(rng.normal(0, kick, (2, len(along))), axis=1)
    headings = direction + slopes.T @ across
    headings /= np.linalg.norm(headings, axis=1, keepdims=True)
    points = start + np.cumsum(headings, axis=0) * STEP
    outside = np.flatnonzero(((points < low) | (points > high)).any(axis=1))
    inside = slice(0, outside[0] if len(outside) else None)
    loss = np.maximum(MINIMUM_LOSS, particle.loss_at_end * (particle.range - along + STEP) ** -0.42)
    charge = loss * STEP * rng.lognormal(0, 0.35, len(along))
    return Track(points[inside], charge[inside], late)


def _project(rng: Generator, tracks: list[Track], plane: int, detector: Detector) -> Array:
    """Charge of each pixel of a plane by id = column * rows + row, float64 (rows * columns,)."""
    rows, columns = detector.shape
    out = np.zeros(rows * columns)
    if not tracks:
        return out
    points = np.concatenate([t.points for t in tracks])
    charge = np.concatenate([t.charge for t in tracks]) * CHARGE_PER_MEV
    late = np.concatenate([np.full(len(t.charge), t.late) for t in tracks])
    half = detector.rows_per_volume
    for volume in (0, 1):
        mine = (points[:, 0] < 0) == (volume == 0)
        x, y, z = points[mine].T
        distance = detector.drift - np.abs(x) + late[mine]  # from the wires, as the clock of the beam sees it
        angle = detector.angle(plane, volume)
        wire = ((z - detector.length / 2) * np.cos(angle) + y * np.sin(angle)) / detector.wire_pitch
        column = np.floor(wire + columns / 2 + rng.normal(0, 0.15, len(wire))).astype(np.int64)
        for offset, weight in _pulse():
            depth = np.floor(distance / detector.row_pitch).astype(np.int64) + offset
            seen = (depth >= 0) & (depth < half) & (column >= 0) & (column < columns)
            row = depth[seen] if volume == 0 else rows - 1 - depth[seen]
            out += np.bincount(column[seen] * rows + row, charge[mine][seen] * weight, rows * columns)
    return out


def _pulse() -> list[tuple[int, float]]:
    offsets = np.arange(-2, 3)
    weights = np.exp(-0.5 * (offsets / PULSE) ** 2)
    return list(zip(offsets.tolist(), (weights / weights.sum()).tolist(), strict=True))


def _noise(rng: Generator, plane: int, detector: Detector) -> Array:
    """Noise hits: short runs of rows a little above threshold, most of them on the first induction wires."""
    rows, columns = detector.shape
    half = detector.rows_per_volume
    out = np.zeros((columns, rows))
    for volume in (0, 1):
        angle = detector.angle(plane, volume)
        reach = detector.length / 2 * np.cos(angle) + detector.height / 2 * abs(np.sin(angle))
        wires = int(min(reach / detector.wire_pitch, columns // 2))
        loud = angle < 0
        runs = rng.poisson(detector.noise[0 if loud else 1] * half * 2 * wires / 1.3)
        column = rng.integers(columns // 2 - wires, columns // 2 + wires, runs)
        row = rng.integers(0, half, runs)
        for _ in range(6):
            value = detector.threshold + rng.exponential(1.1, len(row))
            np.maximum.at(out, (column, row + volume * half), value)
            going_on = (rng.random(len(row)) < 0.23) & (row + 1 < half)
            column, row = column[going_on], row[going_on] + 1
    return out.reshape(-1)


def _box(detector: Detector) -> tuple[Array, Array]:
    """Lowest and highest corner of the active volume."""
    high = np.array([detector.drift, detector.height / 2, detector.length])
    return np.array([-detector.drift, -detector.height / 2, 0.0]), high


def _crossing(start: Array, direction: Array, box: tuple[Array, Array]) -> tuple[float, float]:
    """Path lengths at which a straight line enters and leaves the box; the first is the larger if it misses."""
    with np.errstate(divide="ignore"):
        to_low, to_high = (box[0] - start) / direction, (box[1] - start) / direction
    first = max(float(np.minimum(to_low, to_high).max()), 0.0)
    return first, float(np.maximum(to_low, to_high).min())
