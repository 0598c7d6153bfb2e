"""From energy in the argon to stored pixels and their labels.

Electrons that escape recombination drift in bundles, diffuse, and arrive on a wire of each plane at a time. The truth
is where they arrive; the image is that, spread by the response, with noise, cut at a threshold. So the response's
tails and echoes, and noise, are background, as in the real events.
"""

import math
from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from cosmictagger.data import Pixels
from cosmictagger.simulate import matter
from cosmictagger.simulate.detector import SUBROWS, Detector, Noise, Response
from cosmictagger.simulate.particles import COSMIC, NEUTRINO, Array, seen

Floats = NDArray[np.float32]

BUNDLE = 600.0
"""Electrons that drift together, as in LArSoft (its ElectronClusterSize). The truth is made of them: a pixel that one
of them reaches has a label, so that this is the smallest labelled charge, too."""
REACH = 7
"""Rows to either side that the response is followed for."""


def drifted(rng: Generator, deposits: Array, detector: Detector) -> Floats:
    """Bundles of electrons as they arrive, (6, n): depth below the image's edge, x's sign, y, z, electrons, owner."""
    deposits = deposits[seen(deposits[:, :3], deposits[:, 6], detector, 1.0)]
    low, high = detector.box()
    inside = ((deposits[:, :3] > low) & (deposits[:, :3] < high)).all(axis=1)
    deposits = deposits[inside & (deposits[:, 3] > 0)]
    x = deposits[:, 0]
    time = (detector.drift - np.abs(x)) / detector.drift_speed
    survive = matter.surviving(deposits[:, 4], deposits[:, 5], detector.field) * np.exp(-time / detector.lifetime)
    electrons = deposits[:, 3] / matter.IONISATION * survive
    number = np.ceil(electrons / BUNDLE).astype(np.int64)
    along, across = (np.sqrt(2 * d * time) for d in detector.diffusion)
    depth = detector.drift - np.abs(x) + detector.drift_speed * deposits[:, 6]
    columns = np.stack(
        [depth, np.sign(x), *deposits[:, 1:3].T, electrons / np.maximum(number, 1), deposits[:, 7], along, across]
    )
    spread = np.repeat(columns.astype(np.float32), number, axis=1)
    kicks = rng.standard_normal((3, spread.shape[1]), dtype=np.float32)
    spread[0] += spread[6] * kicks[0]
    spread[2:4] += spread[7] * kicks[1:]
    return spread[:6]


def read_plane(rng: Generator, bundles: Floats, plane: int, detector: Detector) -> tuple[Pixels, Pixels]:
    """Charge and labels of the stored pixels of a plane; labels have the pixels that belong to somebody."""
    halves = [_read_half(rng, bundles, plane, volume, detector) for volume in (0, 1)]
    rows, columns, charge, label = (np.concatenate(x) for x in zip(*halves, strict=True))
    mine = label > 0
    return Pixels(rows, columns, charge), Pixels(rows[mine], columns[mine], label[mine].astype(np.float32))


