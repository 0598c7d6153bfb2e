"""What the engine knows of ATen: one rule per op, one lowering per recorded call.

This package is the only place where ATen names are known.
"""

from fullframe.ops import (  # each registers its lowerings
    lower_draws,
    lower_index,
    lower_layout,
    lower_losses,
    lower_memory,
    lower_norms,
    lower_products,
    lower_reduce,
    lower_window,
)
from fullframe.ops.build import RULES, Builder
from fullframe.ops.normal import LOWERINGS

__all__ = ["LOWERINGS", "PARTS", "RULES", "Builder"]

PARTS = (
    lower_draws,
    lower_index,
    lower_layout,
    lower_losses,
    lower_memory,
    lower_products,
    lower_reduce,
    lower_window,
    lower_norms,
)
"""The modules whose lowerings are registered."""
