"""Contractions: matrix products and everything that einsum writes for two operands.

One rule serves both uses: a linear map over channels, tiled over pixels (the contracted axis is in
full, nothing is summed over tiles), and a sum over pixels (a weight gradient, a Gram matrix).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from fullframe import region as box
from fullframe.graph import Link, Op
from fullframe.ops.rule import Reduction
from fullframe.region import Region


class Contract(Reduction):
    """``tile.contract(x, y, equation)``, driven by x; axes that only y has are taken in full."""

    heavy = True

    def terms(self, op: Op) -> tuple[str, str, str]:
        operands, out = op.args[2].split("->")
        x, y = operands.split(",")
        return x, y, out

    def keeps(self, op: Op) -> Sequence[tuple[int, int]]:
        x, _, out = self.terms(op)
        return [(x.index(c), k) for k, c in enumerate(out) if c in x]

    def links(self, op: Op) -> Sequence[Link]:
        x, y, _ = self.terms(op)
        return [Link(0, a, a) for a in range(len(x))] + [Link(1, a, x.index(c)) for a, c in enumerate(y) if c in x]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        x, y, _ = self.terms(op)
        return [
            region,
            tuple(region[x.index(c)] if c in x else (0, n) for c, n in zip(y, op.inputs[1].shape, strict=True)),
        ]

    def run(self, op: Op, region: Region, windows: Sequence[Any]) -> Any:
        return torch.einsum(op.args[2], *windows)

    def scratch(self, op: Op, region: Region) -> int:
        """The smaller operand may be laid out anew."""
        reads = zip(op.inputs, self.footprint(op, region), strict=True)
        return min(box.size(r) * v.itemsize for v, r in reads)

    def cost(self, op: Op, elements: int) -> int:
        x, _, out = self.terms(op)
        return 2 * elements * prod(n for c, n in zip(x, op.inputs[0].shape, strict=True) if c not in out)


RULES: dict[str, Reduction] = {"tile.contract": Contract()}
