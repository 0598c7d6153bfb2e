"""Muons, pions and protons: tracks with delta rays, decays, captures and collisions with nuclei.

Sources: PDG, "Passage of particles through matter" (scattering after Highland, knock-on electrons) and its particle
listings; Measday, Phys. Rep. 354 (2001) 243 (capture of negative muons: 74 % in argon); free paths from the PDG's
nuclear interaction lengths. Hadronic collisions share energy among a few nucleons: no model of the nucleus.
"""

from dataclasses import replace

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from cosmictagger.simulate import matter
from cosmictagger.simulate.detector import Detector
from cosmictagger.simulate.particles import (
    SLOWEST_DELTA,
    TRACKED_DELTA,
    Array,
    Deposits,
    Light,
    Particle,
    isotropic,
    seen,
    turned,
)

STEP = 0.1
MASS = {
    "muon+": matter.MUON,
    "muon-": matter.MUON,
    "pion+": matter.PION,
    "pion-": matter.PION,
    "proton": matter.PROTON,
}
FREE_PATH = {"proton": matter.INTERACTION_LENGTH, "pion+": 108.0, "pion-": 108.0}
CAPTURED_MUONS = 0.74
BINDING = 8.0  # MeV to take a nucleon out
MUON_LIFE = 2.2  # us


def follow(
    rng: Generator, particle: Particle, detector: Detector, deposits: Deposits, light: Light
) -> list[Particle]:
    """Leave the energy of one charged particle in `deposits` and `light`; returns what comes out of its end."""
    mass = MASS[particle.kind]
    table = matter.table(mass)
    reach = float(table.range_at(np.array(particle.kinetic)))
    collision = rng.exponential(FREE_PATH[particle.kind]) if particle.kind in FREE_PATH else np.inf
    low, high = detector.box()
    path = min(reach, collision, 1.2 * float(np.linalg.norm(high - low)))
    steps = max(int(np.ceil(path / STEP)), 1)
    ends = np.minimum(np.arange(steps + 1) * STEP, path)
    kinetic = np.where(ends < reach, table.kinetic_at(np.maximum(reach - ends, 0)), 0.0)
    places, directions = _walk(rng, particle, kinetic, np.diff(ends), mass)
    gone = np.flatnonzero(((places < low) | (places > high)).any(axis=1))
    inside = slice(0, int(gone[0]) if len(gone) else steps)
    _lose(rng, particle, (places[inside], directions[inside], kinetic), (detector, deposits, light))
    if len(gone) or not steps:
        return []
    end = replace(particle, start=places[-1], direction=directions[-1], kinetic=float(kinetic[-1]))
    if collision < reach:
        return _collision(rng, end)
    return _rest(rng, end)


def _walk(rng: Generator, particle: Particle, kinetic: Array, lengths: Array, mass: float) -> tuple[Array, Array]:
    """Middles of the steps and directions (steps, 3), bent by multiple scattering."""
    middle = np.maximum((kinetic[1:] + kinetic[:-1]) / 2, 0.2)
    kick = matter.SCATTERING / (matter.momentum(middle, mass) * matter.beta(middle, mass))
    kick *= np.sqrt(lengths / matter.RADIATION_LENGTH)
    across = np.linalg.svd(particle.direction[None])[2][1:]  # two unit vectors at right angles to the direction
    slopes = np.cumsum(rng.standard_normal((2, len(kick))) * np.minimum(kick, 0.5), axis=1)
    directions = particle.direction + slopes.T @ across
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    ends = particle.start + np.cumsum(directions * lengths[:, None], axis=0)
    return ends - directions * lengths[:, None] / 2, directions


def _lose(
    rng: Generator,
    particle: Particle,
    track: tuple[Array, Array, Array],
    to: tuple[Detector, Deposits, Light],
) -> None:
    """Mean loss below SLOWEST_DELTA, and collisions with electrons above it one by one."""
    (places, directions, kinetic), (detector, deposits, light) = track, to
    count = len(places)
    if not count:
        return
    mass = MASS[particle.kind]
    mean = kinetic[:count] - kinetic[1 : count + 1]
    middle = np.maximum((kinetic[:count] + kinetic[1 : count + 1]) / 2, 0.2)
    most = np.maximum(matter.largest_transfer(middle, mass), SLOWEST_DELTA)
    b2 = matter.beta(middle, mass) ** 2
    length = mean / matter.table(mass).loss_at(middle)
    rate = matter.K / 2 / b2 * length  # times the integral of (1 - b2 T / most) / T^2
    soft = np.maximum(mean - rate * (np.log(most / SLOWEST_DELTA) - b2 * (1 - SLOWEST_DELTA / most)), 0.1 * mean)
    number = rng.poisson(rate * (1 / SLOWEST_DELTA - 1 / most))
    where = np.repeat(np.arange(count), number)
    transfer = 1 / (1 / SLOWEST_DELTA - rng.random(len(where)) * (1 / SLOWEST_DELTA - 1 / most[where]))
    happens = rng.random(len(where)) > b2[where] * transfer / most[where]
    where, transfer = where[happens], transfer[happens]
    far = transfer > TRACKED_DELTA
    _spawn(rng, particle, (places, directions, most), (where[far], transfer[far]), (detector, light))
    energy = np.asarray(soft + np.bincount(where[~far], transfer[~far], count), np.float64)
    visible = seen(places, particle.time, detector, 2.0)
    lost = energy[visible]
    per_cm = lost / np.maximum(length[visible], 1e-6)
    clock = np.array([particle.time, particle.owner])
    deposits.add(places[visible], lost, per_cm, directions[visible, 0], clock)


