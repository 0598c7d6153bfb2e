"""Plans that store a given share of the most that is stored at once, whatever the budget, in small tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from fullframe.schedule import plan, planner, tiling, within
from fullframe.schedule.rematerialize import Stages


@contextmanager
def storing(share: float, *, join: bool, fill: float = 0.0, window: int = 20_000) -> Iterator[None]:
    """Inside, plans drop gaps down to this share, and fill again up to another; the largest window of a tile has
    about so many bytes."""

    def fit(begun, request):
        graph, draft = begun.graph, begun.draft
        stages = Stages(graph, draft, window, join=join)
        state = stages.search.copy()
        top = max(state.profile(), default=0)
        state.drop(top * share)
        if fill > share:
            state.fill(top * fill)
        made = stages.draft(state)
        return planner._finish(begun, made, replace(request, max_in_flight=1, most=10 * window), 0)

    with (
        mock.patch.object(planner, "_fit", fit),
        mock.patch.object(tiling, "WINDOW", window),
        mock.patch.object(tiling, "LEAST", 1 << 12),
        mock.patch.object(plan, "CALL", 0),
        mock.patch.object(within, "WINDOW", window),
    ):
        yield
