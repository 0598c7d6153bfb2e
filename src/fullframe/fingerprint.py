"""What a recording reads of a module besides its tensors: flags, attributes, hooks, structure.

A stale recording is a silent wrong number, so everything a forward could look at goes in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PLAIN = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """A hashable picture of a module tree; equal pictures may share a recording."""
    seen: dict[int, int] = {}
    return tuple((name, _object(m, seen)) for name, m in module.named_modules(remove_duplicate=False))


def _object(thing: Any, seen: dict[int, int]) -> Any:
    """Type and attributes of an object; tensors by identity, what is met again by its number."""
    if id(thing) in seen:
        return "again", seen[id(thing)]
    seen[id(thing)] = len(seen)
    fields = getattr(thing, "__dict__", {})
    return type(thing), id(type(thing).forward) if isinstance(thing, nn.Module) else None, tuple(
        (key, _attribute(value, seen)) for key, value in sorted(fields.items()) if key != "_modules"
    )


def _attribute(value: Any, seen: dict[int, int]) -> Any:
    if isinstance(value, PLAIN):
        return type(value).__name__, repr(value) if isinstance(value, float) else value
    if isinstance(value, torch.Tensor):
        return "tensor", id(value)
    if isinstance(value, nn.Module):
        return "module", id(value)
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(_attribute(v, seen) for v in value)
    if isinstance(value, (set, frozenset)):
        return "set", tuple(sorted((repr(_attribute(v, seen)) for v in value)))
    if isinstance(value, dict):
        return "dict", tuple((repr(k), _attribute(v, seen)) for k, v in value.items())
    if callable(value) and not hasattr(value, "__dict__"):
        return "callable", id(value)
    if callable(value):
        return "callable", id(value), getattr(value, "__qualname__", None)
    if hasattr(value, "__dict__"):
        return _object(value, seen)
    return "object", id(value)
