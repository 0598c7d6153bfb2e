"""The quantities by which simulated events are held against real ones, on pictures small enough to count by hand."""

import numpy as np
import pytest

from cosmictagger.data import Event, Pixels
from cosmictagger.quantities import Comparison, cluster_sizes, compare, measure, oracle, rule


def test_clusters_touch_at_corners_and_do_not_wrap_around_rows():
    rows = np.array([0, 1, 2, 5, 5, 0, 1])
    columns = np.array([0, 1, 2, 7, 8, 9, 0])
    assert sorted(cluster_sizes(rows, columns)) == [1, 2, 4]
    assert len(cluster_sizes(rows[:0], columns[:0])) == 0


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_those_of_a_flood_fill(seed):
    mask = np.random.default_rng(seed).random((25, 30)) < 0.35
    left, sizes = {(int(r), int(c)) for r, c in zip(*np.nonzero(mask), strict=True)}, []
    while left:
        stack, size = [left.pop()], 0
        while stack:
            r, c = stack.pop()
            size += 1
            near = {(r + a, c + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            stack += near
        sizes.append(size)
    assert sorted(cluster_sizes(*np.nonzero(mask))) == sorted(sizes)


def test_rule_asks_for_three_stored_neighbours_or_much_charge():
    charge = np.zeros((1, 8, 8), np.float32)
    charge[0, 1:3, 1:3] = 6  # each has three stored neighbours
    charge[0, 6, 6] = 13  # alone, but bright
    charge[0, 6, 2] = 6  # alone and faint
    truth = (charge > 0).astype(np.uint8)
    assert rule(charge, truth) == pytest.approx(5 / 6)


def test_oracle_loses_what_shares_a_square_with_a_label():
    charge, truth = np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 4), np.uint8)
    charge[0, :2, :2] = 9
    truth[0, 0, :2] = 1  # the row below is background with charge
    assert oracle(charge, truth) == pytest.approx(0.5)
    charge[0, 1] = 0
    assert oracle(charge, truth) == 1


def _event(charge: np.ndarray, truth: np.ndarray) -> Event:
    def planes(x: np.ndarray) -> tuple[Pixels, ...]:
        found = [np.nonzero(p) for p in x]
        return tuple(Pixels(*f, p[f].astype(np.float32)) for f, p in zip(found, x, strict=True))

    return Event(charge.shape[1:], planes(charge), planes(truth))


def test_quantities_of_a_plane():
    charge, truth = np.zeros((3, 16, 16), np.float32), np.zeros((3, 16, 16), np.uint8)
    charge[:, 2:5, 4], truth[:, 2:5, 4] = 20, 1
    charge[:, 10, 10], truth[:, 10, 10] = 40, 2
    charge[:, 5, 4], charge[:, 14, 1] = 8, 6  # a tail, and noise
    found = measure(_event(charge, truth))
    assert found["near/0"] == 0.5
    assert found["run/1"] == 3
    assert found["small_cosmic/2"] == found["neutrino_clusters/2"] == 1
    assert (found["quiet/0"], found["quiet/1"], found["quiet/2"]) == (1, 1, 2)
    assert found["neutrino_charge/0"] == found["highest/0"] == 40
    alone = measure(_event(charge * (truth != 2), truth * (truth != 2)))
    assert np.isnan(alone["neutrino_charge/0"])
    both = compare(
        [_event(charge, truth)], [_event(charge, truth), _event(charge * (truth != 2), truth * (truth != 2))]
    )
    assert {c.name: len(c.simulated) for c in both}["neutrino_charge/1"] == 1


def test_a_comparison_holds_if_means_agree_and_the_real_one_is_not_rare():
    around = np.linspace(80, 120, 41)
    assert Comparison("run/0", np.array([100.0]), around).holds
    assert not Comparison("run/0", np.array([125.0]), around).holds  # rare
    assert not Comparison("run/0", np.array([100.0]), np.linspace(50, 500, 41)).holds  # means apart
    assert Comparison("rule", np.array([0.5]), np.array([0.8])).holds  # a band for simulated events alone
    assert Comparison("rule", np.array([0.5]), np.array([0.8])).gated
    assert not Comparison("run/1", np.array([100.0]), around).gated
