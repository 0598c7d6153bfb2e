"""What is measured of this machine once, and kept for other processes, in which what follows from it is the same."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

from fullframe.codegen.toolchain import kept_files
from fullframe.storage import disk_rate as disks

LASTS = 30 * 86400  # seconds, after which it is measured again


def disk_rate(folder: Path) -> int:
    """Million bytes a second that the disk of a folder moves: as the environment says, or as it was measured. Raises
    `ValueError` where the environment says no number."""
    told = disks.told()
    return _rate(folder, os.stat(folder).st_dev) if told is None else told


@cache
def _rate(folder: Path, disk: int) -> int:
    """The rate of a disk by the system's number of it, seen from a folder there."""
    size = shutil.disk_usage(folder).total
    return int(once(f"disk {disk} of {size} bytes", lambda: disks.measured(folder)))


def once(name: str, measure: Callable[[], float]) -> float:
    """What a measurement gave when it was last made here, if that is not too long ago, else what it gives now."""
    path = _path(name)
    content = kept_files.kept(path)
    with suppress(OSError, ValueError):
        if content is not None and time.time() - path.stat().st_mtime < LASTS:
            return float(json.loads(content))
    made = measure()
    with suppress(OSError):  # a disk that is full, say: it is measured again next time
        kept_files.keep(json.dumps(made).encode(), path)
    return made


def _path(name: str) -> Path:
    """The file of a measurement: a folder may be another machine's, too."""
    return kept_files.directory() / f"{sha256(f'{platform.node()} {name}'.encode()).hexdigest()}.measure"
