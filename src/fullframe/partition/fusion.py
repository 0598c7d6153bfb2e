"""Groups: which ops of a section run in one pass over the windows of a tile.

A *fused* group is a group of pointwise ops over one loop, with the stores and the sums of what it
makes in the same pass. Values whose every use is on the tile's own region (stores, sums and what
feeds only those) form groups of their own, apart from values that are needed with a halo, since a
sum must not count the halo. Cheap values are recomputed in the second rather than kept for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fullframe.ir import region as box
from fullframe.ir.graph import Op, Value
from fullframe.ir.region import Region
from fullframe.partition.sections import Section
from fullframe.partition.tile_axes import Tile, TileAxes, own_region, tiled

INLINE = 4  # a chain of at most this many ops on loaded values is recomputed rather than kept


@dataclass(frozen=True, eq=False)
class FusionGroup:
    """One op, or a fused group of pointwise ops.

    ``reads`` are the values it takes from outside; ``makes`` the windows that later groups need;
    ``saves`` what it stores of the tile's own region; ``sums`` the reductions it adds to.
    """

    ops: tuple[Op, ...]
    reads: tuple[Value, ...]
    makes: tuple[Value, ...]
    saves: tuple[Value, ...]
    sums: tuple[Op, ...]
    fused: bool = False
    own: bool = False
    loop: Value | None = None


@dataclass(eq=False)
class _Draft:
    ops: list[Op]
    sums: list[Op]
    fused: bool
    own: bool
    loop: Value | None
    after: set[int] = field(default_factory=set)  # groups it depends on, directly or not
    near: set[Value] = field(default_factory=set)  # maps that it makes or reads


Fusable = Callable[[Op], bool]


def fusion_groups(section: Section, tile_axes: TileAxes, fusable: Fusable) -> tuple[FusionGroup, ...]:
    """The groups of a section in runnable order."""
    if not section.sums and not any(tiled(v, tile_axes) for op in section.ops for v in (op.output, *op.inputs)):
        saved = set(section.saves)
        return tuple(
            FusionGroup((op,), op.inputs, (op.output,), (op.output,) if op.output in saved else (), ())
            for op in section.ops
        )
    drafts = _Drafts(section, tile_axes, fusable)
    for op in section.ops:
        drafts.add(op)
    return drafts.finish()


class _Drafts:
    """Groups being put together; ``owner`` says which group makes a value."""

    def __init__(self, section: Section, tile_axes: TileAxes, fusable: Fusable):
        self.section, self.tile_axes, self.fusable = section, tile_axes, fusable
        self.maker = {op.output: op for op in section.ops}
        self.order = {op: k for k, op in enumerate(section.ops)}
        self.sums = set(section.sums)
        self.users: dict[Value, list[Op]] = {}
        for op in section.ops:
            for value in op.inputs:
                self.users.setdefault(value, []).append(op)
        self.own = self._own_only()
        self.groups: list[_Draft] = []
        self.owner: dict[Value, int] = {}

    def _fuses(self, op: Op) -> bool:
        if op.rule.kind == "reduce" and op not in self.sums:
            return False
        loop = op.inputs[0] if op in self.sums else op.output
        return tiled(loop, self.tile_axes) and self.fusable(op)

    def _own_only(self) -> set[Value]:
        """Values read on the tile's own region only."""
        found: set[Value] = set()
        for op in reversed(self.section.ops):
            uses = self.users.get(op.output, [])
            if op in self.sums or not tiled(op.output, self.tile_axes):
                continue
            if all(self._fuses(u) and (u in self.sums or u.output in found) for u in uses):
                found.add(op.output)
        return found

    def add(self, op: Op) -> None:
        if not self._fuses(op):
            self._place(op, None, ())
            return
        own = op in self.sums or op.output in self.own
        loop = op.inputs[0] if op in self.sums else op.output
        recomputed = self._recomputed_chain(op) if own else ()
        reads = {v for o in (*recomputed, op) for v in o.inputs}
        for k in range(len(self.groups) - 1, -1, -1):
            group = self.groups[k]
            same_loop = group.fused and group.own == own and group.loop is not None and group.loop.shape == loop.shape
            if same_loop and not group.near.isdisjoint(reads) and self._may_join(k, op, recomputed):
                self._place(op, k, recomputed)
                return
        self._place(op, None, recomputed, fused=True, own=own, loop=loop)

    def _recomputed_chain(self, op: Op) -> tuple[Op, ...]:
        """The cheap chain behind inputs that another (halo) group makes, to be made here again."""
        chain: list[Op] = []
        stack = [self.maker[v] for v in op.inputs if v in self.maker and v not in self.own]
        while stack:
            maker = stack.pop()
            if not self._fuses(maker) or maker in self.sums or len(chain) >= INLINE:
                return ()
            chain.append(maker)
            stack += [self.maker[v] for v in maker.inputs if v in self.maker and v not in self.own]
        return tuple(sorted(set(chain), key=self.order.__getitem__))

    def _sources(self, op: Op, recomputed: Sequence[Op]) -> set[int]:
        """Groups that make what the op (and what is recomputed for it) reads."""
        made = {o.output for o in recomputed}
        reads = {v for o in (*recomputed, op) for v in o.inputs} - made
        return {self.owner[v] for v in reads if v in self.owner}

    def _may_join(self, k: int, op: Op, recomputed: Sequence[Op]) -> bool:
        return all(s == k or k not in self.groups[s].after for s in self._sources(op, recomputed))

    def _place(self, op: Op, k: int | None, recomputed: Sequence[Op], *, fused: bool = False, own: bool = False,
               loop: Value | None = None) -> None:  # fmt: skip
        sources = self._sources(op, recomputed)
        if k is None:
            k = len(self.groups)
            self.groups.append(_Draft([], [], fused, own, loop))
        group = self.groups[k]
        group.near |= self._maps_of((*recomputed, op))
        for other in recomputed:
            if other not in group.ops:
                group.ops.append(other)
        (group.sums if op in self.sums else group.ops).append(op)
        if op not in self.sums:
            self.owner[op.output] = k
        for s in sources - {k}:
            group.after |= {s} | self.groups[s].after
        for other in self.groups:
            if k in other.after:
                other.after |= group.after

    def _merge(self) -> None:
        """Join fusion groups that share a map, where nothing stands between them."""
        for k, group in enumerate(self.groups):
            for j in range(k):
                if self._mergeable(self.groups[j], group) and not self._between(j, k):
                    self._absorb(j, k)

    def _mergeable(self, a: _Draft, b: _Draft) -> bool:
        if not (a.fused and b.fused and a.own == b.own and a.loop is not None and b.loop is not None):
            return False
        return a.loop.shape == b.loop.shape and not a.near.isdisjoint(b.near)

    def _maps_of(self, ops: Iterable[Op]) -> set[Value]:
        """Maps that ops make or read."""
        return {v for o in ops for v in (o.output, *o.inputs) if tiled(v, self.tile_axes)}

    def _between(self, j: int, k: int) -> bool:
        """Whether a third group must run after one of the two and before the other."""
        first, second = self.groups[j].after, self.groups[k].after
        return any(j in self.groups[s].after for s in second) or any(k in self.groups[s].after for s in first)

    def _absorb(self, j: int, k: int) -> None:
        """Move group j into group k, leaving j empty."""
        old, group = self.groups[j], self.groups[k]
        group.ops = [*(o for o in old.ops if o not in group.ops), *group.ops]
        group.sums = [*old.sums, *group.sums]
        group.near |= old.near
        group.after = (group.after | old.after) - {j, k}
        self.groups[j] = _Draft([], [], False, False, None)
        self.owner = {v: k if h == j else h for v, h in self.owner.items()}
        for other in self.groups:
            if j in other.after:
                other.after = (other.after - {j}) | {k}
        for other in self.groups:
            if k in other.after:
                other.after |= group.after

    def finish(self) -> tuple[FusionGroup, ...]:
        self._merge()
        order = [k for k, u in enumerate(self.groups) if u.ops or u.sums]
        order.sort(key=lambda k: (len(self.groups[k].after), k))
        saved = self._saved_by()
        wanted = self._wanted()
        return tuple(self._group(self.groups[k], k, saved, wanted) for k in order)

    def _saved_by(self) -> dict[Value, int]:
        """The group that stores each saved value: one that passes over its own region, if any."""
        found: dict[Value, int] = {}
        for value in self.section.saves:
            owner = self.owner[value]
            readers = [
                k for k, u in enumerate(self.groups)
                if u.fused and u.own and u.loop is not None and u.loop.shape == value.shape
                and any(value in o.inputs for o in (*u.ops, *u.sums))
            ]  # fmt: skip
            takes = self.groups[owner].fused and self.groups[owner].own
            found[value] = owner if takes or not readers else readers[0]
        return found

    def _group(self, draft: _Draft, k: int, saved: dict[Value, int], wanted: set[Value]) -> FusionGroup:
        ops = tuple(sorted(draft.ops, key=self.order.__getitem__))
        saves = tuple(v for v, by in saved.items() if by == k)
        if not draft.fused:
            (op,) = ops or draft.sums
            makes = () if draft.sums else (op.output,)
            return FusionGroup(ops, op.inputs, makes, saves, tuple(draft.sums))
        made = [op.output for op in ops]
        reads = dict.fromkeys(v for op in (*ops, *draft.sums) for v in op.inputs if v not in made)
        makes = tuple(v for v in made if self.owner[v] == k and (saved.get(v, k) != k or v in wanted))
        return FusionGroup(ops, tuple(reads), makes, saves, tuple(draft.sums), True, draft.own, draft.loop)

    def _wanted(self) -> set[Value]:
        """The values that a group takes from the one that makes them, rather than recomputing them."""
        found: set[Value] = set()
        for group in self.groups:
            made = {op.output for op in group.ops}
            found |= {v for op in (*group.ops, *group.sums) for v in op.inputs} - made
        return found


