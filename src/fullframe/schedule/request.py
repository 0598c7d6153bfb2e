"""What a plan is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fullframe.ir.graph import Op, Value
from fullframe.partition.fusion import Fusable
from fullframe.schedule.split import Split
from fullframe.storage.disk_rate import USUAL

Copied = Callable[[Value, Value], Op]
"""Makes the op that copies the first value to the second."""
SPEED = 250_000  # million operations a second of a processor of which nothing is known
LARGE = 1 << 20  # bytes of untiled values, from which on a stage that makes them is made alone in little memory


@dataclass(frozen=True)
class Request:
    """What to plan for. ``roots``: the inputs' tileable axes. ``tile``: forced tile as (input value, axis, pixels)
    triples. ``free``: values not counted (gradients). ``fusable``: whether a pointwise op or a sum has a place in a
    fusion group. ``window``: bytes that the largest window of a tile may have at least. ``host``: bytes of a second
    tier, in which the stored maps may live where they do not fit in the budget; 0 where there is none. ``disk``:
    bytes of a further one, for the maps that have no place in the nearest of the others, ``rate`` the million bytes a
    second that it moves, and ``speed`` the million operations that are made meanwhile. ``fixed``: bytes that are
    taken whatever the plan; None: an estimate of what recording, plan and libraries take, which lie in the same
    memory. ``imports``: those that importing torch's recording machinery takes beside. ``max_in_flight``: how many
    stages in a row may be in work at the same time where the budget has room for it, and ``alone`` from how many
    bytes of untiled values on one is made after all before it, op by op. ``most``: bytes that the windows of the
    tiles in work may take in stages that make values again, if there are tiles so small. ``external``: inputs and
    outputs that live in objects of the caller's, and are fetched and put by regions. ``copied`` makes the op that
    copies a map from one memory to another on the way of a stage; None where none is copied."""

    budget: int
    workers: int
    roots: tuple[tuple[Value, tuple[int, ...]], ...]
    fusable: Fusable
    tile: tuple[tuple[Value, int, int], ...] | None = None
    free: frozenset[Value] = frozenset()
    window: int = 0
    host: int = 0
    disk: int = 0
    rate: int = USUAL
    speed: int = SPEED
    fixed: int | None = None
    imports: int = 0
    max_in_flight: int = 1
    alone: int = LARGE
    most: int = 0
    split: Split | None = None
    external: frozenset[Value] = frozenset()
    copied: Copied | None = None

    @property
    def hands(self) -> int:
        """The workers of all ranks."""
        return self.workers * (1 if self.split is None else self.split.ranks)
