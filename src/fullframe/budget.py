"""Budgets: text to bytes, and the memory that is free."""

from __future__ import annotations

import re
from pathlib import Path

import torch

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(budget: int | str) -> int:
    """Bytes from a number or text like "8 GB" (10^9) or "7.5 GiB" (2^30); ValueError otherwise."""
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", budget)
        if match is None or match[2].upper() not in UNITS:
            raise ValueError(f"budget {budget!r} is not a number of bytes; write for example '8 GB' or 8_000_000_000")
        budget = int(float(match[1]) * UNITS[match[2].upper()])
    if isinstance(budget, bool) or not 0 < budget < float("inf"):
        raise ValueError(f"budget {budget!r} must be a positive number of bytes")
    return int(budget)


def free_bytes(device: torch.device) -> int:
    """Bytes free on a device now: on the CPU the machine's available memory or what the container's
    limit leaves, whichever is less; on a CUDA device what torch's allocator holds unused counts as free."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    found = [_available()]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such controller, or "max": no limit
    return max(1, min(found))


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 * 10**9  # no way to ask: a modest guess, and plans print what they need
