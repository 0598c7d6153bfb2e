"""What an object holds in fields and slots, which of them count, and what stands for objects and memory in a key."""

from __future__ import annotations

import hashlib
import random
import types
from typing import Any

import torch

BRIEF = 256  # bytes in a key; of more there is a digest
ATOMS = frozenset(
    (int, str, bool, bytes, complex, type(None), type(...), range, types.CodeType,
     torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout)
)  # fmt: skip
# Containers with neither fields nor slots, whose classes nobody can change.
BARE = frozenset((dict, list, tuple, set, frozenset))
# Of a module's own dictionary: what never changes a forward, and what need not be looked at while empty.
IGNORED = frozenset(
    ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
     "_non_persistent_buffers_set")
)  # fmt: skip
OFTEN_EMPTY = frozenset(
    ("_parameters", "_buffers", "_modules", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
     "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
     "_forward_pre_hooks_with_kwargs")
)  # fmt: skip
REGISTERED = ("_parameters", "_buffers", "_modules")  # of a module, always looked at


class Missing:
    """Stands for a field that an object does not have."""


MISSING = Missing()


class Same:
    """Stands for an object in a key: equal only to itself, and keeps it alive."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any):
        self.thing = thing

    def __hash__(self) -> int:
        return id(self.thing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing


class Key:
    """A key of a table, as a step to what lies there."""

    def __init__(self, key: Any):
        self.key = key

    def __str__(self) -> str:
        return repr(self.key)


class Choice:
    """What a guard snapshot looks at, asked in the order in which things are met; None is everything."""

    def fields(self, holder: Any) -> tuple[str, ...] | None:
        """Names of an object's own fields; names that it does not have are looked for too."""
        return None

    def attributes(self, cls: type) -> tuple[str, ...] | None:
        """Names of a class's own attributes and methods."""
        return None

    def carried(self, tensor: torch.Tensor) -> tuple[str, ...] | None:
        """Names of what a tensor carries besides its numbers."""
        return None


def fields_and_slots(thing: Any) -> dict[str, Any] | None:
    """What an object holds in its dictionary and its slots; None where it has neither."""
    found: dict[str, Any] = {}
    plain = True
    for name in ("__dict__", *(s for c in type(thing).__mro__ for s in _slots(c))):
        try:
            value = object.__getattribute__(thing, name)
        except AttributeError:
            continue
        plain = False
        found |= value if name == "__dict__" else {name: value}
    return None if plain else found


def slots_of(thing: Any) -> dict[str, Any]:
    """What an object holds in slots."""
    names = (s for c in type(thing).__mro__ for s in _slots(c))
    return {n: object.__getattribute__(thing, n) for n in names if hasattr(thing, n)}


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    slots = (slots,) if isinstance(slots, str) else tuple(slots)
    private = f"_{cls.__name__.lstrip('_')}"
    named = (private + s if s.startswith("__") and not s.endswith("__") else s for s in slots)
    return tuple(s for s in named if s not in ("__dict__", "__weakref__"))


def digest(memory: Any) -> bytes:
    """The bytes of some memory, or of what lies in it at equal steps, in short: no copy of much is kept or made."""
    try:
        view = memoryview(memory)
    except (TypeError, ValueError, BufferError):  # as of NumPy's dates and times
        return _condensed(memory.tobytes())
    if view.c_contiguous:
        return _condensed(view.cast("B") if view.nbytes else b"")
    if view.ndim == 1 or view.shape is None:
        return _condensed(view.tobytes())
    return _condensed(b"".join(digest(memory[k]) for k in range(len(memory))))


def _condensed(memory: Any) -> bytes:
    return bytes(memory) if len(memory) <= BRIEF else hashlib.blake2b(memory, digest_size=32).digest()


def state_of(generator: Any) -> Any:
    """What numbers a generator of Python's or NumPy's will give next."""
    if isinstance(generator, random.SystemRandom):
        return None
    if isinstance(generator, random.Random):
        return generator.getstate()
    inner = getattr(generator, "bit_generator", None)
    return repr(generator.get_state(legacy=False) if inner is None else inner.state)
