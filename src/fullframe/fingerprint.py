"""What a recording reads of a module besides the numbers in its tensors.

A stale recording is a silent wrong number, so everything a forward could look at goes in: flags,
attributes, hooks and structure of modules; plain objects, containers, functions with their
closures, defaults and the globals they name; class attributes. Tensors go in by shape, dtype,
device, strides and requires_grad, and are listed, so that their numbers are read afresh each step.

Iterators and memory shared with other processes cannot be looked at without changing them or in
time: with one of them in reach every call is recorded anew. Generators of random numbers are listed,
so that a recording that drew from one can be refused.

Not seen: files, the environment, the clock, the insides of compiled extensions, globals that
installed packages read, and what lies more than DEPTH objects away from a module.
"""

from __future__ import annotations

import array
import functools
import random
import sys
import sysconfig
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

# Tensors that a tiled step has put where its forward left them; True: PyTorch's would have a graph, these have none.
# The next call's key has their shape and such apart (`Survey.details`), for few recordings read them.
LEFT = WeakIdKeyDictionary()
DEPTH = 8  # objects, containers and functions away from the nearest module
ATOMS = frozenset(
    (int, str, bool, bytes, complex, type(None), type(...), range, types.CodeType,
     torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout)
)  # fmt: skip
# Of a module's own dictionary: what never changes a forward, and what need not be looked at while empty.
IGNORED = frozenset(
    ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
     "_non_persistent_buffers_set")
)  # fmt: skip
OFTEN_EMPTY = frozenset(
    ("_parameters", "_buffers", "_modules", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
     "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
     "_forward_pre_hooks_with_kwargs")
)  # fmt: skip
INSTALLED = tuple({sysconfig.get_paths()[k] for k in ("purelib", "platlib", "stdlib", "platstdlib")})
INSTALLED += (str(Path(__file__).parent),)
OPAQUE = frozenset(("logging", "threading", "_thread", "io", "_io"))
# Others change it, or taking from it does.
SHARED = ("_queue", "multiprocessing.sharedctypes", "multiprocessing.managers", "ctypes", "_ctypes", "mmap")
BY_STRING = frozenset(("getattr", "hasattr", "globals", "vars", "eval", "exec", "attrgetter", "__dict__"))
ANY_GLOBAL = frozenset(("globals", "eval", "exec"))
SILENT = frozenset(("__init_subclass__", "__repr__", "__str__", "__reduce__", "__reduce_ex__", "__getstate__",
                    "__setstate__", "__del__", "__class_getitem__", "__subclasshook__"))  # fmt: skip


