"""Drop and make again: trading computation for memory along a schedule.

While the peak is too high, the value that costs least to make again per byte it frees there is
dropped after its last use before the peak and cloned before its first use after it. This is greedy;
it does badly where only several values together are worth dropping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from fullframe.ir.graph import Op, Value
from fullframe.partition.saved_values import Cuts
from fullframe.partition.sections import Section, finish_section
from fullframe.partition.tile_axes import tiled
from fullframe.schedule.memory import Lifetimes, lifetimes

HEAVY = 3  # at most this many dear ops are run again, halo on halo, to make one value again
LIGHT = 20  # an element of a cheap op costs as much time as this many multiplications


@dataclass
class Draft:
    """A schedule being improved: the sections in order, with values dropped and made again.

    ``versions`` lists the clones of each value, in the order they were made.
    """

    cuts: Cuts
    steps: list[Section]
    early: int
    order: dict[Op, int]
    kept: list[Value]
    sizes: dict[Value, int]
    versions: dict[Value, list[Value]] = field(default_factory=dict)

    def lifetimes(self) -> Lifetimes:
        return lifetimes(self.steps, self.kept)

    def peak(self) -> int:
        """Most bytes stored at once."""
        return max(self.lifetimes().usage(len(self.steps), self.sizes), default=0)


@dataclass
class Again:
    """How a value would be made again: the ops, what they load, and bytes kept longer for it."""

    ops: set[Op]
    loads: set[Value]
    extended: int
    work: float


def drop_until(draft: Draft, target: int) -> bool:
    """Drop values until the peak is at most ``target``; False where no drop helps any more."""
    while True:
        lives = draft.lifetimes()
        used = lives.usage(len(draft.steps), draft.sizes)
        peak = max(range(len(used)), key=used.__getitem__, default=0)
        if not used or used[peak] <= target:
            return True
        best = _cheapest(draft, lives, peak)
        if best is None:
            return False
        _drop(draft, *best)


def _uses_after(steps: Sequence[Section], peak: int) -> dict[Value, int]:
    """First use of each value after the peak."""
    found: dict[Value, int] = {}
    for k in range(len(steps) - 1, peak, -1):
        for value in steps[k].loads:
            found[value] = k
    return found


def _cheapest(draft: Draft, lives: Lifetimes, peak: int) -> tuple[Value, int, Again] | None:
    best: tuple[float, tuple[Value, int, Again]] | None = None
    fixed = set(draft.kept) | set(draft.steps[peak].loads) | set(draft.steps[peak].outputs)
    uses = _uses_after(draft.steps, peak)
    cuts = draft.cuts
    for value, at in uses.items():
        size = draft.sizes.get(value, 0)
        if value in fixed or not size or lives.first.get(value, peak) >= peak or not tiled(value, cuts.labels):
            continue
        if cuts.maker[value] in cuts.reducing or value in cuts.exact or _waits(draft, lives, value, peak):
            continue
        again = _make_again(draft, lives, value, at, peak)
        if again is None or again.extended >= size:
            continue
        score = again.work / (size - again.extended)
        if best is None or score < best[0]:
            best = score, (value, at, again)
    return None if best is None else best[1]


def _waits(draft: Draft, lives: Lifetimes, value: Value, peak: int) -> bool:
    """Whether a value made again has not been read yet at the peak: what needs it needs the others there too.

    Dropping it would only change the order in which they are made, and could go on for ever.
    """
    if not any(value in clones for clones in draft.versions.values()):
        return False
    return not any(value in step.loads for step in draft.steps[lives.first[value] + 1 : peak])


def _make_again(draft: Draft, lives: Lifetimes, value: Value, at: int, peak: int) -> Again | None:
    """The slice that makes ``value`` at step ``at`` from what is alive there, or would be kept."""
    cuts = draft.cuts
    again = Again(set(), set(), 0, 0.0)
    heavy = 0
    stack = [cuts.maker[value]]
    while stack:
        op = stack.pop()
        if op in again.ops:
            continue
        again.ops.add(op)
        again.work += op.rule.cost(op, prod(op.output.shape)) * (1 if op.rule.heavy else LIGHT)
        heavy += op.rule.heavy
        if heavy > HEAVY:
            return None
        for read in op.inputs:
            if read not in cuts.maker:
                again.loads.add(read)
            elif read not in cuts.stored:
                stack.append(cuts.maker[read])
            elif (found := _at_hand(draft, lives, read, at, peak)) is not None:
                again.loads.add(found)
            elif cuts.maker[read] in cuts.reducing or not tiled(read, cuts.labels) or read in cuts.exact:
                again.loads.add(read)
                again.extended += draft.sizes.get(read, 0)
            else:
                stack.append(cuts.maker[read])
    return again


def _at_hand(draft: Draft, lives: Lifetimes, value: Value, at: int, peak: int) -> Value | None:
    """A version of a value that is alive at a step, or can be kept to it without crossing the peak."""
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


def _drop(draft: Draft, value: Value, at: int, again: Again) -> None:
    """Free ``value`` before the peak and make it again, as a clone, before step ``at``."""
    cuts, steps = draft.cuts, draft.steps
    original = cuts.maker[value]
    clone = Value(value.name + "'", value.shape, value.dtype, value.itemsize)
    cuts.labels[clone] = cuts.labels[value]
    cuts.stored.add(clone)
    draft.sizes[clone] = draft.sizes[value]
    base = next((v for v, clones in draft.versions.items() if value in clones), value)
    draft.versions.setdefault(base, []).append(clone)
    ops = _renamed(draft, again, base)
    made = {replace(op, output=clone) if op.output in (base, value) else op for op in ops}
    for op in made:
        draft.order.setdefault(op, draft.order[original] if op.output is clone else draft.order.get(op, 0))
        if op.output is clone:
            cuts.maker[clone] = op
    for k in range(at, len(steps)):
        if value in steps[k].loads:
            steps[k] = reads_instead(steps[k], {value: clone})
    section = finish_section(made, again.loads, [clone], cuts, draft.order, clone=True)
    steps.insert(at, section)
    if at <= draft.early:
        draft.early += 1


def _renamed(draft: Draft, again: Again, base: Value) -> list[Op]:
    """The ops of a slice, reading the versions that the slice loads."""
    names: dict[Value, Value] = {}
    for load in again.loads:
        for value, clones in draft.versions.items():
            if load in clones:
                names[value] = load
    made = []
    for op in again.ops:
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
