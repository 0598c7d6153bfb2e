"""Sums over tiles, added as a fixed tree over the tiles of the image.

The tiles of a stage are numbered along the image, whatever the order in which they are made. Node ``(level, index)``
of the tree stands for the tiles from ``index << level`` on, ``1 << level`` of them as far as there are so many, and
is its left half combined with its right half. So every bit of a sum is fixed, whoever adds which part of it, and
when; and a contiguous part of the image can be added up by itself, to a few nodes, of which the rest is made.

Tiles that come in their order, or in the opposite one, leave at most one node of each level waiting for its other
half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Protocol

import torch

from fullframe.ir import region as box
from fullframe.ir.graph import Op, Value, reduction_of
from fullframe.ir.region import Region
from fullframe.runtime.tasks import Partials

Place = tuple[bool, int, int]
"""Whether the sums of a node are combined together, its level, and its index there."""
Node = dict[tuple[Op, Region | None], torch.Tensor]
"""Sums by op and the part of its output that they are of, which is None for all of it."""
RUN, SMALL = 32, 1023  # tiles, and numbers of each: together too few for ATen to split among threads


class Running(Protocol):
    """A run of a plan, as it is needed by what drives it."""

    values: dict[Value, torch.Tensor]

    def threads(self, count: int) -> None: ...
    def begin(self, number: int) -> Sums: ...
    def make(self, number: int, k: int) -> Partials: ...
    def end(self, number: int, sums: Sums) -> None: ...
    def free(self, number: int) -> None: ...


class Sums:
    """The sums of a stage in progress.

    ``together`` combines the halves of many nodes by one call, where a call costs more than what it adds: small sums
    wait until an aligned run of `RUN` tiles is there. It gives the same bits.
    """

    def __init__(self, ops: Sequence[Op], tiles: int, device: torch.device, *, together: bool = False):
        self.ops, self.tiles, self.device = ops, tiles, device
        self.nodes: dict[Place, Node] = {}
        self.most = 0  # nodes that waited at the same time
        self._small = {op for op in ops if together and prod(op.output.shape) <= SMALL}
        self._kinds = {op in self._small for op in ops}

    def add(self, tile: int, partials: Partials) -> None:
        """Add the partial results of a tile. They are changed: nothing else may use their memory."""
        for kind in self._kinds:
            found = {(p.op, p.region): made for p, made in partials if (p.op in self._small) is kind}
            self.join({(kind, 0, tile): found})

    def join(self, nodes: Mapping[Place, Node]) -> None:
        """Add nodes, as another share of the same sums has them."""
        for place, node in nodes.items():
            self._put(place, node)
        self.most = max(self.most, len(self.nodes))

    def _put(self, place: Place, node: Node) -> None:
        kind, level, index = place
        if kind and level == 0:
            self.nodes[place] = node
            start = index - index % RUN
            waiting = [(kind, 0, k) for k in range(start, min(start + RUN, self.tiles))]
            if not all(other in self.nodes for other in waiting):
                return
            level, index = RUN.bit_length() - 1, start // RUN
            node = _tree([self.nodes.pop(other) for other in waiting])
        while self.tiles > 1 << level:
            other = index ^ 1
            if other << level < self.tiles:  # else there is no right half
                if (kind, level, other) not in self.nodes:
                    self.nodes[kind, level, index] = node
                    return
                halves = node, self.nodes.pop((kind, level, other))
                node = _combined(*(halves if index < other else halves[::-1]))
            level, index = level + 1, index >> 1
        self.nodes[kind, level, 0] = node

    def finish(self) -> dict[Op, torch.Tensor]:
        """The sums, once all tiles have been added."""
        assert len(self.nodes) == (len(self._kinds) if self.tiles else 0), "tiles are missing"
        root: Node = {key: made for node in self.nodes.values() for key, made in node.items()}
        return {op: _finished(op, root, self.device) for op in self.ops}


def _combined(left: Node, right: Node) -> Node:
    """A node of its halves, in the memory of the left one where that has the type in which sums are added."""
    for place, partial in right.items():
        if place in left:
            left[place] = widened(place[0], left[place])
            reduction_of(place[0]).combine(place[0], left[place], partial)
        else:
            left[place] = partial
    return left


def widened(op: Op, partial: torch.Tensor) -> torch.Tensor:
    """A partial result in the type in which its sum is added: one may come in the type of the output."""
    return partial.to(reduction_of(op).accumulator(op))


def _tree(leaves: Sequence[Node]) -> Node:
    """The node of an aligned run of tiles: all of a level are combined by one call, where each tile has its part."""
    root: Node = {}
    for key in dict.fromkeys(key for leaf in leaves for key in leaf):
        found = [leaf.get(key) for leaf in leaves]
        if all(t is not None for t in found):
            root[key] = _level_by_level(key[0], [widened(key[0], t) for t in found if t is not None])
            continue
        nodes: list[Node] = [{} if t is None else {key: t} for t in found]
        while len(nodes) > 1:
            odd = nodes[len(nodes) & ~1 :]
            nodes = [_combined(a, b) for a, b in zip(nodes[::2], nodes[1::2], strict=False)] + odd
        root |= nodes[0]
    return root


def _level_by_level(op: Op, partials: Sequence[torch.Tensor]) -> torch.Tensor:
    nodes = torch.stack(list(partials), -1)
    while (count := nodes.shape[-1]) > 1:
        left, right = nodes[..., 0 : count & ~1 : 2], nodes[..., 1::2]
        reduction_of(op).combine(op, left, right)
        nodes = nodes[..., ::2].contiguous()
    return nodes[..., 0].clone()


def _finished(op: Op, root: Node, device: torch.device) -> torch.Tensor:
    rule = reduction_of(op)
    total = root.get((op, None))
    if total is None:
        total = rule.start(op, op.output.shape, device)
        for (other, region), partial in root.items():
            # Parts do not overlap, since tiles do not along the axes that an op keeps.
            if other is op and region is not None:
                total[box.slices(region)].copy_(partial)
    return rule.finish(op, total)
