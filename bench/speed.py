"""Time and memory of a training step: tiled against plain eager PyTorch, in turns, in one run.

    python bench/speed.py [--rounds N] [--bfloat16]

UResNet at 3 x 640 x 1024, batch 1, loss light. Plain PyTorch runs in channels_last, as its users would.
Memory is the growth of the resident set at its highest in each one's first step, recording and planning
included; times are medians of the later steps, the ratio is of medians. Run it with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for plain PyTorch with huge pages.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable

import torch
from record import setting, write
from uresnet import event, network

import fullframe
from cosmictagger.memory import PeakMemory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", default="4 GB")
    parser.add_argument("--bfloat16", action="store_true")
    given = parser.parse_args()
    net, criterion = network()
    image, label, source = event(1)
    plain = copy.deepcopy(net).to(memory_format=torch.channels_last)
    flat = image.to(memory_format=torch.channels_last)
    step = fullframe.tile(net, loss=criterion, budget=given.budget)
    variants: dict[str, Callable[[], torch.Tensor]] = {
        "tiled": lambda: step(image, label),
        "eager": lambda: criterion(plain(flat), label),
    }
    times: dict[str, list[float]] = {k: [] for k in variants}
    memory: dict[str, float] = {}
    for turn in range(given.rounds + 1):
        for name, forward in variants.items():
            (net if name == "tiled" else plain).zero_grad(set_to_none=True)
            with PeakMemory(image.device, wanted=turn == 0) as peak:
                start = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=given.bfloat16):
                    loss = forward()
                loss.backward()
                seconds = time.perf_counter() - start
            if turn == 0:
                memory[name] = (peak.added or 0) / 1e9
            else:
                times[name].append(seconds)
            print(f"{name} {turn}: {seconds:.1f} s, loss {loss.item():.5f}", flush=True)
    middle = {k: statistics.median(v) for k, v in times.items()}
    kind = "bfloat16" if given.bfloat16 else "float32"
    pages = "huge pages for malloc" if "hugetlb" in os.environ.get("GLIBC_TUNABLES", "") else "malloc as it comes"
    text = (
        f"UResNet, 3 x {image.shape[2]} x {image.shape[3]}, batch 1, {kind}, {source} shrunk by 2, {pages}\n\n"
        "| | step | memory added |\n|---|---|---|\n"
        + "".join(f"| {k} | {middle[k]:.1f} s | {memory[k]:.2f} GB |\n" for k in variants)
        + f"\ntiled is {middle['eager'] / middle['tiled']:.2f} times as fast with "
        f"{memory['tiled'] / memory['eager']:.2f} of the memory\n\nbench/speed.py, {setting()}"
    )
    write(f"speed-{kind}" + ("-hugepages" if "huge pages" in pages else ""), text)


if __name__ == "__main__":
    main()
