"""Units: which ops of a section run in one pass over the windows of a tile.

A *fused* unit is a group of pointwise ops over one loop, with the stores and the sums of what it
makes in the same pass. Values whose every use is on the tile's own region (stores, sums and what
feeds only those) form units of their own, apart from values that are needed with a halo, since a
sum must not count the halo. Cheap values are made again in the second rather than kept for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fullframe.ir import region as box
from fullframe.ir.graph import Op, Value
from fullframe.ir.region import Region
from fullframe.partition.sections import Section
from fullframe.partition.tile_axes import Labels, Tile, own_region, tiled

INLINE = 4  # a chain of at most this many ops on loaded values is made again rather than kept


@dataclass(frozen=True, eq=False)
class Unit:
    """One op, or a fused group of pointwise ops.

    ``reads`` are the values it takes from outside; ``makes`` the windows that later units need;
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
    after: set[int] = field(default_factory=set)  # units it depends on, directly or not


Fusable = Callable[[Op], bool]


def units_of(section: Section, labels: Labels, fusable: Fusable) -> tuple[Unit, ...]:
    """The units of a section in runnable order."""
    if not section.sums and not any(tiled(v, labels) for op in section.ops for v in (op.output, *op.inputs)):
        saved = set(section.saves)
        return tuple(
            Unit((op,), op.inputs, (op.output,), (op.output,) if op.output in saved else (), ()) for op in section.ops
        )
    drafts = _Drafts(section, labels, fusable)
    for op in section.ops:
        drafts.add(op)
    return drafts.finish()


class _Drafts:
    """Units being put together; ``home`` says which unit makes a value."""

    def __init__(self, section: Section, labels: Labels, fusable: Fusable):
        self.section, self.labels, self.fusable = section, labels, fusable
        self.maker = {op.output: op for op in section.ops}
        self.sums = set(section.sums)
        self.users: dict[Value, list[Op]] = {}
        for op in section.ops:
            for value in op.inputs:
                self.users.setdefault(value, []).append(op)
        self.own = self._own_only()
        self.units: list[_Draft] = []
        self.home: dict[Value, int] = {}

    def _fuses(self, op: Op) -> bool:
        if op.rule.kind == "reduce" and op not in self.sums:
            return False
        loop = op.inputs[0] if op in self.sums else op.output
        return tiled(loop, self.labels) and self.fusable(op)

    def _own_only(self) -> set[Value]:
        """Values read on the tile's own region only."""
        found: set[Value] = set()
        for op in reversed(self.section.ops):
            uses = self.users.get(op.output, [])
            if op in self.sums or not tiled(op.output, self.labels):
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
        again = self._made_again(op) if own else ()
        reads = {v for o in (*again, op) for v in o.inputs}
        for k in range(len(self.units) - 1, -1, -1):
            unit = self.units[k]
            alike = unit.fused and unit.own == own and unit.loop is not None and unit.loop.shape == loop.shape
            if alike and self._near(unit) & reads and self._may_join(k, op, again):
                self._place(op, k, again)
                return
        self._place(op, None, again, fused=True, own=own, loop=loop)

    def _made_again(self, op: Op) -> tuple[Op, ...]:
        """The cheap chain behind inputs that another (halo) unit makes, to be made here again."""
        chain: list[Op] = []
        stack = [self.maker[v] for v in op.inputs if v in self.maker and v not in self.own]
        while stack:
            maker = stack.pop()
            if not self._fuses(maker) or maker in self.sums or len(chain) >= INLINE:
                return ()
            chain.append(maker)
            stack += [self.maker[v] for v in maker.inputs if v in self.maker and v not in self.own]
        order = {o: k for k, o in enumerate(self.section.ops)}
        return tuple(sorted(set(chain), key=order.__getitem__))

    def _sources(self, op: Op, again: Sequence[Op]) -> set[int]:
        """Units that make what the op (and what is made again for it) reads."""
        made = {o.output for o in again}
        reads = {v for o in (*again, op) for v in o.inputs} - made
        return {self.home[v] for v in reads if v in self.home}

    def _may_join(self, k: int, op: Op, again: Sequence[Op]) -> bool:
        return all(s == k or k not in self.units[s].after for s in self._sources(op, again))

    def _place(self, op: Op, k: int | None, again: Sequence[Op], *, fused: bool = False, own: bool = False,
               loop: Value | None = None) -> None:  # fmt: skip
        sources = self._sources(op, again)
        if k is None:
            k = len(self.units)
            self.units.append(_Draft([], [], fused, own, loop))
        unit = self.units[k]
        for other in again:
            if other not in unit.ops:
                unit.ops.append(other)
        (unit.sums if op in self.sums else unit.ops).append(op)
        if op not in self.sums:
            self.home[op.output] = k
        for s in sources - {k}:
            unit.after |= {s} | self.units[s].after
        for other in self.units:
            if k in other.after:
                other.after |= unit.after

    def _merge(self) -> None:
        """Join fused units that share a map, where nothing stands between them."""
        for k, unit in enumerate(self.units):
            for j in range(k):
                if self._mergeable(self.units[j], unit) and not self._between(j, k):
                    self._absorb(j, k)

    def _mergeable(self, a: _Draft, b: _Draft) -> bool:
        if not (a.fused and b.fused and a.own == b.own and a.loop is not None and b.loop is not None):
            return False
        return a.loop.shape == b.loop.shape and bool(self._near(a) & self._near(b))

    def _near(self, unit: _Draft) -> set[Value]:
        """Maps a unit makes or reads."""
        values = {v for o in (*unit.ops, *unit.sums) for v in (o.output, *o.inputs)}
        return {v for v in values if tiled(v, self.labels)}

    def _between(self, j: int, k: int) -> bool:
        """Whether a third unit must run after one of the two and before the other."""
        first, second = self.units[j].after, self.units[k].after
        return any(j in self.units[s].after for s in second) or any(k in self.units[s].after for s in first)

    def _absorb(self, j: int, k: int) -> None:
        """Move unit j into unit k, leaving j empty."""
        old, unit = self.units[j], self.units[k]
        unit.ops = [*(o for o in old.ops if o not in unit.ops), *unit.ops]
        unit.sums = [*old.sums, *unit.sums]
        unit.after = (unit.after | old.after) - {j, k}
        self.units[j] = _Draft([], [], False, False, None)
        self.home = {v: k if h == j else h for v, h in self.home.items()}
        for other in self.units:
            if j in other.after:
                other.after = (other.after - {j}) | {k}
        for other in self.units:
            if k in other.after:
                other.after |= unit.after

    def finish(self) -> tuple[Unit, ...]:
        self._merge()
        order = [k for k, u in enumerate(self.units) if u.ops or u.sums]
        order.sort(key=lambda k: (len(self.units[k].after), k))
        saved = self._saved_by()
        return tuple(self._unit(self.units[k], k, saved) for k in order)

    def _saved_by(self) -> dict[Value, int]:
        """The unit that stores each saved value: one that passes over its own region, if any."""
        found: dict[Value, int] = {}
        for value in self.section.saves:
            home = self.home[value]
            readers = [
                k for k, u in enumerate(self.units)
                if u.fused and u.own and u.loop is not None and u.loop.shape == value.shape
                and any(value in o.inputs for o in (*u.ops, *u.sums))
            ]  # fmt: skip
            takes = self.units[home].fused and self.units[home].own
            found[value] = home if takes or not readers else readers[0]
        return found

    def _unit(self, draft: _Draft, k: int, saved: dict[Value, int]) -> Unit:
        order = {op: n for n, op in enumerate(self.section.ops)}
        ops = tuple(sorted(draft.ops, key=order.__getitem__))
        saves = tuple(v for v, by in saved.items() if by == k)
        if not draft.fused:
            (op,) = ops or draft.sums
            makes = () if draft.sums else (op.output,)
            return Unit(ops, op.inputs, makes, saves, tuple(draft.sums))
        made = [op.output for op in ops]
        reads = dict.fromkeys(v for op in (*ops, *draft.sums) for v in op.inputs if v not in made)
        makes = tuple(v for v in made if self.home[v] == k and (saved.get(v, k) != k or self._wanted(v, draft)))
        return Unit(ops, tuple(reads), makes, saves, tuple(draft.sums), True, draft.own, draft.loop)

    def _wanted(self, value: Value, home: _Draft) -> bool:
        """Whether another unit takes the value from its home, rather than making it again."""
        for other in self.units:
            reads = any(value in op.inputs for op in (*other.ops, *other.sums))
            if reads and other is not home and all(op.output is not value for op in other.ops):
                return True
        return False


