"""The one place where the application meets the engine."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import fullframe

Target = Tensor | tuple[Tensor, ...]


class Plan(Protocol):
    """Printable; says what a step will take before it runs."""

    @property
    def projected_bytes(self) -> int: ...


class Step(Protocol):
    """step(image, target) -> what the criterion makes of the network's output and the target."""

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, ...]: ...

    def plan(self, image: Tensor, target: Target) -> Plan: ...


@dataclass(frozen=True)
class Limits:
    """What a step keeps to, as `fullframe.tile` takes it: a memory budget, threads, and bytes on the disk of a folder
    for maps that do not fit the budget."""

    budget: str | None = None
    threads: int | None = None
    disk: str | None = None
    folder: str | None = None

    def given(self) -> dict[str, Any]:
        """As arguments."""
        return {"budget": self.budget, "workers": self.threads, "disk": self.disk, "folder": self.folder}


def training_step(net: nn.Module, criterion: nn.Module, limits: Limits, mesh: DeviceMesh | None = None) -> Step:
    """A training step within the limits, divided over the processes of a mesh; see `fullframe.tile`."""
    return fullframe.tile(net, loss=criterion, mesh=mesh, **limits.given())


def tiled(net: nn.Module, limits: Limits) -> nn.Module:
    """The same network within the limits; see `fullframe.tile`."""
    return fullframe.tile(net, **limits.given())
