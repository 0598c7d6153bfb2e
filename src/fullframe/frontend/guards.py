"""What a recording reads of a module besides the numbers in its tensors.

A stale recording is a silent wrong number, so everything a forward could look at goes in: flags,
attributes, hooks and structure of modules; plain objects, containers, functions with their
closures, defaults and the globals they name; class attributes. Tensors go in by shape, dtype,
device, strides and requires_grad, and are listed, so that their numbers are read afresh each step.

A guard snapshot may be told to look only at what a recording has read (`fullframe.reads`): then other fields of
objects, other attributes of classes and leaves that were only handed on stay out.

Iterators and memory shared with other processes cannot be looked at without changing them or in
time: with one of them in reach every call is recorded anew. Generators of random numbers are listed,
so that a recording that drew from one can be refused.

Not seen: files, the clock, the insides of compiled extensions, globals that installed packages read
(other than torch's functions, `replaced`), and what lies more than DEPTH objects away from a module.
"""

from __future__ import annotations

import array
import functools
import random
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextvars import ContextVar
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fullframe.frontend.fields import (
    ATOMS,
    BARE,
    IGNORED,
    MISSING,
    OFTEN_EMPTY,
    REGISTERED,
    Choice,
    Key,
    Missing,
    Same,
    digest,
    fields_and_slots,
)  # fmt: skip
from fullframe.frontend.names import (
    ANY_GLOBAL,
    BY_STRING,
    environment,
    foreign,
    foreign_class,
    global_names,
    imported,
    installed,
    looked_up,
)  # fmt: skip

# Tensors that a tiled step has put where its forward left them; True: PyTorch's would have a graph, these have none.
# The next call's key has their shape and such apart (`GuardSnapshot.details`), for few recordings read them.
SIDE_EFFECTS = WeakIdKeyDictionary()
DEPTH = 8  # objects, containers and functions away from the nearest module
OPAQUE = frozenset(("logging", "threading", "_thread", "io", "_io"))
# Others change it, or taking from it does.
SHARED = ("_queue", "multiprocessing.sharedctypes", "multiprocessing.managers", "ctypes", "_ctypes", "mmap")
SILENT = frozenset(("__init_subclass__", "__repr__", "__str__", "__reduce__", "__reduce_ex__", "__getstate__",
                    "__setstate__", "__del__", "__class_getitem__", "__subclasshook__"))  # fmt: skip


