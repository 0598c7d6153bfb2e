"""The one place where the application meets the engine."""

from typing import Protocol

from torch import Tensor, nn

import fullframe


class Plan(Protocol):
    """Printable; says what a step will take before it runs."""

    @property
    def projected_bytes(self) -> int: ...


class Step(Protocol):
    """step(image, label) -> (loss, tags), for a criterion that returns both."""

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]: ...

    def plan(self, image: Tensor, label: Tensor) -> Plan: ...


def training_step(net: nn.Module, criterion: nn.Module, budget: str | None, threads: int | None = None) -> Step:
    """A training step within the budget; see `fullframe.tile`."""
    return fullframe.tile(net, loss=criterion, budget=budget, workers=threads)


def tiled(net: nn.Module, budget: str | None, threads: int | None = None) -> nn.Module:
    """The same network within the budget; see `fullframe.tile`."""
    return fullframe.tile(net, budget=budget, workers=threads)
