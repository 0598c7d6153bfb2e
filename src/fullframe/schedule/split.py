"""How an axis of the images is divided among ranks, and what one rank has of a plan. Only data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fullframe.ir.graph import Graph, Value
from fullframe.ir.region import Region, size
from fullframe.partition.tile_axes import TileAxes


@dataclass(frozen=True, eq=False)
class Split:
    """An axis of the first image, which is divided at ``bounds``: a rank has the pixels between two of them.

    ``inputs`` are those of the graph's that come in shards: (value, axis, bounds). ``gradients`` are the inputs of
    which the graph's last outputs are the gradients, in their order; ``late`` the gradients of outputs that are given
    later, with the number of the output.
    """

    name: str
    root: tuple[Value, int]
    bounds: tuple[int, ...]
    inputs: tuple[tuple[Value, int, tuple[int, ...]], ...]
    gradients: tuple[Value, ...]
    late: Mapping[Value, int]

    @property
    def ranks(self) -> int:
        return len(self.bounds) - 1

    def tile_axis(self, tile_axes: TileAxes) -> int | None:
        """The tile axis that is divided; None where it cannot be tiled."""
        value, axis = self.root
        return tile_axes[value][axis]

    def lasting(self, graph: Graph) -> dict[int, Value]:
        """By the number of an output the input of the graph whose new contents or gradient it is."""
        first = graph.signature.first_content
        found = dict(enumerate(graph.inputs[: graph.signature.contents], first))
        return found | dict(enumerate(self.gradients, len(graph.outputs) - graph.signature.gradients))


class Piece(NamedTuple):
    """Rows of a map that go from one rank to another."""

    value: Value
    region: Region

    @property
    def nbytes(self) -> int:
        return size(self.region) * self.value.itemsize


@dataclass(frozen=True)
class Exchange:
    """What a rank sends to each rank, and what it receives from each."""

    sends: tuple[tuple[Piece, ...], ...]
    receives: tuple[tuple[Piece, ...], ...]


class Meeting(NamedTuple):
    """What ranks exchange at once, before the stage of a ``number`` or behind the last: the ``rows`` that these
    stages read, the closing ones under the number of stages done, and the ``sums`` of these."""

    number: int
    rows: tuple[int, ...]
    sums: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Share:
    """What one rank has of a plan.

    ``tiles``: by stage, the places along the divided axis whose tiles it makes; None where it makes all, as every
    rank does. ``held``: the region that it has room for, of maps that it does not have in full. ``parts``: the
    region of an output that it hands out, ``given`` that of an input which it is given. ``before``: by stage what is
    exchanged ahead of it, and ``closing``, by the number of stages done, after them; None where nothing moves.
    ``meetings``: when that is done, by the stage with which a run begins.
    """

    rank: int
    split: Split
    tiles: tuple[tuple[int, int] | None, ...]
    held: Mapping[Value, Region]
    room: Mapping[Value, tuple[int, ...]]
    parts: Mapping[Value, Region]
    given: Mapping[Value, Region]
    before: tuple[Exchange | None, ...]
    closing: Mapping[int, Exchange | None]
    meetings: Mapping[int, tuple[Meeting, ...]]

    @property
    def ranks(self) -> int:
        return self.split.ranks

    @property
    def exchanges(self) -> list[Exchange]:
        """Those of rows in a step."""
        return [found for found in (*self.before, *self.closing.values()) if found is not None]

    @property
    def received(self) -> int:
        """Bytes of rows that come from other ranks in a step."""
        return sum(piece.nbytes for found in self.exchanges for pieces in found.receives for piece in pieces)
