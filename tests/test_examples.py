"""Each script of `examples/` runs to its end, with what it asserts, in a folder of its own; a notebook's cells run again."""

from __future__ import annotations

import gc
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from zoo.entry import declare_torchvision

FOLDER = Path(__file__).parents[1] / "examples"
LARGE = {
    "earth"
}  # a picture from a package of its own, and a minute at the least; bench/results/earth.md has figures
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if path.stem not in LARGE]

pytestmark = pytest.mark.examples


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_runs(script: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    declare_torchvision()  # which timm and Lightning import
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip(), "an example says what it has shown"
    assert not list(tmp_path.iterdir()), "an example leaves no files"


def test_each_says_how_it_is_run_and_asserts_what_it_says():
    for script in SCRIPTS:
        text = script.read_text()
        assert re.search(rf"^    python examples/{script.name}", text, re.MULTILINE), script.name
        assert "assert" in text, f"{script.name} holds nothing against plain PyTorch, or against what is known"


@pytest.mark.parametrize("more", [[], ["--accelerate"]], ids=["by hand", "Accelerate"])
def test_replicas_of_two_processes_each(more: list[str]):
    if more:
        pytest.importorskip("accelerate")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    ran = subprocess.run([*launcher, str(FOLDER / "replicas.py"), *more], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "2 images, 2 processes each" in ran.stdout


def test_the_script_for_a_cluster_starts_a_process_on_each_node(tmp_path: Path):
    """With stand-ins for SLURM's commands, whose two nodes are this machine."""
    for name, does in {"scontrol": "echo localhost", "srun": '"$@" & "$@"; wait $!'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\nset -e\n{does}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = [str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]
    given = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "1", "PORT": str(port)}
    command = [
        "bash",
        str(FOLDER / "ranks.slurm"),
        str(FOLDER / "ranks.py"),
        "--rows=32",
        "--columns=32",
        "--steps=1",
    ]
    ran = subprocess.run(
        command, env={**os.environ, **given, "PATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "rank 0 of 2" in ran.stdout


def test_a_notebooks_cells_run_again_and_let_go_of_the_step_before():
    cells = [c for c in json.loads((FOLDER / "first_steps.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(c["outputs"] for c in cells), "outputs are the reader's own"
    names: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    first = names["losses"]
    step, pool = (weakref.ref(names["step"]), weakref.ref(names["step"]._fullframe["pool"]))
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert names["losses"] == first
    assert first[-1] < first[0]
    gc.collect()
    assert step() is None and pool() is None
