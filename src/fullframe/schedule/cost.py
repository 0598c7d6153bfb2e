"""What making values again would take: the graph drawn together to what can be stored, with arithmetic and halo.

A *node* is a value that can be stored, or must be. Between nodes lie ops whose outputs are never stored: their
arithmetic counts with the node that they lead to. An *edge* says how wide a part of one node the making of a part of
another reads, along each tile axis: a straight line, measured on two parts of different width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from fullframe.ir import region as box
from fullframe.ir.graph import Graph, Op, Value, reduces, walked
from fullframe.ir.region import Region
from fullframe.partition.saved_values import SavedValues
from fullframe.partition.sections import Section
from fullframe.partition.tile_axes import tiled

POINTWISE = 4  # operations that an element of a cheap op counts for
BYTE = 2  # operations that loading or storing a byte counts for


@dataclass(frozen=True)
class Edge:
    """A node that another is made from: per axis that it is tiled along, where the other's width stands, how many
    times that it needs and how much more; without such an axis (-1) all of it."""

    node: int
    widths: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True, eq=False)
class Nodes:
    """Nodes in runnable order. Per node: its value, bytes in memory, operations (of expensive ops alone, and of all),
    edges to what it is made from, tile axes with extents, and whether it is always stored."""

    values: tuple[Value, ...]
    size: tuple[int, ...]
    heavy: tuple[float, ...]
    work: tuple[float, ...]
    edges: tuple[tuple[Edge, ...], ...]
    axes: tuple[tuple[tuple[int, int], ...], ...]
    always: tuple[bool, ...]


def droppable(graph: Graph, saved: SavedValues, value: Value) -> bool:
    """Whether a stored value may be recomputed instead."""
    op = saved.maker[value]
    if op in saved.reducing or op.rule.kind == "whole" or value in saved.pinned:
        return False
    return tiled(value, saved.tile_axes) and value not in set(graph.outputs)


def more_to_store(graph: Graph, saved: SavedValues) -> set[Value]:
    """Values that are worth storing in place of larger ones that they are made of: pooled maps, parts, sums of maps.

    Left out are those of which a decision might see one making beside another of what they are made of.
    """
    readers: dict[Value, list[Op]] = {}
    for op in graph.ops:
        for v in op.inputs:
            readers.setdefault(v, []).append(op)
    leaves: dict[Value, frozenset[Value]] = {}
    found: set[Value] = set()
    for op in graph.ops:
        out = op.output
        if not tiled(out, saved.tile_axes):
            continue
        under: frozenset[Value] = frozenset()
        for v in op.inputs:
            if v in saved.stored:
                under |= {v} if tiled(v, saved.tile_axes) else frozenset()
            else:
                under |= leaves.get(v, frozenset())
        leaves[out] = under
        if out in saved.stored or not under or op.rule.kind in ("whole", "reduce"):
            continue
        smaller = 2 * out.nbytes <= sum(v.nbytes for v in under)
        if op.rule.kind == "pointwise":
            ends = any(r.rule.heavy or r.rule.kind == "reduce" for r in readers.get(out, ()))
            smaller = smaller and ends and len(under) > 1
        if smaller:
            found.add(out)
    return found - _doubtful(graph, saved, found)


def _doubtful(graph: Graph, saved: SavedValues, found: set[Value]) -> set[Value]:
    """Of these values those that a decision reads beside what they have numbers of."""
    doubtful: set[Value] = set()
    for op in graph.ops:
        if not (tiled(op.output, saved.tile_axes) and op.rule.decides(op)):
            continue
        ops, _ = saved.slice_of(op.output, saved.stored)
        near = found & {o.output for o in ops}
        if not near:
            continue
        kept, loads = saved.slice_of(op.output, saved.stored | (near - {op.output}))
        beside = {o.output for o in kept} | loads
        doubtful |= {v for v in near if _has_numbers_of(saved, v, beside - {v}, op.rule.compares(op))}
    return doubtful


def _has_numbers_of(saved: SavedValues, value: Value, beside: set[Value], anyhow: bool) -> bool:
    stack, seen = [value], {value}
    while stack:
        op = saved.maker.get(stack.pop())
        if op is None or not (anyhow or op.rule.passes(op)):
            continue
        for read in op.inputs:
            if read in beside and read in saved.maker and tiled(read, saved.tile_axes):
                return True
            if read not in seen:
                seen.add(read)
                stack.append(read)
    return False


def nodes_of(graph: Graph, saved: SavedValues, more: set[Value], left_out: set[Value],
             sizes: Callable[[Value], int]) -> Nodes:  # fmt: skip
    """The graph drawn together to what is stored or could be, as ``more``; what is ``left_out`` is always at hand."""
    chosen = saved.stored | more
    values = [op.output for op in graph.ops if op.output in chosen and op.output not in left_out]
    index = {v: k for k, v in enumerate(values)}
    order = {op: k for k, op in enumerate(graph.ops)}
    heavy, work, edges, axes = [], [], [], []
    for v in values:
        found, loads = saved.slice_of(v, chosen)
        ops = sorted(found, key=order.__getitem__)
        heavy.append(float(sum(spent(op) for op in ops if op.rule.heavy)))
        work.append(float(sum(spent(op) for op in ops)))
        axes.append(_axes(saved, v))
        edges.append(_edges(saved, v, ops, [w for w in loads if w in index], index))
    always = tuple(v in saved.stored and not droppable(graph, saved, v) for v in values)
    return Nodes(tuple(values), tuple(sizes(v) for v in values), tuple(heavy), tuple(work), tuple(edges),
                 tuple(axes), always)  # fmt: skip


def spent(op: Op) -> float:
    """Operations that an op of a whole map counts for."""
    n = prod(walked(op).shape)
    return op.rule.cost(op, n) if op.rule.heavy else POINTWISE * n


def _axes(saved: SavedValues, value: Value) -> tuple[tuple[int, int], ...]:
    """Tile axes with extents; for a sum, those of what is summed."""
    through = saved.walked(value)
    return tuple((a, n) for a, n in zip(saved.tile_axes[through], through.shape, strict=True) if a is not None)


def _edges(saved: SavedValues, value: Value, ops: Sequence[Op], loads: Iterable[Value],
           index: dict[Value, int]) -> tuple[Edge, ...]:  # fmt: skip
    own = _axes(saved, value)
    op, through = saved.maker[value], saved.walked(value)
    probes = []
    for width in (16, 48):
        region = tuple((0, n) if a is None else _middle(n, width)
                       for a, n in zip(saved.tile_axes[through], through.shape, strict=True))  # fmt: skip
        probes.append((region, _reach(ops, op, region, op in saved.reducing)))
    found = []
    for load in loads:
        widths = []
        for axis, (tile_axis, n) in enumerate(zip(saved.tile_axes[load], load.shape, strict=True)):
            if tile_axis is None:
                continue
            at = next((k for k, (other, _) in enumerate(own) if other == tile_axis), -1)
            widths.append(
                (-1, 0.0, float(n)) if at < 0 else (at, *_line(saved, through, load, axis, tile_axis, probes))
            )
        found.append(Edge(index[load], tuple(widths)))
    return tuple(found)


def _middle(extent: int, width: int) -> tuple[int, int]:
    width = min(extent, width)
    low = (extent - width) // 2 // 8 * 8
    return low, low + width


def _line(saved: SavedValues, through: Value, load: Value, axis: int, tile_axis: int,
          probes: Sequence[tuple[Region, dict[Value, Region]]]) -> tuple[float, float]:  # fmt: skip
    """How wide a part is read, as a multiple of the width made and so much more."""
    own = saved.tile_axes[through].index(tile_axis)
    points = []
    for region, regions in probes:
        low, high = regions.get(load, ((0, 0),) * len(load.shape))[axis]
        points.append((region[own][1] - region[own][0], high - low))
    (x, p), (y, q) = points
    if x == y:  # the axis is too short to tell: the halo, at most
        return 1.0, float(max(0, p - x))
    slope = max(0.0, (q - p) / (y - x))
    return slope, max(0.0, p - slope * x)


def _reach(ops: Sequence[Op], last: Op, region: Region, reducing: bool) -> dict[Value, Region]:
    """The part of each value that making a part of the last op's output takes."""
    need: dict[Value, Region] = {last.output: region}
    for op in reversed(ops):
        wanted = need.get(op.output)
        if wanted is None or box.is_empty(wanted):
            continue
        if op is last and reducing:
            grown = wanted
        elif reduces(op.rule):
            grown = op.rule.grow(op, op.rule.driver_region(op, wanted))
        else:
            grown = op.rule.grow(op, wanted)
        for v, read in zip(op.inputs, op.rule.footprint(op, grown), strict=True):
            known = need.get(v)
            need[v] = read if known is None else box.union(known, read)
    return need


