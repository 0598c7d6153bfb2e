"""Leaves of the arguments that a step only hands on: names of files, places, dates.

Whether a text or a number in a batch matters cannot be seen from outside. So when two calls differ in nothing else,
the step is recorded once more with things in their place that nobody can ask for anything without it being noted. If
nothing was asked and nothing failed, what was recorded holds for all texts and numbers there.
"""

from __future__ import annotations

import datetime
from pathlib import PurePath
from typing import Any

VALUES = (int, float, complex, str, bytes, PurePath, datetime.date, datetime.time, datetime.timedelta)
SPECIAL_METHODS = """
abs add aenter aexit and await bool bytes call ceil complex contains delattr delitem dir divmod enter eq exit float
floor floordiv format fspath ge getattribute getitem gt hash iadd iand ifloordiv ilshift imatmul imod imul index int
invert ior ipow irshift isub iter itruediv ixor le len length_hint lshift lt matmul mod mul ne neg next or pos pow
radd rand rdivmod reduce reduce_ex repr reversed rfloordiv rlshift rmatmul rmod rmul ror round rpow rrshift rshift
rsub rtruediv rxor set_name setattr setitem sizeof str sub truediv trunc xor
""".split()  # noqa: SIM905  (a table of names reads best as words)


class LeafRead(Exception):
    """Something was asked of a leaf that was to be only handed on."""


class OpaqueLeaf:
    """In the place of a leaf: whatever is asked of it is noted, and fails."""

    __slots__ = ("_number", "_read")

    def __init__(self, number: int, read: set[int]):
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_read", read)


def _note(leaf: OpaqueLeaf, *_args: Any, **_kwargs: Any) -> Any:
    object.__getattribute__(leaf, "_read").add(object.__getattribute__(leaf, "_number"))
    raise LeafRead("a leaf of the arguments was read")


for _name in SPECIAL_METHODS:
    setattr(OpaqueLeaf, f"__{_name}__", _note)


def number_of(leaf: OpaqueLeaf) -> int:
    """Which leaf it is in the place of, without a note."""
    return object.__getattribute__(leaf, "_number")


def value(leaf: Any) -> bool:
    """Whether a leaf is a number or text that a step may leave alone; what is true, false or None it compares."""
    kind = type(leaf)
    return kind is not bool and (issubclass(kind, VALUES) or kind.__module__.partition(".")[0] == "numpy")
