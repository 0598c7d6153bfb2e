"""What makes steps be recorded anew, in words, and a warning where it goes on.

A place is where a guard snapshot has found something: an attribute, an entry of a table, a global, a leaf of the
arguments. Where one that was read has had three values, each recorded, the user is told once.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fullframe.frontend.guards import GuardSnapshot
from fullframe.frontend.inputs import Call
from fullframe.frontend.reads import Reads

ROOTS = ("", "arguments", "keywords", "hooks")  # of a call, as users would say
REMEMBERED = 16  # keys of former recordings, with which a new one is compared
INNER = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
OFTEN = 3  # values, each recorded
TENSOR = 6  # parts of a guard snapshot that say what a tensor is: its class, shape and such


PARTS = ("sizes, types or attributes", "arguments", "modes of torch", "switches of torch.backends",
         "numbers read in Python", "details of tensors")  # fmt: skip
"""What the parts of a call's key are, in its order."""


class Changes:
    """The recordings of one tiled module, and the values that places had."""

    def __init__(self) -> None:
        self._keys: list[tuple[Reads, Any]] = []
        self._values: dict[str, set[Any]] = {}
        self.reason = ""  # of the latest recording

    def note(self, call: Call, reads: Reads, moved: str) -> None:
        """Remember a recording; ``moved`` is a place that the forward itself changes, and warn where that recurs.

        ``reason`` then says why it was made.
        """
        self.reason = "changed: what it reads" if self._keys or self._values else "the first"
        if moved:
            self._add(f"{moved}, which the step itself changes,", object())
        else:
            self._compare(call, reads)

    def _compare(self, call: Call, reads: Reads) -> None:
        key = call.key(reads)
        former = [k for r, k in self._keys if r == reads]
        if former:
            new = [name for name, a, b in zip(PARTS, former[-1], key, strict=False) if a != b]
            self.reason = f"changed: {', '.join(new)}" if new else self.reason
        self._keys = [*self._keys[1 - REMEMBERED :], (reads, key)]
        same = [k for k in former if k[1:4] == key[1:4] and k[5:] == key[5:]]
        for other in same:
            if other[0] == key[0]:
                new = [k for k, (a, b) in enumerate(zip(other[4], key[4], strict=True)) if a != b]
                if len(new) == 1:
                    name = call.names[reads.numbers[new[0]]]
                    self._add(
                        f"the tensor {name}, whose numbers are read in Python,", other[4][new[0]], key[4][new[0]]
                    )
        if same and all(other[0] != key[0] for other in same):
            named = GuardSnapshot(call.roots, reads.choice(), call.entries(reads.passed), ROOTS)
            for found in (difference(named, other[0]) for other in same):
                if found is not None:
                    self._add(*found)

    def _add(self, place: str, *values: Any) -> None:
        self.reason = f"changed: {place.removesuffix(',')}"
        known = self._values.setdefault(place, set())
        warned = len(known) >= OFTEN
        known.update(values)
        if len(known) >= OFTEN and not warned:
            warnings.warn(
                f"{place} is read by the step and has had {OFTEN} values: each is recorded anew, which takes as long "
                "as the first call. If the arithmetic needs it, let it be a tensor that the step only computes with; "
                "if not, let the step not look at it",
                stacklevel=outside(),
            )


def outside() -> int:
    """How far up the caller is that belongs neither to this package nor to torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INNER):
        frame, level = frame.f_back, level + 1
    return level


def difference(new: GuardSnapshot, old: Sequence[Any]) -> tuple[str, int, int] | None:
    """The place in which alone a guard snapshot differs from the parts of another, and what each has there."""
    parts = new.parts
    if _only_sizes(new, old):
        return None
    least = min(len(parts), len(old))
    first = next((k for k in range(least) if parts[k] != old[k]), least)
    same = next((k for k in range(least - first) if parts[-1 - k] != old[-1 - k]), least - first)
    end = len(parts) - same
    around = [s for s in new.spans if s[0] <= first and s[1] >= max(end, first + 1)]
    start, stop, trail = min(around, key=lambda s: s[1] - s[0], default=(0, 0, ()))
    kind = parts[start] if start < stop else None
    if not trail or _is_tensor(kind):
        return None  # sizes are another matter
    before = old[start : len(old) - (len(parts) - stop)]
    return words(trail), hash(tuple(before)), hash(tuple(parts[start:stop]))


def _is_tensor(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.Tensor)


def _only_sizes(new: GuardSnapshot, old: Sequence[Any]) -> bool:
    """Whether several tensors, an image and its target say, differ in their sizes and the like and nothing else."""
    parts = new.parts
    sizes = {k for a, b, _ in new.spans if _is_tensor(parts[a]) for k in range(a, min(a + TENSOR, b))}
    return len(parts) == len(old) and all(k in sizes or parts[k] == old[k] for k in range(len(parts)))


def words(trail: Sequence[str]) -> str:
    """A place as a user would write it."""
    text = re.sub(r"\._(?:modules|buffers|parameters)\['([^']+)'\]", r".\1", "".join(trail))
    text = re.sub(r".*<<?(\w+)>>?", r"\1", text).removeprefix(".module")
    return text.removeprefix(".") or "the module"
