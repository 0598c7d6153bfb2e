"""A training step of UResNet on a batch of full-size events with one exact batch norm, beside a step on one event.

    python bench/batch.py [--batches 1 32] [--budget "16 GB"] [--disk "60 GB"] [--folder /scratch] [--steps 2 2]

bfloat16 under autocast, the light loss, Adam. Events are simulated; charge and labels are sources of stored pixels,
which become dense tile by tile. Each batch runs in a process of its own: measured is the most that is resident, all
of Python and torch, parameters, gradients and moments with it. The first step records and compiles; time is that of
the fastest of the others, or of the first where it is alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from typing import Any

import torch
from huge import most_resident
from record import setting, write
from uresnet import network

import fullframe
from cosmictagger.simulate import simulate_numbered
from cosmictagger.sparse import sparse_batch
from fullframe.schedule.plan import arithmetic


def steps(batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Take the steps in this process; what they took."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    net, criterion = network()
    charge, label = sparse_batch([simulate_numbered(0, number) for number in range(batch)])
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    place = {} if options.disk == "none" else {"disk": options.disk, "folder": options.folder}
    tiled = fullframe.tile(net, loss=criterion, budget=options.budget, **place)
    losses, seconds = [], []
    with torch.autocast("cpu", torch.bfloat16):
        started = time.monotonic()
        plan = tiled.plan(charge, label)
        planned = time.monotonic() - started
    print(plan, flush=True)
    for _ in range(options.steps[0]):
        started = time.monotonic()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = tiled(charge, label)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.monotonic() - started)
        print(f"batch {batch}: {seconds[-1]:.1f} s, loss {losses[-1]:.4f}", flush=True)
    return {
        "batch": batch, "planning": planned, "first": seconds[0], "seconds": min(seconds[1:], default=seconds[0]),
        "losses": losses, "resident": most_resident(), "projected": plan.projected_bytes, "disk": plan.bytes.disk,
        "read": plan.disk_traffic.read, "written": plan.disk_traffic.written,
        "arithmetic": arithmetic(plan) / max(1.0, plan.fastest),
    }  # fmt: skip


def line(row: dict[str, Any], one: float) -> str:
    each = row["seconds"] / row["batch"]
    gigabytes = {name: f"{row[name] / 1e9:.1f} GB" for name in ("projected", "resident", "disk", "read", "written")}
    cells = (
        row["batch"], gigabytes["projected"], gigabytes["resident"], gigabytes["disk"],
        f"{gigabytes['read']} + {gigabytes['written']}", f"{row['arithmetic']:.2f}", f"{row['planning']:.0f} s",
        f"{row['first']:.0f} s", f"{row['seconds']:.1f} s", f"{each:.1f} s", f"{each / one:.2f}",
        ", ".join(f"{x:.4f}" for x in row["losses"]),
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--budget", default="16 GB")
    parser.add_argument("--disk", default="60 GB", help='or "none"')
    parser.add_argument("--folder", default=None)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 2], help="of each batch")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print("ROW " + json.dumps(steps(options.batches[0], options)))
        return
    again = ["--budget", options.budget, "--disk", options.disk]
    again += ["--folder", options.folder] if options.folder else []
    rows = []
    for batch, count in zip(options.batches, options.steps, strict=True):
        command = [sys.executable, __file__, "--inside", "--batches", str(batch), "--steps", str(count), *again]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for text in process.stdout:
                if text.startswith("ROW "):
                    rows.append(json.loads(text[4:]))
                else:
                    print(text, end="", flush=True)
        if process.returncode:
            sys.exit(f"batch {batch} ended with {process.returncode}")
    one = rows[0]["seconds"] / rows[0]["batch"]
    write(
        "batch",
        "\n".join([
            "# A batch of whole events", "",
            f"{setting()}; UResNet, 3 x 1280 x 2048, bfloat16, {options.budget}, disk: {options.disk}", "",
            "| events | projected | most resident | on disk | read and written there | arithmetic | planning "
            "| first step | step | for each event | of the first row's | losses |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
            *(line(row, one) for row in rows),
        ]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
