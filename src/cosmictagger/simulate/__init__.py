"""A simulator of three-plane wire images: one neutrino interaction under what the sky sends, in a detector like SBND.

    event = simulate_numbered(seed=0, number=7)      # the same event, whatever was simulated before

Order of the files: `detector` (geometry and electronics) and `matter` (liquid argon), `particles` (what is
exchanged), `tracks` (muons and hadrons), `showers` (electrons and photons), `cosmics` and `neutrinos` (what there is
to begin with), `readout` (from energy to pixels and labels).

What it does badly: no model of the nucleus, only shares of energy; no showers of muons above hundreds of GeV; no
space charge; every induction wire answers alike whatever the angle of a track; the walls around the argon are not
there.
"""

import numpy as np
from numpy.random import Generator

from cosmictagger.data import Event
from cosmictagger.simulate.cosmics import sky
from cosmictagger.simulate.detector import PLANES, Detector
from cosmictagger.simulate.neutrinos import Mix, interaction
from cosmictagger.simulate.particles import Deposits, Light, Particle
from cosmictagger.simulate.readout import drifted, read_plane
from cosmictagger.simulate.showers import shower
from cosmictagger.simulate.tracks import fly, follow

__all__ = ["Detector", "Mix", "simulate", "simulate_numbered"]


def simulate(rng: Generator, detector: Detector | None = None, mix: Mix | None = None) -> Event:
    """One event with its truth. The same generator state gives the same event."""
    detector, mix = detector or Detector(), mix or Mix()
    particles = [*interaction(rng, detector, mix), *sky(rng, detector)]
    bundles = drifted(rng, _energy(rng, particles, detector).together(), detector)
    planes = [read_plane(rng, bundles, plane, detector) for plane in range(PLANES)]
    charge, label = zip(*planes, strict=True)
    return Event(detector.shape, charge, label)


def simulate_numbered(seed: int, number: int, detector: Detector | None = None, mix: Mix | None = None) -> Event:
    """Event `number` of the sample `seed`, the same whatever was simulated before."""
    event = simulate(np.random.default_rng([seed, number]), detector, mix)
    return Event(event.shape, event.charge, event.label, (seed, 0, number))


def _energy(rng: Generator, particles: list[Particle], detector: Detector) -> Deposits:
    """Follow all particles, and all that comes of them."""
    deposits, light = Deposits(), Light()
    waiting = list(particles)
    while waiting:
        particle = waiting.pop()
        if particle.kind in ("electron", "positron", "photon"):
            light.add(particle)
        elif particle.kind == "neutron":
            waiting += fly(rng, particle, detector)
        else:
            waiting += follow(rng, particle, detector, deposits, light)
    shower(rng, light, detector, deposits)
    return deposits
