"""The registry of decompositions, by the name of the ATen op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fullframe import torch_compat
from fullframe.ir.graph import Value
from fullframe.ops.builder.builder import Builder

Decomposition = Callable[..., Any]
DECOMPOSITIONS: dict[str, Decomposition] = {}


def decomposes(*names: str) -> Callable[[Decomposition], Decomposition]:
    """Register a decomposition for ATen overloads (``.default`` is implied)."""

    def register(function: Decomposition) -> Decomposition:
        for name in names:
            DECOMPOSITIONS[f"aten.{name}" if "." in name else f"aten.{name}.default"] = function
        return function

    return register


def dims_of(x: Value, dims: Any) -> tuple[int, ...]:
    """Sorted non-negative axes; None or an empty list means all."""
    rank = len(x.shape)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return tuple(range(rank))
    dims = [dims] if isinstance(dims, int) else dims
    return tuple(sorted(d % max(rank, 1) for d in dims)) if rank else ()


def wide(dtype: torch.dtype) -> torch.dtype:
    """What ATen computes in where a result has this type: float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)


def cast(b: Builder, x: Value, dtype: Any = None, **_: Any) -> Value:
    return x if dtype in (None, x.dtype) else b.aten(torch_compat.to_copy, x, dtype=dtype)
