"""Train any convolutional network on whole images, tile by tile, within a memory budget."""

from fullframe.check import Check, check
from fullframe.errors import BudgetError, CaptureError, FullframeError, RankError, UnsupportedOpError
from fullframe.schedule.plan import Plan
from fullframe.tiled import Tiled, tile

__version__ = "0.1.0"

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
