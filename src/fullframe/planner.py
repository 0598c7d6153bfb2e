"""From sections to a plan: order, what to drop and make again, tiles, places. Integers only."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from fullframe import region as box
from fullframe.alternate import alternate
from fullframe.fusion import Fusable, Unit, units_of, work_of
from fullframe.graph import BudgetError, Graph, Op, UnsupportedOpError, Value
from fullframe.memory import lifetimes, place, rounded
from fullframe.plan import LARGE, Bytes, Grid, Plan, Slot, Step
from fullframe.recompute import Draft, drop_until
from fullframe.schedule import orders
from fullframe.section import (
    Cuts,
    Labels,
    Section,
    Tile,
    build_sections,
    choose_cuts,
    label_axes,
    tiled,
)
from fullframe.task import KEPT as TASKS
from fullframe.task import NBYTES

WINDOW = 1_400_000  # bytes of the largest window of a tile: about the second-level cache of one core,
MORE = 1.5  # and so much more where the library is called, whose calls take a while to begin, or numbers are narrow
LEAST = 1 << 19  # maps smaller than this are not worth cutting,
DENSE = 1 << 9  # unless so many operations are spent on each byte of them
FIXED = 100_000_000  # what importing torch's recording machinery, touching its libraries and the threads take
PER_OP = 20 << 10  # and the objects of a recorded and planned op
PER_FORM = 1 << 19  # and the machine code that a library keeps for each form of convolution
KEPT = 2  # times what windows take is held by the C library, which keeps some of what is given back,
LOOSE = 3  # and so many times where the budget has room for it: it is then never told to let go
LANES = 3  # tiles in work where maps live in a second tier: one is fetched, one computed, one put back
ROWS = 8  # nor are strips of fewer rows, mostly halo,
THICK = 16  # or, where there are many, of fewer than these: wide ones are rather cut along another axis, too


@dataclass(frozen=True)
class Request:
    """What to plan for. ``roots``: the inputs' tileable axes. ``tile``: forced tile as
    (input value, axis, pixels) triples. ``free``: values not counted (gradients). ``fusable``:
    whether a pointwise op or a sum has a place in a fused unit. ``window``: bytes that the largest window
    of a tile may have at least. ``host``: bytes of a second tier, in which the stored maps may live where they do
    not fit in the budget; 0 where there is none. ``fixed``: bytes that are taken whatever the plan; None: an estimate
    of what recording, plan and libraries take, which lie in the same memory. ``ahead``: how many steps in a row may
    be in work at the same time where the budget has room for it."""

    budget: int
    workers: int
    roots: tuple[tuple[Value, tuple[int, ...]], ...]
    fusable: Fusable
    tile: tuple[tuple[Value, int, int], ...] | None = None
    free: frozenset[Value] = frozenset()
    window: int = 0
    host: int = 0
    fixed: int | None = None
    ahead: int = 1


def plan(graph: Graph, request: Request) -> Plan:
    """Plan a graph for a budget; raises `BudgetError` naming the smallest budget that would do.

    Maps go to the second tier, if there is one, only where nothing else fits: making them again is far cheaper than
    the way there and back.
    """
    if not request.host:
        return _plan(graph, request)
    with suppress(BudgetError, UnsupportedOpError):
        return _plan(graph, replace(request, host=0))
    return _plan(graph, replace(request, workers=max(request.workers, LANES)))


def _plan(graph: Graph, request: Request) -> Plan:
    labels = label_axes(graph, request.roots)
    cuts = choose_cuts(graph, labels)
    sections = build_sections(graph, cuts)
    sizes = _sizes(graph, cuts)
    kept = [v for v in graph.outputs if v is not None]
    best: tuple[int, Draft] | None = None
    for steps, early in orders(graph, sections, sizes):
        lives = lifetimes(steps, kept)
        peak = max(lives.usage(len(steps), sizes), default=0)
        if best is None or peak < best[0]:
            order = {op: k for k, op in enumerate(graph.ops)}
            best = peak, Draft(cuts, list(steps), early, order, kept, sizes)
    assert best is not None
    return _fit(graph, best[1], request)


def _sizes(graph: Graph, cuts: Cuts) -> dict[Value, int]:
    """Bytes of every stored value; outputs of the graph are the caller's, not counted here."""
    outputs = set(graph.outputs)
    return {v: rounded(v.nbytes) if tiled(v, cuts.labels) else v.nbytes for v in cuts.stored if v not in outputs}


