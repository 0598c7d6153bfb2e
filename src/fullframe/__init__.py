"""Train any convolutional network on whole images, tile by tile, within a memory budget."""

from fullframe.check import Check, check
from fullframe.errors import BudgetError, CaptureError, FullframeError, RankError, UnsupportedOpError
from fullframe.schedule.plan import Plan
from fullframe.tiled import Tiled, tile
from fullframe.version import __version__ as __version__

__all__ = [
    "BudgetError",
    "CaptureError",
    "Check",
    "FullframeError",
    "Plan",
    "RankError",
    "Tiled",
    "UnsupportedOpError",
    "check",
    "tile",
]
