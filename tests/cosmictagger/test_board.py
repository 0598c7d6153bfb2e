"""What is written for TensorBoard, as TensorBoard reads it."""

import subprocess
import sys
from dataclasses import replace

import pytest

from cosmictagger.__main__ import main
from cosmictagger.data import EventFile
from cosmictagger.evaluate import Running
from cosmictagger.recipe import Recipe
from cosmictagger.train import Beside, read_log, train


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_tensorboard_shows_what_the_log_says_also_after_a_resume(engine, small, small_events, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = Recipe(replace(small, depth=1), steps=3, validate_every=2, crop=(16, 16), warmup=2, validation_events=1)
    beside = Beside(tensorboard=True)

    def killed(done, total, text):
        if done == 3:
            raise KeyboardInterrupt

    with EventFile(small_events) as events:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, events, tmp_path, Running(), validation=events, beside=replace(beside, say=killed))
        train(replace(recipe, steps=4), events, tmp_path, Running(), validation=events, resume=True, beside=beside)
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    seen = {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}
    steps = [line for line in read_log(tmp_path) if "loss" in line]
    checks = [line for line in read_log(tmp_path) if "validation" in line]
    for tag, key in (("loss", "loss"), ("learning rate", "rate")):
        assert seen[tag] == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in steps]
    assert [step for step, _ in seen["training step/mean_iou"]] == [1, 2, 3, 4]
    wanted = [(line["step"], pytest.approx(line["validation"]["network"]["mean_iou"])) for line in checks]
    assert seen["validation, network/mean_iou"] == wanted and len(wanted) == 2


def test_a_disk_that_fills_is_one_line_that_names_the_folder(tmp_path):
    """A limit on the size of files stands for the disk."""
    program = f"""
import resource
from pathlib import Path
from cosmictagger.board import Board
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
try:
    with Board(Path("{tmp_path}"), 0) as board:
        for step in range(500):
            board.add({{"step": step, "loss": 1.0, "validation": {{}}}})
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == f"[Errno 27] File too large: '{tmp_path / 'tensorboard'}'\n"
    assert "Traceback" not in done.stderr and done.returncode == 0


def test_tensorboard_is_refused_by_name_where_it_is_missing(small, small_events, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    arguments = ["train", str(small_events), str(tmp_path / "a"), "--variant", "a21", "--tensorboard"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install 'fullframe[cosmictagger,tensorboard]'" in said
    assert not (tmp_path / "a").exists()
