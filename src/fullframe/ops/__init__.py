"""What the engine knows of ATen: one decomposition per recorded call, one rule per primitive.

This package is the only place where ATen names are known.
"""

from fullframe.ops import decompositions  # which registers all

__all__ = ["decompositions"]
