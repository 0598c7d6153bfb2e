"""Published networks, tiled, against plain PyTorch in float64: loss, outputs, every gradient, every buffer.

The quick ones run here with their middle tile; `make slow` runs all with three tiles in both modes.
"""

from __future__ import annotations

import pytest
import torch
from zoo import ENTRIES, Entry
from zoo.compare import TIMES, PlainError, case_of, draws, gaps, middle, plain, tiled

from fullframe.errors import CaptureError

# What may run whole: attention between pixels and what depends on it, gathers that follow data, Fourier transforms,
# and what a vector-quantiser looks up.
OUTSIDE = ("bmm", "baddbmm", "scaled_dot_product", "grid_sampler", "fft", "embedding")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def compared(entry: Entry, mode: str, tile: int) -> None:
    """Assert that a tiled step is the plain one; evaluation mode tiles the module without its loss."""
    case = case_of(entry, mode == "training").to(torch.float64)
    found, plan = tiled(case, tile, module=mode == "evaluation")
    worst, where = max(gaps(found, plain(case)))
    assert worst <= 1e-9, f"{where}: {worst:.1e}"
    whole = [name for name in plan.whole if not any(word in name for word in OUTSIDE)]
    assert not whole, whole


QUICK = [pytest.param(e, mode, id=f"{e.name} {mode}") for e in ENTRIES if e.quick for mode in e.modes]
TAKEN = [e for e in ENTRIES if not e.refused]
SLOW = [
    pytest.param(e, mode, tile, id=f"{e.family} {e.name} {mode} {tile}")
    for e in TAKEN
    for mode in e.modes
    for tile in e.tiles
]


@pytest.mark.parametrize(("entry", "mode"), QUICK)
def test_quick(entry: Entry, mode: str):
    compared(entry, mode, entry.tiles[1])


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "mode", "tile"), SLOW)
def test_all(entry: Entry, mode: str, tile: int):
    compared(entry, mode, tile)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("entry", TAKEN, ids=[f"{e.family} {e.name}" for e in TAKEN])
def test_no_further_from_the_truth_than_plain_pytorch(entry: Entry, half: bool):
    try:
        found = draws(entry, half)
    except PlainError as error:
        pytest.skip(f"plain PyTorch fails: {error}")
    assert middle([d.ratio for d in found]) <= TIMES, found


@pytest.mark.slow
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.refused], ids=lambda e: e.name)
def test_refused_by_name(entry: Entry):
    with pytest.raises(CaptureError, match=entry.refused):
        tiled(case_of(entry, True), entry.tiles[0])


def test_names_are_unique():
    assert len({(e.family, e.name) for e in ENTRIES}) == len(ENTRIES)
