"""A run on one of several ranks: stage by stage, its own tiles, between exchanges in which all take part.

Before a stage the rows that it reads beyond those at hand come from the ranks that made them, all by one exchange;
after it the nodes of its sums go round, and each rank puts the same tree together, to the last bit the one of a
single process. Where rows and sums are to be exchanged follows from the plan, so a rank that fails knows where the
others will meet next, and tells them there.
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
from fullframe.schedule.split import Exchange, Piece
from fullframe.storage.arena import shaped

Meeting = tuple[str, int]
"""Where all ranks meet: for ``rows`` before a stage, for its ``sums`` after it, or to ``close`` after so many."""


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


Layout = list[Message]  # of each rank
_LAYOUTS: WeakKeyDictionary[Plan, dict[int, Layout]] = WeakKeyDictionary()


def advance(run: Together, domain: Domain, stages: range, threads: int, multi_threaded: Sequence[bool]) -> None:
    """Run the stages together with the other ranks; what fails on one raises on all, at the same place."""
    journey = _Journey(run, domain, stages)
    with journey.shared():
        for number in stages:
            journey.rows("rows", number)
            sums = run.begin(number)
            run.threads(threads if multi_threaded[number] else 1)
            _make(run, number, sums)
            journey.sums(number, sums)
            run.end(number, sums)
            run.free(number)
        journey.rows("close", stages.stop)


def exchanges(plan: Plan, stages: range) -> list[Meeting]:
    """Where ranks meet in these stages, in order."""
    assert plan.share is not None
    found: list[Meeting] = []
    for number in stages:
        found += [("rows", number)] * (plan.share.before[number] is not None)
        found += [("sums", number)] * _sums_meet(plan, number)
    return [*found, ("close", stages.stop)]


def _sums_meet(plan: Plan, number: int) -> bool:
    assert plan.share is not None
    return plan.share.tiles[number] is not None and bool(plan.stages[number].section.sums)


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


class _Journey:
    """One run over stages: where ranks meet, and how often they have."""

    def __init__(self, run: Together, domain: Domain, stages: range):
        self.run, self.domain = run, domain
        self.meetings = exchanges(run.plan, stages)
        self.met = 0

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
        what, number = meeting
        if what == "sums":
            layout = self._layouts.get(number)
            if layout is None:
                agree(self.domain, None, error)
            else:
                self._swap_of(layout).go(error)
            return
        self._rows_swap(self._exchange(meeting)).go(error)

    # Rows -----------------------------------------------------------------------------------------

    def rows(self, what: str, number: int) -> None:
        """Fetch the rows that are to come before a stage, or after the last."""
        if self.meetings[self.met] != (what, number):
            return
        exchange = self._exchange((what, number))
        swap = self._rows_swap(exchange)
        for pieces, block in zip(exchange.sends, swap.outgoing, strict=True):
            for part, view in self._views(pieces, block):
                view.copy_(part)
        incoming = self._go(swap)
        for pieces, block in zip(exchange.receives, incoming, strict=True):
            for part, view in self._views(pieces, block):
                part.copy_(view)

    def _go(self, swap: Swap) -> list[torch.Tensor]:
        self.met += 1
        return swap.go()

    def _exchange(self, meeting: Meeting) -> Exchange:
        share, (what, number) = self.run.plan.share, meeting
        assert share is not None
        found = share.before[number] if what == "rows" else share.closing.get(number)
        return found or Exchange(((),) * share.ranks, ((),) * share.ranks)

    def _rows_swap(self, exchange: Exchange) -> Swap:
        sends = [sum(rounded(p.nbytes) for p in pieces) for pieces in exchange.sends]
        receives = [sum(rounded(p.nbytes) for p in pieces) for pieces in exchange.receives]
        return Swap(self.domain, sends, receives)

    def _views(self, pieces: Sequence[Piece], block: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows as they lie here, and their place in a message, where channels are innermost, too."""
        at = 0
        for piece in pieces:
            flat = block[at : at + piece.nbytes].view(piece.value.dtype)
            part = part_in(self.run.plan, piece.value, piece.region)
            held = self.run.values[piece.value]
            yield held if part is None else held[part], shaped(flat, box.shape_of(piece.region))
            at += rounded(piece.nbytes)

    # Sums -----------------------------------------------------------------------------------------

    @property
    def _layouts(self) -> dict[int, Layout]:
        return _LAYOUTS.setdefault(self.run.plan, {})

    def sums(self, number: int, sums: Sums) -> None:
        """Add the nodes of the other ranks to the sums of a stage, and give them those of this one."""
        if self.meetings[self.met] != ("sums", number):
            return
        stage = self.run.plan.stages[number]
        mine = list(_parts(stage, sums))
        if number not in self._layouts:  # the same in every run, so it is told only once
            message = Message(sorted(sums.nodes), [part for part, _ in mine])
            self._layouts[number] = agree(self.domain, message)
        layout = self._layouts[number]
        swap = self._swap_of(layout)
        for rank, block in enumerate(swap.outgoing):
            if rank != self.domain.rank:
                for (_, tensor), view in zip(mine, _unpacked(layout[self.domain.rank].parts, block), strict=True):
                    view.copy_(tensor)
        for rank, block in enumerate(self._go(swap)):
            if rank != self.domain.rank:
                sums.join(_nodes(stage.section.sums, layout[rank], block))

    def _swap_of(self, layout: Layout) -> Swap:
        sizes = [message.nbytes for message in layout]
        return Swap(self.domain, [sizes[self.domain.rank]] * self.domain.size, sizes)


def _parts(stage: Stage, sums: Sums) -> Iterator[tuple[Part, torch.Tensor]]:
    """What a rank has added up of a stage's sums, in the type in which they are added."""
    number = {op: k for k, op in enumerate(stage.section.sums)}
    found = [(place, *key, made) for place, node in sums.nodes.items() for key, made in node.items()]
    for place, op, region, made in sorted(found, key=lambda f: (f[0], number[f[1]], f[2] or ())):
        wide = widened(op, made)
        yield Part(place, number[op], region, tuple(wide.shape), wide.dtype), wide


def _unpacked(parts: Sequence[Part], block: torch.Tensor) -> Iterator[torch.Tensor]:
    at = 0
    for part in parts:
        n = prod(part.shape) * part.dtype.itemsize
        yield block[at : at + n].view(part.dtype).view(part.shape)
        at += part.nbytes


def _nodes(ops: Sequence[Op], message: Message, block: torch.Tensor) -> dict[Place, Node]:
    """The nodes of another rank."""
    found: dict[Place, Node] = {place: {} for place in message.places}
    for part, view in zip(message.parts, _unpacked(message.parts, block), strict=True):
        found[part.place][ops[part.op], part.region] = view
    return found
