"""Where the time of a tiled step goes: by kind of work, and by section.

    python bench/profile_step.py [--halvings N] [--budget "4 GB"] [--workers N] [--bfloat16] [--sections N]

UResNet at 3 x 1280 x 2048 halved N times, batch 1, loss light. Steps are timed as they are; then one with every
tile run in Python and every call of the executor timed by the clock of its thread: what a call spends in calls below
it is counted there. *Outside* is what the time of the workers in a step as it is (step x workers) has beyond kernels
and copies of the other: Python, and waiting, in which other work on the machine counts too.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from record import setting, write
from uresnet import event, network

import fullframe
from fullframe import executor, kernels
from fullframe.graph import Op
from fullframe.kernels.kernel import HostCall
from fullframe.plan import Plan
from fullframe.section import tiled

PYTHON = ("a tile's jobs", "a section", "reads cut out", "new windows", "sums joined", "tasks made")


class Clock:
    """Exclusive CPU seconds and calls by name and section, per thread."""

    def __init__(self) -> None:
        self.local = threading.local()
        self.tables: list[tuple[dict[Any, float], Counter[str]]] = []

    def timed(self, call: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            local = self.local
            if not hasattr(local, "below"):
                local.below, local.seconds, local.calls = [], defaultdict(float), Counter()
                self.tables.append((local.seconds, local.calls))
                local.section = -1
            label = name(*args)
            local.below.append(0.0)
            start = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent = time.thread_time() - start
                local.seconds[label, local.section] += spent - local.below.pop()
                local.calls[label] += 1
                if local.below:
                    local.below[-1] += spent

        return timed

    def task(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Of a tile that a thread begins, the section is its own."""

        def begun(run: Any, number: int, k: int) -> Any:
            made = call(run, number, k)
            self.local.section = number
            return made

        return begun

    def kinds(self) -> tuple[Counter[str], Counter[str], dict[int, Counter[str]]]:
        """Seconds and calls by kind, and seconds by section and kind."""
        seconds: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        sections: dict[int, Counter[str]] = defaultdict(Counter)
        for table, counted in self.tables:
            calls.update(counted)
            for (label, section), spent in table.items():
                seconds[label] += spent
                sections[section][label] += spent
        return seconds, calls, sections


def kind_of(plan: Plan) -> Callable[..., str]:
    """What to call a rule's run."""
    given = {*plan.graph.inputs, *plan.graph.constants}

    def kind(op: Op, *_: Any) -> str:
        if op.target == "tile.conv_weight_grad":
            return "convolution, weight gradient"
        if op.target.startswith("tile.conv"):
            return "convolution, forward" if op.inputs[1] in given else "convolution, input gradient or cast weight"
        small = not any(tiled(v, plan.labels) for v in (op.output, *op.inputs))
        return "untiled ops" if small else f"other: {op.target}"

    return kind


def instrument(clock: Clock, plan: Plan) -> None:
    """Put the clock around what the executor calls; this process only profiles."""

    def wrap(holder: Any, attribute: str, name: str | Callable[..., str]) -> None:
        call = name if callable(name) else lambda *_: name
        setattr(holder, attribute, clock.timed(getattr(holder, attribute), call))

    run = executor.Run
    for attribute, name in (("tile", "a tile's jobs"), ("_read", "reads cut out"), ("_store", "stores")):
        wrap(run, attribute, name)
    for attribute in ("_begin", "_end", "_free"):
        wrap(run, attribute, "a section")
    run._task = clock.task(run._task)
    wrap(executor, "empty_map", "new windows")
    wrap(executor.Tasks, "task", "tasks made")
    wrap(executor.Summation, "add", "sums joined")
    wrap(executor.Summation, "finish", "sums joined")
    wrap(HostCall, "_run", "pointwise kernels")
    wrap(kernels.Plain, "run", "pointwise, not compiled")
    rules = {id(op.rule): op.rule for s in plan.steps for op in s.section.ops}
    for rule in rules.values():
        wrap(rule, "run", kind_of(plan))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--halvings", type=int, default=1)
    parser.add_argument("--budget", default="4 GB")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--sections", type=int, default=12)
    given = parser.parse_args()
    net, criterion = network()
    image, label, _ = event(given.halvings)
    step = fullframe.tile(net, loss=criterion, budget=given.budget, workers=given.workers)

    def once() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=given.bfloat16):
            step(image, label).backward()
        return time.perf_counter() - wall, time.process_time() - cpu

    with torch.autocast("cpu", torch.bfloat16, enabled=given.bfloat16):
        plan = step.plan(image, label)
    once()
    once()
    plain = min(once() for _ in range(3))
    executor.taping = lambda: False
    executor._RUNTIMES.clear()
    once()
    clock = Clock()
    instrument(clock, plan)
    cpu = once()[1]
    kind = "bfloat16" if given.bfloat16 else "float32"
    rows, columns = image.shape[2:]
    head = (
        f"UResNet, 3 x {rows} x {columns}, batch 1, {kind}, {plan.workers} workers, {len(plan.steps)} sections, "
        f"{sum(len(s.grid) for s in plan.steps)} tiles. Step {plain[0]:.1f} s (CPU {plain[1]:.1f} s) as it is, CPU "
        f"{cpu:.1f} s with every tile in Python and clocks."
    )
    text = "\n\n".join([head, by_kind(clock, plan, plain[0], cpu), by_section(clock, plan, given.sections)])
    write(f"profile-{kind}-{rows}", f"{text}\n\nbench/profile_step.py, {setting()}")


def by_kind(clock: Clock, plan: Plan, wall: float, cpu: float) -> str:
    """The table of kinds of work."""
    seconds, calls, _ = clock.kinds()
    rest = cpu - sum(seconds.values())
    working = cpu - rest - sum(seconds[name] for name in PYTHON)
    time_of_all = wall * plan.workers
    lines = ["| work | CPU s | of CPU | calls |", "|---|---|---|---|"]
    lines += [f"| {k} | {s:.2f} | {s / cpu:.1%} | {calls[k]} |" for k, s in seconds.most_common() if s > 0.001 * cpu]
    lines.append(f"| around sections | {rest:.2f} | {rest / cpu:.1%} | |")
    outside = (
        f"Kernels and copies {working:.2f} s of the {time_of_all:.2f} s that the workers have in a step as it is; "
        f"outside {1 - working / time_of_all:.1%}"
    )
    workers = ", ".join(f"{sum(t.values()):.1f} s" for t, _ in clock.tables)
    return "\n".join(lines) + f"\n\n{outside}. CPU by thread: {workers}."


def by_section(clock: Clock, plan: Plan, most: int) -> str:
    """The sections that take most."""
    _, _, sections = clock.kinds()
    order = sorted((k for k in sections if k >= 0), key=lambda k: -sections[k].total())[:most]
    lines = ["| section | saves | tiles | CPU s | most of it |", "|---|---|---|---|---|"]
    for k in order:
        s = plan.steps[k]
        made = ", ".join("x".join(map(str, v.shape)) for v in s.section.saves[:3]) or f"{len(s.section.sums)} sums"
        spent = sections[k]
        shares = ", ".join(f"{n} {t / max(spent.total(), 1e-9):.0%}" for n, t in spent.most_common(3))
        lines.append(f"| {k} | {made} | {len(s.grid)} | {spent.total():.3f} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
