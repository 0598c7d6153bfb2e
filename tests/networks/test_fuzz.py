"""Random networks against plain PyTorch in float64: output, loss, every gradient, every buffer.

Run one seed alone with ``python tests/networks/test_fuzz.py SEED``.
"""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from fuzzing import Record, Tally, judged, search, uncompiled
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from random_changes import stale
from randomnets import draw, drawn_from

MANY = 2_000
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
TALLY = Tally()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# A failure is shrunk: fewer and simpler layers, since every list of choices starts with the simplest.
@settings(max_examples=12, derandomize=True, phases=[Phase.generate, Phase.shrink], **QUIET)
@given(st.randoms(use_true_random=False))
@pytest.mark.rest
def test_random_networks_that_shrink(source):
    case = drawn_from(source)
    if case is None:
        return
    note(str(case))
    record = judged(case, 0)
    assert record.outcome not in ("wrong", "refused"), record.detail


@pytest.mark.parametrize("first", range(20_000, 20_080, 40))
def test_random_networks(first):
    tally = search(first, 6)
    check(tally, 2)
    assert any(r.spilled for r in tally.records), "no network ran with its maps on a disk"


@pytest.mark.fuzz
def test_many_random_networks():
    tally = search(100_000, MANY)
    print(tally.table())
    check(tally, 2)


def check(tally: Tally, percent: int) -> None:
    print(f"\n{tally}")
    assert not tally.of("wrong"), str(tally)
    assert 100 * len(tally.of("refused")) <= percent * tally.networks, str(tally)
    assert 100 * len(tally.of("ill-conditioned")) <= percent * tally.networks, str(tally)
    assert not tally.whole(), str(tally)


def changes(first: int, count: int) -> None:
    with uncompiled():
        found = [stale(seed) for seed in range(first, first + count)]
    wrong = [f for f in found if f.outcome == "wrong"]
    print(f"\n{sum(f.changes for f in found)} changes in {count} networks, refused {sum(f.refused for f in found)}")
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.rest
def test_changes_between_steps():
    changes(0, 3)


@pytest.mark.fuzz
def test_many_changes_between_steps():
    changes(1_000, 300)


if __name__ == "__main__":
    _seed = int(sys.argv[1])
    _case = draw(_seed)
    print(_case)
    print(Record(_seed, "unusable") if _case is None else judged(_case, _seed))
