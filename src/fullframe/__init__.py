"""Train any convolutional network on whole images, tile by tile, within a memory budget."""

from fullframe.check import Check, check
from fullframe.graph import BudgetError, CaptureError, FullframeError, UnsupportedOpError
from fullframe.module import Tiled, tile
from fullframe.plan import Plan

__all__ = [
    "BudgetError",
    "CaptureError",
    "Check",
    "FullframeError",
    "Plan",
    "Tiled",
    "UnsupportedOpError",
    "check",
    "tile",
]