class Same:
    """Stands for an object in a key: equal only to itself, and keeps it alive."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any):
        self.thing = thing

    def __hash__(self) -> int:
        return id(self.thing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing


class Survey:
    """One look at everything reachable from some roots.

    ``key`` is hashable: equal keys may share a recording. ``tensors`` are those met, each once, in
    an order that equal keys share.
    """

    def __init__(self, roots: Iterable[Any]):
        self.parts: list[Any] = []
        self.tensors: list[torch.Tensor] = []
        self.seen: dict[int, int] = {}
        self.holders: list[Any] = []  # objects with attributes of their own, in the order met
        self.containers: list[Any] = []  # dicts, lists and deques
        self.sets: list[Any] = []
        self.cells: list[Any] = []  # variables of closures
        self.scopes: list[tuple[dict[str, Any], Iterable[str] | None]] = []  # globals, and which of their names
        self.classes: list[type] = []  # other than torch's
        self.left: list[torch.Tensor] = []  # of the tensors those in `LEFT`
        self.details: list[Any] = []  # what the key does not have of them
        self.generators: list[Any] = []  # of random numbers
        self.caches: list[Any] = []  # functions that keep what they returned
        self.lasting = True  # False where something cannot be looked at
        for root in roots:
            self.visit(root, 0)
        self.key = tuple(self.parts)

    def visit(self, thing: Any, depth: int) -> None:
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
        look = LOOKS.get(kind)
        if look is None:
            look = LOOKS[kind] = _look_for(kind)
        look(self, thing, depth)


def _tensor(survey: Survey, tensor: torch.Tensor, depth: int) -> None:
    strided = tensor.layout is torch.strided
    details = (
        tensor.shape, tensor.dtype, tensor.device, tensor.stride() if strided else tensor.layout,
        tensor.requires_grad,
    )  # fmt: skip
    if tensor in LEFT:
        survey.parts.append("left")
        survey.details += (*details, LEFT[tensor])
        survey.left.append(tensor)
    else:
        survey.parts += details
    survey.tensors.append(tensor)
    if vars(tensor) and not type(tensor).__module__.startswith("torch._"):
        _mapping(survey, vars(tensor), depth)


def _module(survey: Survey, module: nn.Module, depth: int) -> None:
    parts = survey.parts
    survey.holders.append(module)
    for name, value in module.__dict__.items():
        if name in IGNORED or (name in OFTEN_EMPTY and not value):
            continue
        if name == "_fullframe":  # a tiled module inside another: what it wraps, not its recordings
            value = value["pair"]
        parts.append(name)
        survey.visit(value, 0)
    parts.append("end")
    _class(survey, type(module), 0)


def _object(survey: Survey, thing: Any, depth: int) -> None:
    fields = _fields(thing)
    if fields is None or str(type(thing).__module__).partition(".")[0] in OPAQUE:
        survey.parts.append(Same(thing))
        return
    survey.holders.append(thing)
    for name, value in fields.items():
        survey.parts.append(name)
        survey.visit(value, depth + 1)
    survey.parts.append("end")
    _class(survey, type(thing), depth)


def _fields(thing: Any) -> dict[str, Any] | None:
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


def _mapping(survey: Survey, mapping: Any, depth: int) -> None:
    survey.parts.append(len(mapping))
    survey.containers += [mapping] if isinstance(mapping, dict) else []
    for key, value in mapping.items():
        survey.visit(key, depth + 1)
        survey.visit(value, depth + 1)
    _derived(survey, mapping, depth)


def _sequence(survey: Survey, sequence: Any, depth: int) -> None:
    survey.parts.append(len(sequence))
    survey.containers += [sequence] if isinstance(sequence, (list, deque)) else []
    for value in sequence:
        survey.visit(value, depth + 1)
    _derived(survey, sequence, depth)


def _set(survey: Survey, things: Any, depth: int) -> None:
    survey.parts.append(len(things))
    survey.sets.append(things)
    for value in sorted(things, key=repr):
        survey.visit(value, depth + 1)
    _derived(survey, things, depth)


def _derived(survey: Survey, thing: Any, depth: int) -> None:
    """What a kind of container or number has beyond the built-in one."""
    kind = type(thing)
    for name, value in (_fields(thing) or {}).items():
        survey.parts.append(name)
        survey.visit(value, depth + 1)
    if kind.__module__ not in ("builtins", "collections"):
        _class(survey, kind, depth)


def _number(survey: Survey, number: Any, depth: int) -> None:
    plain: Any = next(kind for kind in (float, int, complex, bytes, str) if isinstance(number, kind))
    survey.parts.append(plain.__repr__(number))
    _derived(survey, number, depth)


def _bytes(survey: Survey, thing: Any, depth: int) -> None:
    survey.parts.append(bytes(thing))
    _derived(survey, thing, depth)


def _volatile(survey: Survey, thing: Any, depth: int) -> None:
    survey.parts.append(Same(thing))
    survey.lasting = False


def _generator(survey: Survey, thing: Any, depth: int) -> None:
    survey.parts.append(Same(thing))
    survey.generators.append(thing)
    if type(thing).__module__ != "random":
        _derived(survey, thing, depth)


def _cached(survey: Survey, function: Any, depth: int) -> None:
    survey.caches.append(function)
    survey.visit(function.__wrapped__, depth)


def _reference(survey: Survey, reference: Any, depth: int) -> None:
    survey.visit(reference(), depth + 1)


def _proxy(survey: Survey, proxy: Any, depth: int) -> None:
    survey.visit(proxy.__repr__.__self__, depth + 1)


def _thread_local(survey: Survey, thing: threading.local, depth: int) -> None:
    survey.visit(dict(vars(thing)), depth + 1)


def _variable(survey: Survey, variable: ContextVar[Any], depth: int) -> None:
    survey.visit(variable.get(None), depth + 1)


def _python_module(survey: Survey, module: types.ModuleType, depth: int) -> None:
    """The values in a module of the user's, such as a configuration, and in the modules in it."""
    survey.parts.append(Same(module))
    if not _foreign(module):
        survey.scopes.append((vars(module), None))
        for name, value in list(vars(module).items()):
            if not name.startswith("__"):
                survey.parts.append(name)
                survey.visit(value, depth + 1)


