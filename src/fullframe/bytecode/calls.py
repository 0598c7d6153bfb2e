"""What a call of an op of ATen's has done with memory, and what its schema says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


def looks(func: Any, args: Any, made: Any) -> bool:
    """Whether a call has made views of its arguments, and no copy, whatever it says of itself."""
    if func._schema.is_mutable or func is torch.ops.aten.lift_fresh.default:
        return False
    given = {memory_of(a) for a in flat(args) if isinstance(a, torch.Tensor)}
    views = made if isinstance(made, (list, tuple)) else [made]
    return all(isinstance(view, torch.Tensor) and memory_of(view) in given for view in views)


TAGS = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def plain(func: Any) -> bool:
    """Whether an op makes new tensors of its arguments, or only changes its first; always the same of the same."""
    schema = func._schema
    if not TAGS.isdisjoint(func.tags):
        return False
    if schema.is_mutable:
        first, *rest = (a.alias_info for a in schema.arguments)
        return first is not None and not any(rest) and len(schema.returns) == 1
    fresh = (r.alias_info is None and r.type.kind() == "TensorType" for r in schema.returns)
    return bool(schema.returns) and all(fresh)


def flat(args: Sequence[Any]) -> Iterator[Any]:
    """Arguments, those in lists among them."""
    for a in args:
        yield from a if isinstance(a, (list, tuple)) else (a,)


def memory_of(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor begins, which its views share."""
    return tensor.untyped_storage().data_ptr()