# Stages -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Stage:
    """One pass over the image, or untiled work: nodes that it makes in any case, nodes that it may make to be stored,
    and whether it is cut into tiles."""

    wanted: tuple[int, ...]
    offers: tuple[int, ...]
    axes: frozenset[int]
    cut: bool


def stages_of(sections: Sequence[Section], saved: SavedValues, nodes: Nodes) -> list[Stage]:
    """A stage for each section."""
    index = {v: k for k, v in enumerate(nodes.values)}
    found = []
    for section in sections:
        outputs = [index[v] for v in section.outputs]
        cut = any(tiled(v, saved.tile_axes) for v in section.saves) or bool(section.sums)
        cut = cut and not any(op.rule.kind == "whole" and tiled(op.output, saved.tile_axes) for op in section.ops)
        wanted = tuple(k for k in outputs if nodes.always[k])
        offers = tuple(k for k in outputs if not nodes.always[k])
        axes = frozenset(a for k in outputs for a, _ in nodes.axes[k])
        found.append(Stage(wanted, offers, axes, cut))
    return found


def merged(stages: Sequence[Stage], nodes: Nodes, early: int) -> list[Stage]:
    """Stages with those joined to an earlier one that share most of their work when nothing is stored, and need not
    wait for its sums. ``stages[:early]`` stay among themselves. A joined stage leaves an empty one behind."""
    above = [sum({1 << e.node for e in edges}) for edges in nodes.edges]
    always = sum(1 << k for k, yes in enumerate(nodes.always) if yes)
    home = {k: t for t, s in enumerate(stages) for k in (*s.wanted, *s.offers)}
    found = list(stages)
    made, reads = [], []
    for stage in stages:
        mask, read = _closure((*stage.wanted, *stage.offers), above, always)
        made.append(mask)
        reads.append(read)
    for j, stage in enumerate(stages):
        if not _movable(stage, nodes):
            continue
        since = max((home[k] for k in bits_of(reads[j])), default=-1)
        best, at = 0.5 * _work(nodes, made[j]), -1
        for k in range(max(since + 1, early if j >= early else 0), j):
            if not found[k].cut or found[k].axes != stage.axes or not (found[k].wanted or found[k].offers):
                continue
            if not _light(found[k], nodes):
                continue
            shared = _work(nodes, made[k] & made[j])
            if shared > 0 and shared >= best:
                best, at = shared, k
        if at < 0:
            continue
        into = found[at]
        found[at] = Stage((*into.wanted, *stage.wanted), (*into.offers, *stage.offers), into.axes, True)
        found[j] = Stage((), (), stage.axes, stage.cut)
        made[at] |= made[j]
        reads[at] |= reads[j]
        for k in (*stage.wanted, *stage.offers):
            home[k] = at
    return found


