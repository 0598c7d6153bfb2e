"""Where the time of a tiled step goes: by kind of work, and by section.

    python bench/profile_step.py [--halvings N] [--budget "4 GB"] [--workers N] [--bfloat16] [--sections N]

UResNet at 3 x 1280 x 2048 halved N times, batch 1, loss light. The step is one that is replayed (all tiles in
bytecode), with a clock around each instruction of the bytecode and each wait of a thread. *Outside kernels* is what
the workers' time (step x workers) has beyond instructions that compute or copy: Python, the choice of tiles, memory,
and waiting.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from record import setting, write
from uresnet import event, network

import fullframe
from fullframe.bytecode import libtorch as native
from fullframe.bytecode.recorder import ADD, CALL, COPY, KERNEL, OWN, PLUS
from fullframe.codegen.toolchain import cxx as compiler
from fullframe.native import loader as owned
from fullframe.runtime import executor
from fullframe.schedule.plan import Plan

WATCH = Path(__file__).parent / "watch.h"
ROOM = 1 << 21  # events, as watch.h has it
PLAIN = {COPY: "copies", ADD: "partial sums", PLUS: "partial sums", KERNEL: "pointwise kernels"}
MEMORY, WAITING = "memory had and given back", "waiting"


class Event(NamedTuple):
    """As watch.h has it: the address of an instruction, 0 for a wait; begin and end in nanoseconds."""

    at: int
    begin: int
    end: int


class Spent(NamedTuple):
    """Seconds and number of calls by (section, kind)."""

    seconds: dict[tuple[int, str], float]
    calls: Counter[tuple[int, str]]


def watched() -> list[Event]:
    """What has happened since the last call."""
    source = "".join((Path(native.__file__).parent / name).read_text() for name in native.SOURCES)
    read: Any = compiler.load(source, "fullframe_events")
    read.restype, count = ctypes.POINTER(ctypes.c_int64), ctypes.c_int64()
    found = read(ctypes.byref(count))
    assert count.value <= ROOM, "more events than watch.h has room for"
    return [Event(*found[k : k + 3]) for k in range(0, 3 * count.value, 3)]


def recordings(plan: Plan) -> Iterator[tuple[int, Any]]:
    """Section and instructions of the bytecode of each tile of a plan that is replayed."""
    for schedule in executor._RUNTIMES[plan].schedules.values():
        for number, stage in zip(schedule.stage_range, schedule.stages.list, strict=True):
            found = [bound.bytecode for bound in stage.bound] + ([stage.after.bytecode] if stage.after else [])
            yield from ((number, bytecode.words) for bytecode in found)


def kind(at: int) -> str:
    """What an instruction does."""
    code, first, second = (ctypes.c_int64 * 3).from_address(at)
    if code == CALL:
        return f"library, {ctypes.string_at(first).decode()}.{ctypes.string_at(second).decode()}".rstrip(".")
    if code == OWN:
        functions: dict[str, Any] = owned._LOADED
        loaded = {ctypes.cast(f, ctypes.c_void_p).value: name for name, f in functions.items() if f}
        return f"own, {loaded[first]}"
    return PLAIN.get(code, MEMORY)


def summed(plan: Plan, events: list[Event]) -> Spent:
    """Events by section and kind."""
    starts = sorted((ctypes.addressof(words), ctypes.sizeof(words), number) for number, words in recordings(plan))
    firsts, kinds = [start for start, _, _ in starts], {0: WAITING}
    spent = Spent(defaultdict(float), Counter())
    for e in events:
        if e.at not in kinds:
            kinds[e.at] = kind(e.at)
        number = -1
        if e.at:
            start, size, number = starts[bisect_right(firsts, e.at) - 1]
            assert e.at < start + size
        spent.seconds[number, kinds[e.at]] += 1e-9 * (e.end - e.begin)
        spent.calls[number, kinds[e.at]] += 1
    return spent


def by_kind(spent: Spent, whole: float) -> str:
    """The table of kinds of work, ``whole`` being what the workers have together."""
    seconds: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for (number, name), s in spent.seconds.items():
        seconds[name] += s
        calls[name] += spent.calls[number, name]
    lines = ["| work | s, all workers | share | calls |", "|---|---|---|---|"]
    for name, s in sorted(seconds.items(), key=lambda pair: -pair[1]):
        lines += [f"| {name} | {s:.3f} | {s / whole:.1%} | {calls[name]} |"] if s > 5e-4 * whole else []
    rest = whole - sum(seconds.values())
    lines.append(f"| Python, and the choice of tiles | {rest:.3f} | {rest / whole:.1%} | |")
    outside = seconds[MEMORY] + seconds[WAITING] + rest
    return "\n".join(lines) + f"\n\nOutside kernels: {outside:.2f} s of {whole:.2f} s, **{outside / whole:.1%}**."


def by_section(spent: Spent, plan: Plan, most: int) -> str:
    """The sections that take most."""
    sections: dict[int, dict[str, float]] = defaultdict(dict)
    for (number, name), s in spent.seconds.items():
        if number >= 0:
            sections[number][name] = s
    lines = ["| section | saves | tiles | s | most of it |", "|---|---|---|---|---|"]
    for k in sorted(sections, key=lambda k: -sum(sections[k].values()))[:most]:
        s, total = plan.stages[k], sum(sections[k].values())
        kinds = sorted(sections[k].items(), key=lambda pair: -pair[1])[:3]
        made = ", ".join("x".join(map(str, v.shape)) for v in s.section.saves[:3]) or f"{len(s.section.sums)} sums"
        shares = ", ".join(f"{name} {t / total:.0%}" for name, t in kinds)
        lines.append(f"| {k} | {made} | {len(s.grid)} | {total:.3f} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--halvings", type=int, default=1)
    parser.add_argument("--budget", default="4 GB")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--sections", type=int, default=12)
    given = parser.parse_args()
    native.SOURCES = (str(WATCH), *native.SOURCES)
    net, criterion = network()
    image, label, _ = event(given.halvings)
    step = fullframe.tile(net, loss=criterion, budget=given.budget, workers=given.workers)

    def once() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=given.bfloat16):
            step(image, label).backward()
        return time.perf_counter() - start

    with torch.autocast("cpu", torch.bfloat16, enabled=given.bfloat16):
        plan = step.plan(image, label)
    for _ in range(4):
        once()
    runs = []
    for _ in range(5):
        watched()
        runs.append((once(), watched()))
    runs.sort(key=lambda run: run[0])
    wall, events = runs[len(runs) // 2]
    whole, spent = wall * plan.workers, summed(plan, events)
    precision = "bfloat16" if given.bfloat16 else "float32"
    rows, columns = image.shape[2:]
    head = (
        f"UResNet, 3 x {rows} x {columns}, batch 1, {precision}, {plan.workers} workers, "
        f"{len(plan.stages)} sections, {sum(len(s.grid) for s in plan.stages)} tiles. The middle one of five steps, "
        f"{wall:.2f} s (others {', '.join(f'{w:.2f}' for w, _ in runs)})."
    )
    text = "\n\n".join([head, by_kind(spent, whole), by_section(spent, plan, given.sections)])
    write(f"profile-{precision}-{rows}", f"{text}\n\nbench/profile_step.py, {setting()}")


if __name__ == "__main__":
    main()
