"""Random networks against plain PyTorch in float64: output, loss, every gradient, every buffer.

``FIRST`` + k is the seed of network k; run one alone with ``python tests/test_fuzz.py SEED``.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from randomnets import Case, draw

import fullframe
from fullframe import region as box
from fullframe.memory import lifetimes
from fullframe.module import tile as tiled_module
from fullframe.section import own_region, tiled

FIRST = 20_000
TOLERANCE = 1e-9


@dataclass
class Tally:
    """What happened over many networks."""

    networks: int = 0
    whole: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.networks} networks, {len(self.wrong)} wrong, {self.refused.total()} refused"]
        lines += [f"  refused {n}: {what}" for what, n in self.refused.most_common()]
        lines += [f"  run whole {n}: {what}" for what, n in self.whole.most_common()]
        return "\n".join(lines + self.wrong)


def budget_of(case: Case) -> int | None:
    """A budget between the smallest and plenty; None where the tile is forced."""
    if case.tile is not None:
        return None
    arguments = (case.image,) if case.loss is None else (case.image, case.target)

    def planned(budget: int) -> int:
        return tiled_module(case.net, loss=case.loss, budget=budget).plan(*arguments).projected_bytes

    plenty = planned(1 << 40)
    try:
        smallest = planned(1)
    except fullframe.BudgetError as error:
        smallest = error.smallest
    return int(smallest + case.tight * max(0, plenty - smallest))


def invariants(plan: fullframe.Plan) -> None:
    """Saved tiles are a disjoint cover; places alive together do not overlap; the budget is kept."""
    assert plan.projected_bytes <= plan.budget
    for step in plan.steps:
        for value in step.section.saves:
            if tiled(value, plan.labels):
                regions = [own_region(value, plan.labels, t) for t in step.grid.tiles()]
                assert sum(map(box.size, regions)) == box.size(box.full(value.shape)), f"{value} is no disjoint cover"
                seen = torch.zeros(value.shape, dtype=torch.uint8)
                for region in regions:
                    seen[box.slices(region)] += 1
                assert bool((seen == 1).all()), f"{value} is no disjoint cover"
    lives = lifetimes([s.section for s in plan.steps], [v for v in plan.graph.outputs if v is not None])
    placed = [(v, s) for v, s in plan.slots.items() if v in lives.first]
    for k, (a, s) in enumerate(placed):
        for b, t in placed[:k]:
            together = lives.first[a] <= lives.last[b] and lives.first[b] <= lives.last[a]
            apart = s.offset + s.nbytes <= t.offset or t.offset + t.nbytes <= s.offset
            assert apart or not together, f"{a} and {b} overlap"


def run(seed: int, tally: Tally) -> None:
    case = draw(seed)
    if case is None:
        return
    tally.networks += 1
    try:
        budget = budget_of(case)
        found = fullframe.check(case.net, case.image, case.target, case.loss, tile=case.tile, budget=budget,
                                tolerance=TOLERANCE)  # fmt: skip
        assert found.plan is not None
        invariants(found.plan)
    except fullframe.FullframeError as error:
        tally.refused[f"{type(error).__name__}: {error}"[:160]] += 1
        return
    except Exception as error:  # the seed must reach the report, whatever went wrong
        tally.wrong.append(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}")
        return
    tally.whole.update(name.split(" ")[0] for name in found.plan.whole)
    if not found.passed:
        tally.wrong.append(f"seed {seed}: {found}")


def search(first: int, count: int) -> Tally:
    torch.set_num_threads(1)
    tally, start, seed = Tally(), time.perf_counter(), first
    while tally.networks < count:
        run(seed, tally)
        seed += 1
    print(f"\nseeds {first} to {seed - 1}, {time.perf_counter() - start:.0f} s: {tally}")
    return tally


def test_random_networks():
    tally = search(FIRST, 100)
    assert not tally.wrong, str(tally)
    assert tally.refused.total() <= 2, str(tally)


@pytest.mark.fuzz
def test_many_random_networks():
    tally = search(FIRST + 100_000, 2_000)
    assert not tally.wrong, str(tally)
    assert tally.refused.total() <= 40, str(tally)


if __name__ == "__main__":
    numbers = [int(a) for a in sys.argv[1:]] or [FIRST]
    search(numbers[0], numbers[1] if len(numbers) > 1 else 1)