def _slice(survey: Survey, thing: slice, depth: int) -> None:
    _sequence(survey, (thing.start, thing.stop, thing.step), depth)


def _method(survey: Survey, method: types.MethodType, depth: int) -> None:
    survey.visit(method.__func__, depth)
    survey.visit(method.__self__, depth)


def _builtin(survey: Survey, function: Any, depth: int) -> None:
    """A function of C's, with what it is bound to."""
    owner = function.__self__
    if owner is None or isinstance(owner, (types.ModuleType, type)) or type(owner).__module__.startswith("torch._C"):
        survey.parts.append(function)
    else:
        survey.parts.append(function.__name__)
        survey.visit(owner, depth + 1)


def _partial(survey: Survey, call: functools.partial[Any], depth: int) -> None:
    for part in (call.func, call.args, call.keywords, vars(call)):
        survey.visit(part, depth + 1)


def _array(survey: Survey, array: Any, depth: int) -> None:
    survey.parts += (array.shape, str(array.dtype))
    if array.dtype == object:
        _sequence(survey, array.ravel().tolist(), depth)
    else:
        survey.parts.append(array.tobytes())


def _member(survey: Survey, member: Enum, depth: int) -> None:
    survey.parts.append(member)
    for name, value in vars(member).items():
        if not name.startswith("_"):
            survey.parts.append(name)
            survey.visit(value, depth + 1)


def _atom(survey: Survey, thing: Any, depth: int) -> None:
    survey.parts.append(thing)


def _identity(survey: Survey, thing: Any, depth: int) -> None:
    survey.parts.append(Same(thing))


def _descriptor(survey: Survey, thing: Any, depth: int) -> None:
    for name in ("fget", "__func__", "func"):
        if hasattr(thing, name):
            survey.visit(getattr(thing, name), depth)


def _function(survey: Survey, function: types.FunctionType, depth: int) -> None:
    """Code, defaults and closure; for code that is not an installed package's also the globals it names."""
    code = function.__code__
    survey.parts.append(code)
    for value in (function.__defaults__, function.__kwdefaults__, function.__dict__ or None):
        if value is not None:
            survey.visit(value, depth + 1)
    for cell in function.__closure__ or ():
        survey.cells.append(cell)
        try:
            survey.visit(cell.cell_contents, depth + 1)
        except ValueError:
            survey.parts.append("empty")
    if not _installed(code.co_filename):
        space = function.__globals__
        names = global_names(code)
        if not ANY_GLOBAL.isdisjoint(names):
            names += tuple(n for n in space if not n.startswith("__"))
        survey.scopes.append((space, names))
        met: set[int] = set()
        for name in names:
            if name in space:
                _global(survey, name, space[name], names, met, depth)
            elif (module := _imported(name, space.get("__package__") or "")) is not None:
                _global(survey, name, module, names, met, depth)


def _imported(name: str, package: str) -> Any:
    """The module that a function of this package imports by this name, in full or from where it is."""
    while name not in sys.modules and package and f"{package}.{name}" not in sys.modules:
        package = package.rpartition(".")[0]
    return sys.modules.get(name) or sys.modules.get(f"{package}.{name}")


def _global(survey: Survey, name: str, value: Any, names: Iterable[str], met: set[int], depth: int) -> None:
    """A global; of a module, what in it has one of the names, all of it where code may look up any name."""
    survey.parts.append(name)
    if not isinstance(value, types.ModuleType) or not BY_STRING.isdisjoint(names):
        survey.visit(value, depth + 1)
    elif id(value) not in met and not _foreign(value):
        met.add(id(value))
        survey.scopes.append((vars(value), names))
        for inner in names:
            if inner in vars(value):
                _global(survey, inner, vars(value)[inner], names, met, depth + 1)


