"""Budgets both ways: what a step's plan counts, and what a process really grows by.

A network is drawn and written to a file by one process, which also asks for its smallest budget; another, fresh one
reads it and takes steps within that budget. Measured is the growth of the resident set at its highest, from before
fullframe is imported, when the network, its gradients and the inputs exist, over several steps, the first of which
records and plans. Both are run by ``python tests/support/budgeting.py``.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STEPS = 4
SECONDS = 600  # of a process
MEMORY = 6_000_000_000  # bytes of addresses that drawing and asking may take
SIZES = {1: (10_000, 300_000), 2: (100, 420), 3: (20, 44)}  # pixels of an axis, by the number of axes
ABOVE, BESIDE = 1.05, 20_000_000  # measured may be so many times what is projected, and so many bytes more,
BELOW, LEFT = 1.3, 50_000_000  # and projected so many times what is measured, and so many bytes more


@dataclass(frozen=True)
class Asked:
    """A network with all that its step takes; the ``smallest`` budget is filled in once it is known. With bytes of a
    ``disk``, maps go there rather than that anything is made again; with an ``optimiser`` there is one before anything
    is recorded."""

    net: nn.Module
    input: Any
    target: Any
    loss: Callable[..., Any] | None
    workers: int
    smallest: int = 0
    disk: int = 0
    optimiser: bool = False


@dataclass(frozen=True)
class Grown:
    """Bytes: the budget, what the plan counts of it (fixed bytes and tiles apart), and what the process grew by."""

    budget: int
    projected: int
    fixed: int
    measured: int
    recorded: int  # of these, when the plan was there
    ops: int
    tiles: int

    @property
    def over(self) -> int:
        """Bytes more than was allowed; negative where there was room."""
        return int(self.measured - (ABOVE * self.projected + BESIDE))

    @property
    def idle(self) -> int:
        """Bytes more than may be counted; negative where that is not so."""
        return int(self.projected - (BELOW * self.measured + LEFT))

    @property
    def held(self) -> bool:
        return self.over <= 0 and self.idle <= 0


def drawn(seed: int) -> Asked | None:
    """A random network on a large image, in float32 but for each fifth; None where PyTorch cannot run it."""
    from randomnets import Generator

    generator = Generator(random.Random(seed))
    generator.sizes = SIZES  # type: ignore[misc]
    try:
        case = generator.case(seed)
    except (RuntimeError, ValueError):
        return None
    dtype = torch.float64 if seed % 5 == 4 else torch.float32

    def made(t: Any) -> Any:
        floating = isinstance(t, torch.Tensor) and t.is_floating_point()
        return t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad) if floating else t

    input, target = (pytree.tree_map(made, value) for value in (case.input, case.target))
    loss = case.loss.to(dtype) if isinstance(case.loss, nn.Module) else case.loss
    return Asked(case.net.to(dtype), input, target, loss, 1 + seed % 2)


def tiled(asked: Asked, budget: int) -> Any:
    import fullframe

    if not asked.disk:
        return fullframe.tile(asked.net, loss=asked.loss, budget=budget, workers=asked.workers)
    from disks import folder_on_disk

    from fullframe.schedule import planner

    planner.PER_BYTE, planner.LITTLE = 0, 2
    folder = folder_on_disk()
    return fullframe.tile(
        asked.net, loss=asked.loss, budget=budget, workers=asked.workers, disk=asked.disk, folder=folder
    )


def ask(asked: Asked) -> Asked:
    """With the smallest budget that is said to do."""
    import fullframe

    step = tiled(asked, 1)
    arguments = (asked.input,) if asked.loss is None else (asked.input, asked.target)
    try:
        step.plan(*arguments)
    except fullframe.BudgetError as error:
        return replace(asked, smallest=error.smallest)
    raise AssertionError("a step within one byte")


def take(asked: Asked) -> Grown:
    """Take steps, as the only thing that this process does."""
    for t in (*asked.net.parameters(), *pytree.tree_leaves(asked.input)):
        if isinstance(t, torch.Tensor) and t.requires_grad:
            t.grad = torch.zeros_like(t)  # there before; a step's own take their place
    arguments = (asked.input,) if asked.loss is None else (asked.input, asked.target)
    CLEAR.write_text("5")  # asks the kernel to forget the highest resident set so far
    before = status("VmRSS")
    step = tiled(asked, asked.smallest)
    plan = step.plan(*arguments)
    assert bool(plan.bytes.disk) is bool(asked.disk)
    recorded = status("VmHWM") - before
    for _ in range(STEPS):
        made = [t for t in pytree.tree_leaves(step(*arguments)) if isinstance(t, torch.Tensor) and t.requires_grad]
        for t in (*asked.net.parameters(), *pytree.tree_leaves(asked.input)):
            if isinstance(t, torch.Tensor):
                t.grad = None
        total = sum((t.sum() for t in made[1:]), made[0].sum()) if made else None
        if total is not None:
            total.backward()
        del made, total
    measured = status("VmHWM") - before
    tiles = sum(len(s.grid) for s in plan.stages)
    return Grown(
        asked.smallest, plan.projected_bytes, plan.bytes.fixed, measured, recorded, len(plan.graph.ops), tiles
    )


def status(key: str) -> int:
    """A line of the process's status, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {key}")


def measured(asked: Asked, folder: Path) -> Grown:
    """Ask for the smallest budget and take steps within it, in a process each. The first says what it cannot do."""
    path = folder / "asked.pt"
    torch.save(asked, path)
    run("ask", path)
    return Grown(**eval(run("take", path)))


def run(what: str, path: Path, *more: str) -> str:
    """The last line that a process of this file writes; RuntimeError with what it complains of."""
    command = [sys.executable, __file__, what, str(path), *more]
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the same fullframe as in this process
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=here)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:300])
    return done.stdout.strip().splitlines()[-1]


def main(what: str, path: Path, *more: str) -> None:
    import warnings

    warnings.simplefilter("ignore")
    asked = drawn(int(more[0])) if what == "draw" else torch.load(path, weights_only=False)
    if asked is not None and asked.optimiser:
        torch.optim.SGD(asked.net.parameters(), lr=0.1)
    if what == "take":
        print(vars(take(asked)))
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if asked is not None:
        torch.save(ask(asked), path)
    print("unusable" if asked is None else "asked")


if __name__ == "__main__":
    sys.modules["budgeting"] = sys.modules["__main__"]  # under this name pickles know its classes
    Asked.__module__ = "budgeting"
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
