"""The default UResNet (18.4 M parameters), its loss, and an event: what several benchmarks run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cosmictagger.data import EventFile, shrink, shrink_labels
from cosmictagger.model import NetworkConfig, UResNet
from cosmictagger.objective import PlaneLoss
from cosmictagger.simulate import simulate_numbered

EVENTS = Path(__file__).parents[2] / "shared" / "data" / "sbnd_events.h5"


def network(seed: int = 0) -> tuple[UResNet, nn.Module]:
    """The default network and the light loss."""
    torch.manual_seed(seed)
    return UResNet(NetworkConfig()), PlaneLoss("light")


def event(halvings: int = 0, number: int = 0) -> tuple[Tensor, Tensor, str]:
    """Charge (1, 3, rows, columns) float32, truth int64, and where they come from."""
    if EVENTS.is_file():
        with EventFile(EVENTS) as events:
            found, source = events[number], "a real SBND event"
    else:
        found, source = simulate_numbered(0, number), "a simulated event"
    image = torch.from_numpy(np.ascontiguousarray(shrink(found.image(), halvings)))[None]
    label = torch.from_numpy(np.ascontiguousarray(shrink_labels(found.truth(), halvings)))[None]
    return image, label.long(), source
