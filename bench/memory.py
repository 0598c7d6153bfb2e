"""Training steps of UResNet at full resolution within a budget: projected and measured bytes.

    python bench/memory.py [--steps N] [--only float32]

Each case runs in a process of its own. Measured is the growth of the resident set at its highest, from
before the step is recorded to after the optimiser's steps, without gradients and the optimiser's moments.
Plain PyTorch keeps about 48 GB of activations here, so it is not run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch
from record import setting, write
from uresnet import event, network

import fullframe
from cosmictagger.memory import PeakMemory

CASES = {"float32": "8 GB", "bfloat16": "5 GB"}


def one(kind: str, budget: str, steps: int) -> None:
    """Take the steps and print one row of the table."""
    net, criterion = network()
    image, label, source = event()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)  # parameters and gradients aside: both are there before
    step = fullframe.tile(net, loss=criterion, budget=budget)
    losses, seconds = [], []
    with PeakMemory(image.device) as peak:
        for _ in range(steps):
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
                loss = step(image, label)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
        projected = step.plan(image, label).projected_bytes
    shown = ", ".join(f"{x:.4f}" for x in losses)
    measured = "unknown" if peak.added is None else f"{peak.added / 1e9:.2f} GB"
    print(
        f"| {kind} | {budget} | {projected / 1e9:.2f} GB | {measured} | {seconds[0]:.0f} s | "
        f"{min(seconds[1:], default=seconds[0]):.0f} s | {shown} | {source} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        one(given.only, CASES[given.only], given.steps)
        return
    rows = []
    for kind in [given.only] if given.only else CASES:
        command = [sys.executable, __file__, "--inside", "--only", kind, "--steps", str(given.steps)]
        rows.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    head = (
        "UResNet (18.4 M parameters), 3 x 1280 x 2048, batch 1, loss light\n\n"
        "| dtype | budget | projected | measured | first step | later step | losses | input |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    write("memory", head + "\n".join(rows) + f"\n\nbench/memory.py, {setting()}")


if __name__ == "__main__":
    main()
