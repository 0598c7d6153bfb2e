"""What a step says of how it ran, and what it logs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from disks import folder_on_disk
from torch import nn

import fullframe
from fullframe import errors, torch_compat
from fullframe.bytecode import recorder
from fullframe.bytecode.libtorch import bytecode_available
from fullframe.codegen.toolchain import cxx
from fullframe.runtime import fused
from fullframe.storage import unnamed_file


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    monkeypatch.setattr(errors, "_told", set())


def lines(step) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in step.explain().splitlines())


def test_a_step_says_how_it_ran(caplog):
    caplog.set_level(logging.INFO, "fullframe")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    step = fullframe.tile(net, loss=F.mse_loss, budget="1 GB", workers=1)
    assert step.explain() == "no call has run"
    image = torch.randn(1, 1, 20, 24)
    for turn in range(4):
        step(image, torch.zeros(1, 2, 20, 24)).backward()
        said = lines(step)
        made = "made in this call (the first)"
        assert said["capture"] == ("that of a former call" if turn else made)
    assert said["ops run whole"] == "none" and said["plan"].split()[0].isdigit()
    if cxx.commands():
        assert cxx.isa() in said["kernels"] and "run by torch's ops" not in said["kernels"]
        first, _, count = said["tiles"].split()[:3]
        assert first == count
    step(torch.randn(1, 1, 22, 24), torch.zeros(1, 2, 22, 24))
    assert lines(step)["capture"].startswith("made in this call (changed: ")
    told = [r.getMessage() for r in caplog.records if r.name == "fullframe" and r.levelno == logging.INFO]
    assert len(told) == 2 and "(the first)" in told[0]


@pytest.mark.parametrize("has", [True, False])
def test_a_step_says_in_which_type_it_multiplies(monkeypatch, has):
    monkeypatch.setattr(torch_compat, "has_bfloat16", lambda: has)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).bfloat16()
    step = fullframe.tile(net, loss=F.mse_loss, budget="1 GB", workers=1)
    image = torch.randn(1, 1, 20, 24, dtype=torch.bfloat16)
    step(image, torch.zeros(1, 2, 20, 24, dtype=torch.bfloat16)).backward()
    said = lines(step).get("products of bfloat16")
    assert (said is None) is has
    assert has or said == "5 ops make them in float32, since this processor has none of bfloat16"


class Changing(nn.Module):
    """Its factor is read in Python."""

    def __init__(self):
        super().__init__()
        self.conv, self.factor = nn.Conv2d(1, 1, 1), 1.0

    def forward(self, x):
        return self.conv(x) * self.factor


def test_a_new_capture_names_what_has_changed():
    net = Changing()
    tiled = fullframe.tile(net, budget="1 GB")
    tiled(torch.zeros(1, 1, 8, 8))
    net.factor = 2.0
    tiled(torch.zeros(1, 1, 8, 8))
    assert "factor" in lines(tiled)["capture"]


def test_what_is_not_compiled_is_counted_with_its_reason(monkeypatch):
    made = fused.build_many
    monkeypatch.setattr(fused, "build_many", lambda groups, **_: made(groups, compile=False))
    tiled = fullframe.tile(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), budget="1 GB")
    tiled(torch.zeros(1, 1, 8, 8))
    assert "run by torch's ops: asked for" in lines(tiled)["kernels"]


def test_an_op_that_runs_whole_is_told_once(caplog):
    tiled = fullframe.tile(
        nn.Sequential(nn.Conv2d(1, 1, 1)), loss=lambda x, y: (torch.sort(x, 2)[0] - y).sum(), budget="1 GB"
    )
    for _ in range(2):
        tiled(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
    told = [r.getMessage() for r in caplog.records if "runs whole" in r.getMessage()]
    assert bool(told) == (lines(tiled)["ops run whole"] != "none") and len(told) == len(set(told))


@pytest.mark.rest
def test_without_a_compiler_each_way_is_told_once(tmp_path):
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import importlib.util
importlib.util.find_spec, found = (lambda name, *more: None if name == "ziglang" else found(name, *more)), importlib.util.find_spec
import torch, fullframe
tiled = fullframe.tile(torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU()), budget="1 GB")
for _ in range(2):
    tiled(torch.zeros(1, 8, 32, 32))
"""
    env = os.environ | {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    said = [line for line in done.stderr.splitlines() if "no C++ compiler" in line]
    assert len(said) == len(set(said)) >= 2 and any("bytecode" in line for line in said)


@pytest.mark.skipif(not bytecode_available(), reason="no compiler: nothing is recorded")
def test_tiles_without_bytecode_are_told_once_with_the_reason(monkeypatch, caplog):
    monkeypatch.setattr(recorder, "MOST", 0)  # tensors of a kernel
    tiled = fullframe.tile(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), tile=4, budget="1 GB")
    for _ in range(3):
        tiled(torch.zeros(1, 1, 8, 8))
    told = [r.getMessage() for r in caplog.records if "bytecode" in r.getMessage()]
    assert len(told) == 1 and "a kernel of many tensors" in told[0]


def test_a_disk_without_direct_access_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(unnamed_file, "_direct", lambda fd: None)
    folder = folder_on_disk()
    for _ in range(2):
        unnamed_file.UnnamedFile(folder, 1).close()
    (told,) = [r.getMessage() for r in caplog.records]
    assert str(folder) in told and "direct I/O" in told
