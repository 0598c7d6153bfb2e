"""Fixtures of the application's tests: the reference numbers and real events, where the checkout has them."""

import json
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of the numbers computed with the public CosmicTagger."""
    folder = SHARED / "reference"
    if not (folder / "index.json").is_file():
        pytest.skip(f"reference numbers are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def reference_index(reference: Path) -> dict:
    return json.loads((reference / "index.json").read_text())


@pytest.fixture(scope="session")
def real_events() -> Path:
    """A larcv3 file with three real SBND events."""
    path = SHARED / "data" / "sbnd_events.h5"
    if not path.is_file():
        pytest.skip(f"real events are not at {path}")
    return path
