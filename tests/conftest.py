"""Fixtures that several files ask for by name."""

import os

import pytest
import torch

from fullframe.codegen.toolchain import cxx as compiler


def pytest_report_header() -> str:
    """What computes: `make compat-isa` and `make compat-nocompiler` limit it."""
    library = os.environ.get("ONEDNN_MAX_CPU_ISA", "native")
    return f"kernels: {compiler.isa()}; ATen: {torch.backends.cpu.get_cpu_capability()}; oneDNN: {library}"


@pytest.fixture
def one_thread():
    """Ops in one thread, as a worker runs them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
