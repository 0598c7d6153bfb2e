"""How long a fused group takes: against the same calls one by one, and against a plain copy of its window.

    python bench/kernels.py [--rounds N]

Each line is one group over one window in channels_last order; the variants take turns on warm caches, and the
ratios are of lower quartiles of one run. One thread. A perfect kernel that computes little costs what a copy does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch

from fullframe.codegen import kernel
from fullframe.codegen.group import Group, Node, Operand, Reduction, Ref

WHOLE, CHANNEL = (False,) * 4, (True, False, True, True)


def forward(dtype: torch.dtype, kind: Literal["", "sum", "moments"]) -> Group:
    """Per-channel affine in float32, leaky ReLU, store; `kind` of statistics, or ''."""
    operands = (Operand(dtype, WHOLE), Operand(torch.float32, CHANNEL), Operand(torch.float32, CHANNEL))
    nodes = (
        Node("aten._to_copy.default", (Ref(0),), torch.float32, (("dtype", torch.float32),)),
        Node("aten.mul.Tensor", (Ref(3), Ref(1)), torch.float32),
        Node("aten.add.Tensor", (Ref(4), Ref(2)), torch.float32),
        Node("aten._to_copy.default", (Ref(5),), dtype, (("dtype", dtype),)),
        Node("aten.leaky_relu.default", (Ref(6), 0.01), dtype),
    )
    reductions = (Reduction(Ref(7), kind, (0, 2, 3)),) if kind else ()
    return Group(4, operands, nodes, (Ref(7),), reductions)


def backward(dtype: torch.dtype, _: str) -> Group:
    """Gradient of leaky ReLU and of the normalisation, with the two sums it needs per channel."""
    operands = (Operand(dtype, WHOLE), Operand(dtype, WHOLE), *[Operand(torch.float32, CHANNEL)] * 2)
    nodes = (
        Node("aten.leaky_relu_backward.default", (Ref(0), Ref(1), 0.01, False), dtype),
        Node("aten._to_copy.default", (Ref(1),), torch.float32, (("dtype", torch.float32),)),
        Node("aten.sub.Tensor", (Ref(5), Ref(2)), torch.float32),
        Node("aten._to_copy.default", (Ref(4),), torch.float32, (("dtype", torch.float32),)),
        Node("aten.mul.Tensor", (Ref(7), Ref(6)), torch.float32),
        Node("aten.mul.Tensor", (Ref(7), Ref(3)), torch.float32),
        Node("aten._to_copy.default", (Ref(9),), dtype, (("dtype", dtype),)),
    )
    sums = (Reduction(Ref(4), "sum", (0, 2, 3)), Reduction(Ref(8), "sum", (0, 2, 3)))
    return Group(4, operands, nodes, (Ref(10),), sums)


def silu(dtype: torch.dtype, _: str) -> Group:
    """x * sigmoid(x)."""
    return Group(4, (Operand(dtype, WHOLE),), (Node("aten.silu.default", (Ref(0),), dtype),), (Ref(1),))


def chain(group: Group, operands: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    """The same calls one by one, with PyTorch's own sums: what an eager step would do."""
    values = list(operands)
    for node in group.nodes:
        packet, overload = node.target.removeprefix("aten.").rsplit(".", 1)
        call = getattr(getattr(torch.ops.aten, packet), overload)
        args = [values[a.index] if isinstance(a, Ref) else a for a in node.args]
        values.append(call(*args, **dict(node.kwargs)))
    for reduction in group.reductions:
        value = values[reduction.value.index]
        _ = value.sum(reduction.axes) if reduction.kind == "sum" else torch.var_mean(value, reduction.axes)
    for ref, output in zip(group.outputs, outputs, strict=True):
        output.copy_(values[ref.index])


def quartiles(variants: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each, taken in turns; the lower quartile, since other work on the machine only adds.

    Each runs a few times unmeasured before it is measured, so that none finds the caches as another one left them.
    """
    times: list[list[float]] = [[] for _ in variants]
    for _ in range(rounds):
        for variant, seen in zip(variants, times, strict=True):
            for _ in range(3):
                variant()
            start = time.perf_counter()
            variant()
            seen.append(time.perf_counter() - start)
    return [statistics.quantiles(seen, n=4)[0] for seen in times]


def line(name: str, group: Group, shape: tuple[int, ...], rounds: int) -> str:
    """One group over one window."""
    made = kernel.build(group)
    operands = []
    for operand in group.operands:
        extents = [1 if repeated else n for repeated, n in zip(operand.broadcast, shape, strict=True)]
        operands.append(torch.randn(extents).to(operand.dtype).contiguous(memory_format=torch.channels_last))
    window = operands[0]
    outputs = [torch.empty_like(window) for _ in group.outputs]
    copy, fused, calls = quartiles(
        [
            lambda: outputs[0].copy_(window),
            lambda: made.run(operands, outputs),
            lambda: chain(group, operands, outputs),
        ],
        rounds,
    )
    size = window.numel() * window.element_size() / 1e6
    how = "" if made.compiled else "  (not compiled)"
    dtype = str(window.dtype).removeprefix("torch.")
    return (
        f"{name:24} {dtype:9} {shape[1]:4} ch {size:6.1f} MB  copy {copy * 1e6:7.0f} us  fused {fused * 1e6:7.0f} us"
        f"  fused/copy {fused / copy:5.2f}  ATen/fused {calls / fused:5.1f}{how}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    forms = [
        ("affine, leaky", forward, ""),
        ("affine, leaky, sum", forward, "sum"),
        ("affine, leaky, moments", forward, "moments"),
        ("backward, two sums", backward, ""),
        ("silu", silu, ""),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        kernel.build_many([form(dtype, kind) for _, form, kind in forms])
        for name, form, kind in forms:
            for shape in (
                (1, 16, 32, 2048),
                (1, 32, 32, 2048),
                (1, 3, 32, 2048),
                (1, 17, 32, 2048),
                (1, 96, 8, 1024),
            ):
                print(line(name, form(dtype, kind), shape, rounds), flush=True)


if __name__ == "__main__":
    main()
