"""What several processes do to memory, traffic and time, and what cropped patches would do to the numbers.

    python bench/ranks.py [--only memory time patches] [--rounds 7]

All on this machine, with gloo. *memory*: the plan of UResNet 3 x 1280 x 2048 on 1, 2 and 4 ranks: stored maps of a
rank, and the bytes that all ranks receive in a step, beside what they would if the rows around a window were fetched
before every operation. *time*: UResNet 3 x 640 x 1024 on 2 ranks of one thread each against one process of two
threads, in turns. *patches*: the same image with DistributedDataParallel, half of its rows for each rank, against the
whole image: time, memory, and how far loss and gradients are from the whole image's. With ``--only`` the table is
kept under the names of the parts.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from record import setting, write
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from uresnet import event, network

import fullframe
from cosmictagger.memory import PeakMemory
from fullframe.ir.graph import walked
from fullframe.schedule.plan import Plan

PARTS = ("memory", "time", "patches")
WARM = 3


class Ranks:
    """Processes of this file that take a step when they are asked to, and answer with what they found."""

    def __init__(self, part: str, count: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, "--serve", part]
        world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | world | {"RANK": str(k)},
            )
            for k in range(count)
        ]

    def ask(self) -> list[dict[str, Any]]:
        for p in self.processes:
            assert p.stdin is not None
            print("step", file=p.stdin, flush=True)
        found = []
        for p in self.processes:
            assert p.stdout is not None
            found.append(json.loads(p.stdout.readline()))
        return found

    def end(self) -> None:
        for p in self.processes:
            assert p.stdin is not None
            p.stdin.close()
            p.wait()


def joined() -> tuple[int, int]:
    """This process's rank and how many there are, in a group of their own."""
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def own(tensor: Tensor, rank: int, size: int, axis: int) -> Tensor:
    """A rank's rows."""
    return tensor.tensor_split(size, axis)[rank].contiguous()


def case(halvings: int, rank: int, size: int) -> tuple[Any, Any, Tensor, Tensor]:
    net, loss = network()
    image, label, _ = event(halvings)
    return net, loss, own(image, rank, size, 2), own(label, rank, size, label.dim() - 2)


def by_operation(plan: Plan, size: int) -> int:
    """Bytes of the rows that ranks would receive if each operation fetched what it reads beyond its own rows."""
    roots = [v for v in plan.graph.inputs if plan.tile_axes.get(v) and len(v.shape) == 4]
    divided, total = plan.tile_axes[roots[-1]][2], 0
    for op in plan.graph.ops:
        out = walked(op)
        axes = plan.tile_axes.get(out, ())
        if divided not in axes:
            continue
        axis = axes.index(divided)
        rows = out.shape[axis]
        low, high = rows // size, 2 * rows // size  # of a rank between others, where there are more than two
        region = tuple((low, high) if a == axis else (0, n) for a, n in enumerate(out.shape))
        for value, part in zip(op.inputs, op.rule.footprint(op, op.rule.grow(op, region)), strict=True):
            there = plan.tile_axes.get(value, ())
            if divided not in there:
                continue
            k = there.index(divided)
            n = value.shape[k]
            more = max(0, n * low // rows - part[k][0])  # above; as much lies below
            total += 2 * (size - 1) * more * (value.nbytes // n)
    return total


def serve(part: str) -> None:
    """Answer each line of standard input."""
    rank, size = joined()
    answer = {"memory": planning, "time": stepping, "patches": patching}[part](rank, size)
    for _ in sys.stdin:
        print(json.dumps(answer()), flush=True)
    dist.destroy_process_group()


def planning(rank: int, size: int) -> Any:
    net, loss, image, label = case(0, rank, size)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("domain",))
    step = fullframe.tile(net, loss=loss, budget="20 GB", workers=1, mesh=mesh)

    def answer() -> dict[str, Any]:
        plan = step.plan(image, label)
        share = plan.share
        return {
            "arena": plan.bytes.arena, "total": plan.projected_bytes,
            "received": 0 if share is None else share.received,
            "by operation": by_operation(plan, size) if size > 1 else 0,
        }  # fmt: skip

    return answer


def stepping(rank: int, size: int) -> Any:
    net, loss, image, label = case(1, rank, size)
    torch.set_num_threads(1 if size > 1 else 2)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("domain",)) if size > 1 else None
    step: Any = fullframe.tile(net, loss=loss, budget="8 GB", workers=1 if size > 1 else 2, mesh=mesh)
    return lambda: timed(net, lambda: step(image, label))


