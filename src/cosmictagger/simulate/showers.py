"""Electrons and photons, all of an event stepped together: showers, delta rays, Michel electrons, blips.

Sources: PDG, "Passage of particles through matter" (bremsstrahlung and pair creation in terms of the radiation
length, scattering after Highland); Klein and Nishina for Compton scattering; Berger et al., XCOM (NIST) for the
photoelectric effect in argon. Pairs share energy evenly spread; angles of emission are of the order of mass over
energy.
"""

from functools import cache

import numpy as np
from numpy.random import Generator

from cosmictagger.simulate import matter
from cosmictagger.simulate.detector import Detector
from cosmictagger.simulate.particles import (
    SLOWEST_DELTA,
    TRACKED_DELTA,
    Array,
    Deposits,
    Light,
    isotropic,
    seen,
    turned,
)

ELECTRON_ENDS = 0.15
"""MeV below which an electron stops where it is: a range of 0.3 mm."""
PHOTON_ENDS = 0.03
SOFTEST_PHOTON = 0.3
"""MeV: bremsstrahlung below it is left out, 1 % of the loss of an electron of 10 MeV."""
PHOTONS_WAIT = 48
"""Photons that are worth a round; fewer wait for company."""
MARGIN = 30.0
ELECTRONS_PER_CM3 = matter.DENSITY * 6.02214e23 * matter.Z / matter.A
CLASSICAL_RADIUS = 2.81794e-13
DIRECTION, ENERGY, TIME, SIGN = slice(3, 6), 6, 7, 9


def shower(rng: Generator, light: Light, detector: Detector, deposits: Deposits) -> None:
    """Follow all that waits in `light`, and all that comes of it, to its end."""
    charged = np.concatenate([np.empty((0, 10)), _signed(light.electrons, -1), _signed(light.positrons, 1)])
    photons = np.concatenate([np.empty((0, 10)), _signed(light.photons, 0)])
    while len(charged) or len(photons):
        if len(photons) >= PHOTONS_WAIT or not len(charged):
            fresh, photons = _interact(rng, photons, detector, deposits)
            charged = np.concatenate([charged, fresh])
        if len(charged):
            charged, fresh = _step(rng, charged, detector, deposits)
            photons = np.concatenate([photons, fresh])


def _signed(rows: list[Array], sign: int) -> Array:
    if not rows:
        return np.empty((0, 10))
    together = np.concatenate(rows)
    return np.concatenate([together, np.full((len(together), 1), float(sign))], axis=1)


def _step(rng: Generator, charged: Array, detector: Detector, deposits: Deposits) -> tuple[Array, Array]:
    """One step of every electron; returns those that go on, and the photons that they gave off."""
    table = matter.table(matter.ELECTRON)
    energy = charged[:, ENERGY]
    loss = table.loss_at(energy)
    length = np.clip(0.15 * energy / loss, 0.03, 0.3)
    direction = charged[:, DIRECTION].copy()
    charged[:, :3] += direction * (length / 2)[:, None]
    photons = _radiate(rng, charged, length)
    kept, lost, knocked = _collide(rng, charged, loss, length)
    deposits.add(charged[:, :3], kept, loss, direction[:, 0], charged[:, 7:9])
    charged[:, :3] += direction * (length / 2)[:, None]
    charged[:, ENERGY] -= lost
    _scatter(rng, charged, length)
    rest = charged[:, ENERGY] < ELECTRON_ENDS
    here = seen(charged[:, :3], charged[:, TIME], detector, MARGIN)
    if rest.any():
        ended = charged[rest & here]
        final = np.maximum(ended[:, ENERGY], 0)
        deposits.add(ended[:, :3], final, table.loss_at(np.full(len(ended), 0.1)), ended[:, 3], ended[:, 7:9])
        photons = np.concatenate([photons, _annihilate(rng, ended[ended[:, SIGN] > 0])])
    return np.concatenate([charged[here & ~rest], knocked]), photons


