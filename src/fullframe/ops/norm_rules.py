"""Rule of the functions that read stacked moments (count, mean, squares on a new axis 0)."""

from __future__ import annotations

from collections.abc import Sequence

from fullframe.graph import Link, Op
from fullframe.ops.pointwise import Pointwise, broadcast_region
from fullframe.region import Region


class Stacked(Pointwise):
    """Pointwise, but the first input has one leading axis more, taken in full."""

    def links(self, op: Op) -> Sequence[Link]:
        shape = op.inputs[0].shape
        return [Link(0, a + 1, a) for a in range(len(op.output.shape)) if shape[a + 1] > 1] + [
            link for link in super().links(op) if link.input > 0
        ]

    def footprint(self, op: Op, region: Region) -> Sequence[Region]:
        rest = [broadcast_region(region, v.shape) for v in op.inputs[1:]]
        return [((0, 3), *region), *rest]


STACKED = Stacked()