def _fit(graph: Graph, draft: Draft, request: Request) -> Plan:
    """Drop and make again until the whole plan fits; report the smallest plan seen if it never does."""
    smallest: Plan | None = None
    fixed = _fixed(graph) if request.fixed is None else request.fixed
    helped = True
    steps: dict[Section, Step] = {}
    while True:
        made = _finish(graph, draft, replace(request, ahead=1), steps, fixed)
        over = max(made.projected_bytes - request.budget, made.bytes.host - request.host)
        if over <= 0:
            return _roomy(_abreast(graph, draft, request, steps, fixed) or made, request)
        if smallest is None or made.projected_bytes < smallest.projected_bytes:
            smallest = made
        if not helped:
            raise _refusal(smallest, request)
        helped = drop_until(draft, draft.peak() - over)


def _abreast(graph: Graph, draft: Draft, request: Request, known: dict[Section, Step], fixed: int) -> Plan | None:
    """A plan of the same sections with as many in work at once as fit, those of several branches in turns."""
    if request.ahead == 1:
        return None
    labels = draft.cuts.labels

    def slight(section: Section) -> bool:
        return not any(tiled(v, labels) for v in (*section.loads, *section.outputs))

    draft = replace(draft, steps=alternate(draft.steps, draft.early, draft.kept, draft.sizes, slight))
    for ahead in (request.ahead, 2):
        made = _finish(graph, draft, replace(request, ahead=ahead), known, fixed, ahead - 1)
        if made.projected_bytes <= request.budget:
            return made
    return None


def _roomy(plan: Plan, request: Request) -> Plan:
    """The plan with all that the C library may keep of windows that it was given back, if the budget has room for it;
    else it is tight."""
    if request.fixed is not None:  # on a device, where torch's allocator has other ways
        return plan
    more = plan.bytes.scratch // KEPT * (LOOSE - KEPT)
    if plan.projected_bytes + more > request.budget:
        return replace(plan, tight=True)
    return replace(plan, bytes=replace(plan.bytes, scratch=plan.bytes.scratch + more))


def _fixed(graph: Graph) -> int:
    """Bytes that no tile or map takes: an estimate."""
    called = [op for op in graph.ops if op.rule.heavy and op.rule.calls(op)]
    forms = {(op.target, str(op.args), tuple(v.shape for v in op.inputs)) for op in called}
    return FIXED + PER_OP * len(graph.ops) + PER_FORM * len(forms)


def _refusal(plan: Plan, request: Request) -> Exception:
    least, budget = plan.projected_bytes, request.budget
    if plan.bytes.host > request.host:
        return BudgetError(
            f"the stored maps do not fit in a budget of {budget:,} bytes, and in the host's memory they need "
            f"{plan.bytes.host:,} bytes, where {request.host:,} are free; free some there, or raise the budget",
            least,
        )
    if plan.whole and plan.bytes.arena > budget:
        first = plan.whole[0]
        return UnsupportedOpError(
            f"{first} can only run whole, and the step then needs at least {least:,} bytes; the budget is "
            f"{budget:,}. Raise the budget, or give the op a rule in fullframe/ops"
        )
    whole = f"; of its ops {', '.join(plan.whole)} can only run whole" if plan.whole else ""
    return BudgetError(
        f"the step does not fit in a budget of {budget:,} bytes; the smallest that would do is "
        f"{least:,} bytes ({least / 1e9:.3f} GB){whole}",
        least,
    )


# Tiles, scratch and places -------------------------------------------------------------------------


