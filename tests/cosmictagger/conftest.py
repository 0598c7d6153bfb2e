"""Fixtures of the application's tests: the reference numbers and real events, where the checkout has them."""

import json
from pathlib import Path

import pytest
from torch import nn

from cosmictagger import engine as seam
from cosmictagger.data import writing
from cosmictagger.model import VARIANTS, NetworkConfig
from cosmictagger.simulate import Detector, simulate_numbered

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


class PlainStep(nn.Module):
    """What the engine's step computes, by plain PyTorch."""

    def __init__(self, net: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.net, self.criterion = net, criterion

    def forward(self, image, label):
        return self.criterion(self.net(image), label)

    def plan(self, image, label):
        return PlainPlan()


class PlainPlan:
    projected_bytes = 1_000_000

    def __str__(self) -> str:
        return "plan: everything at once"


@pytest.fixture(params=["plain", "tiled"])
def engine(request, monkeypatch) -> str:
    """Run the test with plain PyTorch behind the application's seam, then with the engine."""
    if request.param == "plain":
        monkeypatch.setattr(
            seam, "training_step", lambda net, criterion, limits, mesh=None: PlainStep(net, criterion)
        )
        monkeypatch.setattr(seam, "tiled", lambda net, limits: net)
    return request.param


@pytest.fixture
def small(monkeypatch) -> NetworkConfig:
    """A network that trains in no time, under the name of a published one."""
    config = NetworkConfig(
        n_initial_filters=2,
        depth=3,
        blocks_per_layer=1,
        blocks_deepest_layer=1,
        blocks_final=0,
        filter_size_deepest=3,
        bottleneck_deepest=4,
        connections="sum",
        residual=False,
    )
    monkeypatch.setitem(VARIANTS, "a21", config)
    return config


@pytest.fixture(scope="session")
def small_events(tmp_path_factory) -> Path:
    """Three simulated events of 80 x 128 pixels."""
    path = tmp_path_factory.mktemp("events") / "events.h5"
    with writing(path) as out:
        for number in range(3):
            out.append(simulate_numbered(7, number, Detector().coarser(16)))
    return path
