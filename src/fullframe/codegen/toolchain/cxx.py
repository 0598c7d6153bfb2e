"""From C++ source to a loaded function: finding a compiler, a private cache on disk, loading.

A cached library ends with the SHA-256 of what precedes it, so that a damaged one is seen before it is loaded.
It is written under a temporary name and then moved, so that other processes see all of it or nothing.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# The vectorising parts of -O3; the rest of it doubles the time to compile and gains nothing here.
OPTIMISE = ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-fpeel-loops")
# Every node is rounded as PyTorch rounds it, so multiplications and additions are not contracted; NaN,
# infinities and signed zeros keep their meaning. Only errno and floating-point traps are given up.
FLAGS = (*OPTIMISE, "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# The instruction set, as `-march` names it; for tests and measurements, as oneDNN's and ATen's own variables are.
VARIABLE = "FULLFRAME_CPU_ISA"
WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
_SECONDS = 300


class BuildError(Exception):
    """No compiler, or it could not make a library of the source."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its path, its flags, and all it predefines (version and instruction sets)."""

    path: str
    flags: tuple[str, ...]
    identity: str


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
        raise ValueError(f"{VARIABLE}={wanted}: {here.path} knows no such instruction set") from error
    missing = sorted(_features(other) - _features(here))
    if missing:
        raise ValueError(f"{VARIABLE}={wanted}: this processor has no {', '.join(missing)}")
    return other


def for_isa(name: str) -> Compiler:
    """The first compiler that makes kernels for an instruction set. Raises BuildError when there is none."""
    paths = [path for path in map(shutil.which, ("g++", "c++", "clang++")) if path]
    for path in paths:
        for more in (WIDE, ()):
            flags = (*FLAGS, f"-march={name}", *more)
            command = [path, *flags, "-dM", "-E", "-x", "c++", os.devnull]
            try:
                asked = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
            except (OSError, subprocess.SubprocessError):
                continue
            if asked.returncode == 0:
                return Compiler(path, flags, asked.stdout)
    raise BuildError("no C++ compiler found (g++, c++ or clang++ on the path)")


def _features(compiler: Compiler) -> set[str]:
    """The instructions that the compiler may use, as it predefines them: ``__AVX2__``."""
    return set(re.findall(r"^#define __([A-Z][A-Z0-9_]*?)__ 1$", compiler.identity, re.MULTILINE))


def isa() -> str:
    """In words, for reports: which compiler makes the kernels, for which instruction set."""
    try:
        found = find()
    except BuildError as error:
        return str(error)
    [march] = [flag for flag in found.flags if flag.startswith("-march=")]
    return f"{Path(found.path).name} {march}"


@cache
def directory() -> Path:
    """The folder of compiled kernels: the user's, private, in their cache, else in the temporary folder; else one for
    this process alone, which goes when it ends."""
    root = os.environ.get("XDG_CACHE_HOME") or ""
    temporary = Path(tempfile.gettempdir())
    with suppress(OSError, RuntimeError):
        base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
        base.mkdir(parents=True, exist_ok=True)
        return _private(base / "fullframe", base / "fullframe" / "kernels")
    with suppress(OSError):
        return _private(temporary / f"fullframe-{os.geteuid()}")
    made = Path(tempfile.mkdtemp(prefix="fullframe-"))
    atexit.register(_remove, made, os.getpid())
    return made


def _private(*folders: Path) -> Path:
    """The last of these folders, made where it is not there. Raises OSError where it cannot be written, or others can
    write one of them."""
    for made in folders:
        made.mkdir(mode=0o700, exist_ok=True)
        if not _ours(made.lstat(), stat.S_ISDIR):
            raise PermissionError(f"{made} is open to others")
    with tempfile.TemporaryFile(dir=folders[-1]):
        return folders[-1]


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # and not one that was forked from it
        shutil.rmtree(folder, ignore_errors=True)


def _ours(found: os.stat_result, kind: Callable[[int], bool]) -> bool:
    """Whether nobody else could have written it."""
    return kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def load(source: str, entry: str) -> Callable[..., int]:
    """The function `entry` of the compiled source, from the cache or built now. Raises BuildError."""
    compiler = find()
    key = hashlib.sha256("\0".join((source, *compiler.flags, compiler.identity)).encode()).hexdigest()
    path = directory() / f"{key}.so"
    if kept(path) is None:
        _build(compiler, source, path)
    try:
        return getattr(ctypes.CDLL(str(path)), entry)
    except (OSError, AttributeError) as error:
        raise BuildError(f"the compiled kernel cannot be loaded: {error}") from error


def kept(path: Path) -> bytes | None:
    """What was sealed in a file of ours; None where there is none, or it is damaged or another's."""
    try:
        if not _ours(path.lstat(), stat.S_ISREG):
            return None
        content = path.read_bytes()
    except OSError:
        return None
    whole = len(content) > 32 and hashlib.sha256(content[:-32]).digest() == content[-32:]
    return content[:-32] if whole else None


def keep(content: bytes, path: Path) -> None:
    """Seal it in a file, which other processes see whole or not at all. Raises OSError."""
    handle, name = tempfile.mkstemp(prefix="build-", suffix=path.suffix, dir=path.parent)
    made = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
        made.chmod(0o600)
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)


def _build(compiler: Compiler, source: str, path: Path) -> None:
    """Compile to a temporary name, seal, move into place."""
    handle, name = tempfile.mkstemp(prefix="build-", suffix=".so", dir=path.parent)
    os.close(handle)
    made = Path(name)
    try:
        done = subprocess.run(
            [compiler.path, *compiler.flags, "-x", "c++", "-", "-o", name],
            input=source, capture_output=True, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode:
            raise BuildError(f"{compiler.path} failed: {done.stderr.strip()[:2000]}")
        keep(made.read_bytes(), path)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the kernel could not be compiled: {error}") from error
    finally:
        made.unlink(missing_ok=True)
