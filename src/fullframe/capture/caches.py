"""Caches in the modules of installed packages, into which a recording must put no tensor of its own.

Grids, windows and positions are kept by size in dictionaries, lists, globals and ``lru_cache``: what a recording has
added to them is taken out again, so that the next plain call makes it.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from operator import is_
from typing import Any, NamedTuple

from fullframe.torch_compat import pytree

# Packages that keep no tensors by size, and are large.
PASSED = frozenset(("torch", "numpy", "sympy", "mpmath", "fullframe", *sys.stdlib_module_names)) - {"__main__"}


KINDS = (dict, OrderedDict, defaultdict, list)  # others may do something when they are looked through


class Known(NamedTuple):
    """What was found among the globals of a module: the names of dictionaries and lists, and of functions with an
    ``lru_cache``; and its globals at the time, in short."""

    globals: int
    spaces: tuple[str, ...]
    functions: tuple[str, ...]


_KNOWN: dict[str, Known] = {}


@contextmanager
def unspoilt(recorded: Callable[[Any], bool]) -> Iterator[None]:
    """Inside, caches may be filled; afterwards they hold nothing new of which a part is ``recorded``."""
    spaces, functions = _spaces()
    before = [dict(s) if isinstance(s, dict) else list(s) for s in spaces]
    sizes = [f.cache_info().currsize for f in functions]
    try:
        yield
    finally:
        for space, old in zip(spaces, before, strict=True):
            if len(space) != len(old) or not _same(space, old):
                _put_back(space, old, recorded)
        for function, size in zip(functions, sizes, strict=True):
            if function.cache_info().currsize != size:
                function.cache_clear()


def _spaces() -> tuple[list[Any], list[Any]]:
    """The globals of modules with the dictionaries and lists among them; and all functions with an ``lru_cache`` that
    any of these holds. A process may have tens of thousands of globals: of a module in which nothing is new only
    names are looked up."""
    spaces: list[Any] = []
    functions: list[Any] = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in PASSED or not hasattr(module, "__dict__"):
            continue
        space = vars(module)
        found, known = hash(tuple(map(id, list(space.values())))), _KNOWN.get(name)
        if known is None or known.globals != found:
            known = _KNOWN[name] = _looked_through(space, found)
        inner = [v for k in known.spaces if type(v := space.get(k)) in KINDS]
        spaces += (space, *inner)
        functions += (f for k in known.functions if type(f := space.get(k)) is _lru_cache_wrapper)
        held = (_values(s) for s in inner)
        functions += (f for values in held if _lru_cache_wrapper in map(type, values) for f in values
                      if type(f) is _lru_cache_wrapper)  # fmt: skip
    return spaces, functions


def _looked_through(space: dict[str, Any], found: int) -> Known:
    items = list(space.items())
    spaces = tuple(k for k, v in items if type(v) in KINDS and k != "__builtins__")
    return Known(found, spaces, tuple(k for k, v in items if type(v) is _lru_cache_wrapper))


def _same(space: Any, old: Any) -> bool:
    """Whether a dictionary holds the very objects that it held, in their order; of a list only the length counts."""
    return isinstance(space, list) or all(map(is_, _values(space), _values(old)))


def _values(space: Any) -> list[Any]:
    return list(space.values() if isinstance(space, dict) else space)


def _put_back(space: Any, old: Any, recorded: Callable[[Any], bool]) -> None:
    def spoilt(value: Any) -> bool:
        return any(recorded(v) for v in pytree.tree_leaves(value))

    if isinstance(space, list):
        if len(space) != len(old) and spoilt(space):
            space[:] = old
        return
    for key in [k for k, v in list(space.items()) if v is not old.get(k, space) and spoilt(v)]:
        if key in old:
            space[key] = old[key]
        else:
            del space[key]
