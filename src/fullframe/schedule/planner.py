"""From sections to a plan: order, what to rematerialize, tiles, places. Integers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

from fullframe.errors import BudgetError, UnsupportedOpError
from fullframe.ir.graph import Graph, Op, Value
from fullframe.partition.fusion import fusion_groups
from fullframe.partition.saved_values import SavedValues, choose_saved_values
from fullframe.partition.sections import Section, build_sections
from fullframe.partition.tile_axes import TileAxes, find_tile_axes, tiled
from fullframe.schedule.clones import Draft, rematerialize_until
from fullframe.schedule.cost import spent
from fullframe.schedule.memory import lifetimes, place, rounded
from fullframe.schedule.order import interleave, orders
from fullframe.schedule.plan import KEPT as TASKS
from fullframe.schedule.plan import LARGE, NBYTES, Bytes, Plan, Stage
from fullframe.schedule.request import Request
from fullframe.schedule.tiling import choose_grid, deep_grid, window_bytes
from fullframe.schedule.within import within
from fullframe.storage.protocol import DEVICE, HOST, Slot

FIXED = 100_000_000  # what importing torch's recording machinery, touching its libraries and the threads take
PER_OP = 20 << 10  # and the objects of a recorded and planned op
PER_FORM = 1 << 19  # and the machine code that a library keeps for each form of convolution
KEPT = 2  # times what windows take is held by the C library, which keeps some of what is given back,
KEPT_AT_MOST = 3  # and so many times where the budget has room for it: it is then never told to let go
LITTLE = 0.02  # of all that a step takes: stored maps that are no more are not worth a search
MANY = 400  # stages, beyond which a search for what to make again would take minutes: it is left out
Known = dict[tuple[Section, int], Stage]
STREAMS = 3  # tiles in work where maps live in a second tier: one is fetched, one computed, one put back


def plan(graph: Graph, request: Request) -> Plan:
    """Plan a graph for a budget; raises `BudgetError` naming the smallest budget that would do.

    Maps go to the second tier, if there is one, only where nothing else fits: recomputing them is far cheaper than
    the way there and back.
    """
    if not request.host:
        return _plan(graph, request)
    alone: BudgetError | None = None
    try:
        return _plan(graph, replace(request, host=0))
    except BudgetError as error:
        alone = error
    except UnsupportedOpError:
        pass
    try:
        return _plan(graph, replace(request, workers=max(request.workers, STREAMS)))
    except BudgetError as error:
        if alone is not None and alone.smallest < error.smallest:
            raise alone from None
        raise


def _plan(graph: Graph, request: Request) -> Plan:
    tile_axes = find_tile_axes(graph, request.roots)
    saved = choose_saved_values(graph, tile_axes)
    sections = build_sections(graph, saved)
    sizes = _sizes(graph, saved)
    kept = [v for v in graph.outputs if v is not None]
    best: tuple[int, Draft] | None = None
    for stages, early in orders(graph, sections, sizes):
        lives = lifetimes(stages, kept)
        peak = max(lives.usage(len(stages), sizes), default=0)
        if best is None or peak < best[0]:
            order = {op: k for k, op in enumerate(graph.ops)}
            best = peak, Draft(saved, list(stages), early, order, kept, sizes)
    assert best is not None
    return _fit(graph, best[1], request)


def _sizes(graph: Graph, saved: SavedValues) -> dict[Value, int]:
    """Bytes of every stored value; outputs of the graph are the caller's, not counted here."""
    outputs = set(graph.outputs)
    return {v: rounded(v.nbytes) if tiled(v, saved.tile_axes) else v.nbytes for v in saved.stored if v not in outputs}


