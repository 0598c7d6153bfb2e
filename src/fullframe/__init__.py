"""Train any convolutional network on whole images, tile by tile, within a memory budget."""

from fullframe.graph import BudgetError, CaptureError, FullframeError, UnsupportedOpError
from fullframe.module import Tiled, tile
from fullframe.plan import Plan

__all__ = ["BudgetError", "CaptureError", "FullframeError", "Plan", "Tiled", "UnsupportedOpError", "tile"]
