"""Randomness and the activations that need it in normal form."""

from __future__ import annotations

from math import log1p, pi
from typing import Any

import torch

from fullframe.ir.graph import Value
from fullframe.ops.builder.builder import Builder
from fullframe.ops.builder.registry import cast, decomposes, wide

aten = torch.ops.aten


@decomposes("rand", "rand_like")
def rand(b: Builder, *_: Any, **__: Any) -> Value:
    return b.draw(b.meta_shape, b.meta_dtype, "uniform")


@decomposes("randn", "randn_like")
def randn(b: Builder, *_: Any, **__: Any) -> Value:
    return b.draw(b.meta_shape, b.meta_dtype, "normal")


@decomposes("uniform")
def uniform(b: Builder, x: Value, low: float = 0.0, high: float = 1.0, **_: Any) -> Value:
    return stretched(b, b.draw(x.shape, x.dtype, "uniform"), low, high)


def stretched(b: Builder, x: Value, low: float, high: float) -> Value:
    x = x if high - low == 1 else b.aten(aten.mul.Scalar, x, high - low)
    return b.aten(aten.add.Scalar, x, low) if low else x


@decomposes("normal_functional")
def normal(b: Builder, x: Value, mean: float = 0.0, std: float = 1.0, **_: Any) -> Value:
    made = b.aten(aten.mul.Scalar, b.draw(x.shape, x.dtype, "normal"), std)
    return b.aten(aten.add.Scalar, made, mean)


@decomposes("normal.float_float", "normal.Tensor_float", "normal.float_Tensor", "normal.Tensor_Tensor")
def normal_of(b: Builder, mean: Any, std: Any = 1.0, *_: Any, **__: Any) -> Value:
    """Normal numbers with means and deviations that are numbers or tensors."""
    made = b.draw(b.meta_shape, b.meta_dtype, "normal")
    made = b.aten(aten.mul.Tensor if isinstance(std, Value) else aten.mul.Scalar, made, std)
    return b.aten(aten.add.Tensor if isinstance(mean, Value) else aten.add.Scalar, made, mean)


# Other distributions: functions of uniform numbers in [0, 1), by inverting their distribution functions.


def exponential(u: torch.Tensor, rate: float) -> torch.Tensor:
    return -torch.log1p(-u) / rate


def geometric(u: torch.Tensor, p: float) -> torch.Tensor:
    return torch.ceil(torch.log1p(-u) / log1p(-p)).clamp(min=1) if p < 1 else torch.ones_like(u)


def cauchy(u: torch.Tensor, median: float, width: float) -> torch.Tensor:
    return median + width * torch.tan(pi * (u - 0.5))


def log_normal(normal: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return torch.exp(mean + std * normal)


DISTRIBUTIONS = {
    "exponential": (exponential, (1.0,)),
    "geometric": (geometric, (0.5,)),
    "cauchy": (cauchy, (0.0, 1.0)),
    "log_normal": (log_normal, (1.0, 2.0)),
}
"""For each in-place method of tensors: the function, and the method's own defaults."""


@decomposes(*DISTRIBUTIONS)
def distributed(b: Builder, x: Value, *numbers: Any, **_: Any) -> Value:
    name = b.target.split(".")[1]
    function, defaults = DISTRIBUTIONS[name]
    drawn = b.draw(x.shape, x.dtype, "normal" if name == "log_normal" else "uniform")
    return b.point(function, (drawn,), x.shape, x.dtype, *numbers, *defaults[len(numbers) :])


def ranked(x: torch.Tensor) -> torch.Tensor:
    return x.argsort()


@decomposes("randperm")
def randperm(b: Builder, n: int, **_: Any) -> Value:
    return cast(b, b.small(ranked, (b.draw((n,), torch.float64, "uniform"),), (n,), torch.int64), b.meta_dtype)


@decomposes("randint", "randint_like", "randint.low", "randint_like.low_dtype")
def randint(b: Builder, *args: Any, **_: Any) -> Value:
    bounds = [a for a in args if isinstance(a, int)]
    low, high = (0, bounds[0]) if "low" not in b.target else bounds[:2]
    made = b.aten(aten.mul.Scalar, b.draw(b.meta_shape, torch.float64, "uniform"), high - low)
    return cast(b, b.aten(aten.add.Scalar, b.aten(aten.floor.default, made), low), b.meta_dtype)


@decomposes("bernoulli", "bernoulli.p", "bernoulli.Tensor")
def bernoulli(b: Builder, x: Value, p: Any = None, **_: Any) -> Value:
    """1 with the probability given by a number, a tensor or x itself."""
    p = x if p is None else p
    kind = (
        p.dtype if isinstance(p, Value) else wide(b.meta_dtype if b.meta_dtype.is_floating_point else torch.float32)
    )
    drawn = b.draw(b.meta_shape, kind, "uniform")
    hit = b.aten(aten.lt.Tensor if isinstance(p, Value) else aten.lt.Scalar, drawn, p)
    return cast(b, hit, b.meta_dtype)


@decomposes("native_dropout")
def native_dropout(b: Builder, x: Value, p: float, train: Any = True) -> list[Value]:
    if not train or p == 0:
        return [x, b.full(x.shape, True, torch.bool)]
    keep = b.aten(aten.lt.Scalar, b.draw(x.shape, wide(x.dtype), "uniform"), 1 - p)
    scaled = b.aten(aten.mul.Scalar, b.aten(aten.mul.Tensor, x, keep), 1 / (1 - p) if p < 1 else 0.0)
    return [scaled, keep]


@decomposes("native_dropout_backward")
def native_dropout_backward(b: Builder, g: Value, mask: Value, scale: float) -> Value:
    return b.aten(aten.mul.Scalar, b.aten(aten.mul.Tensor, g, mask), scale)
