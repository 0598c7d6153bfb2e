"""Time and memory of a training step, tiled and in plain PyTorch, in turns, in one run.

    python bench/speed.py [--network uresnet] [--rounds N] [--variants tiled,eager,...] [--bfloat16]

UResNet and a21 at 3 x 640 x 1024 (--halvings 1), a ResNet-50 classifier and MONAI's U-Net at 1024 x 1024 (--size),
batch 1. Every variant has a process of its own, which steps only when it is its turn. Plain PyTorch runs in
channels_last: as it comes, with huge pages for malloc, with every residual block checkpointed, and, on request
(`compile` among the variants; minutes), compiled; `tiled-one-core` is our step on one core. `limit` is the time of
the convolutions alone (see limit.py). Memory is the growth of the resident set at its highest in the first step,
recording and planning included; times are medians of later steps: ours are timed when tiles have been put in
bytecode, which takes some steps (--warm), shown but not counted. In each turn a step goes before the one that counts,
as what ran meanwhile has taken caches, and pages of memory. One network a run writes one table, so a run can be
repeated for each. On a processor without bfloat16 arithmetic ours are made in float32, and those of plain PyTorch
and of the limit are emulated, and slow.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import statistics
import subprocess
import sys

import torch
from limit import limit
from record import setting, write
from rivals import NETWORKS, case, serve

DEFAULT = "tiled,eager,eager-hugepages,checkpoint,limit"
TUNED = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
Process = subprocess.Popen[str]


def start(given: argparse.Namespace, variant: str) -> Process:
    """A process that serves one variant; returns when it is ready."""
    command = [sys.executable, __file__, "--serve", variant, "--network", given.network, "--budget", given.budget]
    command += ["--halvings", str(given.halvings), "--size", str(given.size), *["--bfloat16"] * given.bfloat16]
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= TUNED if variant.endswith("hugepages") else {}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"{variant} did not start")
    return process


def ask(process: Process, variant: str, turn: str) -> tuple[float, float, float] | None:
    """Seconds, bytes and loss of one step; None when the process ended (out of memory)."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(turn + "\n")
        process.stdin.flush()
        seconds, added, loss = map(float, process.stdout.readline().split())
    except (ValueError, OSError):
        print(f"{variant}: the process ended", flush=True)
        return None
    print(f"{variant} {turn}: {seconds:.2f} s, loss {loss:.5f}", flush=True)
    return seconds, added, loss


def measure(given: argparse.Namespace, variants: list[str]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of the steps, and bytes of the first, by variant; one that ends early is left out."""
    processes = {v: start(given, v) for v in variants}
    times: dict[str, list[float]] = {v: [] for v in variants}
    memory: dict[str, float] = {}
    try:
        for turn in ["first", *map(str, range(1, given.rounds + 1))]:
            for variant in list(processes):
                found = ask(processes[variant], variant, turn)
                if found is None:
                    del processes[variant]
                elif turn == "first":
                    memory[variant] = found[1]
                    for k in range(given.warm if variant.startswith("tiled") else 0):
                        ask(processes[variant], variant, f"warm {k}")
                elif (found := ask(processes[variant], variant, f"{turn}, counted")) is not None:
                    times[variant].append(found[0])
    finally:
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
    return {v: t for v, t in times.items() if len(t) == given.rounds}, memory


def table(given: argparse.Namespace, variants: list[str]) -> str:
    """The measurements as text."""
    times, memory = measure(given, [v for v in variants if v != "limit"])
    middle = {v: statistics.median(t) for v, t in times.items()}
    ours = middle.get("tiled")
    pixels = math.prod(case(given.network, given.halvings, given.size)[2].shape[2:]) / 1e6
    lines = ["| | step | per Mpixel | times tiled | memory added | of eager's |", "|---|---|---|---|---|---|"]
    for v in variants:
        if v in middle:
            ratio = f"{middle[v] / ours:.2f}" if ours else "-"
            part = f"{memory[v] / memory['eager']:.2f}" if memory.get("eager") else "-"
            seconds = f"{middle[v]:.2f} s | {middle[v] / pixels:.2f} s"
            lines.append(f"| {v} | {seconds} | {ratio} | {memory[v] / 1e9:.2f} GB | {part} |")
        elif v != "limit":
            lines.append(f"| {v} | ended | - | - | - | - |")
    if "limit" in variants:
        pair = limit(case(given.network, given.halvings, given.size), given.bfloat16)
        for name, seconds in zip(("the library's convolutions alone", "with our weight gradient"), pair, strict=True):
            ratio = f"{seconds / ours:.2f}" if ours else "-"
            lines.append(f"| {name} | {seconds:.2f} s | {seconds / pixels:.2f} s | {ratio} | - | - |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="uresnet")
    parser.add_argument("--variants", default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warm", type=int, default=4, help="steps of ours after the first that are not timed")
    parser.add_argument("--halvings", type=int, default=1)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--budget", default="4 GB")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--suffix", default="", help="of the table's name, for a second one of the same case")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.network, given.serve, given.halvings, given.size, given.budget, given.bfloat16)
        return
    image = case(given.network, given.halvings, given.size)[2]
    kind = "bfloat16" if given.bfloat16 else "float32"
    text = table(given, given.variants.split(","))
    notes = ["plain PyTorch in channels_last", f"medians of {given.rounds} steps, ours after {given.warm + 1} others"]
    if given.bfloat16 and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        notes.append("bfloat16 is emulated on this processor")
    if importlib.util.find_spec("lightstream") is None:
        notes.append("lightstream is not installed")
    else:
        notes.append("lightstream left out: it trains no batch norm, which every network here has")
    shape = " x ".join(map(str, image.shape[1:]))
    head = f"{given.network}, {shape}, batch 1, {kind}; {'; '.join(notes)}"
    name = f"speed-{given.network}-{kind}" + (f"-{image.shape[2]}" if image.shape[2] not in (640, 1024) else "")
    write(name + given.suffix, f"{head}\n\n{text}\n\nbench/speed.py, {setting()}")


if __name__ == "__main__":
    main()
