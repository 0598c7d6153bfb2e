"""What the engine knows of ATen: one rule per op, one lowering per recorded call.

This package is the only place where ATen names are known.
"""

from fullframe.ops import norms as _norms  # noqa: F401  (registers its lowerings)
from fullframe.ops.build import RULES, Builder
from fullframe.ops.normal import LOWERINGS

__all__ = ["LOWERINGS", "RULES", "Builder"]
