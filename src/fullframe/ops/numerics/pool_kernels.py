"""Kernels for pooling by small windows: one pass over the pixels, with a strided view of the map for each tap."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import torch

from fullframe.bytecode.recorder import run
from fullframe.codegen import kernel
from fullframe.codegen.group import Argument, Group, Node, Operand, Ref
from fullframe.codegen.toolchain.cuda_kernel import DeviceKernel
from fullframe.ops.numerics.convolve import Axis

MOST = 9  # taps of a window; of larger ones the library keeps more in registers


def taps(x: torch.Tensor, axes: Sequence[Axis], extents: Sequence[int]) -> list[torch.Tensor]:
    """For each tap of the windows what it reads for ``extents`` outputs, row by row: views of the last axes."""
    found = []
    for tap in product(*(range(a.kernel) for a in axes)):
        starts = [k * a.dilation for k, a in zip(tap, axes, strict=True)]
        ends = [s + (n - 1) * a.stride + 1 for s, n, a in zip(starts, extents, axes, strict=True)]
        found.append(x[(..., *(slice(s, e, a.stride) for s, e, a in zip(starts, ends, axes, strict=True)))])
    return found


def maximum(parts: Sequence[torch.Tensor], choice: torch.dtype | None) -> torch.Tensor:
    """The largest of some maps, or (``choice``) which of them, the first among equals, as the library has it."""
    x = parts[0]
    packed = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    made = torch.empty(x.shape, dtype=choice or x.dtype, device=x.device, memory_format=packed)
    run(_maximum(len(parts), x.dtype, x.dim(), choice), parts, [made])
    return made


def chosen(g: torch.Tensor, choice: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Write into each map the numbers of ``g`` that chose it, and zeros."""
    run(_chosen(len(parts), g.dtype, choice.dtype, g.dim()), [g, choice], parts)


@cache
def _maximum(count: int, dtype: torch.dtype, rank: int, choice: torch.dtype | None) -> kernel.Kernel | kernel.Plain:
    operands = (Operand(dtype, (False,) * rank),) * count
    nodes: list[Node] = []

    def add(target: str, args: tuple[Argument, ...], dtype: torch.dtype, *rest: tuple[str, Argument]) -> Ref:
        nodes.append(Node(f"aten.{target}", args, dtype, rest))
        return Ref(count + len(nodes) - 1)

    most = Ref(0)
    which = add("zeros_like.default", (most,), choice, ("dtype", choice)) if choice else most
    for k in range(1, count):
        more = add("gt.Tensor", (Ref(k), most), torch.bool)
        more = add("logical_or.default", (more, add("isnan.default", (Ref(k),), torch.bool)), torch.bool)
        most = add("where.self", (more, Ref(k), most), dtype)
        if choice:
            which = add("where.ScalarSelf", (more, k, which), choice)
    return _built(Group(rank, operands, tuple(nodes), (which if choice else most,)))


@cache
def _chosen(count: int, dtype: torch.dtype, choice: torch.dtype, rank: int) -> kernel.Kernel | kernel.Plain:
    operands = (Operand(dtype, (False,) * rank), Operand(choice, (False,) * rank))
    nodes: list[Node] = []
    outputs = []
    for k in range(count):
        nodes.append(Node("aten.ne.Scalar", (Ref(1), k), torch.bool))
        nodes.append(Node("aten.masked_fill.Scalar", (Ref(0), Ref(1 + len(nodes)), 0), dtype))
        nodes.append(Node("aten.add.Scalar", (Ref(1 + len(nodes)), 0), dtype))  # no zero but the positive one
        outputs.append(Ref(1 + len(nodes)))
    return _built(Group(rank, operands, tuple(nodes), tuple(outputs)))


def _built(group: Group) -> kernel.Kernel | kernel.Plain:
    made = kernel.build(group)
    assert not isinstance(made, DeviceKernel)
    return made
