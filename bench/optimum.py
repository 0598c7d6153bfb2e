"""How far is what the planner finds from the best there is?

    python bench/optimum.py [--graphs 24]

Small captured graphs, drawn at random. Of what is stored from stage to stage every state is looked at, so the least
operations (halo and bytes moved included, as the search counts them) are known for each limit of stored bytes. Beside
them stands what the search finds, at eight limits from all that is ever stored to the least that does. A graph counts
in which there is something to decide: less stored costs at least a twentieth more. And for each plan: the arena's
height over the most bytes that are alive at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from math import inf
from pathlib import Path
from typing import NamedTuple

from record import setting, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from optimal import Optimum, TooLarge, best, plan_of, searched

import fullframe
from fullframe.compiler import kept_plans
from fullframe.schedule.memory import lifetimes

SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1, 0.0)  # of the way from the least to the most that is stored


class Row(NamedTuple):
    """A graph: its stages, the values that may be stored, how much dearer it is to store little, and by how much what
    is found is dearer than it need be, by limit."""

    seed: int
    stages: int
    values: int
    dearest: float
    above: tuple[float, ...]


def looked_at(seed: int, graphs: list) -> Row | None:
    """A row of the table; None where there is nothing to decide, or too much to look at."""
    graph, draft = max(graphs, key=lambda pair: len(pair[0].ops))
    starts = searched(graph, draft)
    try:
        optima = [Optimum(start) for start in starts]
    except TooLarge:
        return None
    most = max(max(start.profile(), default=0) for start in starts)
    reached = sorted({used for o in optima for steps in o.steps for *_, used in steps} | {most})
    least = next(limit for limit in reached if min(o.least(limit) for o in optima) < inf)
    limits = [least + share * (most - least) for share in SHARES]
    costs = [min(o.least(limit) for o in optima) for limit in limits]
    if costs[-1] < 1.05 * costs[0]:
        return None
    above = tuple(best(starts, limit) / cost - 1 for limit, cost in zip(limits, costs, strict=True))
    values = sum(not always for always in starts[0].nodes.always)
    return Row(seed, len(starts[0].stages), values, costs[-1] / costs[0], above)


def height(plan: fullframe.Plan) -> float | None:
    """The arena's bytes over the most that are alive at once; None where nothing is stored."""
    lives = lifetimes([s.section for s in plan.stages], [v for v in plan.graph.outputs if v is not None])
    sizes = {v: slot.nbytes for v, slot in plan.slots.items()}
    peak = max(lives.usage(len(plan.stages), sizes), default=0)
    return plan.bytes.arena / peak if peak else None


def report(rows: list[Row], heights: list[float], tried: int) -> str:
    every = sorted(a for r in rows for a in r.above if a < inf)
    missed = sum(a == inf for r in rows for a in r.above)
    lines = [
        "# From the best that there is",
        "",
        setting(),
        "",
        f"{len(rows)} graphs, {len(SHARES)} limits each: above the least operations by "
        f"{statistics.median(every):.2%} in the median, {every[int(0.9 * len(every))]:.1%} at nine of ten, "
        f"{every[-1]:.1%} at most; nothing found where there is something: {missed}.",
        f"The arena of {len(heights)} plans ({tried} networks tried): {statistics.median(heights):.3f} times the "
        f"most bytes alive at once in the median, {max(heights):.3f} at most.",
        "",
        "| seed | stages | values | dearest over cheapest | " + " | ".join(f"{s:.0%}" for s in SHARES) + " |",
        "|---|---|---|---|" + "---|" * len(SHARES),
    ]
    for r in rows:
        cells = " | ".join("none" if a == inf else f"{a:.1%}" for a in r.above)
        lines.append(f"| {r.seed} | {r.stages} | {r.values} | {r.dearest:.2f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=24)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    kept_plans.ON = False
    rows: list[Row] = []
    heights: list[float] = []
    seed = given.first
    while len(rows) < given.graphs:
        graphs, plan = plan_of(seed)
        found = height(plan)
        heights += [] if found is None else [found]
        row = looked_at(seed, graphs)
        if row is not None:
            rows.append(row)
            print(row, flush=True)
        seed += 1
    write("optimum", report(rows, heights, seed - given.first))


if __name__ == "__main__":
    main()
