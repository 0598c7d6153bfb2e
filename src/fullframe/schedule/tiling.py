"""How the tiles of a stage are chosen."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

from fullframe.ir import region as box
from fullframe.ir.graph import Value, walked
from fullframe.ir.region import Region
from fullframe.partition.fusion import FusionGroup, Work, work_of
from fullframe.partition.sections import Section
from fullframe.partition.tile_axes import Tile, TileAxes, tiled
from fullframe.schedule.plan import Grid, tile_cost
from fullframe.schedule.request import Request

WINDOW = 1_400_000  # bytes of the largest window of a tile: about the second-level cache of one core,
MORE = 1.5  # and so much more where the library is called, whose calls take a while to begin, or numbers are narrow
LEAST = 1 << 19  # maps smaller than this are not worth cutting,
DENSE = 1 << 9  # unless so many operations are spent on each byte of them


SUMS = 4  # times the bytes of a map: sums that are larger are made in one tile


ROWS = 8  # nor are strips of fewer rows, mostly halo,
# or, where there are many, of fewer than these: wide ones are rather cut along another axis, too
THICK = 16


def window_bytes(section: Section, groups: Sequence[FusionGroup], tile_axes: TileAxes, tile: Tile,
                 offloaded: Collection[Value] = (), device: bool = False) -> int:  # fmt: skip
    """Most bytes of windows alive at once in a tile, with what its ops take beside them while they run.

    Parts of the maps that live ``offloaded`` are windows too. On a ``device`` libraries copy what a convolution
    reads.
    """
    made = work_of(groups, section.saves, frozenset(section.sums), tile_axes, tile)
    return _most(section, *made, offloaded, device)


def handed_over(section: Section, groups: Sequence[FusionGroup], tile_axes: TileAxes, tile: Tile,
                external: Collection[Value]) -> int:  # fmt: skip
    """Bytes of the largest region that an object of the caller's is given or returns in a tile: while it is copied it
    is there twice."""
    there = [v for v in (*section.loads, *section.saves) if v in external]
    if not there:
        return 0
    regions = work_of(groups, section.saves, frozenset(section.sums), tile_axes, tile)[1]
    return max((box.size(regions[v]) * v.itemsize for v in there if v in regions), default=0)


def _most(section: Section, works: Sequence[Work], regions: dict[Value, Region], offloaded: Collection[Value] = (),
          device: bool = False) -> int:  # fmt: skip
    last = {value: k for k, work in enumerate(works) for value in work.group.reads}
    alive = {v: box.size(regions[v]) * v.itemsize for v in section.loads if v in offloaded and v in last}
    most = 0
    for k, work in enumerate(works):
        group = work.group
        for value in dict.fromkeys((*group.makes, *(v for v in group.saves if v in offloaded))):
            stored = group.own and value in group.saves and value not in offloaded
            alive[value] = 0 if stored or value not in regions else box.size(regions[value]) * value.itemsize
        single = () if group.fused else (*group.ops, *group.sums)
        scratch = max((op.rule.scratch(op, work.region) for op in single), default=0)
        if device and any(op.rule.heavy for op in single):
            scratch = max(
                scratch, sum(box.size(r) * v.itemsize for v, r in zip(group.reads, work.reads, strict=True))
            )
        most = max(most, sum(alive.values()) + scratch)
        for value in (*group.reads, *(v for v in group.saves if v in offloaded)):
            if last.get(value, k) == k:
                alive.pop(value, None)
    return most


def choose_grid(section: Section, tile_axes: TileAxes, request: Request) -> Grid:
    """Tiles of a section: full-width strips of about a window's bytes, or the forced tile."""
    root = _root(section, tile_axes)
    if root is None or _whole(section, tile_axes):
        return Grid()
    if request.tile is None and any(op.output.nbytes > SUMS * root.nbytes for op in section.sums):
        return Grid()  # each tile would have such a sum of its own
    axes = [(tile_axis, n) for tile_axis, n in zip(tile_axes[root], root.shape, strict=True) if tile_axis is not None]
    if request.tile is not None:
        return _forced(axes, tile_axes, request)
    largest = max((v for v in (root, *section.loads) if tiled(v, tile_axes)), key=lambda v: v.nbytes)
    more = largest.itemsize < 4 or any(op.rule.calls(op) for op in section.ops)
    count = max(1, -(-largest.nbytes // max(int(WINDOW * (MORE if more else 1)), request.window)))
    rows = ROWS if count <= 2 * request.hands else THICK
    if root.nbytes >= LEAST and request.hands > 1:
        count = max(count, 2 * request.hands)
        count += -count % request.hands  # or some would wait for one that has a last tile
    elif _dense(section, root):
        count, rows = max(count, request.hands), ROWS // 2
    if count == 1:
        return Grid()
    ratio = _alignment(section, tile_axes, dict(axes))
    chosen = []
    for position, (tile_axis, extent) in enumerate(axes):
        least = 1 if position == 0 and len(axes) > 1 else min(rows, extent)
        pixels = max(least, -(-extent // count))
        align = ratio.get(tile_axis, 1)
        pixels = min(extent, -(-pixels // align) * align)
        chosen.append((tile_axis, extent, pixels))
        pieces = -(-extent // pixels)
        count = (count + pieces // 2) // pieces  # what the other axes are still to be cut into, about
        if count <= 1:
            break
    return Grid(tuple(chosen))


def _whole(section: Section, tile_axes: TileAxes) -> bool:
    """Whether an op of a section takes and makes whole maps."""
    return any(op.rule.kind == "whole" and tiled(op.output, tile_axes) for op in section.ops)


def _dense(section: Section, root: Value) -> bool:
    """Whether a section is worth cutting for what is spent on its map, and no large sum would be made per tile."""
    spent = 0
    for op in section.ops:
        spent += op.rule.cost(op, prod(op.output.shape)) if op.rule.heavy and op.rule.kind != "reduce" else 0
    return spent > DENSE * root.nbytes and all(op.output.nbytes < root.nbytes for op in section.sums)


def _root(section: Section, tile_axes: TileAxes) -> Value | None:
    """The largest tiled map among what a section makes or sums over."""
    found = [v for v in section.saves if tiled(v, tile_axes)]
    found += [walked(op) for op in section.sums]
    found = [v for v in found if tiled(v, tile_axes)]
    return max(found, key=lambda v: v.nbytes, default=None)


def _forced(axes: list[tuple[int, int]], tile_axes: TileAxes, request: Request) -> Grid:
    assert request.tile is not None
    forced = {}
    for value, axis, pixels in request.tile:
        tile_axis = tile_axes[value][axis]
        if tile_axis is not None:
            forced[tile_axis] = (value.shape[axis], min(pixels, value.shape[axis]))
    return Grid(tuple((tile_axis, *forced[tile_axis]) for tile_axis, _ in axes if tile_axis in forced))


def _alignment(section: Section, tile_axes: TileAxes, extents: dict[int, int]) -> dict[int, int]:
    """Multiples at which tile boundaries fall on whole pixels of the section's smaller maps."""
    found: dict[int, int] = {}
    for op in section.ops:
        for value in (op.output, *op.inputs):
            for tile_axis, n in zip(tile_axes[value], value.shape, strict=True):
                if tile_axis in extents and n > 0 and extents[tile_axis] % n == 0:
                    found[tile_axis] = max(found.get(tile_axis, 1), extents[tile_axis] // n)
    return {tile_axis: n for tile_axis, n in found.items() if n <= 64}


# Tiles of stages that make values again -----------------------------------------------------------------------------

SIZES = (-4, -2, -1, 0, 1, 2, 3, 4, 6, 8)  # powers of two times `WINDOW` that the largest window of a tile may have
SLOWER = 0.08  # of the time is added by each doubling of windows beyond the cache


def deep_grid(
    section: Section, groups: Sequence[FusionGroup], tile_axes: TileAxes, grid: Grid, request: Request
) -> Grid:
    """Tiles of a section with much halo: strips or squares, of the size that is fastest among those whose windows
    keep to the request's limit, or the least."""
    root = _root(section, tile_axes)
    if root is None or request.tile is not None:
        return grid
    # One worker has a small map in one piece, which a small budget cuts all the same.
    cut = len(grid) > 1 or (request.hands == 1 and root.nbytes >= LEAST and not _whole(section, tile_axes))
    if not cut:
        return grid
    axes = [(tile_axis, n) for tile_axis, n in zip(tile_axes[root], root.shape, strict=True) if tile_axis is not None]
    ratio = _alignment(section, tile_axes, dict(axes))
    maps = [v for op in section.ops for v in (op.output, *op.inputs) if tiled(v, tile_axes)]
    largest = max((v.nbytes for v in maps), default=1)
    workers, hands = request.workers, request.hands
    best: tuple[float, float, Grid] | None = None
    tried: set[Grid] = set()
    for power in SIZES:
        for squares in (False, True):
            found = _cut(axes, ratio, WINDOW * 2.0**power / largest, squares=squares)
            if found in tried or (len(found) < 2 * hands and root.nbytes >= LEAST and hands > 1):
                continue
            tried.add(found)
            tile = found.tile(tuple((n - 1) // 2 for n in found.counts()))
            made = work_of(groups, section.saves, frozenset(section.sums), tile_axes, tile)
            window = _most(section, *made, request.external) * min(workers, len(found))
            time = tile_cost(made[0]) * (1 + SLOWER * max(0, power)) * len(found)
            over = float(max(0, window - request.most))
            if best is None or (over, time) < best[:2]:
                best = over, time, found
    return grid if best is None else best[2]


def _cut(axes: Sequence[tuple[int, int]], ratio: dict[int, int], share: float, *, squares: bool) -> Grid:
    """A grid whose tiles are about this share of the image: whole rows, or as many pixels along each axis."""
    chosen = []
    rest = list(axes)
    for position, (tile_axis, extent) in enumerate(axes):
        if share >= 1:
            break
        rest = rest[1:]
        wanted = extent * share
        if squares and (position > 0 or len(axes) < 3) and rest:
            area = share * extent * prod(n for _, n in rest)
            wanted = min(extent, area ** (1 / (1 + len(rest))))
        align = ratio.get(tile_axis, 1)
        pieces = max(1, round(extent / max(1, wanted)))
        stage = min(extent, -(-extent // (pieces * align)) * align)
        if stage < extent:
            chosen.append((tile_axis, extent, stage))
        share = share * extent / stage
    return Grid(tuple(chosen))
