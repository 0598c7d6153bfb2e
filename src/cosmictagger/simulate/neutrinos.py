"""One neutrino interaction: a lepton and what leaves the argon nucleus.

Energies resemble those of the booster beam (MiniBooNE, arXiv:0806.1449). The channels are quasi-elastic, resonant
(one Delta, 1232 MeV) and deep; the momentum transfer falls as the square of a dipole, with a mass of 1 GeV (axial
mass of the PDG's neutrino cross sections review), which with the channel's invariant mass fixes lepton and hadrons.
Nucleons are knocked out besides, and a fifth of the pions absorbed: a caricature of a nucleus, not a model of one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from cosmictagger.simulate import matter
from cosmictagger.simulate.detector import Detector
from cosmictagger.simulate.particles import NEUTRINO, Array, Particle, isotropic
from cosmictagger.simulate.tracks import gammas

NUCLEON = 938.9
AXIAL_MASS = 1000.0
ABSORBED_PIONS = 0.2


@dataclass(frozen=True)
class Mix:
    """Shares of charged currents of either flavour, of neutral currents, and of events with cosmic rays alone.

    As in the sample of the CosmicTagger paper (arXiv:2012.01301) electron neutrinos are far more frequent than in the
    beam, so that a network sees enough of them.
    """

    muon: float = 0.35
    electron: float = 0.35
    neutral: float = 0.25
    cosmic_only: float = 0.05


def interaction(rng: Generator, detector: Detector, mix: Mix) -> list[Particle]:
    """Particles from one vertex, in time with the beam; empty in an event with cosmic rays alone."""
    shares = np.array([mix.muon, mix.electron, mix.neutral, mix.cosmic_only])
    flavour = ("muon", "electron", "neutral", "none")[rng.choice(4, p=shares / shares.sum())]
    if flavour == "none":
        return []
    low, high = detector.box()
    vertex = rng.uniform(low, high)
    lepton_mass = {"muon": matter.MUON, "electron": matter.ELECTRON, "neutral": 0.0}[flavour]
    while True:
        energy = rng.gamma(3.5, 240.0)  # MeV: a mean of 0.8 GeV
        channel = rng.choice(3, p=[0.5, 0.35, 0.15])
        mass = (NUCLEON, rng.normal(matter.DELTA, 50.0), rng.uniform(1400.0, 2200.0))[channel]
        found = _scatter(rng, energy, max(mass, NUCLEON), lepton_mass)
        if found is not None:
            break
    lepton, transfer = found
    out = _hadrons(rng, channel, flavour, transfer, mass)
    if flavour != "neutral":
        out.append(("muon-" if flavour == "muon" else "electron", lepton))
    out += _debris(rng)
    made = [_particle(rng, kind, p, vertex) for kind, p in out]
    nucleus = Particle("photon", 0.0, vertex, np.array([0.0, 0.0, 1.0]), 0.0, NEUTRINO)
    return [*(p for some in made for p in some), *gammas(rng, nucleus, rng.exponential(4.0))]


def _scatter(rng: Generator, energy: float, mass: float, lepton_mass: float) -> tuple[Array, Array] | None:
    """Momentum of the lepton and momentum transfer, MeV, or None where the channel is closed."""
    dipole = rng.random()
    q2 = AXIAL_MASS**2 * ((1 - dipole) ** (-1 / 3) - 1)  # a share of (1 + q2 / M^2)^-3 lies above
    omega = (q2 + mass**2 - NUCLEON**2) / (2 * NUCLEON)
    out = energy - omega
    if out <= lepton_mass + 5:
        return None
    p = np.sqrt(out**2 - lepton_mass**2)
    cosine = (2 * energy * out - lepton_mass**2 - q2) / (2 * energy * p)
    if abs(cosine) > 1:
        return None
    azimuth, sine = rng.uniform(0, 2 * np.pi), np.sqrt(1 - cosine**2)
    lepton = p * np.array([sine * np.cos(azimuth), sine * np.sin(azimuth), cosine])
    return lepton, np.array([0, 0, energy]) - lepton


def _hadrons(rng: Generator, channel: int, flavour: str, transfer: Array, mass: float) -> list[tuple[str, Array]]:
    charged = flavour != "neutral"
    nucleon = "proton" if rng.random() < (0.9 if channel == 0 and charged else 0.5) else "neutron"
    if channel == 0:
        return [(nucleon, transfer)]
    energy = np.hypot(mass, np.linalg.norm(transfer))
    pions = 1 if channel == 1 else int(rng.integers(1, 4))
    out, left, boost = [], mass, transfer / energy
    for _ in range(pions):
        kind = "pion0" if rng.random() < 0.35 else ("pion+" if charged or rng.random() < 0.5 else "pion-")
        if rng.random() < ABSORBED_PIONS:
            kind = "proton" if rng.random() < 0.5 else "neutron"
        lighter = max(NUCLEON + 1, left - matter.PION - rng.uniform(0.2, 1.0) * max(left - NUCLEON - matter.PION, 1))
        p = _two_body(max(left, lighter + matter.PION + 1), matter.PION, lighter) * isotropic(rng, 1)[0]
        out.append((kind, _boosted(p, matter.PION, boost)))
        left = lighter
    return [*out, (nucleon, _boosted(isotropic(rng, 1)[0] * 100.0, NUCLEON, boost))]


def _two_body(mass: float, one: float, two: float) -> float:
    """Momentum of the products of a decay at rest."""
    return float(np.sqrt(max((mass**2 - (one + two) ** 2) * (mass**2 - (one - two) ** 2), 0))) / (2 * mass)


def _boosted(p: Array, mass: float, velocity: Array) -> Array:
    b2 = min(float(velocity @ velocity), 0.9999)
    if b2 < 1e-9:
        return p
    gamma = 1 / np.sqrt(1 - b2)
    energy = np.hypot(mass, np.linalg.norm(p))
    return p + velocity * ((gamma - 1) * (p @ velocity) / b2 + gamma * energy)


def _debris(rng: Generator) -> list[tuple[str, Array]]:
    """Nucleons that the others knock out, with some 30 MeV each, more of them neutrons as in argon itself; their
    number is set so that small interactions leave as many blips as in the one real neutral current."""
    count = rng.poisson(2.5)
    momenta = np.sqrt(2 * NUCLEON * rng.exponential(30.0, count))
    kinds = rng.choice(["proton", "neutron"], count, p=[0.35, 0.65])
    return [(str(k), p * d) for k, p, d in zip(kinds, momenta, isotropic(rng, count), strict=True)]


def _particle(rng: Generator, kind: str, p: Array, vertex: Array) -> list[Particle]:
    size = float(np.linalg.norm(p))
    direction = p / size
    if kind == "pion0":  # two photons, back to back in its own frame
        half = isotropic(rng, 1)[0] * matter.NEUTRAL_PION / 2
        boost = p / np.hypot(size, matter.NEUTRAL_PION)
        return [
            one for sign in (1, -1) for one in _particle(rng, "photon", _boosted(sign * half, 0.0, boost), vertex)
        ]
    mass = {
        "muon-": matter.MUON,
        "electron": matter.ELECTRON,
        "photon": 0.0,
        "pion+": matter.PION,
        "pion-": matter.PION,
        "proton": matter.PROTON,
        "neutron": matter.NEUTRON,
    }[kind]
    kinetic = float(np.hypot(size, mass) - mass)
    return [Particle(kind, kinetic, vertex, direction, 0.0, NEUTRINO)]