# A unit on a tile ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Work:
    """One unit on one tile: the region it makes (of the driver, for a lone sum) and what it reads."""

    unit: Unit
    region: Region
    reads: tuple[Region, ...]


def work_of(units: Sequence[Unit], saves: Sequence[Value], sums: frozenset[Op], labels: Labels,
            tile: Tile) -> tuple[list[Work], dict[Value, Region]]:  # fmt: skip
    """What each unit does on a tile, in runnable order, and the region of each value.

    Regions follow from the tile backwards through the footprints; where several units read a
    value, it is made on the box around all that they read.
    """
    need: dict[Value, Region] = {v: own_region(v, labels, tile) for v in saves}
    found: list[Work] = []
    for unit in reversed(units):
        work = _fused(unit, need, labels, tile) if unit.fused else _single(unit, need, sums, labels, tile)
        if work is None:
            continue
        found.append(work)
        for value, read in zip(unit.reads, work.reads, strict=True):
            known = need.get(value)
            need[value] = read if known is None else box.union(known, read)
    found.reverse()
    return found, need


def _fused(unit: Unit, need: dict[Value, Region], labels: Labels, tile: Tile) -> Work | None:
    assert unit.loop is not None
    if unit.own:
        region = own_region(unit.loop, labels, tile)
    else:
        region = ((0, 0),) * len(unit.loop.shape)
        for value in (*unit.makes, *unit.saves):  # what other units read, and what is stored
            if value in need:
                region = box.union(region, need[value])
    if box.is_empty(region):
        return None
    for value in unit.makes:
        need[value] = box.union(need[value], region) if value in need else region
    return Work(unit, region, tuple(box.broadcast(region, v.shape) for v in unit.reads))


def _single(unit: Unit, need: dict[Value, Region], sums: frozenset[Op], labels: Labels, tile: Tile) -> Work | None:
    (op,) = unit.ops or unit.sums
    rule = op.rule
    if op in sums:
        region = own_region(op.inputs[rule.driver], labels, tile)  # type: ignore[attr-defined]
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
    return Work(unit, region, tuple(rule.footprint(op, region)))