class GuardSnapshot:
    """One look at everything reachable from some roots.

    ``key`` is hashable: equal keys may share a recording. ``tensors`` are those met, each once, in
    an order that equal keys share. ``passed`` are entries of containers, by id and key or position,
    of which only the type is looked at, in all roots but the first. With names for the
    roots, ``spans`` say which parts come from which place.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        choice: Choice | None = None,
        passed: Collection[tuple[int, Any]] = (),
        named: Sequence[str] = (),
    ):
        self.choice = choice or Choice()
        self.passed: Collection[tuple[int, Any]] = ()
        self.path: list[str] | None = [] if named else None
        self.spans: list[tuple[int, int, tuple[str, ...]]] = []
        self.mentioned: set[str] = set()  # names in the code of functions met, other than those of classes left out
        self.parts: list[Any] = []
        self.tensors: list[torch.Tensor] = []
        self.inner = 0  # how many of the tensors are in reach of the first root
        self.seen: dict[int, int] = {}
        self.holders: list[Any] = []  # objects with attributes of their own, in the order met
        self.containers: list[Any] = []  # dicts, lists and deques
        self.sets: list[Any] = []
        self.cells: list[Any] = []  # variables of closures
        self.scopes: list[tuple[dict[str, Any], Iterable[str] | None]] = []  # globals, and which of their names
        self.classes: list[type] = []  # other than torch's
        self.side_effects: list[torch.Tensor] = []  # of the tensors those in `SIDE_EFFECTS`
        self.details: list[Any] = []  # what the key does not have of them
        self.generators: list[Any] = []  # of random numbers
        self.caches: list[Any] = []  # functions that keep what they returned
        self.passing: tuple[str, ...] = ()  # the first place of such, if names are asked for
        self.lasting = True  # False where something cannot be looked at
        for k, root in enumerate(roots):
            self.visit(root, 0, named[k] if named else "")
            self.passed = passed
            self.inner = self.inner or len(self.tensors)
        self.key = tuple(self.parts)

    def visit(self, thing: Any, depth: int, step: Any = "") -> None:
        """Look at a thing; ``step`` is how it is found in what was looked at before: a name, key or position."""
        if self.path is None:
            kind = type(thing)
            if kind in ATOMS:  # most of what a module has; a call each would take longer than all the rest
                self.parts += (kind, thing)
            else:
                self._visit(thing, depth)
            return
        first = len(self.parts)
        self.path.append(step if isinstance(step, str) else f"[{step}]")
        self._visit(thing, depth)
        self.spans.append((first, len(self.parts), tuple(self.path)))
        self.path.pop()

    def _visit(self, thing: Any, depth: int) -> None:
        kind = type(thing)
        self.parts.append(kind)
        if kind in ATOMS:
            self.parts.append(thing)
            return
        if kind is float:
            self.parts.append(repr(thing))  # tells -0.0 from 0.0, and NaN equals itself
            return
        name = id(thing)
        if name in self.seen:
            self.parts.append(self.seen[name])
            return
        self.seen[name] = len(self.seen)
        if depth > DEPTH:
            self.parts.append(Same(thing))
            return
        visitor = VISITORS.get(kind)
        if visitor is None:
            visitor = VISITORS[kind] = _visitor_for(kind)
        visitor(self, thing, depth)


def _tensor(snapshot: GuardSnapshot, tensor: torch.Tensor, depth: int) -> None:
    strided = tensor.layout is torch.strided
    details = (
        tensor.shape, tensor.dtype, tensor.device, tensor.stride() if strided else tensor.layout,
        tensor.requires_grad,
    )  # fmt: skip
    if SIDE_EFFECTS and tensor in SIDE_EFFECTS:
        snapshot.parts.append("side effect")
        snapshot.details += (*details, SIDE_EFFECTS[tensor])
        snapshot.side_effects.append(tensor)
    else:
        snapshot.parts += details
    snapshot.tensors.append(tensor)
    if not type(tensor).__module__.startswith("torch._"):
        chosen = snapshot.choice.carried(tensor)
        fields = vars(tensor)
        if chosen is None and fields:
            _mapping(snapshot, fields, depth)
        for name in chosen or ():
            snapshot.parts.append(name)
            snapshot.visit(fields.get(name, MISSING), depth + 1, f".{name}")


def _module(snapshot: GuardSnapshot, module: nn.Module, depth: int) -> None:
    parts, unnamed = snapshot.parts, snapshot.path is None
    snapshot.holders.append(module)
    fields = object.__getattribute__(module, "__dict__")
    chosen = snapshot.choice.fields(module)
    names = fields if chosen is None else dict.fromkeys((*REGISTERED, *chosen))
    for name in names:
        value = fields.get(name, MISSING)
        if name in IGNORED or (name in OFTEN_EMPTY and not value):
            continue
        if name == "_fullframe":  # a tiled module inside another: what it wraps, not its recordings
            value = value["pair"]
        kind = type(value)
        if unnamed and kind in ATOMS:  # as `visit` has it
            parts += (name, kind, value)
            continue
        parts.append(name)
        snapshot.visit(value, 0, f".{name}")
    parts.append("end")
    _class(snapshot, type(module), 0)


def _object(snapshot: GuardSnapshot, thing: Any, depth: int) -> None:
    fields = fields_and_slots(thing)
    if fields is None or str(type(thing).__module__).partition(".")[0] in OPAQUE:
        snapshot.parts.append(Same(thing))
        return
    snapshot.holders.append(thing)
    chosen = snapshot.choice.fields(thing)
    for name in fields if chosen is None else chosen:
        snapshot.parts.append(name)
        snapshot.visit(fields.get(name, MISSING), depth + 1, f"<{type(thing).__name__}>.{name}")
    snapshot.parts.append("end")
    _class(snapshot, type(thing), depth)


def _mapping(snapshot: GuardSnapshot, mapping: Any, depth: int) -> None:
    snapshot.parts.append(len(mapping))
    snapshot.containers += [mapping] if isinstance(mapping, dict) else []
    named = snapshot.path is not None
    for key, value in mapping.items():
        snapshot.visit(key, depth + 1)
        if snapshot.passed and (id(mapping), key) in snapshot.passed:
            snapshot.parts.append(type(value))
        else:
            snapshot.visit(value, depth + 1, Key(key) if named else "")
    _derived(snapshot, mapping, depth)


def _sequence(snapshot: GuardSnapshot, sequence: Any, depth: int) -> None:
    snapshot.parts.append(len(sequence))
    snapshot.containers += [sequence] if isinstance(sequence, (list, deque)) else []
    for k, value in enumerate(sequence):
        if snapshot.passed and (id(sequence), k) in snapshot.passed:
            snapshot.parts.append(type(value))
        else:
            snapshot.visit(value, depth + 1, k)
    _derived(snapshot, sequence, depth)


def _set(snapshot: GuardSnapshot, things: Any, depth: int) -> None:
    snapshot.parts.append(len(things))
    snapshot.sets.append(things)
    for value in sorted(things, key=repr):
        snapshot.visit(value, depth + 1)
    _derived(snapshot, things, depth)


def _derived(snapshot: GuardSnapshot, thing: Any, depth: int) -> None:
    """What a kind of container or number has beyond the built-in one."""
    kind = type(thing)
    if kind in BARE:
        return
    for name, value in (fields_and_slots(thing) or {}).items():
        snapshot.parts.append(name)
        snapshot.visit(value, depth + 1, f".{name}")
    if kind.__module__ not in ("builtins", "collections"):
        _class(snapshot, kind, depth)


def _number(snapshot: GuardSnapshot, number: Any, depth: int) -> None:
    plain: Any = next(kind for kind in (float, int, complex, bytes, str) if isinstance(number, kind))
    snapshot.parts.append(plain.__repr__(number))
    _derived(snapshot, number, depth)


def _bytes(snapshot: GuardSnapshot, thing: Any, depth: int) -> None:
    snapshot.parts.append(digest(thing))
    _derived(snapshot, thing, depth)


def _volatile(snapshot: GuardSnapshot, thing: Any, depth: int) -> None:
    snapshot.parts.append(Same(thing))
    snapshot.lasting = False
    snapshot.passing = snapshot.passing or tuple(snapshot.path or ())


def _generator(snapshot: GuardSnapshot, thing: Any, depth: int) -> None:
    snapshot.parts.append(Same(thing))
    snapshot.generators.append(thing)
    if type(thing).__module__ != "random":
        _derived(snapshot, thing, depth)


def _cached(snapshot: GuardSnapshot, function: Any, depth: int) -> None:
    snapshot.caches.append(function)
    snapshot.visit(function.__wrapped__, depth)


def _reference(snapshot: GuardSnapshot, reference: Any, depth: int) -> None:
    snapshot.visit(reference(), depth + 1)


def _proxy(snapshot: GuardSnapshot, proxy: Any, depth: int) -> None:
    snapshot.visit(proxy.__repr__.__self__, depth + 1)


def _thread_local(snapshot: GuardSnapshot, thing: threading.local, depth: int) -> None:
    snapshot.visit(dict(vars(thing)), depth + 1)


def _variable(snapshot: GuardSnapshot, variable: ContextVar[Any], depth: int) -> None:
    snapshot.visit(variable.get(None), depth + 1)


def _python_module(snapshot: GuardSnapshot, module: types.ModuleType, depth: int) -> None:
    """The values in a module of the user's, such as a configuration, and in the modules in it."""
    snapshot.parts.append(Same(module))
    if not foreign(module):
        snapshot.scopes.append((vars(module), None))
        for name, value in list(vars(module).items()):
            if not name.startswith("__"):
                snapshot.parts.append(name)
                snapshot.visit(value, depth + 1, f".{name}")


