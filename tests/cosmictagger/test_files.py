"""Several files as one, reading ahead, and what a bad file among them says."""

import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.torch import load_file

from cosmictagger import files
from cosmictagger.__main__ import main
from cosmictagger.batches import indices_of_step
from cosmictagger.data import CHARGE, TAGS, DataError, EventFile, writing
from cosmictagger.evaluate import Running, Tagger, evaluate
from cosmictagger.files import EventFiles, ahead, files_of, open_events
from cosmictagger.model import UResNet
from cosmictagger.recipe import Recipe
from cosmictagger.simulate import Detector, simulate_numbered
from cosmictagger.train import read_log, train
from cosmictagger.weights import save_weights


@pytest.fixture(scope="module")
def folder(small_events, tmp_path_factory) -> Path:
    """The three events of `small_events` in two files, one and two."""
    out = tmp_path_factory.mktemp("several")
    with EventFile(small_events) as events:
        for name, numbers in {"a.h5": (0,), "b.h5": (1, 2)}.items():
            with writing(out / name) as file:
                for number in numbers:
                    file.append(events[number])
    return out


def spoiled(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        rows = file[f"{CHARGE}/voxels"][:]
        rows["value"] = np.nan
        file[f"{CHARGE}/voxels"][:] = rows


@pytest.mark.parametrize("how", ["{0}", "{0}/*.h5", "{0}/a.h5,{0}/b.h5", "{0}/**/?.h5"])
def test_files_are_named_by_folder_pattern_or_list(how, folder):
    assert files_of(Path(how.format(folder))) == [folder / "a.h5", folder / "b.h5"]


@pytest.mark.parametrize(
    ("how", "message"),
    [("{0}/*.x", "no file has such a name"), ("{0}/a.h5,{0}/a.h5", "named twice"), ("{1}", "no .h5 or .hdf5 file")],
)
def test_names_that_mean_no_file_or_one_twice(how, message, folder, tmp_path):
    with pytest.raises(DataError, match=message):
        files_of(Path(how.format(folder, tmp_path)))


def test_several_files_are_one_and_few_stay_open(folder, small_events, monkeypatch):
    monkeypatch.setattr(files, "OPEN", 1)
    with EventFile(small_events) as one, open_events(folder) as several:
        assert len(several) == len(one) and several.shape == one.shape
        for index in (2, 0, 1):
            assert np.array_equal(several[index].image(), one[index].image())
            assert several[index].number == one[index].number
            assert len(several._open) == 1
        with pytest.raises(IndexError):
            several[3]
        assert several.fingerprint() != one.fingerprint()


def test_a_file_of_another_size_is_named(folder, tmp_path):
    with writing(tmp_path / "c.h5") as file:
        file.append(simulate_numbered(7, 0, Detector().coarser(32)))
    with pytest.raises(DataError, match=r"c\.h5: images are .* but .* in .*a\.h5"):
        EventFiles([folder / "a.h5", tmp_path / "c.h5"])


@pytest.mark.rest
def test_training_on_several_files_is_that_on_one(engine, small, folder, small_events, tmp_path):
    recipe = Recipe(small, steps=3, validate_every=2, validation_events=1)
    for name, events in {"one": small_events, "several": folder}.items():
        with open_events(events) as found:
            train(recipe, found, tmp_path / name, Running(), validation=found)
    with open_events(folder) as found:
        train(Recipe(small, steps=1), found, tmp_path / "cut", Running())
        train(recipe, found, tmp_path / "cut", Running(), resume=True)
    one, *others = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("one", "several", "cut"))
    assert all((one[key] == other[key]).all() for other in others for key in one)
    log = read_log(tmp_path / "several")
    assert [line["validation"]["events"] for line in log if "validation" in line] == [1, 1]
    assert all(line["waited"] >= 0 for line in log if "loss" in line)


@pytest.mark.rest
def test_a_bad_event_is_named_when_it_is_needed(small, folder, tmp_path, capsys):
    for name in ("a.h5", "b.h5"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    first = indices_of_step(0, 1, 3, seed=0)
    bad = "b.h5" if first == [0] else "a.h5"
    spoiled(tmp_path / bad)
    arguments = ["train", str(tmp_path), str(tmp_path / "run"), "--variant", "a21", "--steps", "3"]
    assert main(arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cosmictagger: ")]
    assert len(said) == 1 and f"{bad}: {CHARGE}: event " in said[0] and "NaN" in said[0]
    assert len(read_log(tmp_path / "run")) >= 1  # what came before is kept
    (tmp_path / bad).write_text("no events")
    assert main([*arguments[:2], str(tmp_path / "other"), *arguments[3:]]) == 2
    assert f"{bad}: not an HDF5 file" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.rest
def test_tags_of_several_files_go_into_a_folder(small, folder, tmp_path, capsys):
    weights = tmp_path / "w.safetensors"
    net = UResNet(small)
    save_weights(net, weights)
    assert main(["predict", str(folder), str(weights), str(tmp_path / "tags")]) == 0
    with open_events(tmp_path / "tags") as tagged, open_events(folder) as events:
        assert evaluate(Tagger(net, Running()), events).network.as_dict() is not None
        assert [len(t.values) for t in tagged.tags(2)] == [len(p.values) for p in events[2].charge]
    with h5py.File(tmp_path / "tags" / "b.h5") as file:
        assert len(file[f"{TAGS}/extents"]) == 2
    assert main(["evaluate", str(tmp_path / "tags")]) == 0
    assert "3 events" in capsys.readouterr().out
    for out, message in {folder: "would replace the events", weights: "is not a folder"}.items():
        assert main(["predict", str(folder), str(weights), str(out)]) == 2
        assert message in capsys.readouterr().err


def test_events_are_shared_between_ranks_without_overlap():
    found = [indices_of_step(step, 2, 12, 3, (rank, 3)) for step in range(2) for rank in range(3)]
    assert sorted(k for indices in found for k in indices) == list(range(12))
    assert indices_of_step(1, 2, 12, 3) == indices_of_step(1, 2, 12, 3, (0, 1))
    with pytest.raises(ValueError, match="rank 3 of 3"):
        indices_of_step(0, 1, 12, 3, (3, 3))


def test_the_next_is_made_while_one_is_used():
    made = {number: threading.Event() for number in range(4)}

    def make(number):
        made[number].set()
        return number

    got = []
    for number in ahead(make, range(4), alone=1):
        if number == 0:
            assert not made[1].is_set()  # nothing is made beside the first
        elif number < 3:
            assert made[number + 1].wait(10)
        got.append(number)
    assert got == [0, 1, 2, 3]


def test_an_error_comes_in_its_turn():
    found = ahead(lambda number: 1 // (2 - number), range(3))
    assert (next(found), next(found)) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        next(found)