def _read_half(
    rng: Generator, bundles: Floats, plane: int, volume: int, detector: Detector
) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats, NDArray[np.int64]]:
    rows = detector.rows_per_volume
    depth, _, y, z, electrons, owner = bundles[:, (bundles[1] > 0) == (volume == 1)]
    first, last = detector.wires(plane)
    column = np.floor(detector.column(plane, volume, y, z)).astype(np.int64)
    subrow = np.floor(depth * (SUBROWS / detector.row_pitch)).astype(np.int64)
    arrives = (column >= first) & (column < last) & (subrow >= 0) & (subrow < rows * SUBROWS)
    dead, levels = _wires(detector, plane, volume)
    arrives[arrives] = ~dead[column[arrives]]
    where, electrons, owner = (column * rows * SUBROWS + subrow)[arrives], electrons[arrives], owner[arrives]
    size = detector.columns * rows
    total = np.asarray(np.bincount(where, electrons, size * SUBROWS), np.float64)
    response = detector.responses[plane]
    touched, signal = _respond(total, rows, response)
    noise = detector.noise(plane, volume)
    if noise.slow:
        wave = _noise(rng, noise, levels, rows).reshape(-1)
    else:
        wave = _rare_noise(rng, _passing(detector, plane, volume), levels, rows).reshape(-1)
        wave[touched] = rng.standard_normal(len(touched), dtype=np.float32) * levels[touched // rows]
    wave[touched] += signal
    np.minimum(wave, response.saturation, out=wave)
    stored = np.flatnonzero(wave > detector.threshold)
    label = _label(where // SUBROWS, owner, stored)
    row = stored % rows
    return row if volume == 0 else 2 * rows - 1 - row, stored // rows, wave[stored], label


def _label(where: NDArray[np.int64], owner: Floats, stored: NDArray[np.int64]) -> NDArray[np.int64]:
    """Whose electrons have reached a stored pixel, be they ever so few; the neutrino's where there are both.

    So does the program that labelled the public events (larcv3's CosmicNeutrinoSegLabel): a neutrino's pixels are
    written over those of cosmic rays.
    """
    size = int(max(stored.max(initial=0), where.max(initial=0))) + 1
    reached = np.zeros(size, np.int64)
    for who in (COSMIC, NEUTRINO):
        reached[where[owner == who]] = who
    return reached[stored]


def _respond(total: Array, rows: int, response: Response) -> tuple[NDArray[np.int64], Array]:
    """Pixels that the response of the arrived electrons touches, and the charge there."""
    at = np.flatnonzero(total > 0)
    wire, subrow = at // (rows * SUBROWS), at % (rows * SUBROWS)
    row, phase = subrow // SUBROWS, subrow % SUBROWS
    units = total[at] / response.electrons_per_unit
    kernel = _kernel(response)
    reached = row[:, None] + np.arange(-REACH, REACH + 1)
    values = units[:, None] * kernel[phase]
    fits = (reached >= 0) & (reached < rows)
    ids = (wire[:, None] * rows + reached)[fits]
    charge = np.asarray(np.bincount(ids, values[fits]), np.float64)
    touched = np.flatnonzero(charge != 0)
    return touched, charge[touched]


@cache
def _kernel(response: Response) -> Array:
    """Share of a charge that each row gets, by the part of a row in which it arrives: (SUBROWS, 2 REACH + 1)."""
    fine = 64
    length = 64
    frequency = np.fft.rfftfreq(fine * length, 1 / fine)
    passed = np.exp(-0.5 * (frequency / response.cutoff) ** response.steepness) * np.sinc(frequency)
    pulse = np.fft.irfft(passed) * fine
    middle = (np.arange(SUBROWS) + 0.5) / SUBROWS
    offset = np.arange(-REACH, REACH + 1) + 0.5 - middle[:, None]
    return pulse[np.rint(offset * fine).astype(np.int64) % (fine * length)]


@cache
def _wires(detector: Detector, plane: int, volume: int) -> tuple[NDArray[np.bool_], Floats]:
    """Which wires of a plane are dead, and the noise of each one: 0 where there is none, or it is dead."""
    rng = np.random.default_rng([detector.serial, plane, volume])
    dead = rng.random(detector.columns) < detector.dead_wires
    level = detector.noise(plane, volume).level * (1 + detector.noise_spread * rng.standard_normal(detector.columns))
    first, last = detector.wires(plane)
    level[:first] = level[last:] = 0
    level[dead] = 0
    return dead, level.astype(np.float32)


def _rare_noise(rng: Generator, passing: tuple[Array, Array], levels: Floats, rows: int) -> Floats:
    """Noise of quiet wires where it is above threshold, zero elsewhere, (columns, rows).

    One pixel in a thousand is, next to another one about as often as anywhere: so they are drawn alone.
    """
    share, sigmas = passing
    out = np.zeros((len(levels), rows), np.float32)
    wire = np.repeat(np.arange(len(levels)), rng.poisson(share * rows))
    row = rng.integers(0, rows, len(wire))
    height = np.sqrt(sigmas[wire] ** 2 - 2 * np.log(1 - rng.random(len(wire))))  # of x exp(-x^2 / 2) above `sigmas`
    kept = rng.random(len(wire)) * height < sigmas[wire]
    while not kept.all():  # Gaussian by rejection
        again = np.flatnonzero(~kept)
        height[again] = np.sqrt(sigmas[wire[again]] ** 2 - 2 * np.log(1 - rng.random(len(again))))
        kept[again] = rng.random(len(again)) * height[again] < sigmas[wire[again]]
    out[wire, row] = height * levels[wire]
    return out


@cache
def _passing(detector: Detector, plane: int, volume: int) -> tuple[Array, Array]:
    """For every wire the share of pixels in which noise alone is above threshold, and the threshold over its
    noise."""
    levels = _wires(detector, plane, volume)[1]
    sigmas = detector.threshold / np.maximum(levels.astype(np.float64), 1e-3)
    share = np.array([math.erfc(x / math.sqrt(2)) / 2 for x in sigmas])
    return share, sigmas


def _noise(rng: Generator, noise: Noise, levels: Floats, rows: int) -> Floats:
    """Noise of every wire, (columns, rows): what the filter passes of white noise, and a part that varies slowly."""
    out = np.zeros((len(levels), rows), np.float32)
    first, last = np.flatnonzero(levels)[[0, -1]]
    some = slice(int(first), int(last) + 1)
    white = rng.standard_normal((last + 1 - first, rows + 4), dtype=np.float32)
    near, middle, far = _noise_taps()
    quick = white[:, 1:-3] + white[:, 3:-1]
    quick *= near / far
    quick += white[:, :-4]
    quick += white[:, 4:]
    quick *= far / middle
    quick += white[:, 2:-2]
    np.multiply(quick, (levels[some] * middle * np.float32(np.sqrt(1 - noise.slow)))[:, None], out=out[some])
    if noise.slow:
        out[some] += _slow(rng, noise, levels[some], rows).T
    return out


def _slow(rng: Generator, noise: Noise, levels: Floats, rows: int) -> Floats:
    """Noise that forgets within some rows, (rows, columns)."""
    keep = np.float32(np.exp(-1 / noise.rows))
    out = rng.standard_normal((rows, len(levels)), dtype=np.float32)
    out *= levels * np.float32(np.sqrt(noise.slow))
    out[1:] *= np.sqrt(1 - keep**2)
    for row in range(1, rows):
        out[row] += keep * out[row - 1]
    return out


@cache
def _noise_taps() -> Floats:
    """A short filter of white noise: weights of the next neighbours, the pixel itself, and those after the next.

    Neighbours agree by a third and those next to them are slightly opposed, as far as can be told from how often
    neighbours are both stored on the quiet wires of the real events.
    """
    near, middle, far = 0.2, 1.0, -0.1
    return np.array([near, middle, far], np.float32) / np.float32(np.sqrt(middle**2 + 2 * near**2 + 2 * far**2))
