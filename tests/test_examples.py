"""Each script of `examples/` runs to its end, with what it asserts, in a folder of its own; a notebook's cells run again."""

from __future__ import annotations

import gc
import json
import re
import runpy
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
