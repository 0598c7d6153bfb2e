"""Which cases of a test run, and fixtures that several files ask for by name."""

import os
from collections import defaultdict
from typing import Any

import pytest
import torch

import fullframe.tiled
from fullframe import torch_compat
from fullframe.codegen.toolchain import cxx as compiler
from fullframe.compiler import kept_plans
from fullframe.schedule import verify

verify.ON = True  # every plan that a test makes is checked
kept_plans.ON = False  # and made, not read
torch_compat.recording_is_imported()  # asked now, or what a plan counts would depend on the tests before
os.environ.setdefault("FULLFRAME_DISK_RATE", "500")  # MB/s, so that plans do not depend on the disk at hand,
os.environ.setdefault("FULLFRAME_ARITHMETIC_RATE", "250000")  # nor on the processor (million operations a second)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cases")
    group.addoption(
        "--few", type=int, metavar="N", help="of a test with more than N cases, N that lie evenly among them"
    )
    group.addoption("--rest", type=int, metavar="N", help="what --few N leaves out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a few cases of each test that is not marked ``rest``, or the others."""
    few, rest = config.getoption("--few"), config.getoption("--rest")
    if few is None and rest is None:
        return
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("rest") is None:
            cases[item.nodeid.partition("[")[0]].append(item)
    chosen = {item.nodeid for those in cases.values() for item in evenly(those, few or rest)}
    left_out = [item for item in items if (item.nodeid in chosen) != (few is not None)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if (item.nodeid in chosen) == (few is not None)]


def evenly(those: list[pytest.Item], count: int) -> list[pytest.Item]:
    """So many of them, the first one and others at equal distances, by their position among all."""
    return [those[k * len(those) // count] for k in range(count)] if len(those) > count else those


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
