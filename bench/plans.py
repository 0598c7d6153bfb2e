"""Plans without running: the smallest budget, and arithmetic and planning time at several budgets.

    python bench/plans.py [--only NAME ...]

Images of any size are views of one number, so nothing is allocated. Arithmetic is that of expensive ops, halo
included, relative to the plan that makes nothing again. Planning time is the processor's, capture apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from networks_large import Decoder, UNet
from record import setting, write
from torch import Tensor, nn
from uresnet import network

import fullframe
from fullframe.compiler import pipeline
from fullframe.ir.graph import Graph
from fullframe.schedule.plan import arithmetic
from fullframe.schedule.planner import plan
from fullframe.schedule.request import Request

GB = 10**9
PLENTY = 1 << 46


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros of any size in the memory of one."""
    return torch.zeros((), dtype=dtype).expand(shape)


def pixelwise(output: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), label)


def unet(side: int) -> tuple[nn.Module, Any, tuple[Tensor, ...]]:
    labels = image(1, side, side, dtype=torch.long)
    return UNet().bfloat16(), pixelwise, (image(1, 3, side, side, dtype=torch.bfloat16), labels)


def uresnet(batch: int) -> tuple[nn.Module, Any, tuple[Tensor, ...]]:
    net, loss = network()
    return net, loss, (image(batch, 3, 1280, 2048), image(batch, 3, 1280, 2048, dtype=torch.long))


def decoder() -> tuple[nn.Module, Any, tuple[Tensor, ...]]:
    return Decoder(), None, (image(1, 4, 512, 512),)


CASES: dict[str, tuple[Callable[[], Any], bool, tuple[float, ...]]] = {
    "U-Net 2,048, bfloat16": (lambda: unet(2_048), True, (0.4,)),
    "U-Net 16,384, bfloat16": (lambda: unet(16_384), True, (20, 10, 7)),
    "U-Net 51,200, bfloat16": (lambda: unet(51_200), True, (300, 150, 76, 68)),
    "UResNet 3 x 1280 x 2048, float32": (lambda: uresnet(1), True, (8, 5, 3.5, 3)),
    "decoder 4,096, no_grad, float32": (decoder, False, (5, 1.4)),
}


def captured(case: Callable[[], Any], training: bool) -> tuple[Graph, Request]:
    """What planning is asked of a step."""
    net, loss, arguments = case()
    found: list[tuple[Graph, Request]] = []
    asked = pipeline.plan_for

    def note(graph: Graph, request: Request, domain: Any) -> Any:
        found.append((graph, request))
        return asked(graph, request, domain)

    pipeline.plan_for = note
    try:
        step = fullframe.tile(net, loss=loss, budget=PLENTY)
        with torch.set_grad_enabled(training):
            step.plan(*arguments)
    finally:
        pipeline.plan_for = asked
    return found[-1]


def rows(name: str) -> list[str]:
    case, training, budgets = CASES[name]
    graph, request = captured(case, training)
    found = []
    for budget in (PLENTY, *(int(b * GB) for b in budgets), 1):
        start = time.process_time()
        try:
            made = plan(graph, replace(request, budget=budget))
        except fullframe.BudgetError as error:
            smallest, seconds = error.smallest, time.process_time() - start
            given = "smallest" if budget == 1 else f"{budget / GB:g} GB"
            found.append(f"| {name} | {given} | {smallest / GB:.2f} GB | - | {seconds:.1f} s |")
            continue
        seconds = time.process_time() - start
        again = arithmetic(made) / max(1.0, made.fastest)
        given = "all stored" if budget == PLENTY else f"{budget / GB:g} GB"
        found.append(f"| {name} | {given} | {made.projected_bytes / GB:.2f} GB | {again:.2f} | {seconds:.1f} s |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    lines = ["| network | budget | projected | arithmetic | planning |", "|---|---|---|---|---|"]
    for name in parser.parse_args().only:
        for row in rows(name):
            print(row, flush=True)
            lines.append(row)
    write("plans", "\n".join([f"# Plans\n\n{setting()}\n", *lines]))


if __name__ == "__main__":
    main()
