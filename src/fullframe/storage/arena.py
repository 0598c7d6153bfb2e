"""The store in a device's own memory: one block of bytes of which maps are views, used again from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from fullframe.device import device_of
from fullframe.ir import region as box
from fullframe.ir.graph import Graph, Value
from fullframe.ir.region import Region
from fullframe.storage.protocol import Slot


class Block:
    """What stores have in common whose ``block`` of memory is all of their bytes: a map is there as long as that."""

    spare = 0

    def __init__(self, nbytes: int, device: torch.device, place: torch.device):
        self.nbytes, self.device = nbytes, device
        self.block = device_of(place).block(nbytes, place)

    def open(self, slot: Slot) -> None:
        """As `Store.open`."""

    def expect(self, slot: Slot, region: Region) -> None:
        """As `Store.expect`."""

    def close(self, slot: Slot) -> None:
        """As `Store.close`."""

    def release(self) -> None:
        """As `Store.release`: with its last reference."""


class Arena(Block):
    """A `Store` whose maps are tensors, which ops read and kernels write in place."""

    def __init__(self, nbytes: int, device: torch.device):
        super().__init__(nbytes, device, device)

    def view(self, slot: Slot) -> torch.Tensor:
        """A map as a tensor, channels innermost for images and volumes."""
        return view(self.block, slot)

    def fetch(self, slot: Slot, region: Region) -> torch.Tensor:
        """As `Store.fetch`: a view."""
        return self.view(slot)[box.slices(region)]

    def put(self, slot: Slot, region: Region, window: torch.Tensor) -> None:
        """As `Store.put`."""
        self.view(slot)[box.slices(region)].copy_(window)


def view(block: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The map of a slot in a block of bytes."""
    stop = slot.offset + prod(slot.shape) * slot.itemsize
    return shaped(block[slot.offset : stop].view(slot.dtype), slot.shape)


def dense(tensor: torch.Tensor) -> bool:
    """Whether a map is one run of bytes in the layout of stored ones."""
    return (tensor.movedim(1, -1) if tensor.dim() in (4, 5) else tensor).is_contiguous()


def gapless(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one run of memory, in whatever order."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) == tensor.numel()


def packed(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements with these strides fill one run of memory, each place once."""
    expected = 1
    for step, n in sorted((step, n) for step, n in zip(strides, shape, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= n
    return True


def shaped(flat: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Flat elements as a map: channels innermost where there are two or more spatial axes."""
    if len(shape) not in (4, 5):
        return flat.view(list(shape))
    inner = [shape[0], *shape[2:], shape[1]]
    return flat.view(inner).movedim(-1, 1)


def empty_map(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised map in the layout of stored ones."""
    count = 1
    for n in shape:
        count *= n
    return shaped(torch.empty(count, dtype=dtype, device=device), shape)


def empty_output(graph: Graph, value: Value, device: torch.device,
                 shape: tuple[int, ...] | None = None) -> torch.Tensor:  # fmt: skip
    """An uninitialised map that is handed out, or a part of this ``shape``, in the layout that is expected of it."""
    strides = graph.strides.get(value)
    if shape is not None and shape != value.shape:
        strides = strides_as(shape, strides)
    else:
        shape = value.shape
    if strides is None:
        return torch.empty(shape, dtype=value.dtype, device=device)
    return torch.empty_strided(shape, strides, dtype=value.dtype, device=device)


def strides_as(shape: Sequence[int], strides: Sequence[int] | None) -> tuple[int, ...] | None:
    """Strides without gaps for a tensor of this shape whose axes lie in memory in the order of other strides."""
    if strides is None:
        return None
    found, step = [0] * len(shape), 1
    for axis in sorted(range(len(shape)), key=lambda a: (strides[a], -a)):
        found[axis] = step
        step *= max(1, shape[axis])
    return tuple(found)