def _fit(graph: Graph, draft: Draft, request: Request) -> Plan:
    """The plan that makes nothing again if it fits, else the fastest found that does; `BudgetError` names the
    smallest.
    """
    fixed = _fixed(graph) if request.fixed is None else request.fixed
    fastest = sum(spent(op) for section in draft.stages for op in section.ops if op.rule.heavy)
    stages: Known = {}

    def finish(draft: Draft, most: int) -> Plan:
        return _finish(graph, draft, replace(request, max_in_flight=1, most=most), stages, fixed)

    def over(made: Plan) -> int:
        return max(made.projected_bytes - request.budget, made.bytes.host - request.host)

    made = finish(draft, 0)
    if over(made) > 0:
        cloned, smallest = _cloned(draft, made, finish, over)
        maps = made.bytes.arena + made.bytes.host
        if over(smallest) <= 0:
            draft, made = cloned, smallest
        elif maps < LITTLE * (made.bytes.total + made.bytes.host) or len(draft.stages) > MANY:
            raise _refusal(smallest, request)
        else:
            found = within(graph, draft, made, finish, over)
            if over(found.plan) > 0:
                raise _refusal(min(smallest, found.plan, key=over), request)
            draft, made, request = found.draft, found.plan, replace(request, most=found.most)
    found = _roomy(_pipelined(graph, draft, request, stages, fixed) or made, request)
    return replace(found, fastest=fastest)


def _cloned(
    draft: Draft, made: Plan, finish: Callable[[Draft, int], Plan], over: Callable[[Plan], int]
) -> tuple[Draft, Plan]:
    """The draft with values dropped and made again by sections of their own until its plan fits; the smallest plan
    seen where that is not enough.
    """
    saved = draft.saved
    saved = replace(saved, tile_axes=dict(saved.tile_axes), stored=set(saved.stored), maker=dict(saved.maker))
    draft = replace(draft, saved=saved, stages=[*draft.stages], order=dict(draft.order), sizes=dict(draft.sizes))
    smallest = made
    while over(made) > 0 and rematerialize_until(draft, draft.peak() - over(made)):
        made = finish(draft, 0)
        smallest = min(smallest, made, key=over)
    if over(made) > 0:
        made = finish(draft, 0)
        smallest = min(smallest, made, key=over)
    return draft, smallest


def _pipelined(graph: Graph, draft: Draft, request: Request, known: Known, fixed: int) -> Plan | None:
    """A plan of the same sections with as many in work at once as fit, those of several branches in turns."""
    if request.max_in_flight == 1:
        return None
    tile_axes = draft.saved.tile_axes

    def trivial(section: Section) -> bool:
        return not any(tiled(v, tile_axes) for v in (*section.loads, *section.outputs))

    draft = replace(draft, stages=interleave(draft.stages, draft.early, draft.kept, draft.sizes, trivial))
    for max_in_flight in (request.max_in_flight, 2):
        made = _finish(graph, draft, replace(request, max_in_flight=max_in_flight), known, fixed, max_in_flight - 1)
        if made.projected_bytes <= request.budget:
            return made
    return None


def _roomy(plan: Plan, request: Request) -> Plan:
    """The plan with all that the C library may keep of windows that it was given back, if the budget has room for it;
    else it is tight."""
    if request.fixed is not None:  # on a device, where torch's allocator has other ways
        return plan
    more = plan.bytes.scratch // KEPT * (KEPT_AT_MOST - KEPT)
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


