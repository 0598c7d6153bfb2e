"""The public test kit: is a tiled step the untiled step?

`agree` runs a network both ways and returns the worst relative difference of loss, outputs,
gradients and buffers; `probe` and `lattice` hold a single rule to its contract.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fullframe


@dataclass(frozen=True)
class Difference:
    """The worst difference found, relative to the largest number of its kind, and where."""

    worst: float
    where: str
    whole: tuple[str, ...]


def agree(
    net: nn.Module, inputs: Sequence[torch.Tensor], loss: Callable[..., torch.Tensor], *,
    target: Any = None, tile: int | tuple[int, ...] | None = None, budget: int | None = None,
) -> Difference:  # fmt: skip
    """Run a training step plainly and tiled, on copies of ``net``, and compare everything.

    ``inputs`` must hold one tensor for the loss form; its gradient is compared where it asks for
    one. ``whole`` of the result names the ops on tiled values that the plan runs whole.
    """
    found: list[tuple[float, str]] = []
    (plain, *_), (tiled, whole) = _plain(net, inputs, loss, target), _tiled(net, inputs, loss, target, tile, budget)
    for kind, expected in plain.items():
        scale = (
            max((float(t.abs().max()) for t in expected.values() if t is not None and t.numel()), default=0.0) or 1.0
        )
        for name, old in expected.items():
            new = tiled[kind].get(name)
            if (old is None) != (new is None):
                found.append((float("inf"), f"{kind} {name}: one of them is None"))
            elif old is not None and new is not None:
                if old.shape != new.shape or old.dtype != new.dtype:
                    found.append(
                        (
                            float("inf"),
                            f"{kind} {name}: {old.dtype}{list(old.shape)} and {new.dtype}{list(new.shape)}",
                        )
                    )
                elif old.numel():
                    gap = float((old.double() - new.double()).abs().nan_to_num(float("inf")).max()) / scale
                    found.append((gap, f"{kind} {name}"))
    worst, where = max(found, default=(0.0, "nothing"))
    return Difference(worst, where, whole)


Results = dict[str, dict[str, "torch.Tensor | None"]]


def _plain(net: nn.Module, inputs: Sequence[torch.Tensor], loss: Callable[..., Any], target: Any) -> tuple[Results]:
    net = copy.deepcopy(net)
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    made = loss(net(*leaves), target)
    if made.requires_grad:
        made.backward()
    return (_results(net, leaves, made),)


def _tiled(net: nn.Module, inputs: Sequence[torch.Tensor], loss: Callable[..., Any], target: Any,
           tile: Any, budget: Any) -> tuple[Results, tuple[str, ...]]:  # fmt: skip
    net = copy.deepcopy(net)
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    step = fullframe.tile(net, loss=loss, tile=tile, budget=budget, workers=1)
    whole = step.plan(*leaves, target).whole
    made = step(*leaves, target)
    if made.requires_grad:
        made.backward()
    return _results(net, leaves, made), whole


def _results(net: nn.Module, leaves: Sequence[torch.Tensor], made: torch.Tensor) -> Results:
    grads = {n: p.grad for n, p in net.named_parameters()} | {f"input{k}": t.grad for k, t in enumerate(leaves)}
    return {
        "loss": {"": made.detach()},
        "gradient of": grads,
        "buffer": {n: b.detach() for n, b in net.named_buffers()},
    }
