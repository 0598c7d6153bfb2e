"""How the loop of a group is shared among the threads of a CUDA device. No arithmetic on values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from fullframe.codegen.cuda import COLUMN, ENTRIES, kept_axes, slots
from fullframe.codegen.group import Group
from fullframe.codegen.loop_layout import in_memory, merged, partial_strides

HEADER = 9
"""Words of a geometry before the tensors' strides within a column."""
COUNT_LIMIT, OFFSET_LIMIT = 2**30, 2**31  # of counting with 32 bits: steps are added to what is counted
_BLOCKS = 16  # blocks per multiprocessor that a launch aims at: two to four times what it runs at once
_CHUNKS = 4  # of a reduction, where each block's results are to be joined afterwards
_JOINED = 4  # elements that a block joins side by side: few, so that many of its threads share the chunks of each
_NEAR = 32  # threads that are neighbours in memory, where there is a choice
_MOST_BLOCKS = 1 << 15


@dataclass(frozen=True)
class Launch:
    """One way to run a call.

    Attributes:
        entry: the function of the source.
        grid: blocks in x (chunks of what is reduced) and y (of what is kept).
        joining: blocks that join the chunks; 0 where there is one chunk.
        wide: whether `words` have 64 bits, else 32.
        words: the geometry that the functions read.
        aligned: per tensor, the bits that must be 0 in its address.
        result: float64 numbers that the reductions give; all of them are written.
        work: those that are needed meanwhile.
    """

    entry: str
    grid: tuple[int, int]
    joining: int
    wide: bool
    words: tuple[int, ...]
    aligned: tuple[int, ...]
    result: int
    work: int


@dataclass(frozen=True)
class Device:
    """What a launch must know of the device: its multiprocessors, and the threads of a block."""

    processors: int
    threads: int


@dataclass(frozen=True)
class _Layout:
    """The axes of a call, outermost first: extent, stride per tensor, stride in the results."""

    kept: list[tuple[int, ...]]
    reduced: list[tuple[int, ...]]
    inner: bool  # whether the one innermost in memory is kept
    lane: tuple[int, ...]  # the strides within a column


def launches(group: Group, extents: Sequence[int], strides: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype],
             held: Sequence[bool], device: Device) -> list[Launch]:  # fmt: skip
    """The ways to run a call, the best first; the last one needs no alignment.

    Args:
        group: its reductions are over the same axes.
        extents: of the loop, none of them 0.
        strides: per tensor, along each loop axis; of operands, then outputs.
        dtypes: of the tensors.
        held: whether the number itself is given in place of a tensor's address.
        device: where it runs.
    """
    layout = _layout(group, extents, strides)
    made = []
    columns = _in_columns(layout)
    if columns is not None:
        bits = [min(16, COLUMN * dtype.itemsize) - 1 for dtype in dtypes]
        aligned = tuple(b if step else 0 for b, step in zip(bits, columns.lane, strict=False))
        lanes = COLUMN if layout.inner else 1
        entry = ENTRIES[2] if layout.inner and group.reductions else ENTRIES[1]
        made.append(_launch(group, columns, (entry, lanes), aligned, held, device))
    return [*made, _launch(group, layout, (ENTRIES[0], 1), (0,) * len(dtypes), held, device)]


def _layout(group: Group, extents: Sequence[int], strides: Sequence[Sequence[int]]) -> _Layout:
    """The axes kept and reduced, each merged where they are one run."""
    columns = [*strides]
    kept = kept_axes(group)
    reduced = [axis for axis in range(group.rank) if axis not in kept]
    columns.append(partial_strides(tuple(extents), tuple(reduced)) if group.reductions else [0] * group.rank)
    order = in_memory(extents, strides)
    rows = [(a in kept, (extents[a], *(c[a] for c in columns))) for a in order]
    parts = [merged([row for here, row in rows if here == which]) for which in (True, False)]
    inner = not order or order[-1] in kept
    last = parts[0 if inner else 1][-1:]
    return _Layout(parts[0], parts[1], inner, last[0][1:] if last else (0,) * len(columns))


