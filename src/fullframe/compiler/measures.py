"""What is measured of this machine once, and kept for other processes, in which what follows from it is the same."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F

from fullframe import torch_compat
from fullframe.codegen.toolchain import kept_files
from fullframe.storage import disk_rate as disks

LASTS = 30 * 86400  # seconds, after which it is measured again
VARIABLE = "FULLFRAME_ARITHMETIC_RATE"
CHANNELS, SIDE, TIMES = 32, 256, 32  # of the convolution that is measured
COUNTED = 2  # times the operations of a convolution: those counted for cheap ops take less time, in its shadow


def disk_rate(folder: Path) -> int:
    """Million bytes a second that the disk of a folder moves: as the environment says, or as it was measured. Raises
    `ValueError` where the environment says no number."""
    told = disks.told()
    return _rate(folder, os.stat(folder).st_dev) if told is None else told


@cache
def _rate(folder: Path, disk: int) -> int:
    """The rate of a disk by the system's number of it, seen from a folder there."""
    size = shutil.disk_usage(folder).total
    return int(once(f"rate of disk {disk} of {size} bytes", lambda: disks.measured(folder)))


def arithmetic_rate(dtype: torch.dtype) -> int:
    """Million operations a second, as plans count them, that the processor makes of numbers of a type: as the
    environment says, or as a convolution by torch's threads was measured, to a power of two. Raises `ValueError`
    where the environment says no number."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return disks.number(VARIABLE, given, "million operations a second")
    narrow = dtype == torch.bfloat16 and torch_compat.has_bfloat16()
    dtype = torch.bfloat16 if narrow else torch.float32
    return int(once(f"convolution {dtype} {torch.get_num_threads()}", lambda: _convolution(dtype)))


def _convolution(dtype: torch.dtype) -> float:
    """Million operations a second of a convolution of 3 x 3."""
    x = torch.ones(1, CHANNELS, SIDE, SIDE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(CHANNELS, CHANNELS, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    seconds = []
    with torch.no_grad():
        for _ in range(TIMES):
            start = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            seconds.append(time.perf_counter() - start)
    rate = COUNTED * 2 * 9 * CHANNELS**2 * SIDE**2 / min(seconds) / 1e6
    return 2 ** round(math.log2(rate))


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
