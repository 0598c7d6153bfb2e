"""Subclasses of Tensor: of which class plain PyTorch's outputs are, and what they carry.

A recording computes with placeholders, and a step with plain tensors. Beside them goes a shadow of each tensor that
is of a subclass in plain PyTorch: of that class, with its attributes and shape, and without numbers. Each function of
torch's that is given one is handed to the ``__torch_function__`` of its class, where the call of the function itself
is answered by an empty tensor of the right shape. What comes back says of which class the result is and what it
carries. Every call does the same again with its own tensors' attributes, so that these are no part of a recording's
key.

A ``__torch_function__`` that computes (other arguments, another result) is refused, and so is a forward that asks a
tensor it has made for what such a method gave to it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fullframe import torch_compat
from fullframe.errors import CaptureError
from fullframe.torch_compat import FakeTensor, FunctionalTensor, overloaded_arguments, pytree, without_modes

CARRIED = "_fullframe_carried"
OWN = str(Path(__file__).parents[1])
SHARES = torch.Tensor.as_subclass  # which torch runs without asking any class


@dataclass(frozen=True)
class Shadowed:
    """Stands for the shadow of this number."""

    number: int


@dataclass(frozen=True)
class Blank:
    """Stands for a plain tensor, whatever its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Met:
    """A function that was given a shadow: its arguments and what it returns, as a pytree's leaves.

    ``numbers`` are those of the results that are shadows, by the result's place among the tensors returned.
    """

    function: Any
    leaves: tuple[Any, ...]
    spec: Any
    results: tuple[Any, ...]
    returned: Any
    numbers: tuple[int | None, ...]