def _class(survey: Survey, cls: type, depth: int) -> None:
    """Attributes and methods of a class and its bases, once per survey."""
    if id(cls) in survey.seen:
        return
    survey.seen[id(cls)] = len(survey.seen)
    if type(cls) is not type:
        _class(survey, type(cls), depth)
    for base in cls.__mro__:
        if base is object or (base is not cls and id(base) in survey.seen):
            continue
        survey.seen.setdefault(id(base), len(survey.seen))
        if str(base.__module__).partition(".")[0] in ("torch", "builtins", *OPAQUE):
            survey.parts += (base, Same(vars(base).get("forward")))  # a replaced forward still shows
            continue
        survey.classes.append(base)
        if _foreign(sys.modules.get(base.__module__)):
            # An installed class: what it holds, but not the insides of its methods.
            survey.parts += [v if isinstance(v, types.FunctionType) else k for k, v in vars(base).items()]
            values: Iterable[tuple[str, Any]] = (
                (k, v) for k, v in vars(base).items() if not isinstance(v, types.FunctionType)
            )
        else:
            values = vars(base).items()
        for name, value in values:
            hidden = name in SILENT if isinstance(value, DEFINITIONS) else name.startswith("__")
            if not hidden and name not in ("_abc_impl", "_is_protocol"):
                survey.parts.append(name)
                survey.visit(value, depth + 1)


DEFINITIONS = (types.FunctionType, property, staticmethod, classmethod, functools.cached_property)


def _type(survey: Survey, cls: type, depth: int) -> None:
    survey.parts.append(cls)
    survey.seen.pop(id(cls), None)
    if cls.__module__ not in ("builtins", "typing"):
        _class(survey, cls, depth)


def _foreign(module: types.ModuleType | None) -> bool:
    """Whether a module belongs to Python or an installed package; what no file tells of is the user's."""
    if module is None:
        return False
    file = getattr(module, "__file__", None)
    if file is None:
        where = next(iter(getattr(module, "__path__", ())), "")
        name = getattr(module, "__name__", "").partition(".")[0]
        return _installed(where) if where else name in sys.stdlib_module_names and name != "__main__"
    return _installed(file)


@functools.lru_cache(maxsize=4096)
def _installed(filename: str) -> bool:
    """Whether a file belongs to Python or an installed package."""
    return filename.startswith(("<frozen", *INSTALLED)) or filename == ""


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names that code, with the functions defined in it, may read as globals or get as attributes by a string."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(global_names(constant)))
        elif isinstance(constant, str) and constant.isidentifier() and not BY_STRING.isdisjoint(code.co_names):
            names[constant] = None
    return tuple(names)


def state_of(generator: Any) -> Any:
    """What numbers a generator of Python's or NumPy's will give next."""
    if isinstance(generator, random.SystemRandom):
        return None
    if isinstance(generator, random.Random):
        return generator.getstate()
    inner = getattr(generator, "bit_generator", None)
    return repr(generator.get_state(legacy=False) if inner is None else inner.state)


Look = Callable[[Survey, Any, int], None]
LOOKS: dict[type, Look] = {}


def _look_for(kind: type) -> Look:
    """How things of a kind are looked at."""
    if kind.__module__.startswith("numpy"):
        if hasattr(kind, "tobytes") and hasattr(kind, "shape"):
            return _array
        if hasattr(kind, "standard_normal"):
            return _generator
    families: list[tuple[Any, Look]] = [
        (torch.Tensor, _tensor),
        (nn.Module, _module),
        (Enum, _member),
        (PurePath, _atom),
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
    for classes, look in families:
        if issubclass(kind, classes):
            return look
    if kind.__module__.startswith(("torch._", "torch.fx")):
        return _identity
    if kind.__module__ == "numpy":
        return _identity
    passing = issubclass(kind, Iterator) and kind.__module__ in ("builtins", "itertools")
    return _volatile if passing or kind.__module__.startswith(SHARED) else _object