def _collide(rng: Generator, charged: Array, loss: Array, length: Array) -> tuple[Array, Array, Array]:
    """Energy that stays in place, energy lost, and electrons knocked out that go their own way, of 1/T^2 (Moller)."""
    energy = charged[:, ENERGY]
    most = np.maximum(energy / 2, SLOWEST_DELTA)  # the slower of two electrons is the one knocked out
    rate = matter.K / 2 / matter.beta(np.maximum(energy, ELECTRON_ENDS / 2), matter.ELECTRON) ** 2 * length
    mean = loss * length
    soft = np.maximum(mean - rate * np.log(most / SLOWEST_DELTA), 0.1 * mean)
    number = rng.poisson(rate * (1 / SLOWEST_DELTA - 1 / most))
    where = np.repeat(np.arange(len(energy)), number)
    transfer = 1 / (1 / SLOWEST_DELTA - rng.random(len(where)) * (1 / SLOWEST_DELTA - 1 / most[where]))
    far = transfer > TRACKED_DELTA
    kept = np.minimum(soft + np.bincount(where[~far], transfer[~far], len(energy)), energy)
    where, transfer = where[far], transfer[far]
    lost = np.minimum(kept + np.bincount(where, transfer, len(energy)), energy)
    knocked = charged[where]
    top = energy[where]
    cosine = np.sqrt(transfer * (top + 2 * matter.ELECTRON) / (top * (transfer + 2 * matter.ELECTRON)))
    if len(where):
        knocked[:, DIRECTION] = turned(rng, knocked[:, DIRECTION], np.arccos(np.clip(cosine, 0, 1)))
    knocked[:, ENERGY], knocked[:, SIGN] = transfer, -1
    return kept, lost, knocked


def _scatter(rng: Generator, charged: Array, length: Array) -> None:
    energy = np.maximum(charged[:, ENERGY], 0.05)
    width = matter.SCATTERING / (matter.momentum(energy, matter.ELECTRON) * matter.beta(energy, matter.ELECTRON))
    width *= np.sqrt(length / matter.RADIATION_LENGTH)
    kick = rng.standard_normal((len(charged), 3)) * np.minimum(width, 1.0)[:, None]
    out = charged[:, DIRECTION] + kick
    charged[:, DIRECTION] = out / np.sqrt((out * out).sum(axis=1))[:, None]


def _radiate(rng: Generator, charged: Array, length: Array) -> Array:
    """At most one photon an electron and step, of 1/k (1 - y + 3/4 y^2); its energy is taken from the electron."""
    energy = charged[:, ENERGY]
    ratio = np.log(np.maximum(energy / SOFTEST_PHOTON, 1))
    # the radiation length holds above 100 MeV; less is radiated below, in argon a quarter at 1 MeV and three quarters
    # at 10 MeV (Berger et al., ESTAR, NIST)
    weak = 1 - np.exp(-((np.log1p(energy / matter.ELECTRON) / 2.4) ** 1.4))
    chosen = np.flatnonzero(rng.random(len(energy)) < 4 / 3 * ratio * weak * length / matter.RADIATION_LENGTH)
    k = SOFTEST_PHOTON * np.exp(rng.random(len(chosen)) * ratio[chosen])
    y = k / energy[chosen]
    happens = rng.random(len(chosen)) < 1 - y + 0.75 * y * y
    chosen, k = chosen[happens], k[happens]
    photons = charged[chosen].copy()
    photons[:, ENERGY], photons[:, SIGN] = k, 0
    angle = np.abs(rng.standard_normal(len(chosen))) * matter.ELECTRON / energy[chosen]
    photons[:, DIRECTION] = turned(rng, photons[:, DIRECTION], np.minimum(angle, 1.5))
    charged[chosen, ENERGY] -= k
    return photons


def _annihilate(rng: Generator, positrons: Array) -> Array:
    """Two photons back to back."""
    out = np.repeat(positrons, 2, axis=0)
    one = isotropic(rng, len(positrons))
    out[0::2, DIRECTION], out[1::2, DIRECTION] = one, -one
    out[:, ENERGY], out[:, SIGN] = matter.ELECTRON, 0
    return out


def _interact(rng: Generator, photons: Array, detector: Detector, deposits: Deposits) -> tuple[Array, Array]:
    """The next interaction of every photon; returns electrons and the photons that remain."""
    grid, total, to_compton, to_pair = _cross_sections()
    log = np.log(photons[:, ENERGY])
    photons[:, :3] += photons[:, DIRECTION] * (rng.exponential(size=len(log)) / np.interp(log, grid, total))[:, None]
    here = seen(photons[:, :3], photons[:, TIME], detector, MARGIN)
    photons, log = photons[here], log[here]
    which = rng.random(len(log))
    compton = which < np.interp(log, grid, to_compton)
    pair = ~compton & (which < np.interp(log, grid, to_pair))
    absorbed = photons[~compton & ~pair]
    absorbed[:, SIGN] = -1
    scattered, recoils = _compton(rng, photons[compton])
    tired = scattered[:, ENERGY] < PHOTON_ENDS
    ends = scattered[tired]
    loss = np.full(len(ends), 10.0)
    deposits.add(ends[:, :3], ends[:, ENERGY], loss, ends[:, 3], ends[:, 7:9])
    return np.concatenate([absorbed, recoils, _pair(rng, photons[pair])]), scattered[~tired]


