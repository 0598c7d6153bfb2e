"""Fixtures that several files ask for by name."""

import os
from typing import Any

import pytest
import torch

import fullframe.tiled
from fullframe.codegen.toolchain import cxx as compiler
from fullframe.schedule import verify

verify.ON = True  # every plan that a test makes is checked


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


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was recorded, one entry for each time."""
    made: list[Any] = []
    compiled = fullframe.tiled.compile_call

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return compiled(*args, **kwargs)

    monkeypatch.setattr(fullframe.tiled, "compile_call", counted)
    return made
