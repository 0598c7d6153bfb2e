"""Plain PyTorch with the engine's random numbers: the oracle of tiled randomness."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fullframe.capture.rng_state import State, States
from fullframe.ir import region as box
from fullframe.ops.decompositions.random import DISTRIBUTIONS
from fullframe.ops.primitives import random as noise
from fullframe.torch_compat import TorchDispatchMode


@contextmanager
def drawn(seed: int | None = None) -> Iterator[None]:
    """Draw torch's random tensors by the engine's own numbers, the oracle of tiled randomness.

    Inside, the random ATen ops that a network's forward calls count up from 0, as they do in a
    recording, and take the numbers of a step with this seed; without one it is drawn from torch's
    default generator, as a step draws its own.
    """
    number = int(torch.randint(2**62, (), dtype=torch.int64)) if seed is None else seed
    with _Draws(number) as draws, draws.states.followed(real=True):
        yield


QUIET = ("native_dropout", "dropout", "rrelu_with_noise", "rrelu_with_noise_")  # may draw nothing, as above


class _Draws(TorchDispatchMode):
    """Runs each random op through its decomposition, on whole tensors."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = torch.tensor(seed)
        self.device = self.seed.device
        self.calls: int | None = 0
        self.marks: list[int | None] = []
        self.states = States(self._follow)

    def _follow(self, state: State) -> None:
        if state.marks > len(self.marks):
            self.marks.append(self.calls)
        elif state.source is not None:
            self.calls = self.marks[state.source] if state.source >= 0 else None

    def _next(self, shape: Sequence[int], dtype: torch.dtype, kind: str = "uniform") -> torch.Tensor:
        make = noise.normal if kind == "normal" else noise.uniform
        if self.calls is None:
            raise NotImplementedError("the random state was set to numbers that this oracle does not have")
        made = make(self.seed.to(self.device), self.calls, tuple(shape), box.full(tuple(shape)))
        self.calls += 1
        return made.to(dtype) if kind == "normal" else noise.narrowed(made, dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        given = (a.device for a in args if isinstance(a, torch.Tensor))
        self.device = torch.device(kwargs.get("device") or next(given, "cpu"))
        if name.startswith("bernoulli"):
            x, p = args[0], args[1] if len(args) > 1 else kwargs.get("p", args[0] if "_." not in name else 0.5)
            floating = x.dtype if x.dtype.is_floating_point else torch.float32
            kind = p.dtype if isinstance(p, torch.Tensor) else torch.promote_types(floating, torch.float32)
            made = (self._next(x.shape, kind) < p).to(x.dtype)
            return x.copy_(made) if "_." in name else made
        if name.removesuffix("_.default") in DISTRIBUTIONS:
            make, defaults = DISTRIBUTIONS[name.removesuffix("_.default")]
            drawn = self._next(args[0].shape, args[0].dtype, "normal" if "normal" in name else "uniform")
            return args[0].copy_(make(drawn, *args[1:], *defaults[len(args) - 1 :]))
        if name == "normal_.default":
            mean, std = (*args[1:], *(0.0, 1.0)[len(args) - 1 :])
            return args[0].copy_(self._next(args[0].shape, args[0].dtype, "normal") * std + mean)
        if name.startswith("normal.") and name.endswith(("_float", "_Tensor")):
            like = [a for a in args[:2] if isinstance(a, torch.Tensor)]
            shape = torch.broadcast_shapes(*(t.shape for t in like)) if like else args[2]
            kind = like[0].dtype if like else kwargs.get("dtype") or torch.get_default_dtype()
            return self._next(shape, kind, "normal") * (args[1] if len(args) > 1 else 1.0) + args[0]
        if name in ("randint.default", "randint.low"):
            low, high = (0, args[0]) if name == "randint.default" else args[:2]
            drawn = self._next(args[-1], torch.float64) * (high - low)
            return (drawn.floor() + low).to(kwargs.get("dtype") or torch.int64)
        if name in ("randint_like.default", "randint_like.low_dtype"):
            low, high = (0, args[1]) if name == "randint_like.default" else args[1:3]
            drawn = self._next(args[0].shape, torch.float64) * (high - low)
            return (drawn.floor() + low).to(kwargs.get("dtype") or args[0].dtype)
        if name == "randperm.default":
            return self._next((args[0],), torch.float64).argsort()
        if name == "uniform_.default":
            low, high = (*args[1:], *(0.0, 1.0)[len(args) - 1 :])
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
            made = args[0] * args[1]
            return args[0].copy_(made) if "noise_." in name else made
        if (
            torch.Tag.nondeterministic_seeded in func.tags
            and "attention" not in name
            and name.partition(".")[0] not in QUIET
        ):
            raise NotImplementedError(f"{func} draws random numbers that this oracle does not know")
        return func(*args, **kwargs)
