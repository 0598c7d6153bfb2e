"""Classes of tiles: tiles of a stage whose tasks are the same but for where their regions lie.

All tiles of the interior of an image do the same on windows of the same shapes. Only the places in memory differ, and
along each axis of the grid these move on by the same number of pixels from tile to tile. So a class has one task, one
recording of it, and for each array that the task touches how much further it begins from one tile to the next. What
is kept does not grow with the image.

Which tiles are alike is found by comparing their tasks (`outline`), where tiles begin at whole pixels of every map:
along each axis the first and the last few tiles with one from the middle, and then, at the corners of what lies
between and along its first rows, the forms and the places. That is enough.
Where a region begins is a monotone function of the tile's position, made of multiples, whole parts and clips; so is
its distance from a straight line as long as nothing is clipped, and the form says where something is. If both ends of
a row of tiles lie on it, all between them do. Where plans are verified, every tile is compared.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from fullframe.ir import region as box
from fullframe.ir.graph import Op, Value
from fullframe.runtime.tasks import Job, Part, Store, Task
from fullframe.schedule import verify
from fullframe.schedule.plan import EDGE

FEWEST = 4  # tiles of an axis that are worth a class
LINE = 16  # tiles of a row that are all compared

Position = tuple[int, ...]
Starts = tuple[tuple[int, ...], ...]
Steps = Sequence[Starts]
Array = tuple[Value, tuple[int, ...]]
"""A stored map and its element at which parts of it begin."""


class Outline(NamedTuple):
    """A task without where its regions lie, its ``form``; and where each of its bases begins.

    Bases are the arrays that the task touches, then the regions that it fetches, and those that it puts.
    """

    form: Hashable
    starts: Starts


def outline(task: Task, offloaded: Collection[Value]) -> Outline:
    """A task's form, and where its bases begin."""
    arrays = arrays_of(task, offloaded)
    jobs = tuple(_form(job, arrays, offloaded) for job in task.jobs)
    moved = [(f.value, f.region) for f in task.fetches]
    moved += [(s.value, s.region) for s in puts_of(task, offloaded) if s.region is not None]
    away = tuple((value, box.shape_of(region)) for value, region in moved)
    starts = (*(start for _, start in arrays), *(tuple(low for low, _ in region) for _, region in moved))
    return Outline((jobs, away), starts)


def arrays_of(task: Task, offloaded: Collection[Value]) -> dict[Array, int]:
    """The arrays that a task reads and writes where they lie, numbered."""
    found: dict[Array, int] = {}
    for value, part in accesses(task, offloaded):
        found.setdefault(begins(value, part), len(found))
    return found


def accesses(task: Task, offloaded: Collection[Value]) -> Iterator[tuple[Value, Part]]:
    """The parts of stored maps that a task reads and writes where they lie."""
    for job in task.jobs:
        yield from ((r.value, r.part) for r in job.reads if not r.window and r.empty is None)
        yield from ((t.value, t.part) for t in job.targets if t.shape is None)
        yield from ((s.value, s.to) for s in job.stores if s.region is not None and s.value not in offloaded)


def puts_of(task: Task, offloaded: Collection[Value]) -> list[Store]:
    """What a task puts away from the device."""
    return [s for job in task.jobs for s in job.stores if s.region is not None and s.value in offloaded]


def begins(value: Value, part: Part) -> Array:
    """The array that a part is of."""
    return value, (0,) * len(value.shape) if part is None else tuple(s.start for s in part)


def span(part: Part) -> Hashable:
    """A part as something that can be compared."""
    return None if part is None else tuple((s.start, s.stop) for s in part)


def _form(job: Job, arrays: dict[Array, int], offloaded: Collection[Value]) -> Hashable:
    def lies(value: Value, part: Part) -> Hashable:
        extents = None if part is None else tuple(s.stop - s.start for s in part)
        return arrays[begins(value, part)], extents

    ops: Sequence[Op] = (*job.group.ops, *job.group.sums)
    reads = tuple(
        (r.value, r.empty, r.window, span(r.part) if r.window or r.empty is not None else lies(r.value, r.part))
        for r in job.reads
    )
    targets = tuple((t.value, t.shape, t.keep, None if t.shape else lies(t.value, t.part)) for t in job.targets)
    stores = tuple(
        (s.value, span(s.made), s.region and (s.value in offloaded or lies(s.value, s.to))) for s in job.stores
    )
    sums = tuple((s.op, s.region, s.shape, s.counted) for s in job.sums)
    positions = tuple(op.rule.position(op, job.region) for op in ops)
    return job.group, box.shape_of(job.region), positions, reads, targets, stores, sums, job.frees


