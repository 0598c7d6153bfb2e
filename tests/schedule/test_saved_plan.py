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
from fullframe.schedule.planner import IMPORTS
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
    limits = step.plan(*inputs()).limits
    assert limits == step.plan(*inputs(32)).limits and limits[:5] == (300_000_000, 0, 0, 3, USUAL)
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


@pytest.mark.rest
def test_it_counts_what_was_yet_to_be_imported_when_it_was_saved(tmp_path):
    """An optimiser of torch.optim imports what a recording needs: with one, a plan has more room."""
    places = [str(Path(__file__).parent), str(Path(fullframe.__file__).parents[1])]
    found = {}
    for first in ("", "torch.optim.SGD([torch.zeros(1)], lr=1)\n"):
        path = tmp_path / f"{bool(first)}.json"
        code = (
            f"import sys; sys.path[:0] = {places!r}\n"
            f"import torch, test_saved_plan as t, fullframe, torch.nn.functional as F\n{first}"
            "plan = fullframe.tile(t.network(), loss=F.cross_entropy, budget='300 MB').plan(*t.inputs())\n"
            f"plan.save({str(path)!r}); print(plan.bytes.fixed)"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        found[path] = int(done.stdout)
    more, less = found.values()
    assert more - less == IMPORTS
    for path, fixed in found.items():
        step = fullframe.tile(network(), loss=F.cross_entropy, plan=path)
        assert step.plan(*inputs()).bytes.fixed == fixed
