"""Every op of the coverage list in a small network, tiled against float64 plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_cases import difference
from usage_cases import CASES

from fullframe import lowering


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, and fused units run by PyTorch: hundreds of networks would each wait for a compiler."""
    torch.set_num_threads(1)
    build = lowering.kernels.build_many
    monkeypatch.setattr(lowering.kernels, "build_many", lambda groups, *, compile: build(groups, compile=False))


@pytest.mark.parametrize(("name", "tile"), [(n, t) for n, c in CASES.items() for t in c.tiles])
def test_tiled_equals_plain(name: str, tile: Any) -> None:
    found = difference(name, tile)
    assert found.worst < 1e-9, found
    if not CASES[name].whole:
        assert not found.whole, found.whole