def _in_columns(layout: _Layout) -> _Layout | None:
    """The same with columns for elements along the innermost axis; None where memory does not allow that."""
    axes = layout.kept if layout.inner else layout.reduced
    if not axes or axes[-1][0] % COLUMN or any(step not in (0, 1) for step in layout.lane[:-1]):
        return None
    others = [*layout.kept, *layout.reduced]
    others.remove(axes[-1])
    for t, step in enumerate(layout.lane[:-1]):
        if step and any(axis[1 + t] % COLUMN for axis in others):
            return None
    extent, *steps = axes[-1]
    column = [*axes[:-1], (extent // COLUMN, *(COLUMN * step for step in steps))]
    kept, reduced = (column, layout.reduced) if layout.inner else (layout.kept, column)
    return _Layout(kept, reduced, layout.inner, layout.lane)


def _launch(group: Group, layout: _Layout, how: tuple[str, int], aligned: tuple[int, ...], held: Sequence[bool],
            device: Device) -> Launch:  # fmt: skip
    """The launch of the function and elements kept per column of `how`."""
    entry, lanes = how
    kept, reduced = (prod(axis[0] for axis in axes) for axes in (layout.kept, layout.reduced))
    unroll = 4 if entry == ENTRIES[0] else 2
    across, chunks, joining, blocks = 0, 1, 0, (1, 1)
    if group.reductions:
        across = _across(kept, reduced, layout.inner, device.threads)
        rows, groups = device.threads >> across, _parts(kept, 1 << across)
        chunks = max(1, min(_parts(reduced, 2 * unroll * rows), _parts(_CHUNKS * device.processors, groups)))
        blocks = (chunks, min(groups, _MOST_BLOCKS))
        joining = min(_power(kept * lanes), _JOINED, device.threads).bit_length() - 1
    else:
        blocks = (min(_parts(kept, unroll * device.threads), 2 * _BLOCKS * device.processors), 1)
    counts = slots(group)
    elements = kept * lanes if group.reductions else 0
    lane = [1 if number else step for number, step in zip(held, layout.lane, strict=False)]
    words = [kept, reduced, len(layout.kept), len(layout.reduced), across, int(layout.inner), chunks, lanes, joining]
    assert len(words) == HEADER
    words += [*lane, layout.lane[-1] if layout.inner else 0]
    wide = _wide(layout, kept, reduced, elements * sum(counts))
    most = len(kept_axes(group))
    for axes, room in ((layout.kept, max(most, 1)), (layout.reduced, max(group.rank - most, 1))):
        for extent, *steps in axes[::-1]:
            words += [extent, *((0, 0) if wide else reciprocal(extent)), *steps]
        words += [0] * ((room - len(axes)) * (len(lane) + 4))
    return Launch(
        entry=entry,
        grid=blocks,
        joining=min(_parts(elements, 1 << joining), _MOST_BLOCKS) if chunks > 1 else 0,
        wide=wide,
        words=tuple(words),
        aligned=aligned,
        result=elements * sum(counts),
        work=chunks * elements * sum(counts) if chunks > 1 else 0,
    )


def words(group: Group) -> int:
    """How many words a geometry of the group has."""
    tensors, kept = len(group.operands) + len(group.outputs), len(kept_axes(group))
    return HEADER + tensors + 1 + (max(kept, 1) + max(group.rank - kept, 1)) * (tensors + 4)


def _wide(layout: _Layout, kept: int, reduced: int, result: int) -> bool:
    """Whether 32 bits are too few for what is counted, or for an offset."""
    axes = [*layout.kept, *layout.reduced]
    ends = [sum((axis[0] - 1) * axis[1 + t] for axis in axes) for t in range(len(layout.lane))]
    return max(kept, reduced) > COUNT_LIMIT or max(*ends, result) + COLUMN > OFFSET_LIMIT


def _across(kept: int, reduced: int, inner: bool, threads: int) -> int:
    """Log2 of the threads of a block with different k, for so many columns: as few as possible idle.

    Neighbours in memory must stay neighbours; otherwise, about `_NEAR` of them, or all for a long run.
    """
    run, other = (kept, reduced) if inner else (reduced, kept)
    wanted = threads if not inner and run >= 16 * threads else min(_NEAR, threads)
    best = max(
        (near for near in _powers(threads) if near >= min(8, _power(run), threads)),
        key=lambda near: (round(_busy(run, near) * _busy(other, threads // near), 2), -abs(near - wanted)),
    )
    return (best if inner else threads // best).bit_length() - 1


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _parts(n: int, size: int) -> int:
    return -(-n // size)


def _busy(n: int, threads: int) -> float:
    """The part of so many threads that have something to do for n columns."""
    return n / (_parts(n, threads) * threads)


def reciprocal(divisor: int) -> tuple[int, int]:
    """Numbers m, s with n // divisor = ((n * m >> 32) + n) >> s for 0 <= n < 2**31 (Granlund, Montgomery 1994)."""
    shift = (divisor - 1).bit_length()
    return ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1, shift
