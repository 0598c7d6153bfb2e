"""``python -m fullframe``: what a report of a fault needs to say of this machine."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

import torch

import fullframe
from fullframe import torch_compat
from fullframe.budget import host_bytes, host_cores
from fullframe.codegen.toolchain import cxx, kept_files
from fullframe.storage.unnamed_file import disk_folder


def facts() -> dict[str, str]:
    """Versions, processor, compiler, threads, memory and devices, each in a few words."""
    return {
        "fullframe": fullframe.__version__,
        "Python": f"{platform.python_version()} ({platform.platform()})",
        "torch": f"{torch.__version__}, instructions {torch.backends.cpu.get_cpu_capability()}",
        "processor": _processor(),
        "compiler": cxx.described(),
        "kernels in": str(kept_files.directory()),
        "missing in torch": ", ".join(torch_compat.missing()) or "nothing",
        "threads": f"{torch.get_num_threads()} of torch, {host_cores()} cores for this process",
        "memory": f"{host_bytes() / 1e9:.2f} GB free, with what the container's limits leave; {_limits()}",
        "maps on disk": _disk(),
        "CUDA devices": ", ".join(map(_device, range(torch.cuda.device_count()))) or "none",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _limits() -> str:
    """The limits of this process on memory that a step may meet."""
    try:
        import resource
    except ImportError:
        return "limits unknown"
    kinds = {"address space": resource.RLIMIT_AS, "locked": resource.RLIMIT_MEMLOCK}
    found = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    words = {k: "unlimited" if n == resource.RLIM_INFINITY else f"{n / 1e9:.2f} GB" for k, n in found.items()}
    return ", ".join(f"{name} {text}" for name, text in words.items())


def _disk() -> str:
    """Where maps lie on disk unless a folder is named, and how much room there is."""
    try:
        folder = disk_folder(None)
    except (OSError, ValueError) as error:
        return str(error)
    return f"in {folder}, {shutil.disk_usage(folder).free / 1e9:.2f} GB free, unless folder= names another"


def _device(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name} ({found.total_memory / 1e9:.1f} GB)"


def main() -> None:
    """Print the facts, one a line."""
    found = facts()
    width = max(map(len, found))
    sys.stdout.writelines(f"{name:<{width}}  {text}\n" for name, text in found.items())


if __name__ == "__main__":
    main()
