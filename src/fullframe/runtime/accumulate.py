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

import torch

from fullframe.ir import region as box
from fullframe.ir.graph import Op, Reduction
from fullframe.ir.region import Region
from fullframe.runtime.tasks import Partials

Place = tuple[int, int]
Node = dict[tuple[Op, Region | None], torch.Tensor]
"""Sums by op and the part of its output that they are of, which is None for all of it."""


class Sums:
    """The sums of a stage in progress.

    ``together`` combines the halves of many nodes by one call, where a call costs more than what it adds: they wait
    until an aligned run of ``TOGETHER`` tiles is there. It gives the same bits.
    """

    TOGETHER, SMALL = 32, 1023  # tiles, and numbers of each: together too few for ATen to split among threads

    def __init__(self, ops: Sequence[Op], tiles: int, device: torch.device, *, together: bool = False):
        self.ops, self.tiles, self.device = ops, tiles, device
        self.nodes: dict[Place, Node] = {}
        self.most = 0  # nodes that waited at the same time
        self._run = self.TOGETHER if together else 1

    def add(self, tile: int, partials: Partials) -> None:
        """Add the partial results of a tile. They are changed: nothing else may use their memory."""
        self.join({(0, tile): {(place.op, place.region): partial for place, partial in partials}})

    def join(self, nodes: Mapping[Place, Node]) -> None:
        """Add nodes, as another share of the same sums has them."""
        for (level, index), node in nodes.items():
            self._put(level, index, node)
        self.most = max(self.most, len(self.nodes))

    def _put(self, level: int, index: int, node: Node) -> None:
        if level == 0 and self._run > 1:
            self.nodes[0, index] = node
            start = index - index % self._run
            waiting = [(0, k) for k in range(start, min(start + self._run, self.tiles))]
            if not all(place in self.nodes for place in waiting):
                return
            level, index = self._run.bit_length() - 1, start // self._run
            node = _tree([self.nodes.pop(place) for place in waiting], self.device, self.SMALL)
        while self.tiles > 1 << level:
            other = index ^ 1
            if other << level < self.tiles:  # else there is no right half
                if (level, other) not in self.nodes:
                    self.nodes[level, index] = node
                    return
                halves = node, self.nodes.pop((level, other))
                node = _combined(*(halves if index < other else halves[::-1]), self.device)
            level, index = level + 1, index >> 1
        self.nodes[level, 0] = node

    def finish(self) -> dict[Op, torch.Tensor]:
        """The sums, once all tiles have been added."""
        (root,) = self.nodes.values() if self.tiles else ({},)
        return {op: _finished(op, root, self.device) for op in self.ops}


def _combined(left: Node, right: Node, device: torch.device) -> Node:
    """A node of its halves, in the memory of the left one where that has the type in which sums are added."""
    for place, partial in right.items():
        if place in left:
            left[place] = _widened(place[0], left[place], device)
            _rule(place[0]).combine(place[0], left[place], partial)
        else:
            left[place] = partial
    return left


def _widened(op: Op, partial: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A partial result in the type in which its sum is added: one may come in the type of the output."""
    rule = _rule(op)
    if partial.dtype == rule.accumulator(op):
        return partial
    total = rule.start(op, partial.shape, device)
    rule.combine(op, total, partial)
    return total


def _tree(leaves: Sequence[Node], device: torch.device, small: int) -> Node:
    """The node of an aligned run of tiles; small results are combined level by level, all of a level by one call."""
    places = dict.fromkeys(place for leaf in leaves for place in leaf)
    root: Node = {}
    for place in places:
        found = [leaf.get(place) for leaf in leaves]
        if all(t is not None and t.numel() <= small for t in found):
            root[place] = _level_by_level(place[0], [_widened(place[0], t, device) for t in found if t is not None])
            continue
        nodes = [{} if t is None else {place: t} for t in found]
        while len(nodes) > 1:
            odd = nodes[len(nodes) & ~1 :]
            nodes = [_combined(a, b, device) for a, b in zip(nodes[::2], nodes[1::2], strict=False)] + odd
        root |= nodes[0]
    return root


def _level_by_level(op: Op, partials: Sequence[torch.Tensor]) -> torch.Tensor:
    nodes = torch.stack(list(partials), -1)
    while (count := nodes.shape[-1]) > 1:
        left, right = nodes[..., 0 : count & ~1 : 2], nodes[..., 1::2]
        _rule(op).combine(op, left, right)
        nodes = nodes[..., ::2].contiguous()
    return nodes[..., 0].clone()


def _finished(op: Op, root: Node, device: torch.device) -> torch.Tensor:
    rule = _rule(op)
    total = root.get((op, None))
    if total is None:
        total = rule.start(op, op.output.shape, device)
        for (other, region), partial in root.items():
            # Parts do not overlap, since tiles do not along the axes that an op keeps.
            if other is op and region is not None:
                total[box.slices(region)].copy_(partial)
    return rule.finish(op, total)


def _rule(op: Op) -> Reduction:
    assert op.rule.kind == "reduce"
    return op.rule  # type: ignore[return-value]
