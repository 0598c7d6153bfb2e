"""A run on one of several ranks: its own tiles, and exchanges in which all take part.

When ranks meet is in the plan (`schedule.meetings`): by one exchange come the rows that the next stages read beyond
those at hand, from the ranks that made them, and the nodes of sums go round, of which each rank puts the same tree
together, to the last bit the one of a single process. As this follows from the plan, a rank that fails knows where
the others will meet next, and tells them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from threading import Lock
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch

from fullframe.distributed.exchange import Swap, agree, rounded, told
from fullframe.distributed.mesh import Domain
from fullframe.ir import region as box
from fullframe.ir.graph import Op
from fullframe.ir.region import Region
from fullframe.runtime.accumulate import Node, Place, Running, Sums, widened
from fullframe.runtime.tasks import part_in, place_of, tiles_of
from fullframe.runtime.workers import pool
from fullframe.schedule.plan import Plan, Stage
from fullframe.schedule.split import Exchange, Meeting, Piece
from fullframe.storage.arena import shaped


class Together(Running, Protocol):
    """A run of a plan, as it is needed here."""

    plan: Plan
    device: torch.device


class Part(NamedTuple):
    """A part of a node of a sum, as it travels: whose, where, and of which shape."""

    place: Place
    op: int  # of the stage's sums
    region: Region | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return rounded(prod(self.shape) * self.dtype.itemsize)


class Message(NamedTuple):
    """What a rank sends to all others when a stage ends: its nodes, some of which may be empty, and their parts."""

    places: list[Place]
    parts: list[Part]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


Layout = list[list[Message]]  # of each rank, for each stage whose sums go round in a meeting
_LAYOUTS: WeakKeyDictionary[Plan, dict[Meeting, Layout]] = WeakKeyDictionary()


def advance(run: Together, domain: Domain, stages: range, threads: int, multi_threaded: Sequence[bool]) -> None:
    """The reference: the stages one by one, together with the other ranks; what fails on one raises on all, at the
    same place."""
    journey = Journey(run, domain, stages)
    with journey.shared():
        for number in stages:
            journey.meet(number)
            sums = run.begin(number)
            run.threads(threads if multi_threaded[number] else 1)
            _make(run, number, sums)
            journey.made(number, sums)
            run.free(number)
        journey.meet(stages.stop)


def _make(run: Together, number: int, sums: Sums) -> None:
    """Make this rank's tiles of a stage, by all of its workers."""
    stage, mine, lock = run.plan.stages[number], tiles_of(run.plan, number), Lock()

    def make(k: int) -> None:
        made = run.make(number, k)
        with lock:
            sums.add(place_of(stage, k), made)

    if run.plan.workers == 1 or len(mine) < 2:
        for k in mine:
            make(k)
    else:
        for _ in pool(run.plan.workers).map(make, mine):
            pass


