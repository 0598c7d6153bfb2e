"""What is installed is what is here: a wheel and a source archive, each in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import fullframe

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STEP = """
import sys, torch, fullframe, cosmictagger
assert fullframe.__file__.startswith(sys.prefix), fullframe.__file__
assert cosmictagger.__file__.startswith(sys.prefix), cosmictagger.__file__
net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))
assert fullframe.check(net, torch.randn(1, 1, 24, 24)).passed
fullframe.tile(net, budget="1 GB")(torch.randn(1, 1, 24, 24)).sum().backward()
print(fullframe.__version__)
"""

pytestmark = pytest.mark.package


def _run(*words: str | Path, folder: Path) -> str:
    """What a command prints, without the paths that the tests are given."""
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=folder, env=here, capture_output=True, text=True)
    assert not done.returncode, f"{words}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel that is made of it."""
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--outdir", folder, ROOT, folder=folder)
    (archive,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return archive, wheel


def _sources() -> set[str]:
    files = [p for p in (ROOT / "src").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {str(p.relative_to(ROOT / "src")) for p in files}


def test_both_hold_every_source(built: tuple[Path, Path]):
    archive, wheel = built
    assert {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n} == _sources()
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    assert {f"src/{name}" for name in _sources()} <= held
    assert {"LICENSE", "README.md", "CITATION.cff", "Makefile", "constraints.txt"} <= held
    assert archive.stat().st_size < 10_000_000 and wheel.stat().st_size < 3_000_000


def test_the_wheel_works_in_an_environment_of_its_own(built: tuple[Path, Path], tmp_path: Path):
    """The environment has this package and nothing else; what it needs is read from the one that the tests run in."""
    _run(sys.executable, "-m", "venv", "--without-pip", "env", folder=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    _run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        built[1],
        folder=tmp_path,
    )
    (packages,) = (tmp_path / "env").glob("lib/*/site-packages")
    (others,) = Path(sys.prefix).glob("lib/*/site-packages")
    (packages / "others.pth").write_text(f"{others}\n")  # comes after the environment's own
    assert _run(python, "-c", STEP, folder=tmp_path).strip() == PROJECT["version"]
    assert PROJECT["version"] in _run(python, "-m", "fullframe", folder=tmp_path)
    assert "train" in _run(tmp_path / "env" / "bin" / "cosmictagger", "--help", folder=tmp_path)


def test_one_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == PROJECT["version"] == fullframe.__version__
    assert cited["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors", "type"} <= cited.keys()
