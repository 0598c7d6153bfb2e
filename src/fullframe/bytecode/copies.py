"""Copies into another layout, outside of bytecode by the code of its instruction: the library turns axes slowly."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from fullframe.bytecode.libtorch import entries
from fullframe.codegen.loop_layout import merged
from fullframe.device import device_of

AXES = 8  # that a copy may have, as the source has it


def axes_of(
    shape: Sequence[int], to: Sequence[int], source: Sequence[int], wide: int, size: int
) -> list[tuple[int, ...]]:
    """The axes of a copy: extent and both strides in bytes, outermost first as they are written. Elements of ``wide``
    bytes are made of some of ``size`` bytes.

    Where neighbours that are written are none that are read, the axis of those that are comes before the last one, so
    that squares of both can be copied.
    """
    axes = [(n, a * wide, b * size) for n, a, b in zip(shape, to, source, strict=True) if n > 1]
    axes = merged(sorted(axes, key=lambda axis: -axis[1])) or [(1, wide, size)]
    turned = next((k for k, (_, _, step) in enumerate(axes[:-1]) if step == size), -1)
    if axes[-1][2] != size and turned >= 0:
        axes.insert(len(axes) - 2, axes.pop(turned))
    return axes


def laid_out(tensor: torch.Tensor, strides: tuple[int, ...] | None) -> torch.Tensor:
    """A tensor of no graph with these strides; a copy only where its elements lie in another order."""
    if strides is None or tensor.stride() == strides:
        return tensor
    pairs = zip(tensor.shape, tensor.stride(), strides, strict=True)
    if all(n == 1 or old == new for n, old, new in pairs):
        place = tensor.storage_offset(), tensor.shape, strides
        return tensor.new_empty(0).set_(tensor.untyped_storage(), *place)  # no view, as autograd understands it
    made = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return made if _copied(made, tensor) else made.copy_(tensor)


def _copied(to: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether the numbers could be copied so."""
    plain = device_of(x.device).on_host and not (x.is_conj() or x.is_neg()) and x.numel() > 0
    found = entries() if plain and type(x) is torch.Tensor else None
    if found is None:
        return False
    axes = axes_of(x.shape, to.stride(), x.stride(), to.itemsize, x.itemsize)
    if len(axes) > AXES:
        return False
    numbers = [x.itemsize, len(axes), *(n for column in zip(*axes, strict=True) for n in column)]
    words = (ctypes.c_int64 * len(numbers))(*numbers)
    found.copy(words, ctypes.c_void_p(to.data_ptr()), ctypes.c_void_p(x.data_ptr()))
    return True
