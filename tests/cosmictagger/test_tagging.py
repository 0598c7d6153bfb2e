"""The script that holds a network against the public thresholds."""

import sys
from pathlib import Path

import pytest

from cosmictagger.data import EventFile
from cosmictagger.metrics import Scores
from cosmictagger.model import UResNet
from cosmictagger.weights import Origin, save_weights

sys.path.append(
    str(Path(__file__).resolve().parents[2] / "bench")
)  # last: a script there has the name of a package here
import record
import tagging

from cosmictagger.evaluate import Evaluation


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_an_untrained_network_misses_what_is_wanted(engine, small, small_events, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    save_weights(UResNet(small), tmp_path / "w.safetensors", Origin(downsample=1))
    events = str(small_events)
    assert tagging.main([str(tmp_path / "w.safetensors"), "--simulated", events, "--real", events]) == 1
    text = (tmp_path / "tagging.md").read_text()
    assert text.count("| simulated (3) |") == text.count("| real (3) |") == 3
    assert "**missed**" in text and "images halved" in text


def test_events_that_were_trained_on_are_refused(small, small_events, tmp_path):
    with EventFile(small_events) as events:
        origin = Origin(data=events.fingerprint())
    with pytest.raises(SystemExit, match="was trained on these events"):
        tagging.scored(UResNet(small), small_events, origin, None)


def test_what_reaches_every_threshold_holds():
    good, poor = Scores(1.0, 0.95, 0.9, 0.7, 0.8), Scores(1.0, 0.95, 0.9, 0.699, 0.8)
    assert tagging.rows("real", Evaluation(3, poor, poor, good))[1]
    assert not tagging.rows("real", Evaluation(3, good, good, poor))[1]


@pytest.mark.rest
def test_real_events_are_scored(engine, small, real_events):
    """Their images are those of the published network; the untrained one is small, and has three numbers for each."""
    found = tagging.scored(UResNet(small).eval(), real_events, Origin(downsample=1), "2 GB")
    assert found.events == 3 and len(tagging.rows("real", found)[0]) == 3
