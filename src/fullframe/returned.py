"""What a call returns: tensors in containers and objects of whatever kind, taken apart and made again.

Containers that `torch.utils._pytree` knows are its business. Other objects (dataclasses, subclasses of dictionaries,
distributions) are copied field by field: each call returns one of its own, as the forward makes it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fullframe.fingerprint import Survey, slots_of
from fullframe.graph import CaptureError
from fullframe.left import PLAIN
from fullframe.places import fields_of

BASES = (OrderedDict, dict, list, tuple)  # of containers, the narrower first
HEAP = 1 << 9  # the flag of a class that Python code has made


@dataclass(frozen=True)
class Fixed:
    """The same in every call."""

    value: Any


@dataclass(frozen=True)
class Numbered:
    """A tensor of the step, by its number."""

    number: int


@dataclass(frozen=True)
class Known:
    """An object that was there before the call, by its position in the survey."""

    number: int


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


def take_apart(thing: Any, survey: Survey) -> tuple[Tree, list[torch.Tensor]]:
    """How to make a thing again, and the tensors in it, each once."""
    taking = _Taking({id(h): Known(k) for k, h in enumerate(survey.holders)})
    return taking.tree(thing), taking.tensors


class _Taking:
    def __init__(self, met: dict[int, Any]):
        self.met = met  # how to make tensors and objects that were met already, by identity
        self.tensors: list[torch.Tensor] = []
        self.things: list[Any] = []  # kept alive, so that no other gets the identity of one

    def tree(self, thing: Any) -> Tree:
        leaves, spec = pytree.tree_flatten(thing, is_leaf=lambda x: isinstance(x, torch.Size))
        return Tree(spec, tuple(self._leaf(x) for x in leaves))

    def _leaf(self, thing: Any) -> Any:
        if isinstance(thing, (*PLAIN, Enum, type)):
            return Fixed(thing)
        if id(thing) not in self.met:
            self.things.append(thing)
            if not isinstance(thing, torch.Tensor):
                return self._copy(thing)
            self.met[id(thing)] = Numbered(len(self.tensors))
            self.tensors.append(thing)
        return self.met[id(thing)]

    def _copy(self, thing: Any) -> Copy:
        kind = type(thing)
        base = next((b for b in BASES if isinstance(thing, b)), None)
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
            items = self.tree(dict(base.items(thing)) if issubclass(base, dict) else list(base.__iter__(thing)))
        fields = {**fields_of(thing), **slots_of(thing)}
        return Copy(name, kind, base, items, tuple((k, self.tree(v)) for k, v in fields.items()))


def put_together(tree: Tree, tensors: Sequence[torch.Tensor], survey: Survey) -> Any:
    """What a step returns, of its own tensors and its call's objects."""
    made: dict[int, Any] = {}

    def tree_of(tree: Tree) -> Any:
        return pytree.tree_unflatten([leaf_of(p) for p in tree.parts], tree.spec)

    def leaf_of(part: Any) -> Any:
        if isinstance(part, Fixed):
            return part.value
        if isinstance(part, Numbered):
            return tensors[part.number]
        if isinstance(part, Known):
            return survey.holders[part.number]
        return made[part.name] if part.name in made else copy_of(part)

    def copy_of(part: Copy) -> Any:
        items = None if part.items is None or part.base is not tuple else tree_of(part.items)
        thing: Any = object.__new__(part.kind) if part.base is None else part.base.__new__(part.kind, *_given(items))
        made[part.name] = thing
        if part.items is not None and part.base is list:
            list.extend(thing, tree_of(part.items))
        elif part.items is not None and part.base is not None and issubclass(part.base, dict):
            for key, value in tree_of(part.items).items():
                part.base.__setitem__(thing, key, value)
        for name, value in part.fields:
            object.__setattr__(thing, name, tree_of(value))
        return thing

    return tree_of(tree)


def _given(items: Any) -> tuple[Any, ...]:
    return () if items is None else (items,)
