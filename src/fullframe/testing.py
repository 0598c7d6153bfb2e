"""The public test kit: is a tiled step the untiled step?

`agree` runs a network both ways and returns the worst relative difference of loss, outputs,
gradients and buffers; `probe` and `lattice` hold a single rule to its contract.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fullframe
from fullframe import region as box
from fullframe.ops import noise


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
    state = torch.get_rng_state()
    with drawn() if random else nullcontext():
        made = loss(net(*leaves), target)
    torch.set_rng_state(state)
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


@contextmanager
def drawn(seed: int | None = None) -> Iterator[None]:
    """Draw torch's random tensors by the engine's own numbers, the oracle of tiled randomness.

    Inside, the random ATen ops that a network's forward calls count up from 0, as they do in a
    recording, and take the numbers of a step with this seed; without one it is drawn from torch's
    default generator, as a step draws its own.
    """
    number = int(torch.randint(2**62, (), dtype=torch.int64)) if seed is None else seed
    with _Draws(number):
        yield


class _Draws(TorchDispatchMode):
    """Runs each random op through its lowering, on whole tensors."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = torch.tensor(seed)
        self.calls = 0

    def _next(self, shape: Sequence[int], dtype: torch.dtype, kind: str = "uniform") -> torch.Tensor:
        make = noise.normal if kind == "normal" else noise.uniform
        made = make(self.seed, self.calls, tuple(shape), box.full(tuple(shape)))
        self.calls += 1
        return made.to(dtype) if kind == "normal" else noise.narrowed(made, dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        if name in ("bernoulli_.float", "bernoulli.p"):
            x, p = args[0], args[1] if len(args) > 1 else 0.5
            made = (self._next(x.shape, x.dtype) < p).to(x.dtype)
            return x.copy_(made) if "_." in name else made
        if name == "uniform_.default":
            low, high = (*args[1:], 0.0, 1.0)[:2] if len(args) > 1 else (0.0, 1.0)
            return args[0].copy_(self._next(args[0].shape, args[0].dtype) * (high - low) + low)
        if name in ("rand_like.default", "randn_like.default"):
            kind = "normal" if "randn" in name else "uniform"
            return self._next(args[0].shape, kwargs.get("dtype") or args[0].dtype, kind)
        if name in ("rand.default", "randn.default"):
            kind = "normal" if "randn" in name else "uniform"
            return self._next(args[0], kwargs.get("dtype") or torch.get_default_dtype(), kind)
        if name == "native_dropout.default" and args[2] and args[1] > 0:
            keep = self._next(args[0].shape, torch.promote_types(args[0].dtype, torch.float32)) < 1 - args[1]
            return args[0] * keep * (1 / (1 - args[1])), keep
        if name.startswith("rrelu_with_noise") and "backward" not in name and len(args) > 4 and args[4]:
            slope = self._next(args[0].shape, args[0].dtype) * (args[3] - args[2]) + args[2]
            args[1].copy_(torch.where(args[0] <= 0, slope, 1))
            return args[0] * args[1]
        return func(*args, **kwargs)