@cache
def _cross_sections() -> tuple[Array, Array, Array, Array]:
    """Per cm over log energy: all together, and the shares of Compton and of Compton and pairs."""
    energy = np.geomspace(PHOTON_ENDS / 2, 1e5, 400)
    a = energy / matter.ELECTRON
    log = np.log(1 + 2 * a)
    klein_nishina = (1 + a) / a**2 * (2 * (1 + a) / (1 + 2 * a) - log / a) + log / (2 * a)
    klein_nishina -= (1 + 3 * a) / (1 + 2 * a) ** 2
    compton = 2 * np.pi * CLASSICAL_RADIUS**2 * klein_nishina * ELECTRONS_PER_CM3
    # full strength at high energies is 7/9 of a radiation length; the rise and the photoelectric effect are fits by
    # eye to the tables of XCOM: a third at 10 MeV, four fifths at 100 MeV
    above = np.maximum(np.log(energy / (2 * matter.ELECTRON)), 0)
    pair = 7 / 9 / matter.RADIATION_LENGTH * (1 - np.exp(-((above / 3.6) ** 2)))
    photoelectric = matter.DENSITY * 0.055 * (0.1 / energy) ** 3
    total = compton + pair + photoelectric
    return np.log(energy), total, compton / total, (compton + pair) / total


def _compton(rng: Generator, photons: Array) -> tuple[Array, Array]:
    """Scattered photons and the electrons they hit, with energies after Klein and Nishina."""
    energy = photons[:, ENERGY]
    least = 1 / (1 + 2 * energy / matter.ELECTRON)
    ratio = np.empty(len(energy))
    todo = np.arange(len(energy))
    while len(todo):  # the mixture of 1/x and x by Butcher and Messel, as in EGS
        low = least[todo]
        first, second = np.log(1 / low), (1 - low**2) / 2
        u = rng.random((2, len(todo)))
        x = np.where(
            rng.random(len(todo)) < first / (first + second), low ** u[0], np.sqrt(low**2 + u[0] * (1 - low**2))
        )
        t = matter.ELECTRON * (1 - x) / (energy[todo] * x)
        good = u[1] < 1 - x * t * (2 - t) / (1 + x * x)
        ratio[todo[good]] = x[good]
        todo = todo[~good]
    cosine = np.clip(1 - matter.ELECTRON * (1 - ratio) / (energy * ratio), -1, 1)
    before = photons[:, DIRECTION] * energy[:, None]
    scattered, recoils = photons.copy(), photons.copy()
    scattered[:, ENERGY], recoils[:, ENERGY] = energy * ratio, energy * (1 - ratio)
    if len(energy):
        scattered[:, DIRECTION] = turned(rng, photons[:, DIRECTION], np.arccos(cosine))
    left = before - scattered[:, DIRECTION] * scattered[:, ENERGY : ENERGY + 1]
    recoils[:, DIRECTION] = left / np.maximum(np.sqrt((left * left).sum(axis=1)), 1e-12)[:, None]
    recoils[:, SIGN] = -1
    return scattered, recoils


def _pair(rng: Generator, photons: Array) -> Array:
    """An electron and a positron for every photon."""
    share = rng.random(len(photons))
    out = np.concatenate([photons, photons])
    kinetic = photons[:, ENERGY] - 2 * matter.ELECTRON
    out[:, ENERGY] = np.concatenate([kinetic * share, kinetic * (1 - share)])
    out[:, SIGN] = np.repeat([-1.0, 1.0], len(photons))
    if len(out):
        angle = np.abs(rng.standard_normal(len(out))) * matter.ELECTRON / np.maximum(out[:, ENERGY], matter.ELECTRON)
        out[:, DIRECTION] = turned(rng, out[:, DIRECTION], np.minimum(angle, 1.5))
    return out
