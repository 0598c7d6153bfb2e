"""A plan that was saved is made again, or there is an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.storage.disk_rate import USUAL

SIDE = 64


def network(width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1)
    )


def inputs(side=SIDE):
    return torch.zeros(1, 1, side, side), torch.zeros(1, side, side, dtype=torch.long)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "plan.json"
    fullframe.tile(network(), loss=F.cross_entropy, budget="300 MB", workers=3).plan(*inputs()).save(path)
    return path


def test_it_brings_its_numbers_and_other_sizes_are_planned_with_them(saved):
    step = fullframe.tile(network(), loss=F.cross_entropy, plan=saved)
    assert step.plan(*inputs()).limits == step.plan(*inputs(32)).limits == (300_000_000, 0, 0, 3, USUAL)
    assert list(saved.parent.iterdir()) == [saved]


def test_another_process_has_the_same_plan(saved):
    places = [str(Path(__file__).parent), str(Path(fullframe.__file__).parents[1])]
    code = (
        f"import sys; sys.path[:0] = {places!r}\n"
        "import test_saved_plan as t, fullframe, torch.nn.functional as F\n"
        f"fullframe.tile(t.network(), loss=F.cross_entropy, plan={str(saved)!r})(*t.inputs()).backward()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_plan_is_an_error(saved):
    held = json.loads(saved.read_text())
    saved.write_text(json.dumps(held | {"plan": "0" * 32}))
    step = fullframe.tile(network(), loss=F.cross_entropy, plan=saved)
    with pytest.raises(fullframe.FullframeError, match="plan= is another than the one that was saved"):
        step(*inputs())


@pytest.mark.parametrize(
    "change", [{"budget": "300 MB"}, {"budget": -1}, {"workers": 0}, {"rate": 0}, {"more": 1}, {"call": None}]
)
def test_another_file_is_an_error(saved, change):
    saved.write_text(json.dumps(json.loads(saved.read_text()) | change))
    with pytest.raises(ValueError, match=r"plan\.json is not a plan that Plan\.save\(\) has written"):
        fullframe.tile(network(), loss=F.cross_entropy, plan=saved)


def test_its_numbers_are_not_given_twice(saved):
    with pytest.raises(ValueError, match="leave out budget="):
        fullframe.tile(network(), plan=saved, budget="1 GB")
