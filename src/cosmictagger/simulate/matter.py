"""What liquid argon does to charged particles: energy loss, range, scattering, recombination.

Sources: Bethe's formula, Highland's and the electron's from the Review of Particle Physics (PDG), "Passage of
particles through matter"; constants of liquid argon and its density effect from Groom, Mokhov and Striganov, At. Data
Nucl. Data Tables 78 (2001) 183, and the PDG's atomic and nuclear properties. Energies in MeV, lengths in cm.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ELECTRON, MUON, PION, PROTON = 0.510999, 105.658, 139.570, 938.272
NEUTRAL_PION, NEUTRON, DELTA = 134.977, 939.565, 1232.0
DENSITY = 1.396  # g/cm^3
Z, A = 18, 39.948
EXCITATION = 188e-6
RADIATION_LENGTH = 14.0
INTERACTION_LENGTH = 85.8  # of nucleons; 119.7 g/cm^2
IONISATION = 23.6e-6  # MeV an electron: Miyajima et al., Phys. Rev. A 9 (1974) 1438
K = 0.307075 * Z / A * DENSITY  # of Bethe's formula, MeV/cm
SCATTERING = 13.6  # Highland's, MeV
LOWEST, HIGHEST = 0.01, 2e6


def momentum(kinetic: Array, mass: float) -> Array:
    return np.sqrt(kinetic * (kinetic + 2 * mass))


def beta(kinetic: Array, mass: float) -> Array:
    return momentum(kinetic, mass) / (kinetic + mass)


def largest_transfer(kinetic: Array, mass: float) -> Array:
    """Most that a particle can give to one electron."""
    gamma = 1 + kinetic / mass
    ratio = ELECTRON / mass
    return 2 * ELECTRON * (gamma**2 - 1) / (1 + 2 * gamma * ratio + ratio**2)


def _density_effect(gamma_beta: Array) -> Array:
    x = np.log10(gamma_beta)
    between = 2 * np.log(10) * x - 5.2146 + 0.19559 * np.maximum(3.0 - x, 0) ** 3
    return np.where(x < 0.2, 0.0, np.maximum(between, 0))


def heavy_loss(kinetic: Array, mass: float) -> Array:
    """Mean loss of a particle heavier than the electron, MeV/cm; below 1 MeV a rough continuation."""
    t = np.maximum(kinetic, 1e-3 * mass)  # Bethe's formula ends here
    b2 = beta(t, mass) ** 2
    gamma_beta = momentum(t, mass) / mass
    most = largest_transfer(t, mass)
    log = 0.5 * np.log(2 * ELECTRON * gamma_beta**2 * most / EXCITATION**2)
    return K / b2 * np.maximum(log - b2 - _density_effect(gamma_beta) / 2, 0.5)


def electron_loss(kinetic: Array) -> Array:
    """Mean loss of an electron to electrons, MeV/cm."""
    gamma = 1 + kinetic / ELECTRON
    b2 = beta(kinetic, ELECTRON) ** 2
    log = np.log(kinetic**2 * (gamma + 1) / (2 * EXCITATION**2))
    rest = (1 - b2) - (2 * gamma - 1) / gamma**2 * np.log(2) + ((gamma - 1) / gamma) ** 2 / 8
    return K / (2 * b2) * (log + rest - _density_effect(momentum(kinetic, ELECTRON) / ELECTRON))


@dataclass(frozen=True)
class Table:
    """Kinetic energies in even steps of their logarithm with loss and range; lookups are linear in the logarithm."""

    kinetic: Array
    loss: Array
    range: Array

    def loss_at(self, kinetic: Array) -> Array:
        return np.interp(np.log(np.maximum(kinetic, LOWEST)), np.log(self.kinetic), self.loss)

    def range_at(self, kinetic: Array) -> Array:
        return np.interp(kinetic, self.kinetic, self.range)

    def kinetic_at(self, left: Array) -> Array:
        """Energy with which a particle has `left` cm to go."""
        return np.interp(left, self.range, self.kinetic)


@cache
def table(mass: float) -> Table:
    kinetic = np.geomspace(LOWEST, HIGHEST, 2000)
    loss = electron_loss(kinetic) if mass == ELECTRON else heavy_loss(kinetic, mass)
    steps = np.diff(kinetic) * (1 / loss[1:] + 1 / loss[:-1]) / 2
    return Table(kinetic, loss, np.concatenate([[0.0], np.cumsum(steps)]) + kinetic[0] / loss[0])


def surviving(loss: Array, along_field: Array, field: float) -> Array:
    """Share of electrons that escape recombination; `along_field` is the cosine between track and drift field.

    The ellipsoidal modified box model with the parameters of ICARUS (arXiv:2407.12969).
    """
    alpha, beta_90, ratio = 0.904, 0.204, 1.25
    cos2 = along_field**2
    strength = beta_90 / np.sqrt(1 - cos2 + cos2 / ratio**2) / (DENSITY * field)
    x = np.maximum(strength * loss, 1e-3)
    return np.clip(np.log(alpha + x) / x, 0, 1)
