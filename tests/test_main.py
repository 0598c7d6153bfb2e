"""``python -m fullframe`` says what a report of a fault needs."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from fullframe.__main__ import facts


def test_facts_name_versions_compiler_and_memory():
    found = facts()
    assert torch.__version__ in found["torch"]
    assert "GB free" in found["memory"] and found["compiler"]


def test_it_prints_each_fact_on_a_line_of_its_own():
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-m", "fullframe"], capture_output=True, text=True, check=True, env=here)
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == list(facts())
