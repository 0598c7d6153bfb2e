"""What is kept on disk for other processes of the same user: compiled kernels, and plans.

A file ends with the SHA-256 of what precedes it, so that a damaged one is seen before it is used. It is written under
a temporary name and then moved, so that other processes see all of it or nothing.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def directory() -> Path:
    """The folder of what is kept: the user's, private, in their cache, else in the temporary folder; else one for
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
