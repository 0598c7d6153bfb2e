"""What a forward leaves behind: tensors in attributes, lists, dictionaries, globals and closures.

Hooks that keep features, heads collected in a list, maps kept to be looked at, states carried to the next call:
PyTorch leaves this call's tensors there, so a recorded step has to as well. While a step is recorded the places in
its reach are looked at when its forward ends, and the recording is put out of them again.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fullframe.errors import CaptureError
from fullframe.frontend.guards import SIDE_EFFECTS, GuardSnapshot
from fullframe.frontend.opaque_leaves import OpaqueLeaf
from fullframe.frontend.sources import (
    Entry,
    Fixed,
    Given,
    Holder,
    Made,
    Result,
    SideEffect,
    Source,
    delete,
    fields_of,
    items_of,
    spaces,
    write,
)
from fullframe.torch_compat import FakeTensor, FunctionalTensor, pytree

PLAIN = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)
GROWN = 4  # calls that may add to a list that nobody empties
MISSING = object()


def recorded(value: Any) -> bool:
    """Whether this is a tensor of a recording, which has no numbers, or stands for a leaf of its arguments."""
    return type(value) is OpaqueLeaf or isinstance(value, (FunctionalTensor, FakeTensor))


@dataclass
class SideEffectTracker:
    """The places in reach of a call, as they are before it is recorded and as the forward leaves them."""

    snapshot: GuardSnapshot
    owners: dict[int, str]  # module -> its path
    tensors: Sequence[torch.Tensor]
    parameters: int = 0  # how many of the tensors are parameters and buffers
    effects: list[SideEffect] = field(default_factory=list)
    results: list[torch.Tensor] = field(default_factory=list)
    placeholders: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spaces = spaces(self.snapshot)
        self.before = {a: items_of(s) for a, s in self.spaces.items()}
        self.sets = [(s, set(s)) for s in self.snapshot.sets if isinstance(s, set)]
        self.known = {id(s) for s in self.spaces.values()}
        self.given = {id(t): k for k, t in enumerate(self.tensors)}
        modules = [h for h in self.snapshot.holders if isinstance(h, nn.Module)]
        self.registered = {id(d) for m in modules for d in (m._parameters, m._buffers)}
        self.parameter_spaces = {id(m._parameters) for m in modules}
        self.modules = {id(vars(m)) for m in modules}
        self.holders = {id(h): k for k, h in enumerate(self.snapshot.holders)}
        self.collected: dict[tuple[Source, Any], Any] = {}

    def collect(self, placeholders: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Note what the forward has left; returns the tensors that the step must hand out besides its outputs."""
        self.placeholders = {id(t): k for k, t in enumerate(placeholders)}
        self.results = list(outputs)
        for source, space in self.spaces.items():
            self._refuse_exchange(source, space)
            changed = {} if id(space) in self.registered else dict(self._changed(source))
            if not changed:
                continue
            found = self._whole(source) if isinstance(space, (list, deque)) else self._each(source, changed)
            self.collected |= {(source, k): v for k, v in changed.items() if None in found or k in found}
            self.effects += found.values()
        return self.results[len(outputs) :]

    def _refuse_exchange(self, source: Source, space: Any) -> None:
        """Parameters must be where they were: a recording puts none in another's place."""
        for key, value in items_of(space).items() if id(space) in self.parameter_spaces else ():
            number = self.placeholders.get(id(value))
            if number is not None and self.tensors[number] is not self.before[source].get(key):
                raise CaptureError(
                    f"the forward puts another parameter in the place of {self._name(source, key)}; leave "
                    "parameters where they are, and choose among them in the forward"
                )

    @property
    def used(self) -> set[int]:
        """Numbers of the results that lie in some place."""
        found: set[int] = set()
        parts: list[Any] = [p.recipe for p in self.effects]
        while parts:
            part = parts.pop()
            if isinstance(part, Result):
                found.add(part.number)
            parts += part.parts if isinstance(part, Made) else part if isinstance(part, tuple) else ()
        return found

    def restore(self) -> str:
        """Put back what was there before; returns the name of something that no step would bring up to date."""
        lost = ""
        for source in self.spaces:
            changed = dict(self._changed(source, quiet=False))
            for key, value in changed.items():
                fine = self.collected.get((source, key), MISSING) is value or self._updated(value, source, key)
                lost = lost or ("" if fine else self._name(source, key))
            self._back(source, changed)
        for source in self.spaces:  # in sets, say: found only now that all else is as it was
            for key, value in self._new(source):
                if any(recorded(t) for t in GuardSnapshot([value]).tensors):
                    lost = lost or self._name(source, key)
                    self._back(source, [key])
        return lost

    def rewind(self) -> None:
        """Give every space and set what it held before, so that the call may be recorded once more."""
        for source, space in self.spaces.items():
            now, old = items_of(space), self.before[source]
            changed = [k for k in now.keys() | old.keys() if now.get(k, MISSING) is not old.get(k, MISSING)]
            self._back(source, changed)
        for space, old in self.sets:
            space.clear()
            space.update(old)

    def _back(self, source: Source, keys: Collection[Any]) -> None:
        """Give a space what it held before under these keys."""
        space, old = self.spaces[source], self.before[source]
        if isinstance(space, (list, deque)):
            if keys:
                write(space, old)
            return
        for key in keys:
            if key in old:
                write(space, {key: old[key]})
            else:
                delete(space, key)

    def _new(self, source: Source) -> list[tuple[Any, Any]]:
        """What a space holds and did not before."""
        before = self.before[source]
        return [(k, v) for k, v in items_of(self.spaces[source]).items() if v is not before.get(k, MISSING)]

    def _changed(self, source: Source, quiet: bool = True) -> Iterator[tuple[Any, Any]]:
        """What a space holds now and did not before, and is a tensor of the call or of its recording, or holds some.

        ``quiet`` leaves out what needs no step to bring it up to date.
        """
        for key, value in self._new(source):
            leaves = self._leaves(value)
            inside = [v() if isinstance(v, weakref.ref) else v for v in leaves]
            if any(recorded(v) or id(v) in self.given for v in inside) and not (
                quiet and self._updated(value, source, key)
            ):
                yield key, value

    def _leaves(self, value: Any) -> list[Any]:
        return pytree.tree_leaves(value, is_leaf=lambda v: id(v) in self.known)

    def _updated(self, value: Any, source: Source, key: Any) -> bool:
        """Whether nothing is to be put: an attribute updated in place, or weights listed again.

        The new numbers of an attribute updated in place are an output of the recording that is copied into it.
        """
        if recorded(value):
            number = self.placeholders.get(id(value))
            return number is not None and self.tensors[number] is self.before[source].get(key)
        if isinstance(value, torch.Tensor) or key not in self.before[source]:
            return False
        now, before = (self._numbers(v) for v in (value, self.before[source][key]))
        return now == before and all(k is not None and k < self.parameters for k in now)

    def _numbers(self, value: Any) -> list[int | None]:
        """Which of the call's tensors a value holds, in its order."""
        leaves = pytree.tree_leaves(value, is_leaf=lambda v: v is not value and id(v) in self.known)
        inside = (v() if isinstance(v, weakref.ref) else v for v in leaves)
        return [self.placeholders.get(id(v), self.given.get(id(v))) for v in inside]

    def _recipe(self, value: Any, attribute: bool = False) -> Any:
        """How to make a value again; None where that cannot be said."""
        if isinstance(value, torch.Tensor):
            number = self.placeholders.get(id(value), self.given.get(id(value)))
            if number is not None:
                # A module registers a parameter that it is given as an attribute: that is not done again.
                registers = attribute and isinstance(self.tensors[number], nn.Parameter)
                return None if registers else Given(number)
            return self._result(value)
        if isinstance(value, PLAIN):
            return Fixed(value)
        leaves, spec = pytree.tree_flatten(value, is_leaf=lambda v: id(v) in self.known)
        if spec.is_leaf():
            return None
        parts = tuple(self._recipe(v) for v in leaves)
        return None if None in parts else Made(parts, spec, id(value))

    def _result(self, tensor: torch.Tensor) -> Result | None:
        if not isinstance(tensor, FunctionalTensor) or isinstance(tensor, nn.Parameter):
            return None
        if tensor.retains_grad:
            raise CaptureError(
                "the forward calls retain_grad() on a tensor that it leaves behind, whose gradient a recorded step "
                "does not have; keep it with a hook of the tensor (register_hook) in a step with loss="
            )
        for k, t in enumerate(self.results):
            if t is tensor:
                return Result(k)
        self.results.append(tensor)
        return Result(len(self.results) - 1)

    def _each(self, source: Source, changed: dict[Any, Any]) -> dict[Any, SideEffect]:
        """Of a dictionary, of an object's attributes or of a variable what can be made again."""
        attribute = id(self.spaces[source]) in self.modules
        found = ((k, self._key(k), self._recipe(v, attribute)) for k, v in changed.items())
        return {k: SideEffect(source, key, r) for k, key, r in found if key is not None and r is not None}

    def _whole(self, source: Source) -> dict[Any, SideEffect]:
        """A list as the forward leaves it, in terms of what it held before; nothing where that cannot be said."""
        old = {id(v): k for k, v in self.before[source].items()}
        now = items_of(self.spaces[source]).values()
        parts = [Entry(old[id(v)]) if id(v) in old else self._recipe(v) for v in now]
        if None in parts:
            return {}
        kept = [self.before[source][p.index] for p in parts if isinstance(p, Entry)]
        grown = len(now) - len(self.before[source])
        if grown > 0 and sum(isinstance(v, torch.Tensor) and v in SIDE_EFFECTS for v in kept) >= GROWN * grown:
            raise CaptureError(
                f"every call adds a tensor to the list {self._name(source, None)}, and each new length is recorded "
                "anew; empty it between the calls, or put each call's tensor in the place of the last"
            )
        return {None: SideEffect(source, None, tuple(parts))}

    def _key(self, key: Any) -> Any:
        """A key of a dictionary; None where the next call may have another."""
        if isinstance(key, PLAIN) or (isinstance(key, tuple) and all(isinstance(k, PLAIN) for k in key)):
            return Fixed(key)
        number = self.holders.get(id(key))
        return None if number is None else Holder(number)

    def _name(self, source: Source, key: Any) -> str:
        """A place in words, or a whole list where there is no key."""
        kind, number, name = source
        if kind == "cell":
            return "a variable of a closure"
        owner = "an object it can reach"
        if kind == "class":
            owner = f"class {self.snapshot.classes[number].__name__}"
        for holder in self.snapshot.holders if kind in ("container", "holder") else ():
            fields = fields_of(holder)
            names = [n for n, v in fields.items() if v is self.spaces[source]]
            if names or fields is self.spaces[source]:
                owner = self.owners.get(id(holder)) or type(holder).__name__
                name = names[0] if names else ""
        return f"{(name if key is None else str(key))!r} of {owner}"

    def name_of(self, tensor: torch.Tensor) -> str:
        """Where a tensor of the call was found."""
        found = (self._name(a, k) for a, s in self.before.items() for k, v in s.items() if v is tensor)
        return next(found, "an object it can reach")
