"""Plans without running: the smallest budget, and arithmetic and planning time at several budgets.

    python bench/plans.py [--only NAME ...]

Images of any size are views of one number, so nothing is allocated. Arithmetic is that of expensive ops, halo
included, relative to the plan that makes nothing again. Predicted is the time of a step by measurements of its ops
(`fullframe.runtime.forecast`), with as many workers as there are cores. Planning time is the processor's, capture
apart. Disks are taken to move 1 GB/s.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from networks_large import Decoder, UNet
from record import setting, write
from torch import Tensor, nn
from uresnet import network

import fullframe
from fullframe.compiler import pipeline
from fullframe.ir.graph import Graph
from fullframe.runtime.forecast import forecast
from fullframe.schedule.plan import arithmetic
from fullframe.schedule.planner import plan
from fullframe.schedule.request import Request

GB = 10**9
PLENTY = 1 << 46
RATE = 1000  # million bytes a second of a disk


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros of any size in the memory of one."""
    return torch.zeros((), dtype=dtype).expand(shape)


def pixelwise(output: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), label)


class Case(NamedTuple):
    """A step, whether it trains, and the budgets in GB, alone or with GB of disk."""

    made: Callable[[], tuple[nn.Module, Any, tuple[Tensor, ...]]]
    training: bool
    budgets: tuple[float | tuple[float, float], ...]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def unet(side: int) -> tuple[nn.Module, Any, tuple[Tensor, ...]]:
    labels = image(1, side, side, dtype=torch.long)
    return UNet().bfloat16(), pixelwise, (image(1, 3, side, side, dtype=torch.bfloat16), labels)


def small_unet() -> tuple[nn.Module, Any, tuple[Tensor, ...]]:
    return UNet(), pixelwise, (image(1, 3, 256, 256), image(1, 256, 256, dtype=torch.long))


def uresnet(batch: int) -> tuple[nn.Module, Any, tuple[Tensor, ...]]:
    net, loss = network()
    return net, loss, (image(batch, 3, 1280, 2048), image(batch, 3, 1280, 2048, dtype=torch.uint8))


def decoder() -> tuple[nn.Module, Any, tuple[Tensor, ...]]:
    return Decoder(), None, (image(1, 4, 512, 512),)


def bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


CASES = {
    "U-Net 256": Case(small_unet, True, (0.1,)),
    "U-Net 2,048, bfloat16": Case(lambda: unet(2_048), True, (0.4,)),
    "U-Net 16,384, bfloat16": Case(lambda: unet(16_384), True, (20, 10, 7)),
    "U-Net 51,200, bfloat16": Case(lambda: unet(51_200), True, (300, 150, 76, 68, (16, 60), (8, 60))),
    "UResNet 3 x 1280 x 2048, float32": Case(lambda: uresnet(1), True, (8, 5, 3.5, 3, 2.5)),
    "UResNet 3 x 1280 x 2048, bfloat16": Case(lambda: uresnet(1), True, (5, 3, 1.5), bfloat16),
    "UResNet 32 x 3 x 1280 x 2048, bfloat16": Case(lambda: uresnet(32), True, ((16, 60),), bfloat16),
    "decoder 4,096, no_grad, float32": Case(decoder, False, (5, 1.4, 1.2)),
}


def captured(case: Case) -> tuple[Graph, Request]:
    """What planning is asked of a step."""
    net, loss, arguments = case.made()
    torch.optim.SGD(net.parameters(), lr=0.1)  # as every training has: it imports what a recording needs, too
    found: list[tuple[Graph, Request]] = []
    asked = pipeline.plan_for

    def note(graph: Graph, request: Request, domain: Any) -> Any:
        found.append((graph, request))
        return asked(graph, request, domain)

    pipeline.plan_for = note
    try:
        step = fullframe.tile(net, loss=loss, budget=PLENTY)
        with torch.set_grad_enabled(case.training), case.context():
            step.plan(*arguments)
    finally:
        pipeline.plan_for = asked
    return found[-1]


def rows(name: str) -> Iterator[str]:
    """A line for each budget, from all that there is to the smallest without a disk."""
    case = CASES[name]
    graph, request = captured(case)
    for given in (None, *case.budgets, 0.0):
        budget, disk = given if isinstance(given, tuple) else (given, 0)
        said = "all stored" if budget is None else f"{budget:g} GB" if budget else "smallest"
        said += f" + {disk:g} GB" * bool(disk)
        asked = replace(
            request, budget=PLENTY if budget is None else max(1, int(budget * GB)), disk=int(disk * GB), rate=RATE
        )
        start = time.process_time()
        try:
            made = plan(graph, asked)
        except fullframe.BudgetError as error:
            seconds = time.process_time() - start
            refused = "" if budget == 0 else "refused: the least is "
            yield f"| {name} | {said} | {refused}{error.smallest / GB:.2f} GB | - | - | - | {seconds:.1f} s |"
            continue
        seconds = time.process_time() - start
        again = arithmetic(made) / max(1.0, made.fastest)
        on_disk = f"{made.bytes.disk / GB:.1f} GB, {sum(made.disk_traffic) / GB:.0f} GB moved" if disk else "-"
        time_of = forecast(made).seconds
        yield (
            f"| {name} | {said} | {made.projected_bytes / GB:.2f} GB | {on_disk} | {again:.2f} | {time_of:.1f} s "
            f"| {seconds:.1f} s |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    lines = [
        "| network | budget | projected | on disk | arithmetic | predicted | planning |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in parser.parse_args().only:
        for row in rows(name):
            print(row, flush=True)
            lines.append(row)
    write("plans", "\n".join([f"# Plans\n\n{setting()}\n", *lines]))


if __name__ == "__main__":
    main()
