"""What a recording has read of the objects in its reach, so that nothing else belongs to its key.

A trainer keeps a history, a network a meter: they change with every step, and no step looks at them. While a step is
recorded, the classes of the objects that a guard snapshot has met tell which attributes are asked for, set or
deleted, by whatever way: attribute access, `getattr` with a name just computed, `operator.attrgetter`, properties,
`__getattr__`. Whoever asks for an object's dictionary, or for what is pickled or copied of it, has read all of it.

What cannot be followed counts whole: objects whose class is written in C or has a `__getattribute__` of its own, and
containers. Attributes of classes are seldom asked for through an object alone, so names in the code of the functions
within reach count, too; a method that nobody could have called is left out, with the globals that it names.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fullframe.frontend.fields import Choice
from fullframe.frontend.guards import GuardSnapshot
from fullframe.frontend.names import BY_STRING, foreign_class, global_names
from fullframe.torch_compat import FunctionalTensor

Roots = Sequence[Any]
# Who asks an object for these has all of it.
WHOLE = frozenset(("__dict__", "__getstate__", "__reduce__", "__reduce_ex__", "__getattribute__", "__dir__"))
OWN = str(Path(__file__).parents[1])
PLAIN_BASES = ("Generic", "Protocol", "ABC", "object", "Module")  # of which no method asks a class for its attributes
# They look into an object's dictionary for the one name that they were asked for, which is noted by itself.
TRUSTED = frozenset(
    f.__code__ for f in (nn.Module.__getattr__, nn.Module.__setattr__, nn.Module.__delattr__,
                         functools.cached_property.__get__)
)  # fmt: skip


@dataclass(frozen=True)
class Reads:
    """What belongs to a recording's key, for the things in the order in which a guard snapshot meets them.

    ``choices``: names of each object's fields and of each class's attributes, None for all. ``numbers``: which of the
    call's tensors had their numbers read. ``details``: whether anything was asked of tensors that former steps left.
    ``passed``: leaves of the arguments that were only handed on, by position.
    """

    choices: tuple[tuple[str, ...] | None, ...] | None = None
    numbers: tuple[int, ...] = ()
    details: bool = True
    passed: tuple[int, ...] = ()

    def choice(self) -> Choice:
        """To snapshot another call by."""
        return Choice() if self.choices is None else _Again(self.choices)


EVERYTHING = Reads()


class _Again(Choice):
    """The same choices for the same things."""

    def __init__(self, choices: Sequence[tuple[str, ...] | None]):
        self._next = iter(choices)

    def fields(self, holder: Any) -> tuple[str, ...] | None:
        return next(self._next, ())  # once the call has gone another way nothing matters: the keys differ

    def attributes(self, cls: type) -> tuple[str, ...] | None:
        return next(self._next, ())

    def carried(self, tensor: torch.Tensor) -> tuple[str, ...] | None:
        return next(self._next, ())


class ReadLog:
    """Attributes read, set or deleted of the objects that a guard snapshot has met."""

    def __init__(self, snapshot: GuardSnapshot):
        kinds = {type(h) for h in snapshot.holders}
        self._classes = [c for c in {*kinds, *snapshot.classes} if _open(c)]
        followed = set(self._classes)
        self._snapshot = snapshot
        self.names: set[str] = set()  # of any object
        self.fields: dict[int, set[str]] = {id(h): set() for h in snapshot.holders if type(h) in followed}
        self._unfollowed = {c for c in snapshot.classes if c not in followed}
        # Tensors that only the arguments hold have a placeholder wherever code meets them.
        self._carrier = {id(t) for t in snapshot.tensors[snapshot.inner :] if vars(t)}
        self.carried: dict[int, set[str]] = {}
        self._classes += [FunctionalTensor] if self._carrier else []

    def follow(self, placeholders: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Note what is read of these placeholders as read of the arguments' tensors that they stand for."""
        for placeholder, tensor in placeholders:
            if id(tensor) in self._carrier:
                self.fields[id(placeholder)] = self.carried[id(tensor)] = set()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, what is read is noted."""
        patches: list[tuple[type, str, Any, Any]] = []
        for cls in self._classes:
            for name, made in (("__getattribute__", self._reader), ("__setattr__", self._writer),
                               ("__delattr__", self._writer)):  # fmt: skip
                patches.append((cls, name, vars(cls).get(name, self), made(getattr(cls, name))))
        done: list[tuple[type, str, Any]] = []
        try:
            for cls, name, old, new in patches:
                try:
                    type.__setattr__(cls, name, new)
                except TypeError:  # a class that nobody may change
                    self._give_up(cls)
                else:
                    done.append((cls, name, old))
            yield
        finally:
            for cls, name, old in reversed(done):
                if old is self:
                    type.__delattr__(cls, name)
                else:
                    type.__setattr__(cls, name, old)

    def _give_up(self, cls: type) -> None:
        self._unfollowed.add(cls)
        for holder in self._snapshot.holders:
            if type(holder) is cls:
                self.fields.pop(id(holder), None)

    def _reader(self, read: Callable[..., Any]) -> Callable[..., Any]:
        fields, names, frame = self.fields, self.names, sys._getframe

        def __getattribute__(thing: Any, name: str) -> Any:
            names.add(name)
            found = fields.get(id(thing))
            if found is not None and (name != "__dict__" or not _trusted(frame(1).f_code)):
                found.add(name)
            return read(thing, name)

        return __getattribute__

    def _writer(self, write: Callable[..., Any]) -> Callable[..., Any]:
        fields, names = self.fields, self.names

        def __setattr__(thing: Any, name: str, *value: Any) -> None:
            names.add(name)
            found = fields.get(id(thing))
            if found is not None:
                found.add(name)
            write(thing, name, *value)

        return __setattr__

    def snapshot(self, roots: Roots, passed: Collection[tuple[int, Any]] = ()) -> tuple[GuardSnapshot, list[Any]]:
        """The guard snapshot of what was read, and the choices by which another call is examined."""
        mentioned: set[str] = set()
        whole = self._whole()
        while True:
            choice = _Noted(self, mentioned, whole)
            snapshot = GuardSnapshot(roots, choice, passed)
            if snapshot.mentioned <= mentioned:
                return snapshot, choice.made
            mentioned |= snapshot.mentioned

    def _whole(self) -> set[type]:
        """Classes of which every attribute counts."""
        found = set(self._unfollowed)
        found |= {type(h) for h in self._snapshot.holders if not WHOLE.isdisjoint(self.fields.get(id(h), WHOLE))}
        for cls in self._snapshot.classes:
            known = all(b.__name__ in PLAIN_BASES or not foreign_class(b) for b in cls.__mro__)
            if not known and not all(_seen_through(b) for b in cls.__mro__ if foreign_class(b)):
                found.add(cls)
        return {base for cls in found for base in cls.__mro__}


class _Noted(Choice):
    """What was read, by the objects themselves."""

    def __init__(self, read_log: ReadLog, mentioned: set[str], whole: Collection[type]):
        self._fields, self._carried = read_log.fields, read_log.carried
        self._names, self._whole = read_log.names | mentioned, whole
        self._raw = "__getattribute__" in mentioned  # which nobody sees
        self._dynamic = not BY_STRING.isdisjoint(mentioned)
        self.made: list[tuple[str, ...] | None] = []

    def fields(self, holder: Any) -> tuple[str, ...] | None:
        names = WHOLE if self._raw else self._fields.get(id(holder), WHOLE)
        self.made.append(_chosen(names))
        return self.made[-1]

    def carried(self, tensor: torch.Tensor) -> tuple[str, ...] | None:
        self.made.append(None if self._raw else _chosen(self._carried.get(id(tensor), WHOLE)))
        return self.made[-1]

    def attributes(self, cls: type) -> tuple[str, ...] | None:
        chosen = None
        if not self._dynamic and cls not in self._whole:
            chosen = tuple(n for n in vars(cls) if n in self._names or n.startswith("__"))
        self.made.append(chosen)
        return chosen


def _chosen(names: Collection[str]) -> tuple[str, ...] | None:
    return tuple(sorted(names)) if WHOLE.isdisjoint(names) else None


def _open(cls: type) -> bool:
    """Whether reads of a class's objects can be followed: it is written in Python, and reads as objects do."""
    plain = cls.__getattribute__ is object.__getattribute__ and bool(cls.__flags__ & HEAP)
    return plain and not any(_raw(base) for base in cls.__mro__)


HEAP = 1 << 9  # of a class made by Python code


@functools.lru_cache(maxsize=4096)
def _raw(cls: type) -> bool:
    """Whether methods of a class reach the attributes of its objects unseen."""
    if str(cls.__module__).partition(".")[0] in ("torch", "builtins"):
        return False
    names = [set(f.__code__.co_names) for f in vars(cls).values() if isinstance(f, types.FunctionType)]
    return any("__getattribute__" in n or {"object", "__setattr__"} <= n for n in names)


def _trusted(code: types.CodeType) -> bool:
    return code in TRUSTED or code.co_filename.startswith(OWN)


@functools.lru_cache(maxsize=4096)
def _seen_through(cls: type) -> bool:
    """Whether no method of an installed class looks up a name that is not in its code."""
    if cls.__name__ in PLAIN_BASES:
        return True
    if cls.__module__.startswith(("torch", "builtins")):
        return cls.__module__.startswith("torch.nn.modules.")
    codes = (f.__code__ for f in vars(cls).values() if isinstance(f, types.FunctionType))
    return all(BY_STRING.isdisjoint(global_names(c)) for c in codes)