def _slice(snapshot: GuardSnapshot, thing: slice, depth: int) -> None:
    _sequence(snapshot, (thing.start, thing.stop, thing.step), depth)


def _method(snapshot: GuardSnapshot, method: types.MethodType, depth: int) -> None:
    snapshot.visit(method.__func__, depth, method.__func__.__name__)
    snapshot.visit(method.__self__, depth)


def _builtin(snapshot: GuardSnapshot, function: Any, depth: int) -> None:
    """A function of C's, with what it is bound to."""
    owner = function.__self__
    if owner is None or isinstance(owner, (types.ModuleType, type)) or type(owner).__module__.startswith("torch._C"):
        snapshot.parts.append(function)
    else:
        snapshot.parts.append(function.__name__)
        snapshot.visit(owner, depth + 1)


def _partial(snapshot: GuardSnapshot, call: functools.partial[Any], depth: int) -> None:
    for part in (call.func, call.args, call.keywords, vars(call)):
        snapshot.visit(part, depth + 1)


def _array(snapshot: GuardSnapshot, array: Any, depth: int) -> None:
    snapshot.parts += (array.shape, str(array.dtype))
    if array.dtype == object:
        _sequence(snapshot, array.ravel().tolist(), depth)
    else:
        snapshot.parts.append(digest(array))