# A group on a tile ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Work:
    """One group on one tile: the region it makes (of the driver, for a lone sum) and what it reads."""

    group: FusionGroup
    region: Region
    reads: tuple[Region, ...]


def work_of(groups: Sequence[FusionGroup], saves: Sequence[Value], sums: frozenset[Op], tile_axes: TileAxes,
            tile: Tile) -> tuple[list[Work], dict[Value, Region]]:  # fmt: skip
    """What each group does on a tile, in runnable order, and the region of each value.

    Regions follow from the tile backwards through the footprints; where several groups read a
    value, it is made on the box around all that they read.
    """
    need: dict[Value, Region] = {v: own_region(v, tile_axes, tile) for v in saves}
    found: list[Work] = []
    for group in reversed(groups):
        work = _fused(group, need, tile_axes, tile) if group.fused else _single(group, need, sums, tile_axes, tile)
        if work is None:
            continue
        found.append(work)
        for value, read in zip(group.reads, work.reads, strict=True):
            known = need.get(value)
            need[value] = read if known is None else box.union(known, read)
    found.reverse()
    return found, need


def _fused(group: FusionGroup, need: dict[Value, Region], tile_axes: TileAxes, tile: Tile) -> Work | None:
    assert group.loop is not None
    if group.own:
        region = own_region(group.loop, tile_axes, tile)
    else:
        region = ((0, 0),) * len(group.loop.shape)
        for value in (*group.makes, *group.saves):  # what other groups read, and what is stored
            if value in need:
                region = box.union(region, need[value])
    if box.is_empty(region):
        return None
    for value in group.makes:
        need[value] = box.union(need[value], region) if value in need else region
    return Work(group, region, tuple(box.broadcast(region, v.shape) for v in group.reads))


def _single(
    group: FusionGroup, need: dict[Value, Region], sums: frozenset[Op], tile_axes: TileAxes, tile: Tile
) -> Work | None:
    (op,) = group.ops or group.sums
    rule = op.rule
    if op in sums:
        region = own_region(op.inputs[rule.driver], tile_axes, tile)  # type: ignore[attr-defined]
    else:
        wanted = need.get(op.output)
        if wanted is None or box.is_empty(wanted):
            return None
        if rule.kind == "reduce":
            region = rule.grow(op, rule.driver_region(op, wanted))  # type: ignore[attr-defined]
            need[op.output] = rule.out_region(op, region)  # type: ignore[attr-defined]
        else:
            need[op.output] = region = rule.grow(op, wanted)
    if box.is_empty(region):
        return None
    return Work(group, region, tuple(rule.footprint(op, region)))
