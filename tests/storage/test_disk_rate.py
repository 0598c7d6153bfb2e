"""How fast a disk is: measured once and kept, or told, and kept with a plan."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.codegen.toolchain import kept_files
from fullframe.compiler import measures
from fullframe.storage import disk_rate
from fullframe.storage.disk_rate import USUAL, VARIABLE


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder, of whose disk nothing is known, in a process that keeps nothing yet."""
    monkeypatch.delenv(VARIABLE, raising=False)
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(kept_files, "directory", lambda: kept)
    measures._rate.cache_clear()
    yield tmp_path
    measures._rate.cache_clear()


def refuse(*_: object) -> None:
    raise AssertionError("it is measured again")


def test_a_rate_is_a_power_of_two_and_measured_once(folder, monkeypatch):
    rate = measures.disk_rate(folder)
    assert 64 <= rate <= 8192 and (rate & (rate - 1) == 0 or rate == USUAL)
    monkeypatch.setattr(disk_rate, "UnnamedFile", refuse)
    assert measures.disk_rate(folder) == rate
    measures._rate.cache_clear()  # as in another process
    assert measures.disk_rate(folder) == rate


@pytest.mark.parametrize("spoil", ["old", "damaged", "foreign"])
def test_what_is_kept_is_used_only_whole_and_new(folder, spoil):
    assert measures.once("thing", lambda: 3.5) == 3.5
    assert measures.once("thing", lambda: 4.5) == 3.5 and measures.once("other", lambda: 5.5) == 5.5
    kept = measures._path("thing")
    if spoil == "old":
        os.utime(kept, (0, 0))
    elif spoil == "damaged":
        kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    else:
        kept.chmod(0o666)
    assert measures.once("thing", lambda: 9.5) == 9.5 and measures.once("other", lambda: 9.5) == 5.5


def test_a_rate_may_be_told(folder, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1234")
    assert measures.disk_rate(folder) == 1234
    for wrong in ("fast", "0", "-1", "0.5"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(ValueError, match=VARIABLE):
            measures.disk_rate(folder)


def test_a_disk_without_room_is_not_measured(folder, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_rate, "UnnamedFile", full)
    assert measures.disk_rate(folder) == USUAL


def test_a_saved_plan_keeps_the_rate(folder, monkeypatch):
    """What is measured when a training goes on may be another number; its plan is the same."""
    net, image, label = nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 32, 32), torch.zeros(1, 30, 30, dtype=torch.long)
    monkeypatch.setenv(VARIABLE, "77")
    limits = {"budget": "1 GB", "disk": "1 MB", "folder": folder}
    fullframe.tile(net, loss=F.cross_entropy, workers=1, **limits).plan(image, label).save(folder / "plan.json")
    assert json.loads((folder / "plan.json").read_text())["rate"] == 77
    monkeypatch.setenv(VARIABLE, "2000")
    again = fullframe.tile(net, loss=F.cross_entropy, plan=folder / "plan.json", folder=folder)
    found = again.plan(image, label).limits
    assert found is not None and found.rate == 77
