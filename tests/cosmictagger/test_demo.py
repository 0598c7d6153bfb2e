"""The demonstration, made small; at full size it is `make demo`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmictagger import demo
from cosmictagger.batches import Crop, load_batch
from cosmictagger.config import Files, Run
from cosmictagger.data import DataError, EventFile
from cosmictagger.session import simulate_file, train_with_report
from cosmictagger.simulate import Detector


@pytest.fixture
def quick(small, monkeypatch):
    coarse = Detector().coarser(16)
    monkeypatch.setattr(demo, "DEMO", replace(demo.DEMO, network=small, steps=2, validate_every=1))
    monkeypatch.setattr(
        demo, "simulate_file", lambda *args, **options: simulate_file(*args, **options, detector=coarse)
    )


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_demo_leaves_a_report_and_can_run_again(engine, quick, tmp_path, capsys):
    out = tmp_path / "demo"
    for _ in range(2):
        said = demo.run_demo(out, minutes=1)
        assert "events not trained on" in said
        page = (out / "report.html").read_text()
        assert "network before training" in page
        noted = capsys.readouterr().err
        assert "on this machine" in noted and "on this machine" in page
        assert sorted(path.name for path in out.iterdir()) == sorted(demo.WRITTEN)
        (out / ".log.jsonl.abcd_123.part").write_text("of a demonstration that was killed")


@pytest.mark.parametrize(
    ("seconds", "crop", "steps"), [(1e-3, None, 2), (9, None, 2), (15, (40, 64), 2), (40, (40, 64), 1)]
)
def test_demo_suits_the_machine(seconds, crop, steps, quick):
    recipe, said = demo.suited((80, 128), seconds, replace(demo.DEMO, minutes=2 if crop is None else 1))
    assert (recipe.crop, recipe.steps) == (crop, steps)
    assert f"takes {seconds:.2f} s" in said and f"{steps} steps" in said
    assert ("parts of 40 x 64" if crop else "whole events") in said


def test_parts_lie_within_the_image_about_labelled_pixels_and_follow_the_seed(small_events):
    with EventFile(small_events) as events:
        made = [
            load_batch(events, [0], downsample=0, device=torch.device("cpu"), crop=Crop((40, 64), (0, k)))
            for k in (0, 1, 1)
        ]
    for batch in made:
        assert batch.image.shape == batch.label.shape == (1, 3, 40, 64)
        assert batch.label.any()
    assert torch.equal(made[1].image, made[2].image) and not torch.equal(made[0].image, made[1].image)


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_a_demo_that_ran_out_of_time_or_learned_nothing_says_so(engine, small, small_events, tmp_path):
    recipe = replace(demo.DEMO, network=small, steps=1000, minutes=1e-9)
    said = train_with_report(Run(Files(small_events, tmp_path / "a", small_events), recipe, demo.RUNNING))
    assert "1 of 1000 steps within 0.0 minutes" in said
    assert "NOT ABOVE" in said and "train longer" in said
    page = (tmp_path / "a" / "report.html").read_text()
    assert "1 of 1000 steps" in page and "NOT ABOVE" in page


FOREIGN = {
    "something": {"thesis.tex": "years of work"},
    "a mark of the user's": {"demo.txt": "what to show on Monday", "report.html": "mine"},
    "names like ours": {"training.h5": "years of work", "log.jsonl": "{}"},
    "beside a demonstration": {"demo.txt": demo.MARKED, "report.html": "ours", "thesis.tex": "years of work"},
    "a folder by our name": {"demo.txt": demo.MARKED, "report.html/thesis.tex": "years of work"},
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("current", [False, True])
def test_demo_spares_a_folder_of_something_else(case, current, tmp_path, monkeypatch):
    for name, text in FOREIGN[case].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="holds something else"):
        demo.run_demo(Path() if current else tmp_path, minutes=1)
    for name, text in FOREIGN[case].items():
        assert (tmp_path / name).read_text() == text


def test_demo_trains_at_full_resolution_within_a_stated_budget():
    assert Detector().shape == (1280, 2048)
    assert demo.RUNNING.downsample == 0
    assert demo.RUNNING.budget == "4 GB"
