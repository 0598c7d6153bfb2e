"""The simulator: seeded, and near the real events in what a network can see."""

import time

import numpy as np
import pytest

from cosmictagger.simulate import Detector, simulate_numbered


@pytest.fixture(scope="module")
def sample():
    return [simulate_numbered(11, k) for k in range(6)]


def test_same_seed_same_event_whatever_came_before():
    coarse = Detector().coarser(8)
    a, b, c = (simulate_numbered(3, k, coarse) for k in (5, 5, 6))
    assert np.array_equal(a.image(), b.image())
    assert np.array_equal(a.truth(), b.truth())
    assert not np.array_equal(a.image(), c.image())


def test_occupancy_is_near_the_real_events(sample):
    image = np.stack([e.image() for e in sample])
    truth = np.stack([e.truth() for e in sample])
    assert image.shape[1:] == (3, 1280, 2048)
    assert 0.005 < (image > 0).mean() < 0.009
    assert 0.0016 < (truth == 1).mean() < 0.0038
    assert 0.0003 < (truth == 2).mean() < 0.0012


def test_charge_is_near_the_real_events(sample):
    image = np.stack([e.image() for e in sample])
    truth = np.stack([e.truth() for e in sample])
    cosmic, untagged = image[truth == 1], image[(truth == 0) & (image > 0)]
    assert 25 < np.median(cosmic) < 55
    assert 90 < np.percentile(cosmic, 95) < 220
    assert 5 < np.median(untagged) < 7


def test_labels_sit_on_charge_and_noise_has_none(sample):
    for event in sample:
        image, truth = event.image(), event.truth()
        assert not truth[image == 0].any()
        assert ((image > 0) & (truth == 0)).any()
        assert all((truth[k] == 1).any() for k in range(3))


def test_first_induction_wires_are_noisy_in_opposite_volumes(sample):
    untagged = sum(((e.image() > 0) & (e.truth() == 0)).astype(int) for e in sample)
    upper, lower = untagged[:, :640].sum((1, 2)), untagged[:, 640:].sum((1, 2))
    assert lower[0] > 5 * upper[0]
    assert upper[1] > 5 * lower[1]


def test_only_pixels_above_threshold_are_kept(sample):
    assert all(p.values.size < 0.02 * 1280 * 2048 for e in sample for p in e.charge)
    assert all((p.values >= 5).all() for e in sample for p in e.charge)


def test_an_event_takes_less_than_a_second():
    began = time.process_time()
    simulate_numbered(0, 0)
    assert time.process_time() - began < 1
