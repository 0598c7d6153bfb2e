"""Reductions in progress: partial results of tiles, added up in the order of the tiles."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from fullframe.ir.graph import Op
from fullframe.runtime.tasks import Partials, Sum


def add(sums: dict[Op, Summation], partials: Partials) -> None:
    """Add a tile's partial results to the sums in progress."""
    for place, partial in partials:
        sums[place.op].add(place, partial)


class Summation:
    """A reduction in progress. Small partial results of whole outputs wait and are then joined, some at a time;
    one that comes ``alone`` is the sum."""

    WAITING, SMALL = 32, 1023  # results, and elements of each: together too few for ATen to split among threads

    def __init__(self, op: Op, device: torch.device, *, alone: bool = False):
        self.op = op
        self.rule: Any = op.rule
        self.device = device
        self.alone = alone
        self.waiting: list[torch.Tensor] = []

    @cached_property
    def total(self) -> torch.Tensor:
        return self.rule.start(self.op, self.op.output.shape, self.device)

    def add(self, place: Sum, partial: torch.Tensor) -> None:
        if place.part is None and self.alone:
            self.total = partial
        elif place.part is not None or self.total.numel() > self.SMALL:
            total = self.total if place.part is None else self.total[place.part]
            self.rule.combine(self.op, total, partial)
        else:
            self.waiting.append(partial)
            if len(self.waiting) == self.WAITING:
                self._join()

    def _join(self) -> None:
        if self.waiting:
            joined = self.waiting[0] if len(self.waiting) == 1 else self.rule.join(self.op, torch.stack(self.waiting))
            self.rule.combine(self.op, self.total, joined)
            self.waiting.clear()

    def finish(self) -> torch.Tensor:
        self._join()
        return self.rule.finish(self.op, self.total)