def _spawn(
    rng: Generator,
    particle: Particle,
    track: tuple[Array, Array, Array],
    deltas: tuple[NDArray[np.int64], Array],
    to: tuple[Detector, Light],
) -> None:
    """Delta rays with an energy and, by kinematics, an angle."""
    (places, directions, most), (where, transfer), (detector, light) = track, deltas, to
    near = seen(places[where], particle.time, detector, 30.0)
    where, transfer = where[near], transfer[near]
    top = most[where]
    cosine = np.sqrt(transfer * (top + 2 * matter.ELECTRON) / (top * (transfer + 2 * matter.ELECTRON)))
    out = np.empty((len(where), 9))
    out[:, :3] = places[where]
    out[:, 3:6] = turned(rng, directions[where], np.arccos(np.clip(cosine, 0, 1)))
    out[:, 6], out[:, 7], out[:, 8] = transfer, particle.time, particle.owner
    light.electrons.append(out)


def _rest(rng: Generator, end: Particle) -> list[Particle]:
    """What a particle at rest turns into."""
    if end.kind == "pion+":  # a muon of 4.1 MeV first, which ends within a pixel
        return _rest(rng, replace(end, kind="muon+"))
    if end.kind == "pion-":
        return _nucleons(rng, end, 0.6 * matter.PION, mean_number=3.0)
    if end.kind == "muon-" and rng.random() < CAPTURED_MUONS:
        neutron = replace(end, kind="neutron", kinetic=rng.exponential(6.0), direction=isotropic(rng, 1)[0])
        return [neutron, *gammas(rng, end, rng.exponential(4.0))]
    if end.kind in ("muon+", "muon-"):
        kind = "positron" if end.kind == "muon+" else "electron"
        late = end.time + rng.exponential(MUON_LIFE)
        return [replace(end, kind=kind, kinetic=_michel(rng), time=late, direction=isotropic(rng, 1)[0])]
    return []


def _michel(rng: Generator) -> float:
    """Energy of an electron from a muon at rest: x^2 (3 - 2x) up to half the muon's mass."""
    while True:
        x = rng.random()
        if rng.random() < x * x * (3 - 2 * x):
            return float(x * matter.MUON / 2)


def _collision(rng: Generator, end: Particle) -> list[Particle]:
    """A hadron meets a nucleus: half of the pions are absorbed there, the others scattered."""
    available = end.kinetic
    if end.kind.startswith("pion"):
        if rng.random() < 0.5:
            return _nucleons(rng, end, available + matter.PION, mean_number=4.0)
        keeps = rng.uniform(0.4, 1.0) * available
        angle = np.array([abs(rng.normal(0, 0.8))])
        pion = replace(end, kinetic=keeps, direction=turned(rng, end.direction[None], angle)[0])
        return [pion, *_nucleons(rng, end, available - keeps, mean_number=1.0)]
    return _nucleons(rng, end, available, mean_number=2.0)


def _nucleons(rng: Generator, end: Particle, energy: float, mean_number: float) -> list[Particle]:
    """Energy shared at random among nucleons and a few photons, the nucleons as often neutrons as protons."""
    count = 1 + rng.poisson(mean_number - 1) if mean_number > 1 else rng.poisson(mean_number)
    free = energy - BINDING * count
    if count == 0 or free <= 1:
        return gammas(rng, end, min(max(energy, 0.0), 5.0))
    shares = rng.dirichlet(np.ones(count + 1))[:count] * free  # the rest heats the nucleus
    kinds = rng.choice(["proton", "neutron"], count)
    out = [
        replace(end, kind=str(kind), kinetic=float(share), direction=direction)
        for kind, share, direction in zip(kinds, shares, isotropic(rng, count), strict=True)
    ]
    return out + gammas(rng, end, rng.exponential(3.0))


def gammas(rng: Generator, end: Particle, energy: float) -> list[Particle]:
    """Photons of a few MeV with which a nucleus cools down (seen by ArgoNeuT, arXiv:1810.06502)."""
    out = []
    while energy > 0.5:
        each = min(energy, rng.exponential(1.8) + 0.2)
        out.append(replace(end, kind="photon", kinetic=float(each), direction=isotropic(rng, 1)[0]))
        energy -= each
    return out


def fly(rng: Generator, neutron: Particle, detector: Detector) -> list[Particle]:
    """A neutron's collisions: protons and photons at distances of tens of centimetres from where it started."""
    low, high = detector.box()
    out: list[Particle] = []
    place, direction, kinetic = neutron.start, neutron.direction, neutron.kinetic
    while kinetic > 1.0:
        # about 3 barn in all from 1 to 100 MeV (evaluated data, ENDF/B), 2.1e22 nuclei per cm^3
        place = place + direction * rng.exponential(16.0)
        if ((place < low - 50) | (place > high + 50)).any():
            break
        here = replace(neutron, start=place, kinetic=0.0)
        if kinetic > 20 and rng.random() < 0.3:
            lost = rng.uniform(0.1, 0.9) * kinetic
            if lost > BINDING:
                out.append(
                    replace(
                        here,
                        kind="proton",
                        kinetic=float(lost - BINDING),
                        direction=turned(rng, direction[None], np.array([abs(rng.normal(0, 0.7))]))[0],
                    )
                )
        elif kinetic > 2 and rng.random() < 0.5:
            lost = float(rng.uniform(0.1, 0.6) * kinetic)
            out += gammas(rng, here, min(lost, 6.0))
        else:
            lost = 0.03 * kinetic  # elastic: argon is heavy
        kinetic -= lost
        direction = turned(rng, direction[None], np.array([abs(rng.normal(0, 1.0))]))[0]
    return out
