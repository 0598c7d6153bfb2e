"""Where ranks meet: rows and sums move in as few exchanges as the order of the stages allows.

A meeting is put off until a stage reads what another rank has made. Then all sums that wait go round at once, with
all rows that are made already and that one of the next stages will read. Fewer meetings mean fewer times that a rank
waits for the slowest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from math import prod

from fullframe.ir.graph import Value
from fullframe.schedule.plan import Stage
from fullframe.schedule.split import Meeting, Share

AHEAD = 32  # stages whose rows may come before they are read
WAITING = 8 << 20  # bytes of sums that wait at most, but for one stage's


def sums_nbytes(stage: Stage) -> int:
    """Bytes of the nodes of a stage's sums that one rank may have."""
    nodes = 2 * (len(stage.grid) - 1).bit_length() or 1
    return 8 * nodes * sum(prod(op.output.shape) for op in stage.section.sums)


def meetings(stages: Sequence[Stage], divided: Sequence[bool], moved: Mapping[int, Sequence[Value]],
             span: range) -> tuple[Meeting, ...]:  # fmt: skip
    """The meetings of a run over a span of stages, the last of them behind it.

    ``divided``: which stages' tiles ranks have between them. ``moved``: the values of which rows move before a stage
    is made, or behind the last of the span.
    """
    ready = _ready(stages, moved, span)
    found: list[Meeting] = []
    waiting: list[int] = []
    pending: set[Value] = set()
    held = 0
    for number in (*span, span.stop):
        reads = number in span and not pending.isdisjoint(stages[number].section.loads)
        if number in ready or reads or held > WAITING or number == span.stop:
            rows = _rows(ready, number)
            found.append(Meeting(number, tuple(rows), tuple(waiting)))
            for n in rows:
                del ready[n]
            waiting, pending, held = [], set(), 0
        if number in span and divided[number] and stages[number].section.sums:
            waiting.append(number)
            pending |= {op.output for op in stages[number].section.sums}
            held += sums_nbytes(stages[number])
    return tuple(found)


def gates(stages: Sequence[Stage], share: Share, span: range) -> dict[int, int]:
    """How many meetings of a run over a span must be over before each stage: up to the last that brings what it
    reads. None of them comes after the stage, so no meeting waits for a stage that waits for it."""
    rows: dict[int, int] = {}
    sums: dict[int, int] = {}
    for k, meeting in enumerate(share.meetings[span.start], 1):
        rows |= dict.fromkeys(meeting.rows, k)
        sums |= dict.fromkeys(meeting.sums, k)
    found: dict[int, int] = {}
    brought: dict[Value, int] = {}
    for number in span:
        section, exchange = stages[number].section, share.before[number]
        if exchange is not None:  # rows stay, and stages after this one may read them, too
            brought |= {p.value: rows[number] for pieces in exchange.receives for p in pieces}
        found[number] = max(rows.get(number, 0), *(brought.get(v, 0) for v in section.loads), 0)
        brought |= dict.fromkeys(section.outputs, 0)
        brought |= dict.fromkeys((op.output for op in section.sums), sums.get(number, 0))
    return found


def _rows(ready: Mapping[int, int], number: int) -> list[int]:
    """Of the next stages those whose rows are all made before a stage."""
    near = takewhile(lambda item: item[0] < number + AHEAD, ready.items())
    return [n for n, first in near if first <= number]


def _ready(stages: Sequence[Stage], moved: Mapping[int, Sequence[Value]], span: range) -> dict[int, int]:
    """By the stage that reads rows, the stage before which all of them are made."""
    made: dict[Value, int] = {}
    found: dict[int, int] = {}
    for number in (*span, span.stop):
        if moved.get(number):
            found[number] = max(made.get(v, span.start) for v in moved[number])
        if number in span:
            made |= dict.fromkeys(stages[number].section.outputs, number + 1)
    return found