def _finish(graph: Graph, draft: Draft, request: Request, known: dict[Section, Step], fixed: int,
            linger: int = 0) -> Plan:  # fmt: skip
    """The plan of a draft; ``known`` keeps the steps of sections that an earlier draft had too. For ``linger`` steps
    more no other map gets the place of one, where the peak allows it: nobody need then wait for its readers."""
    labels, sizes = draft.cuts.labels, draft.sizes
    lives = draft.lifetimes()
    maps = {v: n for v, n in sizes.items() if tiled(v, labels)}
    offsets, arena = place(lives.lingering(len(draft.steps), maps, linger), maps)
    frees: list[list[Value]] = [[] for _ in draft.steps]
    kept = set(draft.kept)
    for value, last in lives.last.items():
        if value not in kept:
            frees[last].append(value)
    for section in draft.steps:
        if section not in known:
            known[section] = _step(section, labels, request, frozenset(maps) if request.host else frozenset())
    turns = _turns(draft, maps)
    steps = tuple(replace(known[s], frees=tuple(f), turned=turns[s]) for s, f in zip(draft.steps, frees, strict=True))
    small = {v: n for v, n in sizes.items() if v not in maps}
    usage = lives.usage(len(steps), small)
    loose = [sum(small.get(v, 0) for v in s.section.outputs) for s in steps]
    taken = [
        _scratch(steps[k : k + request.ahead], request.workers)
        + sum(n for n in loose[k + 1 : k + request.ahead] if n <= LARGE)
        for k in range(len(steps))
    ]
    scratch = max(taken, default=0)
    untiled = max((u + n for u, n in zip(usage, taken, strict=True)), default=0)
    given = set(graph.inputs) | request.free
    outputs = sum(v.nbytes for v in draft.kept if v not in given)
    whole = tuple(f"{op.target} ({op.path or 'in the step'})" for s in steps for op in s.section.ops
                  if op.rule.kind == "whole" and tiled(op.output, labels))  # fmt: skip
    slots = {v: Slot(offsets[v], maps[v]) for v in offsets}
    here, away = (0, arena) if request.host else (arena, 0)
    if request.fixed is None:  # tasks lie in the same memory
        fixed += NBYTES * min(TASKS, sum(len(s.grid) for s in steps))
    held = scratch * (KEPT if request.fixed is None else 1)
    total = Bytes(here, max(0, untiled - scratch), held, outputs, fixed, away)
    return Plan(graph, labels, steps, draft.early, slots, total, request.budget, request.workers, whole,
                request.ahead)  # fmt: skip


def _turns(draft: Draft, maps: dict[Value, int]) -> dict[Section, bool]:
    """Which sections make their last tile first: the other way round than what made the map they read, whose end may
    still be in a cache. It follows from the sections, not from their order, and so does what sums are rounded to."""
    maker = {v: s for s in draft.steps for v in s.outputs}
    found: dict[Section, bool] = {}
    for section in draft.steps:
        read = [v for v in section.loads if v in maps and v in maker]
        latest = max(read, key=lambda v: (maps[v], draft.order.get(maker[v].ops[-1], 0)), default=None)
        found[section] = latest is not None and not found[maker[latest]]
    return found


def _scratch(steps: Sequence[Step], workers: int) -> int:
    """Most bytes of windows and sums while these steps are in work: of as many tiles as there are workers."""
    windows = [s.window for s in steps for _ in range(min(workers, len(s.grid)))]
    return sum(sorted(windows)[-workers:]) + sum(sorted(s.sums for s in steps)[-workers:])


def _step(section: Section, labels: Labels, request: Request, away: frozenset[Value]) -> Step:
    grid = choose_grid(section, labels, request)
    units = units_of(section, labels, request.fusable)
    device = request.fixed is not None
    window = max(window_bytes(section, units, labels, tile, away, device) for tile in grid.samples())
    running = min(request.workers, len(grid))
    sums = sum(prod(op.output.shape) * (8 * (1 + running) if len(grid) > 1 else _alone(op)) for op in section.sums)
    return Step(section, units, grid, (), window, sums, len(grid) > 1)


def _alone(op: Op) -> int:
    """Bytes of each number of a result that is the whole sum: products come in the type of the sum, others wider."""
    return op.output.itemsize if op.rule.heavy else 8