def _closure(wanted: Iterable[int], above: Sequence[int], always: int) -> tuple[int, int]:
    """What is made for some nodes where only what always is stored is at hand, and what of that is read."""
    todo, mask, read, first = 0, 0, 0, 0
    for k in wanted:
        first |= 1 << k
    todo = first
    while todo:
        k = todo.bit_length() - 1
        todo ^= 1 << k
        if always >> k & 1 and not first >> k & 1:
            read |= 1 << k
            continue
        mask |= 1 << k
        todo |= above[k]
    return mask, read


def bits_of(mask: int) -> Iterator[int]:
    """The numbers of the bits that are set, the highest first."""
    while mask:
        k = mask.bit_length() - 1
        yield k
        mask ^= 1 << k


def _work(nodes: Nodes, mask: int) -> float:
    return sum(nodes.heavy[k] for k in bits_of(mask))


def _movable(stage: Stage, nodes: Nodes) -> bool:
    """Whether a stage is tiled and makes, of what must be stored, only small sums."""
    return (
        stage.cut
        and bool(stage.wanted or stage.offers)
        and _light(stage, nodes)
        and not any(nodes.size[k] > 1 << 20 for k in stage.wanted)
    )


def _light(stage: Stage, nodes: Nodes) -> bool:
    """Whether sums in progress are small beside the maps."""
    maps = max((nodes.values[e.node].nbytes for k in stage.wanted for e in nodes.edges[k]), default=0)
    sums = sum(nodes.values[k].nbytes for k in stage.wanted)
    return 16 * sums <= maps or not stage.wanted
