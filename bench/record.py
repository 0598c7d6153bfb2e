"""What every benchmark says of its run: date, commit, hardware; and where it leaves its table."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

# Variables that limit the instruction set: of kernels of ours, oneDNN's, ATen's and MKL's.
LIMITS = ("FULLFRAME_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
RESULTS = Path(__file__).parent / "results"


def setting() -> str:
    """One line: date, commit, processor, cores, torch."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "../src"], cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()
    cores = torch.get_num_threads()
    state = f"{commit or 'no commit'}{' with changes' if changed else ''}"
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)]
    said = [
        str(date.today()),
        f"commit {state}",
        processor(),
        f"{cores} cores",
        f"torch {torch.__version__}",
        *limits,
    ]
    return ", ".join(said)


def processor() -> str:
    """The processor's name and the vector instructions that matter to us."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in found.get("flags", "").split()]
    family = f"family {found.get('cpu family', '?')} model {found.get('model', '?')}"
    return f"{found.get('model name', 'unknown processor')} ({family}, {' '.join(flags)})"


def write(name: str, text: str) -> None:
    """Print a result and keep it under bench/results."""
    print(text, flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text + "\n")
