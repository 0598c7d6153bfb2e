"""Whose code it is, the user's or an installed package's, and which names it reads."""

from __future__ import annotations

import dis
import functools
import os
import sys
import sysconfig
import types
from collections.abc import Iterable
from pathlib import Path

INSTALLED = tuple({sysconfig.get_paths()[k] for k in ("purelib", "platlib", "stdlib", "platstdlib")})
INSTALLED += (str(Path(__file__).parents[1]),)
BY_STRING = frozenset(("getattr", "hasattr", "globals", "vars", "eval", "exec", "attrgetter", "__dict__"))
ENVIRONMENT = frozenset(("environ", "getenv", "environb", "getenvb"))
ANY_GLOBAL = frozenset(("globals", "eval", "exec"))


def environment(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """The environment's variables, for code with these names if it may read them."""
    return () if ENVIRONMENT.isdisjoint(names) else tuple(os.environ.items())


def imported(name: str, package: str) -> types.ModuleType | None:
    """The module that a function of this package imports by this name, in full or from where it is."""
    while name not in sys.modules and package and f"{package}.{name}" not in sys.modules:
        package = package.rpartition(".")[0]
    return sys.modules.get(name) or sys.modules.get(f"{package}.{name}")


def foreign(module: types.ModuleType | None) -> bool:
    """Whether a module belongs to Python or an installed package; what no file tells of is the user's."""
    if module is None:
        return False
    file = getattr(module, "__file__", None)
    if file is None:
        where = next(iter(getattr(module, "__path__", ())), "")
        name = getattr(module, "__name__", "").partition(".")[0]
        return installed(where) if where else name in sys.stdlib_module_names and name != "__main__"
    return installed(file)


def foreign_class(cls: type) -> bool:
    """Whether a class belongs to Python or an installed package."""
    return foreign(sys.modules.get(cls.__module__))


@functools.lru_cache(maxsize=4096)
def installed(filename: str) -> bool:
    """Whether a file belongs to Python or an installed package."""
    return filename.startswith(("<frozen", *INSTALLED)) or filename == ""


@functools.lru_cache(maxsize=4096)
def looked_up(code: types.CodeType) -> frozenset[str]:
    """Names that code, with the functions defined in it, looks up as globals; attributes are none."""
    found = {i.argval for i in dis.get_instructions(code) if "GLOBAL" in i.opname or i.opname.endswith("_NAME")}
    inner = (looked_up(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return frozenset(found).union(*inner)


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
