"""Trainings by several processes, each with its rows of every image."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cosmictagger.__main__ import main
from cosmictagger.world import World

NETWORK = {
    "n_initial_filters": 2, "depth": 3, "blocks_per_layer": 1, "blocks_deepest_layer": 1, "blocks_final": 0,
    "filter_size_deepest": 3, "bottleneck_deepest": 4,
}  # fmt: skip


def _arguments(events: Path, out: Path, *more: str) -> list[str]:
    settings = [f"--set=network.{key}={value}" for key, value in NETWORK.items()]
    given = [f"--validation={events}", "--variant=a21", "--batch=2", "--validate-every=2", "--learning-rate=0.01"]
    return ["train", str(events), str(out), *given, "--budget=2 GB", *settings, *more]


def _together(processes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "cosmictagger", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def _log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_rows_and_items_are_dealt_out_without_a_rest(number):
    image = torch.arange(2 * 7 * 3).view(2, 7, 3)
    all_of_them = [World(rank, number) for rank in range(number)]
    assert torch.equal(torch.cat([world.rows(image) for world in all_of_them], -2), image)
    assert sorted(k for world in all_of_them for k in world.dealt(range(5))) == [*range(5)]


@pytest.mark.rest
def test_two_processes_train_as_one_does_bit_for_bit_and_one_goes_on(small_events, tmp_path):
    assert main(_arguments(small_events, tmp_path / "one", "--steps=4")) == 0
    made = _together(2, _arguments(small_events, tmp_path / "two", "--steps=2"))
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("2 steps; ") == 1  # of one of them alone
    assert "rank 0 of 2" in (tmp_path / "two" / "plan.txt").read_text()
    assert main(_arguments(small_events, tmp_path / "two", "--steps=4", "--resume")) == 0
    one, two = (_log(tmp_path / name) for name in ("one", "two"))
    for line in one + two:
        line.pop("seconds", None)
        line.pop("waited", None)
    assert one == two
    ours, theirs = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.rest
def test_processes_are_told_to_name_their_budget(small_events, tmp_path):
    arguments = [a for a in _arguments(small_events, tmp_path / "out", "--steps=1") if not a.startswith("--budget")]
    made = _together(2, arguments)
    assert made.returncode != 0 and "name the budget of each" in made.stderr
    assert not (tmp_path / "out").exists()
