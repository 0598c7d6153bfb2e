"""How the loop of a group lies in memory: extents, order of the axes, strides. No arithmetic on values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from fullframe.codegen.group import Group
from fullframe.device import device_of


@dataclass(frozen=True)
class Geometry:
    """The loop of one call.

    Attributes:
        extents: per loop axis of the group.
        shapes: per reduction, the shape of its partial.
        steps: and its strides.
        offsets: per reduction, where its partial starts among all partials; one more for their total size.
        words: what the compiled kernel reads: rank, extents, strides per tensor, and per reduction strides,
            plane and offset, for the axes in their order in memory, merged where they are one run.
    """

    extents: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    words: tuple[int, ...]


def loop(
    group: Group, operands: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> tuple[tuple[int, ...], list[list[int]]]:
    """Extent per loop axis, and per tensor its stride along each. Raises ValueError as `measure` does."""
    extents = _extents(group, operands, outputs)
    strides = [_strides(tensor, extents) for tensor in (*operands, *outputs)]
    for i, stride in enumerate(strides[len(operands) :]):
        if any(step == 0 and extent > 1 for step, extent in zip(stride, extents, strict=True)):
            raise ValueError(f"output {i} overlaps itself: strides {stride} for shape {extents}")
    return extents, strides


def device(tensors: Sequence[torch.Tensor]) -> torch.device:
    """Where the tensors of a call are; a zero-dimensional one may be on the CPU, as in PyTorch."""
    return next((t.device for t in tensors if t.dim()), tensors[-1].device if tensors else torch.device("cpu"))


def measure(group: Group, operands: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor],
            lies: Sequence[tuple[int, ...]] | None = None) -> Geometry:  # fmt: skip
    """The geometry of a call. Raises ValueError when the tensors are not those of the group, on one device.

    ``lies`` are the strides that decide in which order the axes are walked; None: the tensors' own.
    """
    extents, strides = loop(group, operands, outputs)
    deciding = strides if lies is None else [_aligned(s, own) for s, own in zip(lies, strides, strict=True)]
    shapes, offsets, kept, ends = [], [0], [], []
    for reduction in group.reductions:
        shape = [extent for axis, extent in enumerate(extents) if axis not in reduction.axes]
        kept.append(partial_strides(extents, reduction.axes))
        ends.append((prod(shape), offsets[-1]))
        shapes.append(tuple(shape) if reduction.kind == "sum" else (3, *shape))
        offsets.append(offsets[-1] + prod(shapes[-1]))
    axes = merged([(extents[a], *(s[a] for s in (*strides, *kept))) for a in in_memory(extents, deciding)])
    axes = _inner(axes, len(strides), len(strides) + len(kept))
    columns = list(zip(*axes, strict=True))
    words = [len(axes), *columns[0]]
    for column in columns[1 : 1 + len(strides)]:
        words += column
    for column, end in zip(columns[1 + len(strides) :], ends, strict=True):
        words += (*column, *end)
    steps = tuple(contiguous(shape) for shape in shapes)
    return Geometry(extents, tuple(shapes), steps, tuple(offsets), tuple(words))


def _extents(group: Group, operands: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Extent per loop axis, from all tensors, which must agree."""
    if len(operands) != len(group.operands) or len(outputs) != len(group.outputs):
        raise ValueError(
            f"{len(operands)} operands and {len(outputs)} outputs given, "
            f"{len(group.operands)} and {len(group.outputs)} expected"
        )
    wanted = [(f"operand {i}", o.dtype, o.broadcast) for i, o in enumerate(group.operands)]
    wanted += [(f"output {i}", group.dtype(r), (False,) * group.rank) for i, r in enumerate(group.outputs)]
    extents: list[int | None] = [None] * group.rank
    place = device((*operands, *outputs))
    for (name, dtype, broadcast), tensor in zip(wanted, (*operands, *outputs), strict=True):
        here = tensor.device == place or (
            tensor.dim() == 0 and device_of(tensor.device).on_host and name.startswith("operand")
        )
        if tensor.dtype != dtype or tensor.dim() != len(broadcast) or not here:
            raise ValueError(
                f"{name} is {tensor.dtype} of {tensor.dim()} axes on {tensor.device}; "
                f"the group has {dtype} of {len(broadcast)} axes on {place}"
            )
        for axis, repeated in enumerate(broadcast):
            extent = tensor.shape[axis]
            if repeated and extent == 1:
                continue
            if repeated or extents[axis] not in (None, extent):
                raise ValueError(f"{name}: axis {axis} of {tuple(tensor.shape)} is not that of the loop")
            extents[axis] = extent
    return tuple(1 if extent is None else extent for extent in extents)


def _strides(tensor: torch.Tensor, extents: tuple[int, ...]) -> list[int]:
    """Elements between neighbours along each loop axis; 0 where the tensor is repeated."""
    if tensor.dim() == 0:
        return [0] * len(extents)
    return [0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)]


def _aligned(strides: Sequence[int], own: Sequence[int]) -> list[int]:
    """Strides for the last axes of a loop, along those where there is a step."""
    found = [0] * (len(own) - len(strides)) + list(strides)
    return [new if old else 0 for new, old in zip(found, own, strict=True)]


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous array."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def partial_strides(extents: tuple[int, ...], reduced: tuple[int, ...]) -> list[int]:
    """Strides of a contiguous partial along the loop axes; 0 where it has none."""
    kept = [axis for axis in range(len(extents)) if axis not in reduced]
    steps = dict(zip(kept, contiguous([extents[axis] for axis in kept]), strict=True))
    return [steps.get(axis, 0) if extent > 1 else 0 for axis, extent in enumerate(extents)]


def in_memory(extents: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    """The axes along which there is a step, outermost in memory first."""
    order = sorted(range(len(extents)), key=lambda axis: -sum(stride[axis] for stride in strides))
    return [axis for axis in order if extents[axis] != 1]


def merged(axes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Neighbouring axes made one where every stride allows it.

    An axis is its extent and its strides, outermost first.
    """
    width = len(axes[0]) if axes else 0
    merged: list[tuple[int, ...]] = []
    for inner in axes:
        outer = merged[-1] if merged else None
        if outer and all(outer[i] == inner[i] * inner[0] for i in range(1, width)):
            merged[-1] = (outer[0] * inner[0], *inner[1:])
        else:
            merged.append(inner)
    return merged


_WIDEST = 2048  # elements of a pixel, beyond which they are better seen as pixels of one channel


def _inner(axes: list[tuple[int, ...]], tensors: int, columns: int) -> list[tuple[int, ...]]:
    """At least two axes, the last being channels. A long run that nobody needs channel by channel is pixels."""
    one = (1,) + (0,) * columns
    kept = bool(axes) and any(axes[-1][1 + tensors :])
    if len(axes) == 1 and not kept:
        return [*axes, one]
    if len(axes) < 2:
        return [one] * (2 - len(axes)) + axes
    repeated = any(axes[-2][1 + t] == 0 != axes[-1][1 + t] for t in range(tensors))
    return [*axes, one] if axes[-1][0] > _WIDEST and not kept and not repeated else axes
