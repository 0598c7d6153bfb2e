"""The headline's script, made tiny: units stop and resume bit for bit, and the table is made of whatever is done."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cosmictagger import train as training
from cosmictagger.batches import Crop, place
from cosmictagger.data import EventFile, shrink_labels
from cosmictagger.simulate import Detector, simulate_numbered

sys.path.append(
    str(Path(__file__).resolve().parents[2] / "bench")
)  # last: a script there has the name of a package here
import headline
import headline_scores
import headline_table


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_units_stop_and_resume_bit_for_bit_and_leave_scores(engine, tmp_path, monkeypatch, capsys):
    tiny, save = headline.PRESETS["tiny"], training._save
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    headline.run_unit(tiny, "full-0", whole, whole / "results")
    with monkeypatch.context() as patched:

        def stops(state, *rest):
            save(state, *rest)
            if state.step in (1, 3):
                raise KeyboardInterrupt

        patched.setattr(training, "_save", stops)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                headline.run_unit(tiny, "full-0", stopped, stopped / "results")
    assert not (stopped / "results").exists()
    headline.run_unit(tiny, "full-0", stopped, stopped / "results")
    with (
        np.load(whole / "results" / "full-0.npz") as one,
        np.load(stopped / "results" / "full-0.npz") as other,
    ):
        assert sorted(one) == sorted(other)
        assert all(np.array_equal(one[key], other[key]) for key in one)
    weights = [(x / "full-0" / "weights.safetensors").read_bytes() for x in (whole, stopped)]
    assert weights[0] == weights[1]
    headline.run_unit(tiny, "half-0", whole, whole / "results")
    text = headline_table.write_table(whole / "results", "half")
    assert "| full | 1 |" in text and "| full-0 | 4 |" in text
    assert (whole / "results" / "curves.png").is_file()
    before = (whole / "results" / "full-0.npz").stat().st_mtime_ns
    headline.run_unit(tiny, "full-0", whole, whole / "results")  # done already
    assert (whole / "results" / "full-0.npz").stat().st_mtime_ns == before


def test_arms_of_a_seed_see_the_same_parts_and_as_many_images():
    recipes = {name: headline.recipe_of(headline.FIRST, arm, 1) for name, arm in headline.ARMS.items()}
    assert {r.steps * r.batch for r in recipes.values()} == {8000}
    assert {r.crop for r in recipes.values()} == {(320, 512)}
    assert recipes["deeper"].network.depth == recipes["half"].network.depth + 1
    event = simulate_numbered(7, 0, Detector().coarser(16))
    starts = [place(event, Crop((32, 64), (0, k)), 3) for k in range(6)]
    assert all(row % 8 == column % 8 == 0 for row, column in starts)
    assert len(set(starts)) > 1


def test_scores_of_right_answers_and_of_the_best_halved_one(small_events):
    with EventFile(small_events) as events:
        event = events[0]
    truth, charge = event.truth(), event.image() > 0
    full = headline_scores._counts(event, truth, 0)
    assert full["charged"].sum() == charge.sum()
    assert full["upsampled"].sum() == truth.size
    assert headline_table.pooled(full["charged"][None]) == 1
    half = headline_scores._counts(event, shrink_labels(truth, 1), 1)
    assert headline_table.pooled(half["own"][None]) == 1
    assert np.array_equal(half["charged"], half["oracle"])
    assert headline_table.pooled(half["upsampled"][None]) < headline_table.pooled(half["charged"][None]) < 1


def test_vertices_are_those_of_the_simulated_events():
    detector = Detector()
    distances = []
    for number in range(4):
        places = headline_scores.vertices(5, number, detector, (0, 0))
        truth = simulate_numbered(5, number, detector).truth()
        assert (places is not None) == bool((truth == 2).any())
        for plane, (row, column) in enumerate(places or []):
            rows, columns = np.nonzero(truth[plane] == 2)
            distances.append(np.hypot(rows + 0.5 - row, columns + 0.5 - column).min())
    assert np.median(distances) < 3


def test_bootstrap_pairs_events():
    low, high = headline_table.bootstrap(np.full(50, 6.0))
    assert low == high == 6
    low, high = headline_table.bootstrap(np.random.default_rng(0).normal(6, 1, 400))
    assert low < 6 < high and high - low == pytest.approx(4 * 1 / 20, rel=0.2)


def test_a_unit_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["headline.py", "--unit", "quarter-0"])
    with pytest.raises(SystemExit):
        headline.main()
    assert "no unit 'quarter-0'" in capsys.readouterr().err
