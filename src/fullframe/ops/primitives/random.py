"""Random numbers that do not depend on the tiling: a hash of seed, call and global position.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) applied twice. Normal
numbers are made by Box and Muller's method (1958) from two uniform ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, prod

import torch

from fullframe.ir import region as box
from fullframe.ir.graph import Kind, Op
from fullframe.ir.region import Region
from fullframe.ops.primitives.rule import BaseRule

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(number: int) -> int:
    """An unsigned 64-bit number as the signed one with the same bits; torch's int64 wraps around."""
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def scrambled(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser: a bijection of 64 bits that spreads every bit over all."""
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    return x ^ _shifted(x, 31)


def uniform(seed: torch.Tensor, number: int, shape: Sequence[int], region: Region) -> torch.Tensor:
    """Float64 numbers in [0, 1) for a region of a tensor of this shape; call ``number`` of the step."""
    position = torch.zeros((), dtype=torch.int64, device=seed.device)
    for axis, (low, high) in enumerate(region):
        line = torch.arange(low, high, device=seed.device) * prod(shape[axis + 1 :])
        position = position + line.view(-1, *[1] * (len(region) - axis - 1))
    key = scrambled(seed * _signed(_GOLDEN) + _signed((number + 1) * _FIRST))
    bits = scrambled(scrambled(position * _signed(_GOLDEN) + key) + key)
    return _shifted(bits, 11).to(torch.float64) * 2.0**-53


def normal(seed: torch.Tensor, number: int, shape: Sequence[int], region: Region) -> torch.Tensor:
    """Standard normal numbers, as `uniform`."""
    radius = (-2 * torch.log1p(-uniform(seed, 2 * number + (1 << 40), shape, region))).sqrt()
    return radius * torch.cos(2 * pi * uniform(seed, 2 * number + 1 + (1 << 40), shape, region))


class Random(BaseRule):
    """``tile.random(seed, kind, number)``: kind is uniform (in [0, 1)) or normal."""

    kind: Kind = "pointwise"

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        _, kind, number = op.args
        made = (normal if kind == "normal" else uniform)(windows[0], number, op.output.shape, region)
        return narrowed(made, op.output.dtype) if kind == "uniform" else made.to(op.output.dtype)

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        return [box.full(op.inputs[0].shape)]

    def cost(self, op: Op, elements: int) -> int:
        return 40 * elements

    def scratch(self, op: Op, region: Region) -> int:
        return 4 * 8 * box.size(region)  # counters of eight bytes, before and after each step


def narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers in [0, 1) in a narrower dtype, rounded down so that 1 is never reached."""
    if dtype == torch.float64:
        return x
    digits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[dtype]
    return ((x * 2.0**digits).floor() * 2.0**-digits).to(dtype)


RULES: dict[str, BaseRule] = {"tile.random": Random()}
