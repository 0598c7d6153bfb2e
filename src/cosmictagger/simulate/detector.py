"""Geometry, clocks and electronics of a liquid-argon detector like SBND, and how its images are packed.

Two drift volumes share a cathode at x = 0; the wires stand at x = -200 and x = +200 cm, three planes on each side,
the first and second at +-60 degrees to the vertical, which of them first differing between the sides (SBND
Collaboration, "Construction of precision wire readout planes for SBND", arXiv:2002.08424). Lengths in cm, times in
microseconds, x along the drift, y up, z along the beam.

The numbers of the response and the noise are read off three public simulated SBND events, each where it is said; none
is fitted pixel by pixel.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PLANES = 3
SUBROWS = 2
"""Bins of true arrival time in a row, so that the response knows where in its row a charge arrived."""


@dataclass(frozen=True)
class Response:
    """What the electronics and the deconvolution make of the charge on the wires of one plane."""

    cutoff: float
    """Where the low-pass filter exp(-(f/cutoff)**steepness / 2) begins to fall, in 1/rows."""
    steepness: float
    """2 is Gaussian; a steeper filter rings, which leaves echoes two to four rows beside bright tracks."""
    electrons_per_unit: float
    """Electrons that make one unit of the image's charge."""
    saturation: float
    """Largest charge of a pixel."""


@dataclass(frozen=True)
class Noise:
    """Noise of one plane in one volume, in units of charge."""

    level: float
    """Standard deviation."""
    slow: float = 0.0
    """Share of the variance that varies slowly along the drift."""
    rows: float = 11.0
    """Rows over which the slow part forgets."""


# Filters of this form are the Wiener-inspired ones of MicroBooNE (arXiv:1802.08709). Width and steepness are tuned
# to the mean profile of columns with one labelled row in the public example events: 0.67 of the charge in it and
# 0.16 on either side on the collection wires, with an echo of 1 % three rows away; 0.59 and 0.205 without an echo
# on the induction wires, alike on both of them and in both volumes. The gain is the same for all planes, since
# waves are deconvolved, and is tuned to the median charge of cosmic pixels in the same events. Saturation: a front
# end of 14 mV/fC that shapes for 2 us, about a row, takes in some 100 fC in that time before its converter ends
# (MicroBooNE, arXiv:1705.07341); bipolar pulses have less than half of the range.
RESPONSES = (
    Response(cutoff=0.34, steepness=3.6, electrons_per_unit=198.0, saturation=1300.0),
    Response(cutoff=0.34, steepness=3.6, electrons_per_unit=198.0, saturation=1300.0),
    Response(cutoff=0.42, steepness=6.0, electrons_per_unit=198.0, saturation=3300.0),
)
# From the share of pixels above threshold far from any track, whose charges follow the tail of a Gaussian, and how
# often a neighbour 1 to 12 rows on is above it, too. The wires met first are deconvolved from a weak low-frequency
# response and so have the slow part.
LOUD, QUIET, COLLECTION = Noise(2.10, slow=0.655), Noise(1.58), Noise(1.385)


@dataclass(frozen=True)
class Detector:
    """The defaults resemble SBND: three planes of 1280 x 2048 pixels."""

    drift: float = 200.0
    """Depth of each of the two drift volumes, cm."""
    height: float = 400.0
    length: float = 500.0
    row_pitch: float = 0.3125
    """Drift distance per row, cm: four ticks of 0.5 us."""
    wire_pitch: float = 0.3
    """Distance of wires, cm; also the width of a column."""
    columns: int = 2048
    angles: tuple[float, float, float] = (60.0, -60.0, 0.0)
    """Of the wires to the vertical, degrees, in the first volume; the second is its mirror image."""
    margins: tuple[float, float, float] = (9.3, 9.3, 57.3)
    """Empty columns before the first wire of each plane, times the wire pitch, cm."""
    spans: tuple[float, float, float] = (595.8, 595.8, 499.8)
    """Width of all wires of a plane, cm: as far as the real events have pixels."""
    drift_speed: float = 0.1563
    """cm/us at 0.5 kV/cm and 88 K (Walkowiak, NIM A 449 (2000) 288)."""
    field: float = 0.5
    """kV/cm."""
    lifetime: float = 3_000.0
    """Mean time for which electrons drift freely, us. Along six long tracks of the real events the charge a wire
    falls with 2.5 to 3.4 ms of drift time: the value with which they were made, not that of the argon in the
    detector."""
    diffusion: tuple[float, float] = (4.0e-6, 8.8e-6)
    """Along and across the drift, cm^2/us as used for SBND (along: MicroBooNE has measured 3.7, arXiv:2104.06551)."""
    threshold: float = 5.0
    """Pixels with less charge are not kept: the smallest charge in the real events."""
    responses: tuple[Response, Response, Response] = RESPONSES
    noise_spread: float = 0.027
    """Spread of the noise level from wire to wire, from how far counts of a wire agree between the real events."""
    dead_wires: float = 0.001
    """Share of wires without a signal. The three real events have none; detectors have a few."""
    serial: int = 1
    """Which wires are dead or loud: two detectors with the same serial number have the same ones."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a plane."""
        return 2 * self.rows_per_volume, self.columns

    @property
    def rows_per_volume(self) -> int:
        return round(self.drift / self.row_pitch)

    @property
    def window(self) -> float:
        """Time in which charge from anywhere in a volume arrives, us."""
        return self.drift / self.drift_speed

    def box(self) -> tuple[Array, Array]:
        """Lowest and highest corner of both volumes together."""
        high = np.array([self.drift, self.height / 2, self.length])
        return np.array([-self.drift, -self.height / 2, 0.0]), high

    def column(self, plane: int, volume: int, y: NDArray, z: NDArray) -> NDArray:
        """Where on the axis of columns a point lies, as a fraction of columns, before it is cut to a whole one."""
        angle = np.radians(self.angles[plane])
        up = y if (angle >= 0) == (volume == 0) else -y
        across = z * np.cos(angle) + (self.height / 2 + up) * abs(np.sin(angle))
        return (across + self.margins[plane]) / self.wire_pitch

    def wires(self, plane: int) -> tuple[int, int]:
        """First column with a wire and the one after the last."""
        margin = self.margins[plane]
        return round(margin / self.wire_pitch), round((margin + self.spans[plane]) / self.wire_pitch)

    def noise(self, plane: int, volume: int) -> Noise:
        """In each volume another one of the slanted planes is met first."""
        if self.angles[plane] == 0:
            return COLLECTION
        return LOUD if (plane == 0) == (volume == 1) else QUIET

    def coarser(self, factor: int) -> "Detector":
        """The same detector with pixels `factor` times as large, for quick trials."""
        return replace(
            self,
            row_pitch=self.row_pitch * factor,
            wire_pitch=self.wire_pitch * factor,
            columns=self.columns // factor,
        )