def _member(snapshot: GuardSnapshot, member: Enum, depth: int) -> None:
    snapshot.parts.append(member)
    for name, value in vars(member).items():
        if not name.startswith("_"):
            snapshot.parts.append(name)
            snapshot.visit(value, depth + 1, f".{name}")


def _atom(snapshot: GuardSnapshot, thing: Any, depth: int) -> None:
    snapshot.parts.append(thing)


def _identity(snapshot: GuardSnapshot, thing: Any, depth: int) -> None:
    snapshot.parts.append(Same(thing))


def _descriptor(snapshot: GuardSnapshot, thing: Any, depth: int) -> None:
    for name in ("fget", "__func__", "func"):
        if hasattr(thing, name):
            snapshot.visit(getattr(thing, name), depth)


def _function(snapshot: GuardSnapshot, function: types.FunctionType, depth: int) -> None:
    """Code, defaults and closure; for code that is not an installed package's also the globals it names."""
    code = function.__code__
    snapshot.parts.append(code)
    for value in (function.__defaults__, function.__kwdefaults__, function.__dict__ or None):
        if value is not None:
            snapshot.visit(value, depth + 1, function.__name__)
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        snapshot.cells.append(cell)
        try:
            snapshot.visit(cell.cell_contents, depth + 1, f"<{function.__name__}>.{name}")
        except ValueError:
            snapshot.parts.append("empty")
    if not installed(code.co_filename):
        space = function.__globals__
        names = global_names(code)
        snapshot.mentioned.update(names)
        snapshot.parts += environment(names)
        own = tuple(n for n in names if n in looked_up(code)) if BY_STRING.isdisjoint(names) else names
        if not ANY_GLOBAL.isdisjoint(names):
            names += tuple(n for n in space if not n.startswith("__"))
            own = names
        snapshot.scopes.append((space, own))
        met: set[int] = set()
        for name in own:
            if name in space:
                _global(snapshot, name, space[name], names, met, depth)
            elif (module := imported(name, space.get("__package__") or "")) is not None:
                _global(snapshot, name, module, names, met, depth)


def _global(snapshot: GuardSnapshot, name: str, value: Any, names: Iterable[str], met: set[int], depth: int) -> None:
    """A global; of a module, what in it has one of the names, all of it where code may look up any name."""
    snapshot.parts.append(name)
    if not isinstance(value, types.ModuleType) or not BY_STRING.isdisjoint(names):
        snapshot.visit(value, depth + 1, f"<globals>.{name}")
    elif id(value) not in met and not foreign(value):
        met.add(id(value))
        snapshot.scopes.append((vars(value), names))
        for inner in names:
            if inner in vars(value):
                _global(snapshot, inner, vars(value)[inner], names, met, depth + 1)


