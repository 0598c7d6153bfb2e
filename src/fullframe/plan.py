"""The plan: what runs in which order and tiles, what is stored where and how long. Only data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from fullframe.fusion import Unit
from fullframe.graph import Graph, Value
from fullframe.section import Labels, Section, Span, Tile


@dataclass(frozen=True)
class Grid:
    """Cuts labels into tiles: (label, pixels where the label is widest, pixels of a tile) each."""

    axes: tuple[tuple[int, int, int], ...] = ()

    def counts(self) -> list[int]:
        return [-(-extent // step) for _, extent, step in self.axes]

    def __len__(self) -> int:
        n = 1
        for c in self.counts():
            n *= c
        return n

    def tile(self, position: tuple[int, ...]) -> Tile:
        return {
            label: Span(k * step, min((k + 1) * step, extent), extent)
            for (label, extent, step), k in zip(self.axes, position, strict=True)
        }

    def tiles(self) -> Iterator[Tile]:
        """All tiles, the last axis fastest."""
        return (self.tile(p) for p in product(*(range(n) for n in self.counts())))

    def samples(self) -> Iterator[Tile]:
        """One tile of each class: first, second and last along every axis."""
        choices = [sorted({0, min(1, n - 1), n - 1}) for n in self.counts()]
        return (self.tile(p) for p in product(*choices))


@dataclass(frozen=True, eq=False)
class Step:
    """One section with its tiles, and the stored values that are not needed after it."""

    section: Section
    units: tuple[Unit, ...]
    grid: Grid
    frees: tuple[Value, ...]
    scratch: int
    parallel: bool


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a stored map lives in the arena, in bytes."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class Bytes:
    """Projected bytes: the arena of stored maps, untiled values at their peak, the windows of the
    tiles in work, sums in progress, and outputs handed to the caller."""

    arena: int
    untiled: int
    scratch: int
    outputs: int

    @property
    def total(self) -> int:
        return self.arena + self.untiled + self.scratch + self.outputs


@dataclass(frozen=True, eq=False)
class Plan:
    """Immutable; printable. ``steps[:early]`` make the outputs that are handed out first."""

    graph: Graph
    labels: Labels
    steps: tuple[Step, ...]
    early: int
    slots: dict[Value, Slot]
    bytes: Bytes
    budget: int
    workers: int
    whole: tuple[str, ...] = ()

    @property
    def projected_bytes(self) -> int:
        """Bytes the step adds beyond inputs, parameters and gradients, by arithmetic."""
        return self.bytes.total

    def __str__(self) -> str:
        from fullframe.report import describe

        return describe(self)
