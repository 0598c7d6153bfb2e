"""How a plan prints."""

from __future__ import annotations

from math import prod

from fullframe import region as box
from fullframe.plan import Plan, Step
from fullframe.fusion import work_of
from fullframe.section import tiled


def human(nbytes: float) -> str:
    """Bytes in decimal units, as budgets are given."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def describe(plan: Plan) -> str:
    """The whole plan as text: totals, then each section with what it loads, saves and sums."""
    b = plan.bytes
    tiled_steps = [s for s in plan.steps if _is_tiled(plan, s)]
    cuts = [v for s in plan.steps for v in s.section.saves if tiled(v, plan.labels)]
    barriers = [op for s in plan.steps for op in s.section.sums]
    again = sum(s.section.clone for s in plan.steps)
    lines = [
        f"plan: {len(plan.graph.ops)} ops in {len(tiled_steps)} tiled sections and {len(plan.steps) - len(tiled_steps)} untiled",
        f"  cuts {len(cuts)} (of them made again {again}), sums {len(barriers)}, workers {plan.workers}",
        f"  projected {human(b.total)} of a budget of {human(plan.budget)}: stored maps {human(b.arena)}, "
        f"untiled {human(b.untiled)}, windows {human(b.scratch)}, outputs {human(b.outputs)}",
    ]
    lines += [f"  runs whole: {name}" for name in plan.whole]
    for k, step in enumerate(plan.steps):
        if k == plan.early and 0 < k:
            lines.append("  -- outputs are ready; gradients arrive --")
        if _is_tiled(plan, step):
            lines.append(_line(plan, k, step))
    return "\n".join(lines)


def _is_tiled(plan: Plan, step: Step) -> bool:
    s = step.section
    return bool(s.sums) or any(tiled(v, plan.labels) for v in s.saves)


def _line(plan: Plan, k: int, step: Step) -> str:
    s = step.section
    loads = " ".join(v.name for v in s.loads if tiled(v, plan.labels)) or "-"
    saves = " ".join(f"{v.name}{list(v.shape)}" for v in s.saves) or "-"
    sums = " ".join(f"{op.output.name}" for op in s.sums) or "-"
    mark = "again " if s.clone else ""
    tiles = "x".join(map(str, step.grid.counts())) or "1"
    frees = " ".join(v.name for v in step.frees if tiled(v, plan.labels)) or "-"
    return f"  {k:4d} {mark}load {loads} | {len(s.ops)} ops, tiles {tiles}, halo {halo(plan, step):.0%} | save {saves} | sum {sums} | free {frees}"


def halo(plan: Plan, step: Step) -> float:
    """Elements made more than once for the halo, relative to those needed once (interior tile)."""
    tiles = list(step.grid.samples())
    tile = tiles[len(tiles) // 2]
    made = owned = 0
    section = step.section
    for work in work_of(step.units, section.saves, frozenset(section.sums), plan.labels, tile)[0]:
        for op in work.unit.ops:
            if op.rule.heavy:
                made += box.size(work.region)
                owned += prod(op.output.shape) / len(step.grid)
    return max(0.0, made / owned - 1) if owned else 0.0