def _class(snapshot: GuardSnapshot, cls: type, depth: int) -> None:
    """Attributes and methods of a class and its bases, once per snapshot."""
    if id(cls) in snapshot.seen:
        return
    snapshot.seen[id(cls)] = len(snapshot.seen)
    if type(cls) is not type:
        _class(snapshot, type(cls), depth)
    for base in cls.__mro__:
        if base is object or (base is not cls and id(base) in snapshot.seen):
            continue
        snapshot.seen.setdefault(id(base), len(snapshot.seen))
        if str(base.__module__).partition(".")[0] in ("torch", "builtins", *OPAQUE):
            snapshot.parts += (base, Same(vars(base).get("forward")))  # a replaced forward still shows
            continue
        snapshot.classes.append(base)
        chosen = snapshot.choice.attributes(base)
        foreign = foreign_class(base)
        snapshot.parts += [n for n in vars(base) if not n.startswith("__")]
        for name, value in list(vars(base).items()):
            hidden = name in SILENT if isinstance(value, DEFINITIONS) else name.startswith("__")
            if hidden or name in ("_abc_impl", "_is_protocol"):
                continue
            if foreign and isinstance(value, types.FunctionType):
                snapshot.parts.append(value)  # of an installed class not the insides of its methods
                snapshot.mentioned.update(n for n in global_names(value.__code__) if n not in BY_STRING)
            elif chosen is None or name in chosen:
                snapshot.parts.append(name)
                snapshot.visit(value, depth + 1, f"<{base.__name__}>.{name}")
            else:
                code = getattr(value, "__code__", None)
                snapshot.parts += (name, type(value), code)


DEFINITIONS = (types.FunctionType, property, staticmethod, classmethod, functools.cached_property)


def _type(snapshot: GuardSnapshot, cls: type, depth: int) -> None:
    snapshot.parts.append(cls)
    snapshot.seen.pop(id(cls), None)
    if cls.__module__ not in ("builtins", "typing"):
        _class(snapshot, cls, depth)


Visitor = Callable[[GuardSnapshot, Any, int], None]
VISITORS: dict[type, Visitor] = {}


def _visitor_for(kind: type) -> Visitor:
    """How things of a kind are looked at."""
    if kind.__module__.startswith("numpy"):
        if hasattr(kind, "tobytes") and hasattr(kind, "shape"):
            return _array
        if hasattr(kind, "standard_normal"):
            return _generator
    families: list[tuple[Any, Visitor]] = [
        (torch.Tensor, _tensor),
        (nn.Module, _module),
        (Enum, _member),
        ((PurePath, Missing), _atom),
        ((int, float, complex, str, bytes), _number),
        ((bytearray, array.array), _bytes),
        ((dict, types.MappingProxyType), _mapping),
        ((list, tuple, deque), _sequence),
        ((set, frozenset), _set),
        (types.FunctionType, _function),
        (types.MethodType, _method),
        ((types.BuiltinFunctionType, types.MethodWrapperType), _builtin),
        (functools.partial, _partial),
        ((property, staticmethod, classmethod, functools.cached_property), _descriptor),
        (slice, _slice),
        (types.ModuleType, _python_module),
        (random.Random, _generator),
        (functools._lru_cache_wrapper, _cached),
        (threading.local, _thread_local),
        (weakref.ref, _reference),
        (weakref.ProxyTypes, _proxy),
        (ContextVar, _variable),
        (type, _type),
    ]
    for classes, visitor in families:
        if issubclass(kind, classes):
            return visitor
    if kind.__module__ == "numpy" or kind.__module__.startswith(("torch._", "torch.fx")):
        return _identity
    passing = issubclass(kind, Iterator) and kind.__module__ in ("builtins", "itertools")
    return _volatile if passing or kind.__module__.startswith(SHARED) else _object
