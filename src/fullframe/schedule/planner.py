"""From sections to a plan: order, what to rematerialize, tiles, places. Integers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from math import prod

from fullframe.errors import BudgetError, UnsupportedOpError
from fullframe.ir.graph import Graph, Op, Value
from fullframe.partition.fusion import fusion_groups
from fullframe.partition.saved_values import SavedValues, choose_saved_values
from fullframe.partition.sections import Section, build_sections
from fullframe.partition.tile_axes import TileAxes, find_tile_axes, tiled
from fullframe.schedule import verify
from fullframe.schedule.clones import Draft, rematerialize_until
from fullframe.schedule.cost import BYTE, spent
from fullframe.schedule.memory import Lifetimes, lifetimes, place, rounded
from fullframe.schedule.order import interleave, orders
from fullframe.schedule.placement import Versions, spill
from fullframe.schedule.plan import (
    Bytes,
    Plan,
    Stage,
    banded,
    bookkeeping,
    kinds_of,
    runs_whole,
    stage_cost,
    tables_of,
)
from fullframe.schedule.rematerialize import Stages
from fullframe.schedule.request import LARGE, Request
from fullframe.schedule.saved_plan import Limits
from fullframe.schedule.shares import Shares, shares_of
from fullframe.schedule.tiling import choose_grid, deep_grid, handed_over, window_bytes
from fullframe.schedule.within import searches_of, within
from fullframe.storage.protocol import DEVICE, DISK, DISK_BUFFER, HOST, Slot

FIXED = 35_000_000  # what touching torch's libraries and the threads take,
IMPORTS = 65_000_000  # what importing torch's recording machinery takes, where that is yet to be done,
PER_OP = 20 << 10  # and the objects of a recorded and planned op
PER_FORM = 1 << 19  # and the machine code that a library keeps for each form of convolution
KEPT = 2  # times what windows take is held by the C library, which keeps some of what is given back,
KEPT_AT_MOST = 3  # and so many times where the budget has room for it: it is then never told to let go
KEPT_ANYWAY = 64 << 20  # bytes that it keeps for a thread without being asked
LITTLE = 0.02  # of all that a step takes: stored maps that are no more are not worth a search
REPEATS = 3  # times that the room for maps is estimated, which depends on the windows of what is on disk,
ONCE = 1  # or so many, where a plan is only to be compared with others
ALONE = 4  # times the budget: where more is stored, a disk that there is is used before all else is tried
Known = dict[tuple[Section, int, frozenset[Value]], Stage]
PER_BYTE = 1.0  # times the operations that are made while a disk moves a byte
APART = 0.25  # of the shorter of the two, arithmetic and the disk's work, that is not done behind the other
WORTH = (0.0, 0.12, 0.4)  # times that price, at which a search takes a byte that is stored, or loaded, in any memory
DEAR = 1.05  # times the price of the ops alone, from which on it may pay to store less on a disk
LARGEST = 16 << 20  # bytes of untiled values, from which on copies cost more than a stage made alone
STREAMS = 3  # tiles in work where maps live in a second tier: one is fetched, one computed, one put back


def plan(graph: Graph, request: Request) -> Plan:
    """Plan a graph for a budget; raises `BudgetError` naming the smallest budget that would do.

    Maps go to the host's memory, if that is another one, only where nothing else fits: recomputing them is far
    cheaper than the way there and back. They go to a disk where nothing else fits, or where all else makes so much
    again that the disk is faster.
    """
    found: Plan | None = None
    refused: BudgetError | None = None
    begun = _Begun(graph, request)
    for allowed in _tiers(request, begun.draft.peak()):
        if found is not None and not (allowed.disk and _again(found)):
            break
        try:
            made = _fit(begun, allowed)
        except BudgetError as error:
            refused = error if refused is None or error.smallest <= refused.smallest else refused
        except UnsupportedOpError:
            if allowed.host == request.host and allowed.disk == request.disk and found is None:
                raise
        else:
            found = made if found is None or price(made, request) < price(found, request) else found
    if found is None:
        assert refused is not None
        raise refused
    if verify.ON:
        verify.verify_plan(found)
    asked = Limits(request.budget, request.disk, request.host, request.workers, request.rate, request.speed,
                   request.imports)  # fmt: skip
    return replace(found, limits=asked)


def _again(plan: Plan) -> bool:
    """Whether anything is made again in a plan."""
    return any(stage.section.clone or stage.section.recompute for stage in plan.stages)


def _tiers(request: Request, stored: int) -> list[Request]:
    """The request without memories but the device's own, and then with more and more of those that there are. Where
    far more is stored than that has room for, a disk is taken at once: its plans, too, make again what is cheaper
    than the way there and back, and the search for others takes as long as theirs."""
    if request.disk and not request.host and stored > ALONE * request.budget:
        return [request]
    found = [replace(request, host=0, disk=0)]
    if request.host:
        request = replace(request, workers=max(request.workers, STREAMS))
        found.append(replace(request, disk=0))
    return [*found, request] if request.disk else found


def price(plan: Plan, request: Request) -> float:
    """What a step costs, in operations: its ops, or what a disk moves meanwhile, whichever takes longer, and a part
    of the other."""
    ops = computed(plan)
    moved = per_byte(request) * sum(plan.disk_traffic) if plan.bytes.disk else 0.0
    return max(ops, moved) + APART * min(ops, moved)


def per_byte(request: Request) -> float:
    """Operations that are made while the disk moves a byte."""
    return PER_BYTE * request.speed / request.rate


def computed(plan: Plan) -> float:
    """Operations of a step, those of cheap ops as much as the time that they take, about."""
    return sum((stage_cost(plan, stage) for stage in plan.stages), 0.0)


class _Begun:
    """A graph in the order in which least is stored at once, and what planning it within some memories has found that
    planning it within others asks for again: stages of sections, by the number of workers, and searches."""

    def __init__(self, graph: Graph, request: Request):
        self.graph = graph
        tile_axes = find_tile_axes(graph, request.roots)
        saved = choose_saved_values(graph, tile_axes)
        sections = build_sections(graph, saved)
        sizes = _sizes(graph, saved, request)
        kept = [v for v in graph.outputs if v is not None]
        best: tuple[int, Draft] | None = None
        for stages, early in orders(graph, sections, sizes):
            lives = lifetimes(stages, kept)
            peak = max(lives.usage(len(stages), sizes), default=0)
            if best is None or peak < best[0]:
                order = {op: k for k, op in enumerate(graph.ops)}
                best = peak, Draft(saved, list(stages), early, order, kept, sizes)
        assert best is not None
        self.draft = best[1]
        self.known: dict[int, Known] = {}
        self.versions = Versions(request.copied if request.split is None else None)

    @cached_property
    def searches(self) -> list[Stages]:
        return searches_of(self.graph, self.draft)


def _sizes(graph: Graph, saved: SavedValues, request: Request) -> dict[Value, int]:
    """Bytes of every stored value; outputs of the graph are the caller's, not counted here. Of a map that is divided
    among ranks these are about what one has of it: `_arranged` counts the rows that it reads beyond."""
    outputs, tile_axes = set(graph.outputs), saved.tile_axes
    tile_axis = None if request.split is None else request.split.tile_axis(tile_axes)

    def size(value: Value) -> int:
        if not tiled(value, tile_axes):
            return value.nbytes
        divided = tile_axis is not None and tile_axis in tile_axes[value]
        return rounded(value.nbytes // request.split.ranks if request.split and divided else value.nbytes)

    return {v: size(v) for v in saved.stored if v not in outputs}


def _fit(begun: _Begun, request: Request) -> Plan:
    """The plan that makes nothing again if it fits, else the fastest found that does; `BudgetError` names the
    smallest. The request may differ from that with which the graph was begun in its memories and workers alone.
    """
    graph, draft = begun.graph, begun.draft
    fixed = _fixed(graph) + request.imports if request.fixed is None else request.fixed
    fastest = sum(spent(op) for section in draft.stages for op in section.ops if op.rule.heavy)

    def finish(draft: Draft, most: int) -> Plan:
        return _finish(begun, draft, replace(request, max_in_flight=1, most=most), fixed, ONCE)

    def over(made: Plan) -> int:
        """By how many bytes a plan does not fit; less than nothing by as many as it leaves in all memories."""
        near = made.projected_bytes - request.budget
        far = made.bytes.host + made.bytes.disk - request.host - request.disk
        return max(near, made.bytes.host - request.host) if max(near, far) > 0 else near + far

    made, cost = finish(draft, 0), partial(price, request=request)
    priced = bool(request.disk and per_byte(request))
    worth = [BYTE + w * per_byte(request) for w in WORTH] if priced else [float(BYTE)]
    base = smallest = made
    if over(base) > 0 and not priced:
        cloned, smallest = _cloned(draft, base, finish, over)
        offloaded = base.bytes.host + base.bytes.disk
        if over(smallest) <= 0:
            draft, made = cloned, smallest
        elif base.bytes.arena + offloaded < LITTLE * (base.bytes.total + offloaded):
            raise _refusal(smallest, request)
    if over(made) > 0 or (made.bytes.disk and cost(made) > DEAR * computed(made)):
        found = within(begun.searches, base, finish, over, cost, worth)
        if min(over(made), over(found.plan)) > 0:
            raise _refusal(min(smallest, found.plan, key=over), request)
        if over(made) > 0 or (over(found.plan) <= 0 and cost(found.plan) < cost(made)):
            draft, made, request = found.draft, found.plan, replace(request, most=found.most)
    finished = partial(_finish, begun, fixed=fixed)
    if made.bytes.disk:
        # It is the disk that works ahead: what several stages take would send more maps there.
        again = finished(draft, replace(request, max_in_flight=1))
        made = min(made, again, key=lambda plan: (over(plan) > 0, cost(plan)))
        found = _roomy(made, request)
    else:
        found = _pipelined(draft, request, finished) or _roomy(made, request)
    return replace(found, fastest=fastest)


def _cloned(
    draft: Draft, made: Plan, finish: Callable[[Draft, int], Plan], over: Callable[[Plan], int]
) -> tuple[Draft, Plan]:
    """The draft with values dropped and made again by sections of their own until its plan fits; the smallest plan
    seen where that is not enough.
    """
    draft, smallest = draft.copy(), made
    while over(made) > 0 and rematerialize_until(draft, draft.peak() - over(made)):
        made = finish(draft, 0)
        smallest = min(smallest, made, key=over)
    if over(made) > 0:
        made = finish(draft, 0)
        smallest = min(smallest, made, key=over)
    return draft, smallest


def _pipelined(draft: Draft, request: Request, finish: Callable[[Draft, Request], Plan]) -> Plan | None:
    """A plan of the same sections with as many in work at once as fit, those of several branches in turns; rather
    fewer at once than that the C library is to give back all that is free."""
    if request.max_in_flight == 1 and request.split is None:
        return None
    tile_axes = draft.saved.tile_axes

    def trivial(section: Section) -> bool:
        return not any(tiled(v, tile_axes) for v in (*section.loads, *section.outputs))

    draft = replace(draft, stages=interleave(draft.stages, draft.early, draft.kept, draft.sizes, trivial))
    found: Plan | None = None
    several = (request.max_in_flight, LARGEST), (request.max_in_flight // 2, LARGE), (2, LARGE)
    # What need not wait for the one before lets ranks meet less often, also one stage after the other.
    for max_in_flight, alone in several if request.split is None else (*several, (1, LARGE)):
        ways = replace(request, max_in_flight=max_in_flight, alone=alone)
        made = finish(draft, ways)
        if made.projected_bytes <= request.budget:
            made = _roomy(made, request)
            if not made.tight:
                return made
            found = found or made
    return found


def _roomy(plan: Plan, request: Request) -> Plan:
    """The plan with all that the C library may keep of windows that it was given back, if the budget has room for it,
    and of untiled values for each worker, if it has for these, too; with room for neither it is tight."""
    if request.fixed is not None:  # on a device, where torch's allocator has other ways
        return plan
    more = plan.bytes.scratch // KEPT * (KEPT_AT_MOST - KEPT)
    if plan.projected_bytes + more > request.budget:
        return replace(plan, tight=True)
    plan = replace(plan, bytes=replace(plan.bytes, scratch=plan.bytes.scratch + more))
    untiled = plan.bytes.untiled
    kept = untiled + plan.bytes.scratch
    if plan.projected_bytes + untiled * (plan.workers - 1) > request.budget or kept <= KEPT_ANYWAY:
        return plan
    return replace(plan, keeps=kept, bytes=replace(plan.bytes, untiled=untiled * plan.workers))


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
    disk = f" and {request.disk:,} on disk" if request.disk else ""
    return BudgetError(
        f"the step does not fit in a budget of {budget:,} bytes{disk}; the smallest that would do is "
        f"{least:,} bytes ({least / 1e9:.3f} GB){whole}",
        least,
    )


# Tiles, scratch and places -------------------------------------------------------------------------


def _finish(begun: _Begun, draft: Draft, request: Request, fixed: int, repeats: int = REPEATS) -> Plan:
    """The plan of a draft.

    With a disk, the nearest memory holds what it can, which is estimated so many times, and the disk the other maps.
    """
    maps = {v: n for v, n in draft.sizes.items() if tiled(v, draft.saved.tile_axes)}
    reversals = _reversals(draft, maps)
    if not request.disk:
        return _arranged(begun, draft, request, fixed, frozenset(), reversals)

    def spilled(room: int, spare: int = 0, bands: bool = False) -> Plan:
        moved, far = spill(draft, maps, room, request.disk, begun.versions)
        made = _arranged(begun, moved, request, fixed, far, reversals)
        spare += banded(made, far) if bands else 0
        return replace(made, bytes=replace(made.bytes, spare=spare if far else 0))

    if request.host:
        return spilled(request.host)
    # Parts of maps on disk are windows: these are the largest that there may be.
    largest = _arranged(begun, draft, request, fixed, frozenset(maps), reversals)
    room = request.budget - largest.bytes.total
    ahead = largest.bytes.scratch // KEPT + 4 * DISK_BUFFER
    for spare, bands in (ahead, True), (ahead, False):
        made = _filled(request, room - spare, partial(spilled, spare=spare, bands=bands), repeats)
        if made.bytes.total <= request.budget:
            return made
    return _filled(request, room, spilled, repeats)


def _filled(request: Request, room: int, spilled: Callable[[int], Plan], repeats: int) -> Plan:
    """The plan with as many maps in the nearest memory as the budget has room for beside all else, about ``room``."""
    made = spilled(room)
    for _ in range(repeats):
        spare = request.budget - made.bytes.total
        if spare < 0:
            room = min(room, made.bytes.arena) + spare  # there are gaps between the maps
            made = spilled(room)
        elif made.bytes.disk:
            other = spilled(room + spare)
            if other.bytes.total > request.budget or other.bytes.disk >= made.bytes.disk:
                break
            room, made = room + spare, other
    return made


def _arranged(begun: _Begun, draft: Draft, request: Request, fixed: int,
              far: frozenset[Value], reversals: Sequence[bool]) -> Plan:  # fmt: skip
    """The plan of a draft with these maps on disk. While stages are in flight no other map gets the place of one,
    where the peak allows it: nobody need then wait for its readers."""
    graph, known = begun.graph, begun.known.setdefault(request.workers, {})
    tile_axes, sizes = draft.saved.tile_axes, draft.sizes
    lives = draft.lifetimes()
    maps = {v: n for v, n in sizes.items() if tiled(v, tile_axes)}
    frees: list[list[Value]] = [[] for _ in draft.stages]
    kept = set(draft.kept)
    for value, last in lives.last.items():
        if value not in kept:
            frees[last].append(value)
    offloaded = frozenset(maps) if request.host else far
    made = []
    for section in draft.stages:
        offloads = offloaded.intersection((*section.loads, *section.outputs))
        key = section, request.most if section.recompute else 0, offloads
        if key not in known:
            known[key] = _stage(section, tile_axes, request, offloads)
        made.append(known[key])
    stages = tuple(
        replace(stage, frees=tuple(f), reversed=turned)
        for stage, f, turned in zip(made, frees, reversals, strict=True)
    )
    shares = request.split and shares_of(graph, stages, draft.early, tile_axes, request.split)
    if shares:
        maps = {v: rounded(shares.nbytes(v)) for v in maps}
    slots, stored = _slots(lives, len(draft.stages), maps, request, far)
    small = {v: n for v, n in sizes.items() if v not in maps}
    usage = lives.usage(len(stages), small)
    loose = [sum(small.get(v, 0) for v in s.section.outputs) for s in stages]
    # Bytecode hands out an untiled value as a copy. What op by op makes the value itself makes large ones.
    copied = [sum(small.get(v, 0) for v in s.section.saves) for s in stages]
    copied = [n if LARGE < n <= request.alone else 0 for n in copied]
    taken = [
        _scratch(stages[k : k + request.max_in_flight], request.workers)
        + sum(n for n in loose[k + 1 : k + request.max_in_flight] if n <= request.alone)
        + sum(n for n in copied[k : k + request.max_in_flight])
        for k in range(len(stages))
    ]
    scratch = max(taken, default=0)
    untiled = max((u + n for u, n in zip(usage, taken, strict=True)), default=0)
    given = set(graph.inputs) | request.free | {v for v in request.external if tiled(v, tile_axes)}
    outputs = sum(shares.nbytes(v) if shares else v.nbytes for v in draft.kept if v not in given)
    whole = runs_whole(stages, tile_axes, request.external)
    if request.fixed is None:  # tasks lie in the same memory
        fixed += bookkeeping(stages)
        fixed += 2 * DISK_BUFFER * request.workers * bool(far)  # one more for what is cut out of a band
    held = scratch * (KEPT if request.fixed is None else 1)
    total = Bytes(stored.get(DEVICE, 0), max(0, untiled - scratch), held, outputs, fixed, stored.get(HOST, 0),
                  stored.get(DISK, 0), exchanged=_exchanged(shares, stages, request) if shares else 0)  # fmt: skip
    return Plan(graph, tile_axes, stages, draft.early, slots, total, request.budget, request.workers, whole,
                request.max_in_flight, request.alone, external=request.external)  # fmt: skip


def _exchanged(shares: Shares, stages: Sequence[Stage], request: Request) -> int:
    """The most bytes that a rank sends and receives at once, and has of its inputs in the place that they take with
    the rows of others."""
    inputs = sum(shares.nbytes(v) for v, _, _ in shares.split.inputs if v in shares.held)
    return shares.exchanged(stages, request.max_in_flight) + inputs


def _slots(
    lives: Lifetimes, stages: int, maps: dict[Value, int], request: Request, far: frozenset[Value]
) -> tuple[dict[Value, Slot], dict[str, int]]:
    """A place for each map, in the nearest memory or on disk, and how many bytes of each are taken."""
    slots: dict[Value, Slot] = {}
    stored: dict[str, int] = {}
    near = HOST if request.host else DEVICE
    for tier, part in ((near, maps.keys() - far), (DISK, far)):
        chosen = {v: n for v, n in maps.items() if v in part} if far else maps
        if tier == DISK and not far:
            continue
        offsets, stored[tier] = place(lives.lingering(stages, chosen, request.max_in_flight - 1), chosen)
        if tier == DISK and stored[tier] > request.disk:
            offsets, stored[tier] = place(lives, chosen)
        shape = {v: v.shape if request.split is None else (maps[v] // v.itemsize,) for v in chosen}
        slots |= {v: Slot(at, maps[v], shape[v], v.dtype, v.itemsize, tier) for v, at in offsets.items()}
    return slots, stored


def _reversals(draft: Draft, maps: dict[Value, int]) -> list[bool]:
    """Which sections make their last tile first: the other way round than what made the map they read, whose end may
    still be in a cache. It follows from the sections, not from their order, and so does what sums are rounded to."""
    maker = {v: s for s in draft.stages for v in s.outputs}
    found: dict[Section, bool] = {}
    for section in draft.stages:
        read = [v for v in section.loads if v in maps and v in maker]
        latest = max(read, key=lambda v: (maps[v], draft.order.get(maker[v].ops[-1], 0)), default=None)
        found[section] = latest is not None and not found[maker[latest]]
    return [found[section] for section in draft.stages]


def _scratch(stages: Sequence[Stage], workers: int) -> int:
    """Most bytes of windows and sums while these stages are in work: of as many tiles as there are workers."""
    windows = [s.window for s in stages for _ in range(min(workers, len(s.grid)))]
    return sum(sorted(windows)[-workers:]) + sum(sorted(s.sums for s in stages)[-workers:])


def _stage(section: Section, tile_axes: TileAxes, request: Request, offloaded: frozenset[Value]) -> Stage:
    offloaded |= request.external
    grid = choose_grid(section, tile_axes, request)
    groups = fusion_groups(section, tile_axes, request.fusable)
    if section.recompute:
        grid = deep_grid(section, groups, tile_axes, grid, request)
    tiles = grid.corners() if section.recompute else grid.samples()
    device = request.fixed is not None
    window = max(
        window_bytes(section, groups, tile_axes, tile, offloaded, device)
        + handed_over(section, groups, tile_axes, tile, request.external)
        for tile in tiles
    )
    running = min(request.workers, len(grid))
    waiting = (len(grid) - 1).bit_length()  # nodes of a sum's tree, one a level
    held = 8 * (waiting + running)
    sums = sum(prod(op.output.shape) * (held if len(grid) > 1 else _result_bytes(op)) for op in section.sums)
    kinds = kinds_of(section, groups, tile_axes, grid)
    tables = tables_of(section, groups, tile_axes, grid)
    return Stage(section, groups, grid, (), window, sums, len(grid) > 1, kinds=kinds, tables=tables)


def _result_bytes(op: Op) -> int:
    """Bytes of each number of a result that is the whole sum: products come in the type of the sum, others wider."""
    return op.output.itemsize if op.rule.heavy else 8