def patching(rank: int, size: int) -> Any:
    net, loss, image, label = case(1, rank, size)
    torch.set_num_threads(1)
    net = net.to(memory_format=torch.channels_last)
    replica = DistributedDataParallel(net)
    image = image.contiguous(memory_format=torch.channels_last)
    return lambda: timed(net, lambda: loss(replica(image), label))


def timed(net: Any, forward: Any) -> dict[str, Any]:
    """Seconds and bytes of a step, its loss and the gradients' numbers (those of the whole file are too many)."""
    net.zero_grad(set_to_none=True)
    if dist.get_world_size() > 1:
        dist.barrier()
    with PeakMemory(torch.device("cpu")) as peak:
        started = time.perf_counter()
        value = forward()
        value.backward()
        seconds = time.perf_counter() - started
    some = torch.cat([p.grad.flatten()[:64] for p in net.parameters() if p.grad is not None])
    return {"seconds": seconds, "bytes": peak.added or 0, "loss": float(value.detach()), "gradient": some.tolist()}


def memory() -> list[str]:
    lines = [
        "| ranks | stored maps of a rank | of one rank's | in all a rank | received a step, all ranks | if every "
        "operation fetched its rows |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    alone = 0
    for size in (1, 2, 4):
        ranks = Ranks("memory", size)
        found = ranks.ask()
        ranks.end()
        most = max(f["arena"] for f in found)
        alone = alone or most
        total = max(f["total"] for f in found)
        received, other = sum(f["received"] for f in found), found[0]["by operation"]
        lines.append(
            f"| {size} | {most / 1e9:.2f} GB | {most / alone:.3f} | {total / 1e9:.2f} GB | {received / 1e6:.0f} MB | "
            f"{other / 1e6:.0f} MB |"
        )
        print(lines[-1], flush=True)
    return ["## Memory and traffic", "", "UResNet 3 x 1280 x 2048, float32; plans.", "", *lines, ""]


def compared(rounds: int, parts: tuple[str, ...]) -> list[str]:
    worlds = {"one process of two threads": Ranks("time", 1)}
    worlds |= {"two ranks of one thread": Ranks("time", 2)} if "time" in parts else {}
    worlds |= {"patches, DistributedDataParallel": Ranks("patches", 2)} if "patches" in parts else {}
    times: dict[str, list[float]] = {name: [] for name in worlds}
    last: dict[str, list[dict[str, Any]]] = {}
    first: dict[str, int] = {}
    for k in range(WARM + rounds):
        for name, ranks in worlds.items():
            last[name] = ranks.ask()
            first.setdefault(name, max(f["bytes"] for f in last[name]))
            if k >= WARM:
                times[name].append(max(f["seconds"] for f in last[name]))
            print(name, k, round(max(f["seconds"] for f in last[name]), 2), flush=True)
    for ranks in worlds.values():
        ranks.end()
    base = next(iter(worlds))
    truth = torch.tensor(last[base][0]["gradient"])
    lines = [
        "| | step | that of one process, of this | memory of a process, first step | loss | gradients, apart |",
        "|---|---|---|---|---|---|",
    ]
    for name in worlds:
        ratio = statistics.median(a / b for a, b in zip(times[base], times[name], strict=True))
        loss = statistics.mean(f["loss"] for f in last[name])
        apart = float((torch.tensor(last[name][0]["gradient"]) - truth).norm() / truth.norm())
        lines.append(
            f"| {name} | {statistics.median(times[name]):.2f} s | {ratio:.2f} | {first[name] / 1e9:.2f} GB | "
            f"{loss:.6f} | {apart:.1e} |"
        )
    text = (
        "UResNet 3 x 640 x 1024, float32; medians of rounds in turns; gradients: 64 numbers of each parameter, their "
        "distance relative to their length."
    )
    return ["## Time, and patches", "", text, "", *lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", choices=PARTS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    lines = ["# Ranks", "", setting(), ""]
    if "memory" in options.only:
        lines += memory()
    if {"time", "patches"} & set(options.only):
        lines += compared(options.rounds, tuple(options.only))
    write("-".join(["ranks", *(options.only if options.only != list(PARTS) else ())]), "\n".join(lines))


if __name__ == "__main__":
    main()
