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
from typing import Any

from fullframe.torch_compat import pytree

# Packages that keep no tensors by size, and are large.
PASSED = frozenset(("torch", "numpy", "sympy", "mpmath", "fullframe", *sys.stdlib_module_names)) - {"__main__"}


KINDS = (dict, OrderedDict, defaultdict, list)  # others may do something when they are looked through


@contextmanager
def unspoilt(recorded: Callable[[Any], bool]) -> Iterator[None]:
    """Inside, caches may be filled; afterwards they hold nothing new of which a part is ``recorded``."""
    spaces = list(_spaces())
    before = [dict(s) if isinstance(s, dict) else list(s) for s in spaces]
    sizes = [(f, f.cache_info().currsize) for s in spaces for f in _values(s) if type(f) is _lru_cache_wrapper]
    try:
        yield
    finally:
        for space, old in zip(spaces, before, strict=True):
            _put_back(space, old, recorded)
        for function, size in sizes:
            if function.cache_info().currsize != size:
                function.cache_clear()


def _spaces() -> Iterator[Any]:
    """The globals of modules, and the dictionaries and lists among them."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in PASSED and hasattr(module, "__dict__"):
            yield vars(module)
            yield from (v for k, v in list(vars(module).items()) if type(v) in KINDS and k != "__builtins__")


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
