"""Rematerialization: trading computation for memory along a schedule.

While the peak is too high, the value that costs least to recompute per byte it frees there is
dropped after its last use before the peak and cloned before its first use after it. This is greedy;
it does badly where only several values together are worth dropping, which `search` does within tighter budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from fullframe.ir.graph import Op, Value
from fullframe.partition.saved_values import SavedValues
from fullframe.partition.sections import Section, finish_section
from fullframe.partition.tile_axes import tiled
from fullframe.schedule.memory import Lifetimes, lifetimes

HEAVY = 3  # at most this many expensive ops are run again, halo on halo, to recompute one value
LIGHT = 20  # an element of a cheap op costs as much time as this many multiplications


@dataclass
class Draft:
    """A schedule being improved: the sections in order, with values rematerialized.

    ``versions`` lists the clones of each value, in the order they were made.
    """

    saved: SavedValues
    stages: list[Section]
    early: int
    order: dict[Op, int]
    kept: list[Value]
    sizes: dict[Value, int]
    versions: dict[Value, list[Value]] = field(default_factory=dict)

    def copy(self) -> Draft:
        """Another draft, which may be improved apart."""
        saved = self.saved
        saved = replace(saved, tile_axes=dict(saved.tile_axes), stored=set(saved.stored), maker=dict(saved.maker))
        versions = {v: [*clones] for v, clones in self.versions.items()}
        return Draft(saved, [*self.stages], self.early, dict(self.order), self.kept, dict(self.sizes), versions)

    def lifetimes(self) -> Lifetimes:
        return lifetimes(self.stages, self.kept)

    def peak(self) -> int:
        """Most bytes stored at once."""
        return max(self.lifetimes().usage(len(self.stages), self.sizes), default=0)


@dataclass
class Recompute:
    """How a value would be recomputed: the ops, what they load, and bytes kept longer for it."""

    ops: set[Op]
    loads: set[Value]
    extended: int
    work: float


def rematerialize_until(draft: Draft, target: int) -> bool:
    """Drop values until the peak is at most ``target``; False where no drop helps any more."""
    while True:
        lives = draft.lifetimes()
        used = lives.usage(len(draft.stages), draft.sizes)
        peak = max(range(len(used)), key=used.__getitem__, default=0)
        if not used or used[peak] <= target:
            return True
        best = _cheapest(draft, lives, peak)
        if best is None:
            return False
        _rematerialize(draft, *best)


def _uses_after(stages: Sequence[Section], peak: int) -> dict[Value, int]:
    """First use of each value after the peak."""
    found: dict[Value, int] = {}
    for k in range(len(stages) - 1, peak, -1):
        for value in stages[k].loads:
            found[value] = k
    return found


def _cheapest(draft: Draft, lives: Lifetimes, peak: int) -> tuple[Value, int, Recompute] | None:
    best: tuple[float, tuple[Value, int, Recompute]] | None = None
    fixed = set(draft.kept) | set(draft.stages[peak].loads) | set(draft.stages[peak].outputs)
    uses = _uses_after(draft.stages, peak)
    saved = draft.saved
    for value, at in uses.items():
        size = draft.sizes.get(value, 0)
        if value in fixed or not size or lives.first.get(value, peak) >= peak or not tiled(value, saved.tile_axes):
            continue
        if saved.maker[value] in saved.reducing or value in saved.pinned or _waits(draft, lives, value, peak):
            continue
        recompute = _recompute(draft, lives, value, at, peak)
        if recompute is None or recompute.extended >= size:
            continue
        score = recompute.work / (size - recompute.extended)
        if best is None or score < best[0]:
            best = score, (value, at, recompute)
    return None if best is None else best[1]


def _waits(draft: Draft, lives: Lifetimes, value: Value, peak: int) -> bool:
    """Whether a value recomputed has not been read yet at the peak: what needs it needs the others there too.

    Dropping it would only change the order in which they are made, and could go on for ever.
    """
    if not any(value in clones for clones in draft.versions.values()):
        return False
    return not any(value in stage.loads for stage in draft.stages[lives.first[value] + 1 : peak])


def _recompute(draft: Draft, lives: Lifetimes, value: Value, at: int, peak: int) -> Recompute | None:
    """The slice that makes ``value`` at stage ``at`` from what is alive there, or would be kept."""
    saved = draft.saved
    recompute = Recompute(set(), set(), 0, 0.0)
    heavy = 0
    stack = [saved.maker[value]]
    while stack:
        op = stack.pop()
        if op in recompute.ops:
            continue
        recompute.ops.add(op)
        recompute.work += op.rule.cost(op, prod(op.output.shape)) * (1 if op.rule.heavy else LIGHT)
        heavy += op.rule.heavy
        if heavy > HEAVY:
            return None
        for read in op.inputs:
            if read not in saved.maker:
                recompute.loads.add(read)
            elif read not in saved.stored:
                stack.append(saved.maker[read])
            elif (found := _at_hand(draft, lives, read, at, peak)) is not None:
                recompute.loads.add(found)
            elif saved.maker[read] in saved.reducing or not tiled(read, saved.tile_axes) or read in saved.pinned:
                recompute.loads.add(read)
                recompute.extended += draft.sizes.get(read, 0)
            else:
                stack.append(saved.maker[read])
    return recompute


def _at_hand(draft: Draft, lives: Lifetimes, value: Value, at: int, peak: int) -> Value | None:
    """A version of a value that is alive at a stage, or can be kept to it without crossing the peak."""
    if value not in lives.first:
        return value  # made before the schedule starts
    for version in reversed([value, *draft.versions.get(value, [])]):
        first = lives.first.get(version)
        if (
            first is not None
            and first < at
            and (lives.last[version] >= at or first > peak or lives.last[version] >= peak)
        ):
            return version
    return None


def _rematerialize(draft: Draft, value: Value, at: int, recompute: Recompute) -> None:
    """Free ``value`` before the peak and recompute it, as a clone, before stage ``at``."""
    saved, stages = draft.saved, draft.stages
    original = saved.maker[value]
    clone = Value(value.name + "'", value.shape, value.dtype, value.itemsize)
    saved.tile_axes[clone] = saved.tile_axes[value]
    saved.stored.add(clone)
    draft.sizes[clone] = draft.sizes[value]
    base = next((v for v, clones in draft.versions.items() if value in clones), value)
    draft.versions.setdefault(base, []).append(clone)
    ops = _renamed(draft, recompute)
    made = {replace(op, output=clone) if op.output in (base, value) else op for op in ops}
    for op in made:
        draft.order.setdefault(op, draft.order[original] if op.output is clone else draft.order.get(op, 0))
        if op.output is clone:
            saved.maker[clone] = op
    for k in range(at, len(stages)):
        if value in stages[k].loads:
            stages[k] = reads_instead(stages[k], {value: clone})
    section = finish_section(made, recompute.loads, [clone], saved, draft.order, clone=True)
    stages.insert(at, section)
    if at <= draft.early:
        draft.early += 1


def _renamed(draft: Draft, recompute: Recompute) -> list[Op]:
    """The ops of a slice, reading the versions that the slice loads."""
    names: dict[Value, Value] = {}
    for load in recompute.loads:
        for value, clones in draft.versions.items():
            if load in clones:
                names[value] = load
    made = []
    for op in recompute.ops:
        inputs = tuple(names.get(v, v) for v in op.inputs)
        new = op if inputs == op.inputs else replace(op, inputs=inputs)
        draft.order[new] = draft.order[op]
        made.append(new)
    return made


def reads_instead(section: Section, names: dict[Value, Value]) -> Section:
    """The section with values replaced in everything it reads."""
    swapped = {
        op: replace(op, inputs=tuple(names.get(v, v) for v in op.inputs))
        for op in section.ops
        if any(v in names for v in op.inputs)
    }
    return replace(
        section,
        ops=tuple(swapped.get(op, op) for op in section.ops),
        loads=tuple(names.get(v, v) for v in section.loads),
        sums=tuple(swapped.get(op, op) for op in section.sums),
    )
