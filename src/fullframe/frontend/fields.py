"""What an object holds in fields and slots, which of them count, and what stands for objects and memory in a key."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch

BRIEF = 256  # bytes in a key; of more there is a digest


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