@dataclass(frozen=True)
class OutputClasses:
    """How a call's outputs get their classes.

    ``given`` are the numbers of the shadows of the call's tensors, ``met`` what was met with them, and ``outputs``
    the numbers of the outputs' shadows.
    """

    given: Mapping[int, int] = field(default_factory=dict)
    met: tuple[Met, ...] = ()
    outputs: tuple[int | None, ...] = ()

    def shadows(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """What the outputs of a call with these tensors are of, before it runs."""
        if not any(n is not None for n in self.outputs):
            return []
        with _apart():
            found = {n: _shadow(tensors[k]) for k, n in self.given.items()}
            for met in self.met:
                _again(met, found, "the step")
        return [None if n is None else found[n] for n in self.outputs]

    def renumbered(self, numbers: Mapping[int, int]) -> OutputClasses:
        """The same for a call whose tensors have other numbers."""
        return OutputClasses({numbers[k]: n for k, n in self.given.items()}, self.met, self.outputs)


def with_class(tensor: torch.Tensor, shadow: torch.Tensor | None) -> torch.Tensor:
    """A tensor of the class of its shadow, with what that carries."""
    if shadow is None or type(shadow) is torch.Tensor:
        return tensor
    made = tensor.as_subclass(type(shadow))
    vars(made).update(vars(shadow))
    return made


def special(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a class that code can tell from torch's own."""
    return type(tensor) is not torch.Tensor and not isinstance(tensor, (nn.Parameter, FakeTensor, FunctionalTensor))


def refuse_dispatching(tensors: Sequence[torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors whose class has its own way to compute, below that of torch's functions."""
    for name, parameter in parameters.items():  # a parameter, whatever its class
        if type(parameter) is not nn.Parameter and _dispatches(type(parameter)):
            raise CaptureError(
                f"{name.removeprefix('module.')} is a {type(parameter).__name__}, which computes by a "
                "__torch_dispatch__ of its own, and a recorded step cannot follow that; give the tiled module to "
                "what makes such parameters, as in fully_shard(fullframe.tile(net)), and not what is inside of it"
            )
    for cls in {type(t) for t in tensors if special(t)}:
        if _dispatches(cls):
            raise CaptureError(
                f"a {cls.__name__} computes by a __torch_dispatch__ of its own, which a recorded step cannot follow; "
                "give the step a plain tensor"
            )


def _dispatches(cls: Any) -> bool:
    fake = issubclass(cls, (FakeTensor, FunctionalTensor))
    return not fake and cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__  # pyright: ignore[reportFunctionMemberAccess]


class Shadows:
    """The shadows of one recording."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}  # of placeholders, by identity
        self.kept: list[torch.Tensor] = []  # those placeholders, so that no other gets the identity of one
        self.found: dict[int, torch.Tensor] = {}
        self.given: dict[int, int] = {}
        self.met: list[Met] = []
        self.open = True

    def give(self, number: int, placeholder: torch.Tensor, tensor: torch.Tensor) -> None:
        """Let this placeholder be of the class of the call's tensor of this number."""
        with _apart():
            shadow = _shadow(tensor)
        self.given[number] = self._note(placeholder, shadow)
        _set_class(placeholder, type(tensor))

    def follow(self, function: Any, args: Any, kwargs: Any, made: Any, where: str) -> Any:
        """What a function returned, of the classes that it has in plain PyTorch."""
        if not (self.open and self.numbers):
            return made
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if not any(id(x) in self.numbers for x in leaves):
            return made
        results, returned = pytree.tree_flatten(made)
        if not any(isinstance(r, torch.Tensor) for r in results):
            return made
        old = {id(x) for x in leaves}
        blank = [tuple(map(self._abstract, things)) for things in (leaves, results)]
        met = Met(function, blank[0], spec, blank[1], returned, ())
        with _apart():
            shadows = _handed(met, self.found, where)
        numbers: list[int | None] = []
        for k, (result, shadow) in enumerate(zip(results, shadows, strict=True)):
            if not isinstance(result, torch.Tensor):
                numbers.append(None)
                continue
            cls = type(shadow)
            if id(result) in old and _class_of(result) is not cls:
                result = results[k] = _alias(result)
            numbers.append(None if cls is torch.Tensor else self._note(result, shadow))
            if cls is not torch.Tensor and _class_of(result) is not cls:
                _set_class(result, cls, vars(shadow))
        if any(n is not None for n in numbers):
            self.met.append(replace(met, numbers=tuple(numbers)))
        return pytree.tree_unflatten(results, returned)

    def output_classes(self, outputs: Sequence[torch.Tensor]) -> OutputClasses:
        """How these outputs get their classes."""
        numbers = tuple(self.numbers.get(id(t)) for t in outputs)
        needed = {n for n in numbers if n is not None}
        met: list[Met] = []
        for one in reversed(self.met):
            if not needed.isdisjoint(one.numbers):
                needed.update(x.number for x in (*one.leaves, *one.results) if isinstance(x, Shadowed))
                met.append(one)
        return OutputClasses({k: n for k, n in self.given.items() if n in needed}, tuple(reversed(met)), numbers)

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Inside, placeholders can be made of a class by ``as_subclass``, of which torch tells no mode."""

        me = get_ident()

        def as_subclass(tensor: torch.Tensor, cls: Any) -> torch.Tensor:
            if get_ident() != me:
                return SHARES(tensor, cls)
            plain = _plain(cls)
            made = _alias(tensor)
            if plain is torch.Tensor:
                return made
            shadows = self.found.get(self.numbers.get(id(tensor), -1))
            with _apart():
                shadow = SHARES(_blank(_described(tensor)) if shadows is None else shadows, plain)
            leaves, spec = pytree.tree_flatten(((self._abstract(tensor), plain), {}))
            number = self._note(made, shadow)
            blank = _described(made)
            self.met.append(Met(SHARES, tuple(leaves), spec, (blank,), pytree.tree_structure(0), (number,)))
            _set_class(made, plain, {})
            return made

        FunctionalTensor.as_subclass = as_subclass  # type: ignore[method-assign]
        try:
            yield
        finally:
            del FunctionalTensor.as_subclass

    def _abstract(self, thing: Any) -> Any:
        if not isinstance(thing, torch.Tensor):
            return thing
        number = self.numbers.get(id(thing))
        return _described(thing) if number is None else Shadowed(number)

    def _note(self, placeholder: torch.Tensor, shadow: torch.Tensor) -> int:
        number = self.numbers.setdefault(id(placeholder), len(self.kept))
        self.kept += [placeholder] if number == len(self.kept) else []
        self.found[number] = shadow
        return number


@contextmanager
def _apart() -> Iterator[None]:
    """Inside, nothing is recorded, and no gradient follows."""
    with without_modes(), torch.no_grad():
        yield


def _again(met: Met, found: dict[int, torch.Tensor], where: str) -> None:
    shadows = _handed(met, found, where)
    for number, shadow in zip(met.numbers, shadows, strict=True):
        if number is not None:
            found[number] = shadow


def _handed(met: Met, found: Mapping[int, torch.Tensor], where: str) -> list[Any]:
    """What the classes of a function's arguments make of its results: shadows, one by one."""
    given = [_filled(x, found) for x in met.leaves]
    args, kwargs = pytree.tree_unflatten(given, met.spec)
    if met.function is SHARES:
        return [SHARES(*args)]
    results = [_filled(x, found) for x in met.results]
    tensors = [x for x in given if isinstance(x, torch.Tensor) and type(x) is not torch.Tensor]
    overloaded = overloaded_arguments(tensors)
    if not overloaded:
        return results
    answer = _Answer(met.function, given, pytree.tree_unflatten(results, met.returned))
    kinds = tuple(map(type, overloaded))
    versions = [t._version for t in (*given, *results) if isinstance(t, torch.Tensor)]
    for tensor in overloaded:
        with answer:
            made = type(tensor).__torch_function__(met.function, kinds, args, kwargs)
        if made is not NotImplemented:
            break
    else:
        names = ", ".join(cls.__name__ for cls in kinds)
        raise TypeError(f"in {where}, no __torch_function__ of {names} takes {_name(met.function)}")
    shadows = pytree.tree_leaves(made)
    changed = versions != [t._version for t in (*given, *results) if isinstance(t, torch.Tensor)]
    if changed or not answer.given or not _same(shadows, results):
        raise CaptureError(
            f"in {where}, the __torch_function__ of {kinds[0].__name__} changes what {_name(met.function)} is given "
            "or returns, which a recorded step would not; give the step a plain tensor (.as_subclass(torch.Tensor))"
        )
    return shadows


class _Answer(TorchFunctionMode):
    """Answers a function, once it is called with the arguments that it was called with, by a result."""

    def __init__(self, function: Any, leaves: Sequence[Any], result: Any):
        super().__init__()
        self.function, self.leaves, self.result = function, leaves, result
        self.given = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.given and func == self.function and _same(pytree.tree_leaves((args, kwargs or {})), self.leaves):
            self.given = True
            return self.result
        return func(*args, **(kwargs or {}))


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether these are the same things, but for the classes of tensors."""
    return len(some) == len(others) and all(_one(a, b) for a, b in zip(some, others, strict=True))


def _one(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        with torch_compat.no_torch_function():
            return a.shape == b.shape and a.untyped_storage()._cdata == b.untyped_storage()._cdata
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    return type(a) is type(b) and bool(a == b)


def _filled(thing: Any, found: Mapping[int, torch.Tensor]) -> Any:
    if isinstance(thing, Shadowed):
        return found[thing.number]
    return _blank(thing) if isinstance(thing, Blank) else thing


def _blank(like: Blank) -> torch.Tensor:
    return torch.empty((), dtype=like.dtype, device=like.device).expand(like.shape)


def _described(tensor: torch.Tensor) -> Blank:
    with torch_compat.no_torch_function():
        return Blank(tuple(tensor.shape), tensor.dtype, tensor.device)


def _shadow(tensor: torch.Tensor) -> torch.Tensor:
    shadow = SHARES(_blank(_described(tensor)), type(tensor))
    vars(shadow).update(vars(tensor))
    return shadow


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    with torch_compat.no_torch_function():
        return tensor.view_as(tensor)


def _name(function: Any) -> str:
    name = getattr(function, "__name__", str(function))
    owner = getattr(getattr(function, "__self__", None), "__name__", "")
    return f"{owner}.{name}" if name in ("__get__", "__set__") and owner else name


def _plain(cls: Any) -> Any:
    """The class that a placeholder's class stands for."""
    if isinstance(cls, _Kind):
        return cls.__mro__[2]
    return torch.Tensor if cls is FunctionalTensor else cls


def _class_of(tensor: torch.Tensor) -> Any:
    return _plain(type(tensor))


class _Kind(type(torch.Tensor)):
    """Classes that torch's functionalisation takes for its own."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is FunctionalTensor

    __hash__ = type.__hash__


def _set_class(placeholder: torch.Tensor, cls: type, carried: Collection[str] | None = None) -> None:
    """Make a placeholder one of a class; ``carried`` are attributes it has in plain PyTorch, and not here."""
    if carried is not None:
        vars(placeholder)[CARRIED] = frozenset(carried)
    placeholder.__class__ = _placeholder_class(cls, carried is not None)


@lru_cache(maxsize=64)
def _placeholder_class(cls: type, made: bool) -> Any:
    """The class of placeholders for tensors of a class: of both kinds, computing as recorded tensors do."""
    kind: Any = _Kind if type(cls) is type(torch.Tensor) else type("_Kind", (_Kind, type(cls)), {})
    own: dict[str, Any] = {"__torch_function__": torch_compat.disabled_torch_function}
    if made:  # by the step
        own |= {"__getattribute__": _read, "__setattr__": _write}
    try:
        return kind(cls.__name__, (FunctionalTensor, cls), own)
    except TypeError as error:
        raise CaptureError(
            f"no placeholder for a tensor of class {cls.__name__} can be made ({error}); give the step a plain "
            "tensor (.as_subclass(torch.Tensor))"
        ) from error


def _read(tensor: Any, name: str) -> Any:
    own = object.__getattribute__(tensor, "__dict__")[CARRIED]
    whole = name == "__dict__" and own and not sys._getframe(1).f_code.co_filename.startswith(OWN)
    if name in own or whole:
        raise _unfollowed(tensor, name)
    return FunctionalTensor.__getattribute__(tensor, name)


def _write(tensor: Any, name: str, value: Any) -> None:
    if name == "__dict__" or not hasattr(torch.Tensor, name):
        raise _unfollowed(tensor, name)
    FunctionalTensor.__setattr__(tensor, name, value)


def _unfollowed(tensor: Any, name: str) -> CaptureError:
    return CaptureError(
        f"the step reads or sets the attribute {name} of a {type(tensor).__name__} that it has made, which a "
        "recorded step cannot follow; do that with what it returns, or compute with .as_subclass(torch.Tensor)"
    )
