"""What comes from the sky while an image is taken: muons, electrons, photons and neutrons.

Sources: Reyna, hep-ph/0604145 (momenta and angles of muons); PDG, "Cosmic rays" (charge ratio 1.28; electrons and
photons at the ground); Gordon et al., IEEE Trans. Nucl. Sci. 51 (2004) 3427 (neutrons at the ground). What lies above
the detector is only a number of electrons, photons and neutrons that come through.
"""

from functools import cache

import numpy as np
from numpy.random import Generator

from cosmictagger.simulate import matter
from cosmictagger.simulate.detector import Detector
from cosmictagger.simulate.particles import COSMIC, NOBODY, Array, Particle, isotropic

MUON_RATE = 5.2e-3
"""Muons that cross the active volume in a microsecond."""
SHOWER_RATE = 0.1e-3
"""Electrons and photons above 10 MeV that reach the active volume, a microsecond. At the ground they are as many as
muons; concrete overhead (3 m over SBND), inactive argon and walls leave few."""
NEUTRON_RATE = 0.15e-3
"""Neutrons above 10 MeV, a microsecond: of 65 a second and square metre at the ground, what the same concrete leaves.
Both rates are set so that the number of small cosmic clusters is that of the real events; muons alone make most
of them."""
RADIOACTIVE_RATE = 0.013
"""Photons a microsecond that are in no record of the truth (radioactivity, captured neutrons): set so that unlabelled
charge above 9 is as frequent five or more pixels from any label as in the real events."""
POSITIVE = 1.28 / 2.28
LOWEST_MUON, HIGHEST_MUON = 150.0, 2e6


def sky(rng: Generator, detector: Detector) -> list[Particle]:
    """All that arrives in time to be seen: from one drift time before the image begins to its end."""
    span = 2 * detector.window
    out = []
    for rate, make in ((MUON_RATE, _muon), (SHOWER_RATE, _shower), (NEUTRON_RATE, _neutron)):
        for _ in range(rng.poisson(rate * span)):
            time = rng.uniform(-detector.window, detector.window)
            out.append(make(rng, detector, time))
    for _ in range(rng.poisson(RADIOACTIVE_RATE * span)):
        out.append(_decay(rng, detector, rng.uniform(-detector.window, detector.window)))
    return out


def _muon(rng: Generator, detector: Detector, time: float) -> Particle:
    momenta, cosines = _muons()
    while True:
        k = rng.integers(len(momenta))
        start, direction = _entry(rng, detector, cosines[k])
        if start is not None:
            kind = "muon+" if rng.random() < POSITIVE else "muon-"
            kinetic = float(np.hypot(momenta[k], matter.MUON) - matter.MUON)
            return Particle(kind, kinetic, start, direction, time, COSMIC)


@cache
def _muons() -> tuple[Array, Array]:
    """A large sample of momenta (MeV) and cosines of the zenith angle that stands for Reyna's intensity."""
    rng = np.random.default_rng(604145)
    log_p = rng.uniform(np.log10(LOWEST_MUON / 1000), np.log10(HIGHEST_MUON / 1000), 400_000)
    cosine = rng.random(400_000)
    vertical = np.maximum(10**log_p * cosine, 0.7)  # GeV; the fit is for 1 GeV and more, it is flat about here
    x = np.log10(vertical)
    index = 0.2455 + 1.288 * x - 0.2555 * x**2 + 0.0209 * x**3
    intensity = cosine**3 * vertical**-index * 10**log_p  # times p: the sample is even in the logarithm
    kept = rng.random(400_000) * intensity.max() < intensity
    return 1000 * 10 ** log_p[kept], cosine[kept]


def _entry(rng: Generator, detector: Detector, cosine: float) -> tuple[Array | None, Array]:
    """Where a straight line from the sky enters the detector (None if it misses), and its direction."""
    low, high = detector.box()
    azimuth, sine = rng.uniform(0, 2 * np.pi), np.sqrt(1 - cosine**2)
    direction = np.array([sine * np.cos(azimuth), -cosine, sine * np.sin(azimuth)])
    radius = float(np.linalg.norm(high - low)) / 2
    one = np.cross(direction, [0.3, 0.1, 0.9])
    one /= np.linalg.norm(one)
    spot = radius * np.sqrt(rng.random()) * np.exp(1j * rng.uniform(0, 2 * np.pi))
    place = (low + high) / 2 + spot.real * one + spot.imag * np.cross(direction, one) - 2 * radius * direction
    with np.errstate(divide="ignore"):
        to_low, to_high = (low - place) / direction, (high - place) / direction
    first, last = float(np.minimum(to_low, to_high).max()), float(np.maximum(to_low, to_high).min())
    return (place + (first + 1e-3) * direction if last > first + 0.1 else None), direction


def _falling(rng: Generator, detector: Detector, power: float) -> tuple[Array, Array]:
    """Entry of something whose intensity goes with a power of the cosine of the zenith angle."""
    while True:
        start, direction = _entry(rng, detector, float(rng.random() ** (1 / (power + 1))))
        if start is not None:
            return start, direction


def _shower(rng: Generator, detector: Detector, time: float) -> Particle:
    """30, 6 and 0.2 electrons in all above 10, 100 and 1000 MeV, and 1.5 times as many photons (PDG)."""
    start, direction = _falling(rng, detector, 3.0)
    log = np.interp(-np.log(rng.random()), np.log([1, 5, 150, 20000]), np.log([10, 100, 1000, 10000]))
    kind = str(rng.choice(["photon", "electron", "positron"], p=[0.6, 0.25, 0.15]))
    return Particle(kind, float(np.exp(log)), start, direction, time, COSMIC)


def _neutron(rng: Generator, detector: Detector, time: float) -> Particle:
    """A spectrum that falls with 1/E from 10 MeV to the knee near 200 MeV and ends at 1 GeV."""
    start, direction = _falling(rng, detector, 3.0)
    kinetic = 10.0 * 30.0 ** rng.random() if rng.random() < 0.8 else 300.0 * 3.3 ** rng.random()
    return Particle("neutron", float(kinetic), start, direction, time, COSMIC)


def _decay(rng: Generator, detector: Detector, time: float) -> Particle:
    low, high = detector.box()
    kinetic = min(0.3 + rng.exponential(0.8), 4.0)
    return Particle("photon", float(kinetic), rng.uniform(low, high), isotropic(rng, 1)[0], time, NOBODY)
