"""The simulator: seeded, near the real events in what a network can see, and its physics near the tables."""

import time
from dataclasses import replace

import numpy as np
import pytest

from cosmictagger.data import EventFile
from cosmictagger.quantities import BANDS, collect
from cosmictagger.simulate import Detector, Mix, matter, simulate_numbered
from cosmictagger.simulate.detector import RESPONSES
from cosmictagger.simulate.particles import Deposits, Light, Particle
from cosmictagger.simulate.readout import _kernel, _label
from cosmictagger.simulate.showers import shower
from cosmictagger.simulate.tracks import follow


@pytest.fixture(scope="module")
def sample():
    return [simulate_numbered(11, k) for k in range(8)]


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
    assert 0.0016 < (truth == 1).mean() < 0.0045
    assert 0.0001 < (truth == 2).mean() < 0.0012


def test_charge_is_near_the_real_events(sample):
    image = np.stack([e.image() for e in sample])
    truth = np.stack([e.truth() for e in sample])
    cosmic, untagged = image[truth == 1], image[(truth == 0) & (image > 0)]
    assert 35 < np.median(cosmic) < 52
    assert 90 < np.percentile(cosmic, 95) < 180
    assert 5 < np.median(untagged) < 6.5


def test_events_are_neither_easier_nor_dustier_than_real_ones(sample):
    found = collect(sample)
    for name, (low, high) in BANDS.items():  # a few events only: the bands are for a hundred
        assert low - 0.03 < np.nanmean(found[name]) < high + 0.03, name


def test_labels_sit_on_charge_and_noise_has_none(sample):
    for event in sample:
        image, truth = event.image(), event.truth()
        assert not truth[image == 0].any()
        assert ((image > 0) & (truth == 0)).any()
        assert all((truth[k] == 1).any() for k in range(3))


def test_a_label_is_whoever_reached_a_stored_pixel_and_the_neutrinos_where_both_did():
    where, owner = np.array([3, 3, 5, 5, 5, 7, 8, 9]), np.array([1, 1, 2, 1, 1, 2, 0, 1], np.float32)
    assert _label(where, owner, np.array([2, 3, 5, 7, 8, 11])).tolist() == [0, 1, 2, 2, 0, 0]


def test_first_induction_wires_are_noisy_in_opposite_volumes(sample):
    untagged = sum(((e.image() > 0) & (e.truth() == 0)).astype(int) for e in sample)
    upper, lower = untagged[:, :640].sum((1, 2)), untagged[:, 640:].sum((1, 2))
    assert lower[0] > 4 * upper[0]
    assert upper[1] > 4 * lower[1]


def test_only_pixels_above_threshold_are_kept(sample):
    assert all(p.values.size < 0.02 * 1280 * 2048 for e in sample for p in e.charge)
    assert all((p.values >= 5).all() for e in sample for p in e.charge)


def test_events_of_a_kind_can_be_asked_for():
    coarse = Detector().coarser(8)
    alone = simulate_numbered(0, 0, coarse, Mix(0, 0, 0, 1))
    assert not (alone.truth() == 2).any()
    assert sum((simulate_numbered(0, k, coarse, Mix(1, 0, 0, 0)).truth() == 2).sum() for k in range(3)) > 0


def test_dead_wires_are_the_same_in_every_event_and_have_no_charge():
    half_dead = replace(Detector().coarser(8), dead_wires=0.5)
    live = set()
    for k in range(8):
        plane = simulate_numbered(0, k, half_dead).charge[2]
        live |= set(plane.columns[plane.rows < 80].tolist())
    assert 0.3 < len(live) / (1666 / 8) < 0.65


def test_an_event_takes_a_third_of_a_second_of_one_core():
    simulate_numbered(0, 0)  # tables are made once
    began = time.process_time()
    for k in range(4):
        simulate_numbered(0, k)
    assert (time.process_time() - began) / 4 < 0.6  # twice what it takes, since others may compute


def test_packing_of_rows_and_columns():
    detector = Detector()
    assert detector.shape == (1280, 2048)
    assert [detector.wires(k) for k in range(3)] == [(31, 2017), (31, 2017), (191, 1857)]
    assert detector.column(2, 0, np.array([0.0]), np.array([30.0])) == pytest.approx(191 + 100)
    for plane, volume, sign in ((0, 0, 1), (0, 1, -1), (1, 0, -1), (1, 1, 1)):
        expected = 31 + (30 * 0.5 + (200 + sign * 50) * np.sqrt(0.75)) / 0.3
        found = detector.column(plane, volume, np.array([50.0]), np.array([30.0]))
        assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    "mass, kinetic, loss",
    [
        (matter.MUON, 264.0, 2.10),  # minimum: 1.508 MeV cm^2/g (Groom, Mokhov, Striganov)
        (matter.MUON, 9900.0, 2.80),
        (matter.ELECTRON, 1.0, 1.9),
    ],
)
def test_energy_loss_is_that_of_the_tables(mass, kinetic, loss):
    assert matter.table(mass).loss_at(np.array([kinetic]))[0] == pytest.approx(loss, rel=0.07)


def test_recombination_takes_more_where_more_is_ionised_and_along_the_field():
    some, much = (matter.surviving(np.array([x]), np.array([0.0]), 0.5)[0] for x in (2.1, 20.0))
    assert some == pytest.approx(0.69, abs=0.04)
    assert much < 0.4
    assert matter.surviving(np.array([20.0]), np.array([1.0]), 0.5)[0] < much


def test_energy_is_conserved_along_tracks_and_in_showers():
    rng, detector = np.random.default_rng(2), Detector()
    start, direction = np.array([100.0, 0.0, 50.0]), np.array([0.0, 0.0, 1.0])
    deposits, light = Deposits(), Light()
    follow(rng, Particle("muon-", 300.0, start, direction, 0.0, 1), detector, deposits, light)
    total = deposits.together()[:, 3].sum() + sum(x[:, 6].sum() for x in light.electrons)
    assert total == pytest.approx(300, rel=0.1)
    lost = []
    for _ in range(8):
        deposits, light = Deposits(), Light()
        light.add(Particle("electron", 300.0, start, direction, 0.0, 2))
        shower(rng, light, detector, deposits)
        lost.append(deposits.together()[:, 3].sum())
    assert 240 < np.mean(lost) < 305


def test_response_keeps_the_charge_and_only_the_steep_one_rings():
    for response in RESPONSES:
        assert _kernel(response).sum(axis=1) == pytest.approx(1, abs=0.02)
    assert _kernel(RESPONSES[2]).min() < -0.05
    assert _kernel(replace(RESPONSES[0], steepness=2.0)).min() > -1e-6


def test_real_events_read_by_the_same_quantities(real_events):
    with EventFile(real_events) as events:
        found = collect(events)
    expected = {
        "rule": 0.820,
        "oracle": 0.910,
        "near/1": 0.148,
        "near/2": 0.650,
        "small_cosmic/2": 96.7,
        "neutrino_clusters/2": 127,
        "quiet/1": 2205,
        "run/2": 3.03,
        "neutrino_charge/1": 40.7,
    }
    for name, value in expected.items():
        assert found[name].mean() == pytest.approx(value, rel=0.005), name
    assert found["highest/1"].max() == pytest.approx(544, abs=1)