Draw = Callable[[Position], Outline]


class Likeness:
    """Which tiles of a grid are alike: runs of tiles along each of its axes, and for boxes of such runs how much
    further each base begins from one tile to the next."""

    def __init__(self, counts: Sequence[int], whole: Sequence[bool], draw: Draw):
        """``whole``: along which axes of the grid tiles begin at whole pixels of every map; elsewhere no few tiles
        tell what the others are."""
        self.runs = [
            _runs(counts, axis, draw) if whole[axis] else [(k, k) for k in range(n)] for axis, n in enumerate(counts)
        ]
        self.lows = [[low for low, _ in runs] for runs in self.runs]
        self.steps: dict[Position, Steps | None] = {}

    def box(self, position: Position) -> Position:
        """The first tile of the box that a position is in."""
        return tuple(lows[bisect_right(lows, at) - 1] for lows, at in zip(self.lows, position, strict=True))

    def found(self, first: Position, draw: Draw) -> Steps | None:
        """By axis of the grid, how many elements further along each axis of its own every base begins; None for a box
        of one tile, and where the tiles of a box are not alike."""
        if first not in self.steps:
            ends = tuple(dict(runs)[low] for runs, low in zip(self.runs, first, strict=True))
            self.steps[first] = None if first == ends else _regular(first, ends, draw)
        return self.steps[first]

    def boxes(self) -> Iterator[tuple[Position, Position]]:
        """The first and the last tile of all boxes."""
        for found in product(*self.runs):
            yield tuple(low for low, _ in found), tuple(high for _, high in found)


def _runs(counts: Sequence[int], axis: int, draw: Draw) -> list[tuple[int, int]]:
    """The first and last of each run of tiles along an axis that may be alike, the others in the middle."""
    n, middle = counts[axis], [c // 2 for c in counts]
    single = [(k, k) for k in range(n)]
    if n < FEWEST + 2:
        return single

    def form(at: int) -> Hashable:
        return draw((*middle[:axis], at, *middle[axis + 1 :])).form

    common = form(n // 2)
    first = next((k for k in range(min(EDGE, n // 2)) if form(k) == common), n // 2)
    last = next((k for k in range(n - 1, max(n - 1 - EDGE, n // 2), -1) if form(k) == common), n // 2)
    return single if last - first + 1 < FEWEST else [*single[:first], (first, last), *single[last + 1 :]]


def _regular(first: Position, ends: Position, draw: Draw) -> Steps | None:
    """The steps along each axis, if the tiles of a box are alike and lie on straight lines."""
    origin = draw(first)
    steps = []
    probes = list(product(*({low, high} for low, high in zip(first, ends, strict=True))))
    if not origin.starts:
        return None
    for axis, (low, high) in enumerate(zip(first, ends, strict=True)):
        if low == high:
            steps.append(_less(origin.starts, origin.starts))
            continue
        second = draw((*first[:axis], low + 1, *first[axis + 1 :]))
        if second.form != origin.form:
            return None
        steps.append(_less(second.starts, origin.starts))
        probes += [(*first[:axis], at, *first[axis + 1 :]) for at in range(low, high)][:LINE]
        probes.append((*first[:axis], high - 1, *first[axis + 1 :]))
    if verify.ON:
        probes = list(product(*(range(low, high + 1) for low, high in zip(first, ends, strict=True))))
    return steps if all(follows(draw(probe), origin, steps, first, probe) for probe in probes) else None


def follows(other: Outline, origin: Outline, steps: Steps, first: Position, position: Position) -> bool:
    """Whether a tile is like the first of its box, and where it should be."""
    shift = _less((position,), (first,))[0]
    expected = tuple(_add(start, moved(steps, shift, base)) for base, start in enumerate(origin.starts))
    return other.form == origin.form and other.starts == expected


def moved(steps: Steps, shift: Sequence[int], base: int) -> tuple[int, ...]:
    """How much further a base begins so many tiles along each axis of the grid."""
    along = (tuple(n * much for n in step[base]) for much, step in zip(shift, steps, strict=True))
    return tuple(sum(parts) for parts in zip(*along, strict=True))


def _add(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(m + n for m, n in zip(a, b, strict=True))


def _less(a: Starts, b: Starts) -> Starts:
    return tuple(tuple(m - n for m, n in zip(p, q, strict=True)) for p, q in zip(a, b, strict=True))
