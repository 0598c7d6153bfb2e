"""``python -m fullframe`` says what a report of a fault needs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

import fullframe
from fullframe.__main__ import facts
from fullframe.compiler.agreement import share_parameters
from fullframe.distributed.mesh import Domain, Thing
from fullframe.frontend.inputs import Pair


def test_facts_name_versions_compiler_and_memory():
    found = facts()
    assert torch.__version__ in found["torch"]
    assert "GB free" in found["memory"] and found["compiler"]


def test_it_prints_each_fact_on_a_line_of_its_own():
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-m", "fullframe"], capture_output=True, text=True, check=True, env=here)
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == list(facts())


class _OneRank(Domain):
    """Without a process group; it keeps what it is given."""

    def __init__(self):
        self.name, self.rank, self.size = "domain", 0, 1

    def gather(self, thing: Thing) -> list[Thing]:
        self.given = thing
        return [thing]

    def broadcast(self, tensors):
        pass


def test_source_that_is_not_installed_knows_its_version(monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    domain = _OneRank()
    share_parameters(domain, Pair(nn.Conv2d(1, 1, 1), None), {})
    (about, _), _ = domain.given
    assert about["fullframe"] == facts()["fullframe"] == fullframe.__version__
    sources = (p.read_text() for p in Path(fullframe.__file__).parents[1].glob("*/**/*.py"))
    assert not any("importlib.metadata" in text for text in sources)
