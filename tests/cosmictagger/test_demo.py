"""The demonstration, made small; at full size it is `make demo`."""

from dataclasses import replace

import pytest

from cosmictagger import demo
from cosmictagger.data import DataError
from cosmictagger.session import simulate_file
from cosmictagger.simulate import Detector


@pytest.fixture
def quick(small, monkeypatch):
    coarse = Detector().coarser(16)
    monkeypatch.setattr(demo, "DEMO", replace(demo.DEMO, network=small, steps=2, validate_every=1))
    monkeypatch.setattr(
        demo, "simulate_file", lambda *args, **options: simulate_file(*args, **options, detector=coarse)
    )


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_demo_leaves_a_report_and_can_run_again(engine, quick, tmp_path):
    for _ in range(2):
        said = demo.run_demo(tmp_path / "demo", minutes=1)
        assert "events not trained on" in said
        assert (tmp_path / "demo" / "report.html").is_file()


def test_demo_spares_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds something else"):
        demo.run_demo(tmp_path, minutes=1)
    assert (tmp_path / "thesis.tex").exists()


def test_demo_trains_at_full_resolution_within_a_stated_budget():
    assert Detector().shape == (1280, 2048)
    assert demo.RUNNING.downsample == 0
    assert demo.RUNNING.budget == "4 GB"
