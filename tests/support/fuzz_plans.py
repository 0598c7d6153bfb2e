"""Plans of a random network other than its own: of many stages at once, and with maps in other memories."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock
from zlib import crc32

import fullframe
from fullframe.compiler.requests import MAX_IN_FLIGHT
from fullframe.ir.graph import Graph
from fullframe.schedule import planner
from fullframe.schedule.placement import _Stays
from fullframe.storage import protocol

PLENTY = 1 << 40
ROOM = 32 << 20  # bytes for what is read ahead and written behind


def abreast(graph: Graph, request: planner.Request) -> fullframe.Plan:
    """A plan of which several steps may be in work at the same time, if the budget has room for that."""
    return planner.plan(graph, replace(request, max_in_flight=MAX_IN_FLIGHT))


def away(graph: Graph, request: planner.Request) -> fullframe.Plan:
    """A plan whose stored maps live in the second tier, whether they would fit in the first or not."""
    return _planned(graph, replace(request, budget=PLENTY, host=PLENTY, workers=planner.STREAMS))


def on_disk(graph: Graph, request: planner.Request) -> fullframe.Plan:
    """A plan whose stored maps live on a disk, whether they would fit in memory or not, with room to read ahead: of
    half of the maps that are read several times every other time alone, the first or the second."""
    away = mock.patch.multiple(_Stays, move=_every_other, fetch=lambda *_: None)
    with away, mock.patch.object(planner, "PER_BYTE", 0):
        found = _planned(graph, replace(request, budget=PLENTY, disk=PLENTY, workers=2))
    return replace(found, bytes=replace(found.bytes, spare=ROOM if found.bytes.disk else 0))


def _every_other(stays: _Stays, room: int, limit: int) -> None:
    for value, found in stays.of.items():
        drawn = crc32(value.name.encode())
        for stay in found:
            if len(found) == 1 or drawn & 1 or (stay.number + (drawn >> 1)) % 2 == 0:
                stays.moved[stay] = None


def _planned(graph: Graph, request: planner.Request) -> fullframe.Plan:
    return planner._fit(planner._Begun(graph, request), request)


def in_bands(all_of_them: bool) -> Any:
    """What is cut within a row is moved in rows of full width, however long its own runs are; or nothing is."""
    return mock.patch.object(protocol, "BAND_RUN", 1 << 30 if all_of_them else 0)