def window_bytes(section: Section, units: Sequence[Unit], labels: Labels, tile: Tile,
                 away: Collection[Value] = (), device: bool = False) -> int:  # fmt: skip
    """Most bytes of windows alive at once in a tile, with what its ops take beside them while they run.

    Parts of the maps that live ``away`` are windows too. On a ``device`` libraries copy what a convolution reads.
    """
    works, regions = work_of(units, section.saves, frozenset(section.sums), labels, tile)
    last = {value: k for k, work in enumerate(works) for value in work.unit.reads}
    alive = {v: box.size(regions[v]) * v.itemsize for v in section.loads if v in away and v in last}
    most = 0
    for k, work in enumerate(works):
        unit = work.unit
        for value in dict.fromkeys((*unit.makes, *(v for v in unit.saves if v in away))):
            stored = unit.own and value in unit.saves and value not in away
            alive[value] = 0 if stored or value not in regions else box.size(regions[value]) * value.itemsize
        single = () if unit.fused else (*unit.ops, *unit.sums)
        scratch = max((op.rule.scratch(op, work.region) for op in single), default=0)
        if device and any(op.rule.heavy for op in single):
            scratch = max(scratch, sum(box.size(r) * v.itemsize for v, r in zip(unit.reads, work.reads, strict=True)))
        most = max(most, sum(alive.values()) + scratch)
        for value in (*unit.reads, *(v for v in unit.saves if v in away)):
            if last.get(value, k) == k:
                alive.pop(value, None)
    return most


def choose_grid(section: Section, labels: Labels, request: Request) -> Grid:
    """Tiles of a section: full-width strips of about a window's bytes, or the forced tile."""
    root = _root(section, labels)
    if root is None or any(op.rule.kind == "whole" and tiled(op.output, labels) for op in section.ops):
        return Grid()
    axes = [(label, n) for label, n in zip(labels[root], root.shape, strict=True) if label is not None]
    if request.tile is not None:
        return _forced(axes, labels, request)
    largest = max((v for v in (root, *section.loads) if tiled(v, labels)), key=lambda v: v.nbytes)
    more = largest.itemsize < 4 or any(op.rule.calls(op) for op in section.ops)
    count = max(1, -(-largest.nbytes // max(int(WINDOW * (MORE if more else 1)), request.window)))
    rows = ROWS if count <= 2 * request.workers else THICK
    if root.nbytes >= LEAST and request.workers > 1:
        count = max(count, 2 * request.workers)
        count += -count % request.workers  # or some would wait for one that has a last tile
    elif _dense(section, root):
        count, rows = max(count, request.workers), ROWS // 2
    if count == 1:
        return Grid()
    ratio = _alignment(section, labels, dict(axes))
    chosen = []
    for position, (label, extent) in enumerate(axes):
        least = 1 if position == 0 and len(axes) > 1 else min(rows, extent)
        step = max(least, -(-extent // count))
        align = ratio.get(label, 1)
        step = min(extent, -(-step // align) * align)
        chosen.append((label, extent, step))
        pieces = -(-extent // step)
        count = (count + pieces // 2) // pieces  # what the other axes are still to be cut into, about
        if count <= 1:
            break
    return Grid(tuple(chosen))


def _dense(section: Section, root: Value) -> bool:
    """Whether a section is worth cutting for what is spent on its map, and no large sum would be made per tile."""
    spent = 0
    for op in section.ops:
        rule: Any = op.rule
        spent += rule.cost(op, prod(op.output.shape)) if rule.heavy and rule.kind != "reduce" else 0
    return spent > DENSE * root.nbytes and all(op.output.nbytes < root.nbytes for op in section.sums)


def _root(section: Section, labels: Labels) -> Value | None:
    """The largest tiled map among what a section makes or sums over."""
    found = [v for v in section.saves if tiled(v, labels)]
    found += [op.inputs[getattr(op.rule, "driver", 0)] for op in section.sums]
    found = [v for v in found if tiled(v, labels)]
    return max(found, key=lambda v: v.nbytes, default=None)


def _forced(axes: list[tuple[int, int]], labels: Labels, request: Request) -> Grid:
    assert request.tile is not None
    forced = {}
    for value, axis, pixels in request.tile:
        label = labels[value][axis]
        if label is not None:
            forced[label] = (value.shape[axis], min(pixels, value.shape[axis]))
    return Grid(tuple((label, *forced[label]) for label, _ in axes if label in forced))


def _alignment(section: Section, labels: Labels, extents: dict[int, int]) -> dict[int, int]:
    """Multiples at which tile boundaries fall on whole pixels of the section's smaller maps."""
    found: dict[int, int] = {}
    for op in section.ops:
        for value in (op.output, *op.inputs):
            for label, n in zip(labels[value], value.shape, strict=True):
                if label in extents and n > 0 and extents[label] % n == 0:
                    found[label] = max(found.get(label, 1), extents[label] // n)
    return {label: n for label, n in found.items() if n <= 64}
