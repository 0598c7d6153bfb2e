"""In which memory each stored map lives: in the nearest, or farther away where that one does not hold them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fullframe.ir.graph import Value
from fullframe.partition.sections import Section
from fullframe.schedule.memory import Lifetimes, place


def spill(stages: Sequence[Section], lives: Lifetimes, maps: Mapping[Value, int], room: int,
          limit: int) -> frozenset[Value]:  # fmt: skip
    """The maps that live farther away: as few as it takes for the others to need no more than ``room`` bytes at once,
    and no more than have place there, ``limit`` bytes.

    At the peak the map goes that is read least often, and of those the one that lives longest. Which one is next does
    not depend on the room, so what is moved for one room is moved for every smaller one.
    """
    reads = Counter(v for section in stages for v in section.loads)
    alive = {v: range(lives.first[v], lives.last[v] + 1) for v in lives.first if maps.get(v)}
    near, far = lives.usage(len(stages), dict(maps)), [0] * len(stages)
    moved: list[Value] = []
    while near and max(near) > room:
        peak = max(range(len(near)), key=near.__getitem__)
        here = [
            v for v, span in alive.items() if peak in span and max(far[span.start : span.stop]) + maps[v] <= limit
        ]
        if not here:
            break
        value = min(here, key=lambda v: (reads[v], -len(alive[v])))
        for k in alive.pop(value):
            near[k] -= maps[value]
            far[k] += maps[value]
        moved.append(value)
    return frozenset(moved[: _placed(lives, maps, moved, limit)])


def _placed(lives: Lifetimes, maps: Mapping[Value, int], moved: Sequence[Value], limit: int) -> int:
    """How many of these maps, the first ones, have place in so many bytes: there are gaps between them."""

    def fits(count: int) -> bool:
        return place(lives, {v: maps[v] for v in moved[:count]})[1] <= limit

    if fits(len(moved)):
        return len(moved)
    least, most = 0, len(moved)  # so many fit, so many do not
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least
