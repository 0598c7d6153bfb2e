"""Places where a forward may leave tensors, what it leaves there, and how a step puts it there.

Places are named by their position in the guard snapshot of a call, which calls of equal keys share, for the object
itself may be another at the next call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import CellType
from typing import Any

import torch

from fullframe.frontend.fields import slots_of
from fullframe.frontend.guards import SIDE_EFFECTS, GuardSnapshot
from fullframe.torch_compat import pytree

Source = tuple[str, int, str]  # kind, position among what the guard snapshot has of it, name of a field


# How to make again what lies in a place ------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A tensor that the step hands out."""

    number: int


@dataclass(frozen=True)
class Given:
    """A tensor of the call itself."""

    number: int


@dataclass(frozen=True)
class Entry:
    """What the list held at this position before the call."""

    index: int


@dataclass(frozen=True)
class Fixed:
    """A number, text and the like."""

    value: Any


@dataclass(frozen=True)
class Made:
    """A new container; where two places hold the same one, they have the same ``name``."""

    parts: tuple[Any, ...]
    spec: Any
    name: int


@dataclass(frozen=True)
class Holder:
    """An object that was there before the call, by its position in the guard snapshot: a key of a dictionary, say."""

    number: int


@dataclass(frozen=True)
class SideEffect:
    """Where something is put: under ``key`` (a recipe too), or a whole list where that is None."""

    source: Source
    key: Any
    recipe: Any


# Places --------------------------------------------------------------------------------------------


class Names:
    """Some names of a dictionary, seen as a space: the globals that a function may set."""

    def __init__(self, scope: tuple[dict[str, Any], Iterable[str] | None]):
        self.space, names = scope
        self.names = self.space if names is None else names

    def items(self) -> dict[Any, Any]:
        return {n: self.space[n] for n in self.names if n in self.space}

    def write(self, items: dict[Any, Any]) -> None:
        self.space.update(items)

    def delete(self, key: Any) -> None:
        del self.space[key]


class Slots:
    """The slots of an object, or the attributes of a class."""

    def __init__(self, owner: Any):
        self.owner = owner

    def items(self) -> dict[Any, Any]:
        return dict(vars(self.owner)) if isinstance(self.owner, type) else slots_of(self.owner)

    def write(self, items: dict[Any, Any]) -> None:
        for name, value in items.items():
            setattr(self.owner, name, value)

    def delete(self, key: Any) -> None:
        delattr(self.owner, key)


class Cell:
    """The variable of a closure."""

    def __init__(self, cell: CellType):
        self.cell = cell

    def items(self) -> dict[Any, Any]:
        try:
            return {"": self.cell.cell_contents}
        except ValueError:
            return {}

    def write(self, items: dict[Any, Any]) -> None:
        self.cell.cell_contents = items[""]

    def delete(self, key: Any) -> None:
        del self.cell.cell_contents


VIEWS: dict[str, Callable[[Any], Any]] = {"cell": Cell, "scope": Names, "class": Slots, "slots": Slots}


def spaces(snapshot: GuardSnapshot) -> dict[Source, Any]:
    """Where a forward may leave tensors, each once: dictionaries, lists, attributes, globals, closures."""
    found: dict[Source, Any] = {("container", k, ""): c for k, c in enumerate(snapshot.containers)}
    for k, holder in enumerate(snapshot.holders):
        fields = fields_of(holder)
        found["holder", k, ""] = fields
        kept = ((n, v) for n, v in fields.items() if isinstance(v, (dict, list, deque)))
        found |= {("holder", k, n): v for n, v in kept}
    met: set[int] = set()
    found = {a: s for a, s in found.items() if not (id(s) in met or met.add(id(s)))}
    for kind, things in viewed(snapshot).items():
        found |= {(kind, k, ""): VIEWS[kind](thing) for k, thing in enumerate(things)}
    return found


def viewed(snapshot: GuardSnapshot) -> dict[str, list[Any]]:
    return {"cell": snapshot.cells, "scope": snapshot.scopes, "class": snapshot.classes, "slots": snapshot.holders}


def _space(snapshot: GuardSnapshot, source: Source) -> Any:
    kind, number, name = source
    if kind == "holder":
        fields = fields_of(snapshot.holders[number])
        return fields[name] if name else fields
    return snapshot.containers[number] if kind == "container" else VIEWS[kind](viewed(snapshot)[kind][number])


def fields_of(holder: Any) -> dict[str, Any]:
    """An object's own dictionary; an empty one where it has none."""
    try:
        return object.__getattribute__(holder, "__dict__")
    except AttributeError:
        return {}


def items_of(space: Any) -> dict[Any, Any]:
    """What a space holds, by key or position."""
    if isinstance(space, (list, deque)):
        return dict(enumerate(space))
    return dict(space) if isinstance(space, dict) else space.items()


def write(space: Any, items: dict[Any, Any]) -> None:
    """Give a space what it is to hold; other than a list it keeps what it has under other keys."""
    if isinstance(space, list):
        space[:] = items.values()
    elif isinstance(space, deque):
        space.clear()
        space.extend(items.values())
    elif isinstance(space, dict):
        space.update(items)
    else:
        space.write(items)


def delete(space: Any, key: Any) -> None:
    if isinstance(space, dict):
        del space[key]
    else:
        space.delete(key)


# After a step --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WriteBack:
    """One call: what the guard snapshot met, the tensors it handed out, which had a graph that these do not have,
    its own.
    """

    snapshot: GuardSnapshot
    results: Sequence[torch.Tensor]
    detached: Sequence[bool]
    given: Sequence[torch.Tensor]
    made: dict[int, Any] = field(default_factory=dict)

    def put(self, effects: Sequence[SideEffect]) -> None:
        """Put the call's tensors where its forward leaves them."""
        # All is looked up before anything is written, so that places may exchange what they hold.
        writes = []
        for effect in effects:
            space = _space(self.snapshot, effect.source)
            old = items_of(space)
            if effect.key is None:
                writes.append((space, dict(enumerate(self._make(r, old) for r in effect.recipe))))
            else:
                writes.append((space, {self._make(effect.key, old): self._make(effect.recipe, old)}))
        for space, items in writes:
            write(space, items)

    def _make(self, recipe: Any, old: dict[Any, Any]) -> Any:
        if isinstance(recipe, Result):
            tensor = self.results[recipe.number]
            SIDE_EFFECTS[tensor] = self.detached[recipe.number]
            return tensor
        if isinstance(recipe, Given):
            return self.given[recipe.number]
        if isinstance(recipe, Entry):
            return old[recipe.index]
        if isinstance(recipe, Holder):
            return self.snapshot.holders[recipe.number]
        if isinstance(recipe, Fixed):
            return recipe.value
        if recipe.name not in self.made:
            parts = [self._make(p, old) for p in recipe.parts]
            self.made[recipe.name] = pytree.tree_unflatten(parts, recipe.spec)
        return self.made[recipe.name]
