"""The site's code runs: each page's blocks in order, the examples in docstrings, and every command names what there is."""

from __future__ import annotations

import doctest
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import fullframe

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KINDS = {"python", "sh", "yaml", ""}  # "": a drawing
DOCUMENTED = (
    "fullframe.tiled",
    "fullframe.check",
    "fullframe.testing",
    "fullframe.errors",
    "fullframe.schedule.plan",
)

pytestmark = pytest.mark.docs


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_a_pages_code_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(), {"__name__": "__main__"}
    for found in FENCE.finditer(text):
        kind, code = found.groups()
        line = text.count("\n", 0, found.start()) + 2
        assert kind in KINDS, f"{page.name}:{line}: a block of kind {kind}"
        if kind == "sh":
            for command in filter(None, map(str.strip, code.splitlines())):
                _names_what_there_is(command)
        elif kind == "yaml":
            assert yaml.safe_load(code), f"{page.name}:{line}"
        elif kind == "python" and code.startswith(">>>"):
            _session(code, names, f"{page.name}:{line}")
        elif kind == "python":
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def _session(code: str, names: dict[str, Any], name: str) -> None:
    """Run what is typed and compare with what is said to come out, keeping the page's names."""
    test = doctest.DocTestParser().get_doctest(code, names, name, name, 0)
    said: list[str] = []
    runner = doctest.DocTestRunner()
    runner.run(test, out=said.append, clear_globs=False)
    assert not runner.failures, "".join(said)
    names.update(test.globs)


def _names_what_there_is(command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), command
    elif words[0] == "python" and words[1] != "-m":
        assert (ROOT / words[1]).is_file(), command
    elif words[0] == "sbatch":
        assert any((ROOT / word).is_file() for word in words if word.endswith(".slurm")), command
    else:
        assert words[0] in ("pip", "python", "torchrun", "cosmictagger"), command


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_in_docstrings_run(name: str):
    found = doctest.testmod(import_module(name))
    assert not found.failed
    assert found.attempted or name not in ("fullframe.tiled", "fullframe.check")


def test_scripts_that_pages_name_are_there():
    for page in [*PAGES, ROOT / "README.md"]:
        for name in re.findall(r"`((?:examples|bench)/[\w/.*-]+)`", page.read_text()):
            assert list(ROOT.glob(name)), f"{page.name} names {name}"


def test_every_example_and_every_public_name_has_its_place():
    shown = (ROOT / "docs" / "examples.md").read_text()
    for script in (ROOT / "examples").glob("*.py"):
        assert f'--8<-- "examples/{script.name}"' in shown
    described = (ROOT / "docs" / "api.md").read_text()
    for name in fullframe.__all__:
        assert re.search(rf"^::: fullframe\.(check\.)?{name}$", described, re.MULTILINE), name
