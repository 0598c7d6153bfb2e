"""Every op of the coverage list in a small network, tiled against float64 plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_cases import difference
from usage_cases import CASES


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("name", "tile"), [(n, t) for n, c in CASES.items() for t in c.tiles])
def test_tiled_equals_plain(name: str, tile: Any) -> None:
    found = difference(name, tile)
    assert found.worst < 1e-9, found
    if not CASES[name].whole:
        assert not found.whole, found.whole
