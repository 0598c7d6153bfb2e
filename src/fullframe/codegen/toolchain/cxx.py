"""From C++ source to a loaded function: finding a compiler, compiling into a private folder, loading."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fullframe.codegen.toolchain import kept_files

# Every node is rounded as PyTorch rounds it, so multiplications and additions are not contracted; NaN,
# infinities and signed zeros keep their meaning. Only errno and floating-point traps are given up.
ROUNDING = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
FLAGS = ("-std=gnu++17", "-O2", *ROUNDING, "-shared", "-fPIC")
# Of GCC, the vectorising parts of -O3; the rest of it doubles the time to compile and gains nothing here. Clang,
# which does not know these flags, vectorises at -O2.
GCC = ("-ftree-vectorize", "-fvect-cost-model=dynamic", "-fpeel-loops")
# The instruction set, as `-march` names it; for tests and measurements, as oneDNN's and ATen's own variables are.
VARIABLE = "FULLFRAME_CPU_ISA"
ZIG = ("-m", "ziglang", "c++")  # arguments of Python
WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
ARM = platform.machine() in ("aarch64", "arm64")
_SECONDS = 900  # zig makes its C++ library first, which once takes minutes


class BuildError(Exception):
    """No compiler, or it could not make a library of the source."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command that starts it, its flags, and all it predefines (version, instruction sets)."""

    command: tuple[str, ...]
    flags: tuple[str, ...]
    identity: str

    @property
    def name(self) -> str:
        """As people call it."""
        return "zig c++" if _is_zig(self.command) else Path(self.command[0]).name

    @property
    def version(self) -> str:
        """Its own words for its version, as it predefines them."""
        found = re.search(r'^#define __VERSION__ "(.*)"$', self.identity, re.MULTILINE)
        return found[1] if found else ""


@cache
def find() -> Compiler:
    """The compiler of this machine, for the instruction set that the environment names, else for this processor's.

    Raises BuildError when there is none that works, and ValueError for an instruction set that it does not know, or
    that this processor does not have.
    """
    here = for_isa("native")
    wanted = os.environ.get(VARIABLE) or "native"
    if wanted == "native":
        return here
    try:
        other = for_isa(wanted)
    except BuildError as error:
        raise ValueError(f"{VARIABLE}={wanted}: {here.name} knows no such instruction set") from error
    missing = sorted(_features(other) - _features(here))
    if missing:
        raise ValueError(f"{VARIABLE}={wanted}: this processor has no {', '.join(missing)}")
    return other


def for_isa(name: str) -> Compiler:
    """The first compiler that makes kernels for an instruction set. Raises BuildError when there is none."""
    refused = []
    for command in commands():
        bare = _predefined(command, ())
        if bare is None:
            refused.append(" ".join(command))
            continue
        family = () if "#define __clang__ " in bare else GCC
        wanted = name.replace("-", "_") if _is_zig(command) else name
        # On ARM older ones know the second alone; elsewhere it means to tune, and would be taken for any name.
        for march in (f"-march={wanted}", f"-mcpu={wanted}")[: 2 if ARM else 1]:
            for wide in (WIDE, ()):
                flags = (*FLAGS, *family, march, *wide)
                identity = _predefined(command, flags)
                if identity is not None:
                    return Compiler(command, flags, identity)
        refused.append(" ".join(command))
    found = f"; none of these makes code for {name}: {', '.join(refused)}" if refused else ""
    raise BuildError(
        f"no C++ compiler found (g++, c++ or clang++ on the path, or `pip install fullframe[compiler]`){found}"
    )


def commands() -> list[tuple[str, ...]]:
    """The commands that may start a compiler, the preferred first: those on the path, then Python's own package of
    one, which the extra ``compiler`` installs."""
    found: list[tuple[str, ...]] = [(path,) for path in map(shutil.which, ("g++", "c++", "clang++")) if path]
    if find_spec("ziglang") is not None and sys.executable:
        found.append((sys.executable, *ZIG))
    return found


def _is_zig(command: tuple[str, ...]) -> bool:
    return command[1:] == ZIG


def _predefined(command: tuple[str, ...], flags: tuple[str, ...]) -> str | None:
    """What a compiler predefines with these flags; None where it refuses them."""
    asking = [*command, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    try:
        asked = subprocess.run(asking, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout if asked.returncode == 0 else None


def _features(compiler: Compiler) -> set[str]:
    """The instructions that the compiler may use, as it predefines them: ``__AVX2__``."""
    return set(re.findall(r"^#define __([A-Z][A-Z0-9_]*?)__ 1$", compiler.identity, re.MULTILINE))


def isa() -> str:
    """In words, for reports: which compiler makes the kernels, for which instruction set."""
    try:
        found = find()
    except BuildError as error:
        return str(error)
    [march] = [flag for flag in found.flags if flag.startswith(("-march=", "-mcpu="))]
    return f"{found.name} {march}"


def described() -> str:
    """As `isa`, with the compiler's version, or why there is none."""
    words = isa()
    try:
        return f"{words}, version {find().version}"
    except BuildError:
        return words


def load(source: str, entry: str) -> Callable[..., int]:
    """The function `entry` of the compiled source, from the cache or built now. Raises BuildError."""
    compiler = find()
    key = hashlib.sha256("\0".join((source, *compiler.flags, compiler.identity)).encode()).hexdigest()
    path = kept_files.directory() / f"{key}.so"
    if kept_files.kept(path) is None:
        _build(compiler, source, path)
    try:
        return getattr(ctypes.CDLL(str(path)), entry)
    except (OSError, AttributeError) as error:
        raise BuildError(f"the compiled kernel cannot be loaded: {error}") from error


def _build(compiler: Compiler, source: str, path: Path) -> None:
    """Compile to a temporary name, seal, move into place."""
    handle, name = tempfile.mkstemp(prefix="build-", suffix=".so", dir=path.parent)
    os.close(handle)
    made = Path(name)
    try:
        done = subprocess.run(
            [*compiler.command, *compiler.flags, "-x", "c++", "-", "-o", name],
            input=source, capture_output=True, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode:
            raise BuildError(f"{compiler.name} failed: {done.stderr.strip()[:2000]}")
        kept_files.keep(made.read_bytes(), path)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the kernel could not be compiled: {error}") from error
    finally:
        made.unlink(missing_ok=True)
