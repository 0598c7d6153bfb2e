"""Budgets: text to bytes, and the memory that is free."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(budget: int | str, name: str = "budget") -> int:
    """Bytes from a number or text like "8 GB" (10^9) or "7.5 GiB" (2^30); ValueError or TypeError with the name of
    what it is the number of otherwise."""
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", budget)
        if match is None or match[2].upper() not in UNITS:
            raise ValueError(f"{name} {budget!r} is not a number of bytes; write for example '8 GB' or 8_000_000_000")
        budget = int(float(match[1]) * UNITS[match[2].upper()])
    if not isinstance(budget, (int, float)):
        raise TypeError(f"{name} is a number of bytes, or text such as '8 GB'; got {budget!r}")
    if isinstance(budget, bool) or not 0 < budget < float("inf"):
        raise ValueError(f"{name} {budget!r} must be a positive number of bytes")
    return int(budget)


def host_bytes(root: Path = Path("/")) -> int:
    """Bytes of the host's memory that are free now: what the machine has available, or what the container's limits
    leave, whichever is less. ``root`` holds /proc."""
    return max(1, min([_available(root), *_left(root)]))


def _available(root: Path) -> int:
    found = _numbers(root / "proc/meminfo").get("MemAvailable:")
    return (
        8 * 10**9 if found is None else found * 1024
    )  # no way to ask: a modest guess, and plans print what they need


# Control groups: of version 1 (a hierarchy for memory alone) and 2 (one for all) ------------------------------------

LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
USED = ("memory.current", "memory.usage_in_bytes")
PAGES = ("inactive_file", "active_file")  # of files, which the system takes back before a limit is felt


def _left(root: Path) -> Iterator[int]:
    """What each limit leaves on the group of this process, and on those that it lies in."""
    for group in _groups(root):
        limits = [n for name in LIMITS if (n := _number(group / name)) is not None]
        used = next((n for name in USED if (n := _number(group / name)) is not None), None)
        if limits and used is not None:
            stat = _numbers(group / "memory.stat")
            pages = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in PAGES)  # version 1 has both
            yield min(limits) - max(0, used - pages)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of the groups, from this process's own to the highest that is mounted here."""
    own = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            own["cgroup" if controllers else "cgroup2"] = path
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in own:
            continue
        if kind[0] == "cgroup" and "memory" not in kind[2].split(","):
            continue
        mounted, top = own[kind[0]], PurePosixPath(fields[3])
        below = PurePosixPath(mounted).relative_to(top) if PurePosixPath(mounted).is_relative_to(top) else None
        # A container may see its own group as the highest, under the name that it has outside.
        parts = () if below is None or ".." in below.parts else below.parts
        at = root / fields[4].lstrip("/")
        for n in range(len(parts), -1, -1):
            yield at.joinpath(*parts[:n])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []


def _number(path: Path) -> int | None:
    """None where there is no such file, or it says "max": no limit."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _numbers(path: Path) -> dict[str, int]:
    """Names and numbers, one of each a line."""
    fields = (line.split() for line in _lines(path))
    return {f[0]: int(f[1]) for f in fields if len(f) > 1 and f[1].isdecimal()}


def host_cores() -> int:
    """Those that this process may run on, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
