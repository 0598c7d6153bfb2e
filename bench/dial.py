"""The dial: a training step within a half down to a sixteenth of plain PyTorch's memory.

    python bench/dial.py [--rows 640] [--columns 1024] [--steps 3]

UResNet, float32, batch 1. Plain PyTorch's memory is what one of its steps grows the resident set by at its highest,
gradients apart. Each row runs in a process of its own. Measured is the growth of the resident set at its highest,
from before the step is recorded; times are the best of the steps after the first, which records and plans. Predicted
is what the plan says before anything has run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch
from record import setting, write
from uresnet import network

import fullframe
from cosmictagger.memory import PeakMemory
from fullframe.schedule.plan import arithmetic

SHARES = (2, 4, 8, 16)


def one(rows: int, columns: int, steps: int, budget: int) -> None:
    """Take steps and print the growth of the resident set, seconds, and what the plan says; budget 0: plain PyTorch,
    1: all memory that there is. The prediction is made last, so that it adds nothing to what is measured."""
    net, criterion = network()
    image = torch.rand(1, 3, rows, columns)
    label = torch.randint(0, 3, (1, 3, rows, columns))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    step = None
    if budget:
        step = fullframe.tile(net, loss=criterion, budget=None if budget == 1 else budget)
    seconds = []
    with PeakMemory(image.device) as peak:
        for _ in range(steps):
            start = time.perf_counter()
            loss = criterion(net(image), label) if step is None else step(image, label)
            loss.backward()
            for p in net.parameters():
                p.grad = None
            seconds.append(time.perf_counter() - start)
    plan = None if step is None else step.plan(image, label)
    projected = 0 if plan is None else plan.projected_bytes
    again = 1.0 if plan is None else arithmetic(plan) / max(1.0, plan.fastest)
    predicted = 0.0 if plan is None else plan.predicted_seconds
    print(peak.added or 0, min(seconds[1:], default=seconds[0]), projected, again, predicted)


def row(given: argparse.Namespace, budget: int) -> tuple[float, ...] | str:
    command = [sys.executable, __file__, "--inside", str(budget), "--rows", str(given.rows)]
    command += ["--columns", str(given.columns), "--steps", str(given.steps if budget else 1)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    return tuple(float(x) for x in done.stdout.split())


def line(head: str, found: tuple[float, ...], fastest: float) -> str:
    measured, seconds, projected, again, predicted = found
    return (
        f"{head}| {projected / 1e9:.2f} GB | {measured / 1e9:.2f} GB | {again:.2f} | {predicted:.1f} | {seconds:.1f} "
        f"| {seconds / fastest:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        one(given.rows, given.columns, given.steps, given.inside)
        return
    plain, fastest = row(given, 0), row(given, 1)
    assert not isinstance(plain, str) and not isinstance(fastest, str), (plain, fastest)
    lines = [
        "# The dial",
        "",
        f"{setting()}; UResNet 3 x {given.rows} x {given.columns}, float32, batch 1",
        "",
        "| budget | projected | measured | arithmetic | predicted, s | seconds | of the fastest |",
        "|---|---|---|---|---|---|---|",
        f"| plain PyTorch | - | {plain[0] / 1e9:.2f} GB | - | - | {plain[1]:.1f} | {plain[1] / fastest[1]:.2f} |",
        line("| all there is ", fastest, fastest[1]),
    ]
    for share in SHARES:
        budget = int(plain[0] / share)
        found = row(given, budget)
        head = f"| 1/{share}: {budget / 1e9:.2f} GB "
        if isinstance(found, str):
            lines.append(f"{head}| {found} | | | | | |")
            continue
        lines.append(line(head, found, fastest[1]))
    write("dial", "\n".join(lines))


if __name__ == "__main__":
    main()