def _finish(graph: Graph, draft: Draft, request: Request, known: Known, fixed: int,
            linger: int = 0) -> Plan:  # fmt: skip
    """The plan of a draft; ``known`` keeps the stages of sections that an earlier draft had too. For ``linger``
    stages more no other map gets the place of one, where the peak allows it: nobody need then wait for its
    readers."""
    tile_axes, sizes = draft.saved.tile_axes, draft.sizes
    lives = draft.lifetimes()
    maps = {v: n for v, n in sizes.items() if tiled(v, tile_axes)}
    offsets, arena = place(lives.lingering(len(draft.stages), maps, linger), maps)
    frees: list[list[Value]] = [[] for _ in draft.stages]
    kept = set(draft.kept)
    for value, last in lives.last.items():
        if value not in kept:
            frees[last].append(value)
    for section in draft.stages:
        key = section, request.most if section.recompute else 0
        if key not in known:
            known[key] = _stage(section, tile_axes, request, frozenset(maps) if request.host else frozenset())
    made = [known[s, request.most if s.recompute else 0] for s in draft.stages]
    reversals = _reversals(draft, maps)
    stages = tuple(
        replace(stage, frees=tuple(f), reversed=reversals[stage.section])
        for stage, f in zip(made, frees, strict=True)
    )
    small = {v: n for v, n in sizes.items() if v not in maps}
    usage = lives.usage(len(stages), small)
    loose = [sum(small.get(v, 0) for v in s.section.outputs) for s in stages]
    taken = [
        _scratch(stages[k : k + request.max_in_flight], request.workers)
        + sum(n for n in loose[k + 1 : k + request.max_in_flight] if n <= LARGE)
        for k in range(len(stages))
    ]
    scratch = max(taken, default=0)
    untiled = max((u + n for u, n in zip(usage, taken, strict=True)), default=0)
    given = set(graph.inputs) | request.free
    outputs = sum(v.nbytes for v in draft.kept if v not in given)
    whole = tuple(f"{op.target} ({op.path or 'in the step'})" for s in stages for op in s.section.ops
                  if op.rule.kind == "whole" and tiled(op.output, tile_axes))  # fmt: skip
    tier = HOST if request.host else DEVICE
    slots = {v: Slot(offsets[v], maps[v], v.shape, v.dtype, v.itemsize, tier) for v in offsets}
    here, offloaded = (0, arena) if request.host else (arena, 0)
    if request.fixed is None:  # tasks lie in the same memory
        fixed += NBYTES * min(TASKS, sum(len(s.grid) for s in stages))
    held = scratch * (KEPT if request.fixed is None else 1)
    total = Bytes(here, max(0, untiled - scratch), held, outputs, fixed, offloaded)
    return Plan(graph, tile_axes, stages, draft.early, slots, total, request.budget, request.workers, whole,
                request.max_in_flight)  # fmt: skip


def _reversals(draft: Draft, maps: dict[Value, int]) -> dict[Section, bool]:
    """Which sections make their last tile first: the other way round than what made the map they read, whose end may
    still be in a cache. It follows from the sections, not from their order, and so does what sums are rounded to."""
    maker = {v: s for s in draft.stages for v in s.outputs}
    found: dict[Section, bool] = {}
    for section in draft.stages:
        read = [v for v in section.loads if v in maps and v in maker]
        latest = max(read, key=lambda v: (maps[v], draft.order.get(maker[v].ops[-1], 0)), default=None)
        found[section] = latest is not None and not found[maker[latest]]
    return found


def _scratch(stages: Sequence[Stage], workers: int) -> int:
    """Most bytes of windows and sums while these stages are in work: of as many tiles as there are workers."""
    windows = [s.window for s in stages for _ in range(min(workers, len(s.grid)))]
    return sum(sorted(windows)[-workers:]) + sum(sorted(s.sums for s in stages)[-workers:])


def _stage(section: Section, tile_axes: TileAxes, request: Request, offloaded: frozenset[Value]) -> Stage:
    grid = choose_grid(section, tile_axes, request)
    groups = fusion_groups(section, tile_axes, request.fusable)
    if section.recompute:
        grid = deep_grid(section, groups, tile_axes, grid, request)
    tiles = grid.corners() if section.recompute else grid.samples()
    device = request.fixed is not None
    window = max(window_bytes(section, groups, tile_axes, tile, offloaded, device) for tile in tiles)
    running = min(request.workers, len(grid))
    waiting = (len(grid) - 1).bit_length()  # nodes of a sum's tree, one a level
    held = 8 * (waiting + running)
    sums = sum(prod(op.output.shape) * (held if len(grid) > 1 else _result_bytes(op)) for op in section.sums)
    return Stage(section, groups, grid, (), window, sums, len(grid) > 1)


def _result_bytes(op: Op) -> int:
    """Bytes of each number of a result that is the whole sum: products come in the type of the sum, others wider."""
    return op.output.itemsize if op.rule.heavy else 8
