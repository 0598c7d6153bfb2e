"""Defaults shared by the rules, and the rule of an op that is only ever run whole."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod

import torch

from fullframe.errors import UnsupportedOpError
from fullframe.ir import region as box
from fullframe.ir.graph import Kind, Link, Op, reduces
from fullframe.ir.region import Region


def nbytes_of(op: Op, regions: Sequence[Region]) -> int:
    """Bytes of a region of each input."""
    return sum(box.size(r) * v.itemsize for v, r in zip(op.inputs, regions, strict=True))


def made_of(op: Op, region: Region) -> int:
    """Bytes of what an op makes of a (grown) region."""
    return box.size(op.rule.out_region(op, region) if reduces(op.rule) else region) * op.output.itemsize


class BaseRule:
    """A rule that reads every input in full: the safe default the families narrow down."""

    kind: Kind = "whole"
    heavy = False
    pinned = False

    def links(self, op: Op) -> Sequence[Link]:
        return ()

    def channels(self, op: Op) -> Sequence[tuple[int, int]]:
        return ()

    def grow(self, op: Op, region: Region) -> Region:
        return region

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        return [box.full(v.shape) for v in op.inputs]

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        return op.call(*op.bind(windows), **op.kwargs)

    def position(self, op: Op, region: Region) -> Hashable:
        """All of it: true of every rule, though tiles in other places are then of other classes."""
        return region

    def cost(self, op: Op, elements: int) -> int:
        return elements

    def scratch(self, op: Op, region: Region) -> int:
        """A copy of all that it reads and makes, as of another layout; the ops that move numbers make none."""
        return 0 if self.kind == "layout" else nbytes_of(op, self.footprint(op, region)) + made_of(op, region)

    def kept(self, op: Op, region: Region, pieces: Sequence[int]) -> Mapping[Hashable, int]:
        """Bytes of tables that stay when its tiles are made: as many unlike each other along each axis of the output
        as it is cut into ``pieces``, each of about a ``region``. What has one key is kept once, whoever asks."""
        return {}

    def selects(self, op: Op) -> bool:
        return False

    def decides(self, op: Op) -> bool:
        return False

    def compares(self, op: Op) -> bool:
        return False

    def opposes(self, op: Op) -> bool:
        return False

    def calls(self, op: Op) -> bool:
        return False

    def passes(self, op: Op) -> bool:
        return self.kind == "layout" or self.selects(op)


class Aligned(BaseRule):
    """A rule by which the axes of every input run along those of the output."""

    def links(self, op: Op) -> Sequence[Link]:
        return [Link(i, a, a) for i in range(len(op.inputs)) for a in range(len(op.output.shape))]


class UnexpectedShapeError(UnsupportedOpError):
    """An op makes its ``value`` in another ``shape`` than PyTorch's own rule of its shapes says."""

    def __init__(self, op: Op, shape: tuple[int, ...]):
        super().__init__(
            f"{op.target} makes a tensor of shape {shape}, and PyTorch's own rule of shapes, by which the step was "
            f"recorded, says {tuple(op.output.shape)}; give it an input of another shape"
        )
        self.value, self.shape = op.output, shape


class Whole(BaseRule):
    """An op known only by its name: all of the inputs, all of the output, once."""

    heavy = True

    def grow(self, op: Op, region: Region) -> Region:
        return box.full(op.output.shape)

    def run(self, op: Op, region: Region, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        made = super().run(op, region, windows)
        if tuple(made.shape) != tuple(op.output.shape):
            raise UnexpectedShapeError(op, tuple(made.shape))
        return made

    def cost(self, op: Op, elements: int) -> int:
        """Of attention: each query meets all keys, and what comes of that all values."""
        if "attention" not in op.target or len(op.inputs) < 3 or len(op.inputs[0].shape) < 2:
            return super().cost(op, elements)
        keys = max(v.shape[-2] if len(v.shape) > 1 else 1 for v in op.inputs[1:3])
        return 4 * prod(op.inputs[0].shape) * keys


class Reduction(BaseRule):
    """A sum over tiles of the driver input.

    Partial results are float64 for floating inputs: between tiles nothing is lost, whatever the
    number of tiles, so the result does not depend on the tiling beyond one rounding.
    """

    kind: Kind = "reduce"
    driver = 0

    def keeps(self, op: Op) -> Sequence[tuple[int, int]]:
        """Pairs (axis of the driver, axis of the output) that are not summed."""
        return ()

    def accumulator(self, op: Op) -> torch.dtype:
        if op.output.dtype.is_complex:
            return torch.complex128
        return torch.float64 if op.output.dtype.is_floating_point else op.output.dtype

    def start(self, op: Op, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.accumulator(op), device=device)

    def combine(self, op: Op, total: torch.Tensor, partial: torch.Tensor) -> None:
        total.add_(partial)

    def finish(self, op: Op, total: torch.Tensor) -> torch.Tensor:
        return total.to(op.output.dtype)

    def out_region(self, op: Op, driver: Region) -> Region:
        """Where the partial result of a driver region is added in the output."""
        out = list(box.full(op.output.shape))
        for axis, kept in self.keeps(op):
            out[kept] = driver[axis]
        return tuple(out)

    def driver_region(self, op: Op, out: Region) -> Region:
        """The driver region summed into an output region."""
        read = list(box.full(op.inputs[self.driver].shape))
        for axis, kept in self.keeps(op):
            read[axis] = out[kept]
        return tuple(read)