class Journey:
    """One run over stages: where ranks meet, how often they have, and the sums that wait for the next time."""

    def __init__(self, run: Together, domain: Domain, stages: range):
        assert run.plan.share is not None
        self.run, self.domain, self.stop = run, domain, stages.stop
        self.share, self.meetings = run.plan.share, run.plan.share.meetings[stages.start]
        self.met = 0
        self.waiting: dict[int, Sums] = {}

    def end(self, number: int, sums: Sums) -> None:
        """A stage's sums are there, of all ranks."""
        self.run.end(number, sums)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Tell the other ranks, where they wait next, of what fails inside."""
        try:
            yield
        except BaseException as error:
            if not told(error) and self.met < len(self.meetings):
                self._attend(self.meetings[self.met], error)
            raise

    def _attend(self, meeting: Meeting, error: BaseException) -> None:
        """Take part in a meeting having failed; raises the error."""
        layout = self._layouts.get(meeting) if meeting.sums else []
        if layout is None:
            agree(self.domain, None, error)
        else:
            self._swap(meeting, layout).go(error)

    def made(self, number: int, sums: Sums) -> None:
        """A stage's tiles are made. Its sums wait, if the other ranks have a part of them."""
        if waits(self.run.plan, number):
            self.waiting[number] = sums
        else:
            self.run.end(number, sums)

    def meet(self, number: int) -> None:
        """Exchange what is due before a stage, or after the last."""
        meeting = self.meetings[self.met]
        if meeting.number != number:
            return
        layout = self._layout(meeting)
        swap = self._swap(meeting, layout)
        for rank, block in enumerate(swap.outgoing):
            if rank != self.domain.rank:
                self._pack(meeting, rank, block)
        self.met += 1
        for rank, block in enumerate(swap.go()):
            if rank != self.domain.rank:
                self._unpack(meeting, layout, rank, block)
        for n in meeting.sums:
            self.end(n, self.waiting.pop(n))

    def _swap(self, meeting: Meeting, layout: Layout) -> Swap:
        """The exchange: to each other rank its rows, and then all sums."""
        sends, receives = ([0] * self.domain.size for _ in range(2))
        for exchange in self._exchanges(meeting):
            for rank in range(self.domain.size):
                sends[rank] += sum(rounded(p.nbytes) for p in exchange.sends[rank])
                receives[rank] += sum(rounded(p.nbytes) for p in exchange.receives[rank])
        for rank, messages in enumerate(layout):
            receives[rank] += sum(message.nbytes for message in messages)
        own = sum(message.nbytes for message in layout[self.domain.rank]) if layout else 0
        return Swap(self.domain, [n + own for n in sends], receives)

    def _exchanges(self, meeting: Meeting) -> list[Exchange]:
        """The rows that move, of this rank."""
        found = (self.share.closing.get(n) if n == self.stop else self.share.before[n] for n in meeting.rows)
        return [exchange for exchange in found if exchange is not None]

    def _pack(self, meeting: Meeting, rank: int, block: torch.Tensor) -> None:
        at = 0
        for exchange in self._exchanges(meeting):
            for part, view in self._views(exchange.sends[rank], block[at:]):
                view.copy_(part)
            at += sum(rounded(p.nbytes) for p in exchange.sends[rank])
        for n in meeting.sums:
            mine = list(parts_of(self.run.plan.stages[n], self.waiting[n]))
            parts = [part for part, _ in mine]
            for (_, tensor), view in zip(mine, unpacked(parts, block[at:]), strict=True):
                view.copy_(tensor)
            at += sum(part.nbytes for part in parts)

    def _unpack(self, meeting: Meeting, layout: Layout, rank: int, block: torch.Tensor) -> None:
        at = 0
        for exchange in self._exchanges(meeting):
            for part, view in self._views(exchange.receives[rank], block[at:]):
                part.copy_(view)
            at += sum(rounded(p.nbytes) for p in exchange.receives[rank])
        for n, message in zip(meeting.sums, layout[rank] if layout else (), strict=True):
            self.waiting[n].join(nodes_of(self.run.plan.stages[n].section.sums, message, block[at:]))
            at += message.nbytes

    def _views(self, pieces: Sequence[Piece], block: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows as they lie here, and their place in a message, where channels are innermost, too."""
        at = 0
        for piece in pieces:
            flat = block[at : at + piece.nbytes].view(piece.value.dtype)
            part = part_in(self.run.plan, piece.value, piece.region)
            held = self.run.values[piece.value]
            yield held if part is None else held[part], shaped(flat, box.shape_of(piece.region))
            at += rounded(piece.nbytes)

    @property
    def _layouts(self) -> dict[Meeting, Layout]:
        return _LAYOUTS.setdefault(self.run.plan, {})

    def _layout(self, meeting: Meeting) -> Layout:
        """How the sums of a meeting travel: the same in every run, so it is told only once."""
        if meeting.sums and meeting not in self._layouts:
            mine = [self._message(n) for n in meeting.sums]
            self._layouts[meeting] = agree(self.domain, mine)
        return self._layouts[meeting] if meeting.sums else []

    def _message(self, number: int) -> Message:
        sums = self.waiting[number]
        return Message(sorted(sums.nodes), [part for part, _ in parts_of(self.run.plan.stages[number], sums)])


def waits(plan: Plan, number: int) -> bool:
    """Whether other ranks have a part of a stage's sums."""
    return plan.share is not None and plan.share.tiles[number] is not None and bool(plan.stages[number].section.sums)


def parts_of(stage: Stage, sums: Sums) -> Iterator[tuple[Part, torch.Tensor]]:
    """What a rank has added up of a stage's sums, in the type in which they are added."""
    number = {op: k for k, op in enumerate(stage.section.sums)}
    found = [(place, *key, made) for place, node in sums.nodes.items() for key, made in node.items()]
    for place, op, region, made in sorted(found, key=lambda f: (f[0], number[f[1]], f[2] or ())):
        wide = widened(op, made)
        yield Part(place, number[op], region, tuple(wide.shape), wide.dtype), wide


def unpacked(parts: Sequence[Part], block: torch.Tensor) -> Iterator[torch.Tensor]:
    at = 0
    for part in parts:
        n = prod(part.shape) * part.dtype.itemsize
        yield block[at : at + n].view(part.dtype).view(part.shape)
        at += part.nbytes


def nodes_of(ops: Sequence[Op], message: Message, block: torch.Tensor) -> dict[Place, Node]:
    """The nodes of another rank."""
    found: dict[Place, Node] = {place: {} for place in message.places}
    for part, view in zip(message.parts, unpacked(message.parts, block), strict=True):
        found[part.place][ops[part.op], part.region] = view
    return found
