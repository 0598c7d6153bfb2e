"""What a call returns: tensors in containers and objects of whatever kind, flattened, and made again for each call.

Containers that `torch.utils._pytree` knows are its business. Other objects (dataclasses, subclasses of dictionaries,
distributions) are copied field by field: each call returns one of its own, as the forward makes it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from fullframe.errors import CaptureError
from fullframe.frontend.fields import slots_of
from fullframe.frontend.guards import GuardSnapshot
from fullframe.frontend.opaque_leaves import VALUES, OpaqueLeaf, number_of
from fullframe.frontend.side_effects import PLAIN
from fullframe.frontend.sources import Fixed, Holder, Result, fields_of
from fullframe.torch_compat import pytree

BASES: tuple[Any, ...] = (OrderedDict, dict, list, tuple)  # of containers, the narrower first
HEAP = 1 << 9  # the flag of a class that Python code has made


@dataclass(frozen=True)
class Tree:
    """Containers that pytree knows, by what lies in them."""

    spec: Any
    parts: tuple[Any, ...]


@dataclass(frozen=True)
class Copy:
    """An object of a class, by the items of the built-in container that it is and by its fields.

    Where it is met twice, the second is of the same ``name`` and nothing else.
    """

    name: int
    kind: type = object
    base: type | None = None
    items: Tree | None = None
    fields: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class HandedOn:
    """A leaf of the arguments, by its number, which the next call has another of."""

    number: int


def flatten(thing: Any, snapshot: GuardSnapshot, leaves: Sequence[Any] = ()) -> tuple[Tree, list[torch.Tensor]]:
    """How to make a thing again, and the tensors in it, each once."""
    handed = {id(x): HandedOn(k) for k, x in enumerate(leaves) if not isinstance(x, torch.Tensor)}
    taking = _Taking(handed | {id(h): Holder(k) for k, h in enumerate(snapshot.holders)})
    return taking.tree(thing), taking.tensors


class _Taking:
    def __init__(self, met: dict[int, Any]):
        self.met = met  # how to make tensors and objects that were met already, by identity
        self.tensors: list[torch.Tensor] = []
        self.things: list[Any] = []  # kept alive, so that no other gets the identity of one

    def tree(self, thing: Any) -> Tree:
        leaves, spec = pytree.tree_flatten(thing, is_leaf=lambda x: type(x) is torch.Size)
        return Tree(spec, tuple(self._leaf(x) for x in leaves))

    def _leaf(self, thing: Any) -> Any:
        if type(thing) is OpaqueLeaf:
            return HandedOn(number_of(thing))
        if isinstance(thing, (*PLAIN, *VALUES, Enum, type)):
            return Fixed(thing)
        if id(thing) not in self.met:
            self.things.append(thing)
            if not isinstance(thing, torch.Tensor):
                return self._copy(thing)
            self.met[id(thing)] = Result(len(self.tensors))
            self.tensors.append(thing)
        return self.met[id(thing)]

    def _copy(self, thing: Any) -> Copy:
        kind = type(thing)
        base: Any = next((b for b in BASES if isinstance(thing, b)), None)
        simple = kind.__new__ is object.__new__ and kind.__flags__ & HEAP and not isinstance(thing, nn.Module)
        if base is None and not simple:
            raise CaptureError(
                f"the step returns a {kind.__name__}, which may hide tensors; return tensors in tuples, lists, dicts "
                "or dataclasses"
            )
        name = len(self.things)
        self.met[id(thing)] = Copy(name)
        items = None
        if base is not None:
            held: Any = thing
            items = self.tree(dict(base.items(held)) if issubclass(base, dict) else list(base.__iter__(held)))
        fields = {**fields_of(thing), **slots_of(thing)}
        return Copy(name, kind, base, items, tuple((k, self.tree(v)) for k, v in fields.items()))


def renumbered(part: Any, number: Callable[[int], int]) -> Any:
    """The same with other positions for the objects that were there before the call."""
    if isinstance(part, Holder):
        return Holder(number(part.number))
    if isinstance(part, Tree):
        return Tree(part.spec, tuple(renumbered(p, number) for p in part.parts))
    if isinstance(part, Copy):
        items = None if part.items is None else renumbered(part.items, number)
        return replace(part, items=items, fields=tuple((k, renumbered(v, number)) for k, v in part.fields))
    return part


def unflatten(tree: Tree, tensors: Sequence[torch.Tensor], snapshot: GuardSnapshot, leaves: Sequence[Any]) -> Any:
    """What a step returns, of its own tensors and its call's objects and ``leaves``."""
    return _Making(tensors, snapshot, leaves).tree(tree)


class _Making:
    def __init__(self, tensors: Sequence[torch.Tensor], snapshot: GuardSnapshot, leaves: Sequence[Any]):
        self.tensors, self.snapshot, self.leaves = tensors, snapshot, leaves
        self.made: dict[int, Any] = {}

    def tree(self, tree: Tree) -> Any:
        return pytree.tree_unflatten([self._leaf(p) for p in tree.parts], tree.spec)

    def _leaf(self, part: Any) -> Any:
        if isinstance(part, Fixed):
            return part.value
        if isinstance(part, Result):
            return self.tensors[part.number]
        if isinstance(part, Holder):
            return self.snapshot.holders[part.number]
        if isinstance(part, HandedOn):
            return self.leaves[part.number]
        return self.made[part.name] if part.name in self.made else self._copy(part)

    def _copy(self, part: Copy) -> Any:
        base: Any = part.base or object
        given = (self.tree(part.items),) if base is tuple and part.items is not None else ()
        thing = self.made[part.name] = base.__new__(part.kind, *given)
        if base is list and part.items is not None:
            list.extend(thing, self.tree(part.items))
        elif issubclass(base, dict) and part.items is not None:
            for key, value in self.tree(part.items).items():
                base.__setitem__(thing, key, value)
        for name, value in part.fields:
            object.__setattr__(thing, name, self.tree(value))
        return thing
