"""The commands as a user types them; whatever goes wrong is one line, status 2 and nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import fullframe
from cosmictagger.__main__ import main
from cosmictagger.data import CHARGE, SCORES, TAGS
from cosmictagger.model import UResNet
from cosmictagger.weights import save_weights


@pytest.fixture
def weights(small, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(UResNet(small), path)
    return path


def test_from_simulation_to_tags(engine, small, small_events, tmp_path, capsys):
    assert main(["simulate", str(tmp_path / "events.h5"), "--events", "1"]) == 0
    with h5py.File(tmp_path / "events.h5") as file:
        assert file[f"{CHARGE}/image_meta"]["number_of_voxels"].tolist() == [[2048, 1280]] * 3
    events, out = str(small_events), tmp_path / "run"
    train = [
        "train",
        events,
        str(out),
        "--variant",
        "a21",
        "--validation",
        events,
        "--budget",
        "1 GB",
        "--steps",
        "2",
    ]
    assert main(train) == 0
    assert (out / "report.html").is_file()
    assert main([*train[:-1], "3", "--resume"]) == 0
    weights = str(out / "weights.safetensors")
    assert main(["evaluate", events, weights, "--json", str(tmp_path / "scores.json")]) == 0
    printed = capsys.readouterr().out
    assert "mIoU" in printed
    assert json.loads((tmp_path / "scores.json").read_text())["events"] == 3
    assert main(["predict", events, weights, str(tmp_path / "tags.h5")]) == 0
    with h5py.File(tmp_path / "tags.h5") as tagged, h5py.File(events) as source:
        tags, charge = tagged[f"{TAGS}/voxels"][:], source[f"{CHARGE}/voxels"][:]
        assert np.array_equal(tags["id"], charge["id"])
        assert set(np.unique(tags["value"])) <= {0, 1, 2}
        names = []
        source.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert all(np.array_equal(tagged[name][:], source[name][:]) for name in names)
        total = sum(tagged[f"{group}/voxels"]["value"] for group in SCORES)
        assert total == pytest.approx(1, abs=1e-5)
    assert main(["evaluate", str(tmp_path / "tags.h5"), "--json", str(tmp_path / "again.json")]) == 0
    again, before = (json.loads((tmp_path / name).read_text()) for name in ("again.json", "scores.json"))
    assert again["network"] == before["network"] and again["baseline"] == before["baseline"]
    assert "ungated" in before and "ungated" not in again
    capsys.readouterr()
    assert main(["evaluate", events, weights, "--downsample", "1"]) == 2
    assert "was trained with downsample = 0, not 1; leave --downsample out" in capsys.readouterr().err
    assert main(["evaluate", events]) == 2
    assert "no group Data/sparse2d_cosmictagger_group" in capsys.readouterr().err


def test_half_resolution_tags_every_stored_pixel(engine, small_events, weights, tmp_path):
    assert main(["predict", str(small_events), str(weights), str(tmp_path / "t.h5"), "--downsample", "1"]) == 0
    with h5py.File(tmp_path / "t.h5") as file:
        assert len(file[f"{TAGS}/voxels"]) == len(file[f"{CHARGE}/voxels"])


WRONG = {
    "missing events": (["train", "{tmp}/none.h5", "{out}"], "none.h5: no such file"),
    "not hdf5": (["train", "{text}", "{out}"], "not an HDF5 file"),
    "unsuitable sides": (["train", "{events}", "{out}"], "80 x 128 pixels does not suit a network of depth 6"),
    "unknown option": (["train", "{events}", "{out}", "--lerning-rate", "1"], "--learning-rate"),
    "unknown variant": (["train", "{events}", "{out}", "--variant", "vgg"], "vgg"),
    "no number": (["train", "{events}", "{out}", "--steps", "many"], "many"),
    "no step": (["train", "{events}", "{out}", "--steps", "0"], "steps is 0"),
    "nothing to resume": (["train", "{events}", "{out}", "--resume", "--variant", "a21"], "no checkpoint"),
    "missing weights": (["evaluate", "{events}", "{tmp}/w", "--json", "{out}"], "no such file"),
    "weights that are none": (["predict", "{events}", "{text}", "{out}"], "neither safetensors nor"),
    "nan charge, train": (["train", "{nan}", "{out}", "--variant", "a21"], "event 2 plane 2: charge is NaN"),
    "nan charge, evaluate": (["evaluate", "{nan}", "{weights}", "--json", "{out}"], "charge is NaN"),
    "nan charge, predict": (["predict", "{nan}", "{weights}", "{out}"], "event 2 plane 2: charge is NaN"),
    "bad validation": (["train", "{events}", "{out}", "--variant", "a21", "--validation", "{nan}"], "charge is NaN"),
    "no events": (["simulate", "{out}", "--events", "0"], "--events must be at least 1"),
    "unwritable": (["simulate", "/proc/none/a.h5", "--events", "1"], "/proc/none"),
    "a folder in its place": (["simulate", "{tmp}/in", "--events", "1"], "is a folder"),
    "scores into a folder": (["evaluate", "{events}", "{weights}", "--json", "{tmp}/in"], "is a folder"),
    "tags over their events": (["predict", "{events}", "{weights}", "{events}"], "would replace the events"),
    "a file for a folder": (["train", "{events}", "{text}", "--variant", "a21"], "not a folder"),
    "no command": (["trian"], "trian"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_line_status_two_and_nothing_left(case, engine, small, small_events, weights, tmp_path, capsys):
    arguments, message = WRONG[case]
    inputs, outputs = tmp_path / "in", tmp_path / "results"
    inputs.mkdir()
    outputs.mkdir()
    text, nan = inputs / "text", inputs / "nan.h5"
    text.write_text("no events here")
    nan.write_bytes(small_events.read_bytes())
    with h5py.File(nan, "r+") as file:
        rows = file[f"{CHARGE}/voxels"][:]
        rows["value"][-1] = np.nan
        file[f"{CHARGE}/voxels"][:] = rows
    names = {"tmp": tmp_path, "text": text, "nan": nan, "events": small_events, "weights": weights}
    names["out"] = outputs / "result"
    assert main([a.format(**names) for a in arguments]) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("cosmictagger: ")]
    assert len(lines) == 1
    assert said.err.splitlines()[-1] == lines[0]
    assert message in lines[0]
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize(("budget", "message"), [("10 KB", "smallest that would do"), ("much", "much")])
def test_a_budget_that_will_not_do(budget, message, small, small_events, tmp_path, capsys):
    arguments = ["train", str(small_events), str(tmp_path / "run"), "--variant", "a21", "--budget", budget]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--disk", "1 GB"], "give budget="),
        (["--budget", "1 GB", "--folder", "{tmp}"], "give disk="),
        (["--budget", "1 GB", "--disk", "1 GB", "--folder", "{tmp}/none"], "none"),
    ],
)
def test_a_disk_that_will_not_do(options, message, small, small_events, tmp_path, capsys):
    given = [option.format(tmp=tmp_path) for option in options]
    assert main(["train", str(small_events), str(tmp_path / "run"), "--variant", "a21", *given]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_training_with_a_disk_has_the_same_bits(small, small_events, tmp_path, monkeypatch):
    """Whatever lies there. The settings are kept, and a training goes on without it."""
    asked: list[dict] = []
    made = fullframe.tile

    def noted(*given, **limits):
        asked.append(limits)
        return made(*given, **limits)

    monkeypatch.setattr(fullframe, "tile", noted)
    common = [str(small_events), "--variant", "a21", "--budget", "1 GB", "--steps", "2"]
    disk = ["--disk", "100 MB", "--folder", str(tmp_path)]
    for name, more in (("memory", []), ("disk", disk)):
        assert main(["train", common[0], str(tmp_path / name), *common[1:], *more]) == 0
    assert asked[-1]["disk"] == "100 MB" and asked[-1]["folder"] == str(tmp_path)
    assert "disk: 100 MB" in (tmp_path / "disk" / "config.yaml").read_text()
    a, b = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("memory", "disk"))
    assert a == b
    assert main(["train", "--out", str(tmp_path / "memory"), "--resume", "--steps", "3", *disk]) == 0


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk, reached at once, between two events, and in the last one."""
    program = f"""
import resource, sys
from cosmictagger.__main__ import main as run
for limit in (100, 60_000, 300_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    assert run(["simulate", "{tmp_path / "a.h5"}", "--events", "2"]) == 2
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    said = [line for line in done.stderr.splitlines() if line.startswith("cosmictagger: [Errno 27]")]
    assert len(said) == 3 and all("a.h5" in line for line in said)
    assert list(tmp_path.iterdir()) == []


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "cosmictagger", "evaluate", str(tmp_path / "a.h5"), str(tmp_path / "w")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"cosmictagger: {tmp_path / 'w'}: no such file\n"


@pytest.mark.parametrize("command", ["simulate", "train", "evaluate", "predict", "report", "compare", "demo"])
def test_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: cosmictagger {command}")
