"""What must hold of every plan, whatever was decided. Tests have each plan checked; nobody else waits for that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fullframe.ir.graph import verify
from fullframe.ir.region import Interval
from fullframe.partition.tile_axes import own_region, tiled
from fullframe.schedule.memory import lifetimes
from fullframe.schedule.plan import Plan, Stage
from fullframe.storage.protocol import Slot

ON = False  # tests set it


def verify_plan(plan: Plan) -> None:
    """Assert that the graph is sound, that each section reads what is there, that tiles cover what they save, that
    maps alive together lie apart, and that the bytes are those of the stores and within the budget."""
    verify(plan.graph)
    _order(plan)
    for stage in plan.stages:
        _cover(plan, stage)
    _places(plan)
    assert plan.projected_bytes <= plan.budget, f"{plan.projected_bytes} bytes are beyond the budget of {plan.budget}"


def _order(plan: Plan) -> None:
    """Whatever a section or an op in it reads has been made before, and has not been freed."""
    there = set(plan.graph.inputs) | set(plan.graph.constants)
    for stage in plan.stages:
        section = stage.section
        for value in section.loads:
            assert value in there, f"{section!r} reads {value!r}, which is not there"
        within = set(section.loads)
        for op in section.ops:
            for value in op.inputs:
                assert value in within, f"{op!r} of {section!r} reads {value!r}, which the section does not have"
            within.add(op.output)
        for value in section.outputs:
            assert value in within, f"{section!r} does not make {value!r}"
        there.update(section.outputs)
        there.difference_update(stage.frees)
    for value in plan.graph.outputs:
        assert value is None or value in there, f"the output {value!r} is not there at the end"


def _cover(plan: Plan, stage: Stage) -> None:
    """The tiles of a stage make each element of what it saves once."""
    for value in stage.section.saves:
        if not tiled(value, plan.tile_axes):
            continue
        parts: list[set[Interval]] = [set() for _ in value.shape]
        for position in _along_each_axis(stage.grid.counts()):
            own = own_region(value, plan.tile_axes, stage.grid.tile(position))
            for found, interval in zip(parts, own, strict=True):
                found.add(interval)
        for found, length in zip(parts, value.shape, strict=True):
            end = 0
            for low, high in sorted(i for i in found if i[0] < i[1]):
                assert low == end, f"of an axis of {value!r} {low} follows on {end} in tiles of {stage.grid}"
                end = high
            assert end == length, f"the tiles of {value!r} end at {end} of {length}"


def _along_each_axis(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The positions of the tiles that are the first along all axes but one."""
    yield (0,) * len(counts)
    for axis, count in enumerate(counts):
        yield from (tuple(n if a == axis else 0 for a in range(len(counts))) for n in range(1, count))


def _places(plan: Plan) -> None:
    """Maps in one store that live at the same time lie apart, within the store."""
    lives = lifetimes([s.section for s in plan.stages], [v for v in plan.graph.outputs if v is not None])
    placed = sorted((item for item in plan.slots.items() if item[0] in lives.first), key=lambda item: item[1].offset)
    for k, (a, slot) in enumerate(placed):
        size = plan.bytes.stores[slot.tier]
        assert _end(slot) <= size, f"{a!r} ends at {_end(slot)} of a {slot.tier} of {size} bytes"
        for b, other in placed[k + 1 :]:
            if other.offset >= _end(slot):
                break
            apart = lives.last[a] < lives.first[b] or lives.last[b] < lives.first[a]
            assert apart or other.tier != slot.tier, f"{a!r} and {b!r} lie in the same place at the same time"


def _end(slot: Slot) -> int:
    return slot.offset + slot.nbytes
