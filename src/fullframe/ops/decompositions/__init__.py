"""How each recorded ATen op is expressed by primitives, one file a family."""

from fullframe.ops.decompositions import (  # each registers its own
    elementwise,
    indexing,
    layout,
    losses,
    memory,
    norms,
    products,
    random,
    reductions,
    windows,
)

__all__ = [
    "elementwise",
    "indexing",
    "layout",
    "losses",
    "memory",
    "norms",
    "products",
    "random",
    "reductions",
    "windows",
]
