"""The search for what to store, beside the best of all states, where there are few."""

from __future__ import annotations

from math import inf

import pytest
from optimal import Optimum, best, plan_of, searched

from fullframe.compiler import kept_plans


@pytest.mark.parametrize("seed", [5, 13, 14])
def test_what_is_found_is_near_the_best_there_is(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bench/optimum.py looks at more graphs."""
    monkeypatch.setattr(kept_plans, "ON", False)
    graphs, _ = plan_of(seed)
    starts = searched(*graphs[0])
    optima = [Optimum(start) for start in starts]
    most = max(max(start.profile(), default=0) for start in starts)
    for share in (1.0, 0.6, 0.3):
        least = min(optimum.least(share * most) for optimum in optima)
        found = best(starts, share * most)
        assert (least == found == inf) or least * (1 - 1e-12) <= found <= 1.3 * least
