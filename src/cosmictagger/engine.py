"""The one place where the application meets the engine."""

from typing import Protocol

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


def training_step(
    net: nn.Module,
    criterion: nn.Module,
    budget: str | None,
    threads: int | None = None,
    mesh: DeviceMesh | None = None,
) -> Step:
    """A training step within the budget, divided over the processes of a mesh; see `fullframe.tile`."""
    return fullframe.tile(net, loss=criterion, budget=budget, workers=threads, mesh=mesh)


def tiled(net: nn.Module, budget: str | None, threads: int | None = None) -> nn.Module:
    """The same network within the budget; see `fullframe.tile`."""
    return fullframe.tile(net, budget=budget, workers=threads)
