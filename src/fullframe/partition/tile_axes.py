"""Tile axes: the batch and spatial axes of the inputs, followed through the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fullframe.ir import region as box
from fullframe.ir.graph import Graph, Op, Value, reduces, walked
from fullframe.ir.region import Region

TileAxes = dict[Value, tuple["int | None", ...]]
_Axis = tuple[Value, int]


def find_tile_axes(graph: Graph, roots: Sequence[tuple[Value, Sequence[int]]]) -> TileAxes:
    """Follow the given axes of the inputs through the graph.

    Axes contracted by a convolution are never tiled; nor is a tile axis that one value carries twice
    (a map added to its own transpose), since a tile would then need two places at once.
    """
    parent: dict[tuple[Value, int], tuple[Value, int]] = {}

    def find(key: _Axis) -> _Axis:
        while (up := parent.get(key, key)) != key:
            parent[key] = parent.get(up, up)
            key = up
        return key

    channels: list[_Axis] = []
    for op in graph.ops:
        for a, b in axis_pairs(op):
            parent[find(a)] = find(b)
        for i, axis in op.rule.channels(op):
            channels.append((op.output if i < 0 else op.inputs[i], axis))
    dead = {find(key) for key in channels}
    names: dict[_Axis, int] = {}
    for value, axes in roots:
        for axis in axes:
            key = find((value, axis))
            if key not in dead:
                names.setdefault(key, len(names))
    return _apply_names(graph, names, find)


def axis_pairs(op: Op) -> Iterable[tuple[_Axis, _Axis]]:
    """Pairs of axes that run along each other in an op."""
    through = walked(op)
    for link in op.rule.links(op):
        yield (op.inputs[link.input], link.axis), (through, link.out)
    if reduces(op.rule):
        for axis, out in op.rule.keeps(op):
            yield (through, axis), (op.output, out)


def _apply_names(graph: Graph, names: dict[_Axis, int], find: Callable[[_Axis], _Axis]) -> TileAxes:
    values = [*graph.inputs, *graph.constants, *(op.output for op in graph.ops)]
    found: TileAxes = {}
    doubled: set[int] = set()
    for value in values:
        tile_axes = tuple(names.get(find((value, a))) if n > 1 else None for a, n in enumerate(value.shape))
        used = [x for x in tile_axes if x is not None]
        doubled |= {x for x in used if used.count(x) > 1}
        found[value] = tile_axes
    if doubled:
        found = {v: tuple(None if x in doubled else x for x in ls) for v, ls in found.items()}
    return found


def tiled(value: Value, tile_axes: TileAxes) -> bool:
    return any(x is not None for x in tile_axes[value])


def sums_tiles(op: Op, tile_axes: TileAxes) -> bool:
    """Whether the op adds up partial results of tiles (a reduction over a tile axis)."""
    if not reduces(op.rule):
        return False
    kept = {axis for axis, _ in op.rule.keeps(op)}
    return any(x is not None and a not in kept for a, x in enumerate(tile_axes[walked(op)]))


# Tiles -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """The part ``[low, high)`` of a tile axis whose axis has ``reference`` pixels where it is widest."""

    low: int
    high: int
    reference: int


Tile = dict[int, Span]


def own_region(value: Value, tile_axes: TileAxes, tile: Tile) -> Region:
    """The tile's own part of a value; over all tiles a disjoint cover, whatever the sizes."""
    found = []
    for tile_axis, n in zip(tile_axes[value], value.shape, strict=True):
        span = tile.get(tile_axis) if tile_axis is not None else None
        if span is None:
            found.append((0, n))
        else:
            found.append((box.scaled(span.low, n, span.reference), box.scaled(span.high, n, span.reference)))
    return tuple(found)
