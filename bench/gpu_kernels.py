"""Fused kernels on a CUDA device: bytes per second, against ATen's calls and a plain copy."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from fullframe.codegen import kernel
from fullframe.codegen.group import Group, Node, Operand, Reduction, Ref
from fullframe.codegen.toolchain.cuda_kernel import DeviceKernel

WHOLE, CHANNEL = (False,) * 4, (True, False, True, True)


def forward(dtype: torch.dtype, kind: str) -> Group:
    """leaky_relu(x * scale + shift), and sums or moments of it per channel."""
    operands = tuple(Operand(dtype, broadcast) for broadcast in (WHOLE, CHANNEL, CHANNEL))
    nodes = (
        Node("aten.mul.Tensor", (Ref(0), Ref(1)), dtype),
        Node("aten.add.Tensor", (Ref(3), Ref(2)), dtype),
        Node("aten.leaky_relu.default", (Ref(4), 0.01), dtype),
    )
    reductions = (Reduction(Ref(5), kind, (0, 2, 3)),) if kind in ("sum", "moments") else ()
    return Group(4, operands, nodes, (Ref(5),), reductions)


def statistics_of(dtype: torch.dtype, kind: str) -> Group:
    """Moments alone: nothing is written."""
    return Group(4, (Operand(dtype, WHOLE),), (), (), (Reduction(Ref(0), "moments", (0, 2, 3)),))


def milliseconds(action: Callable[[], object], rounds: int) -> float:
    """The median time on the device."""
    times = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def overhead(made: DeviceKernel | kernel.Kernel | kernel.Plain, group: Group) -> float:
    """Microseconds of Python per call, on a small window."""
    operands, outputs = tensors(group, (1, 16, 8, 8), torch.contiguous_format)
    made.run(operands, outputs)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(500):
        made.run(operands, outputs)
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / 500 * 1e6


def tensors(group: Group, shape: tuple[int, ...], layout: torch.memory_format) -> tuple[list[torch.Tensor], ...]:
    """Operands and outputs of a group over a window."""
    operands = []
    for operand in group.operands:
        extents = [1 if repeated else n for repeated, n in zip(operand.broadcast, shape, strict=True)]
        operands.append(torch.randn(extents, device="cuda", dtype=operand.dtype).contiguous(memory_format=layout))
    return operands, [torch.empty_like(operands[0]) for _ in group.outputs]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    print(torch.cuda.get_device_name())
    forms = [
        ("affine, leaky", forward, ""),
        ("affine, leaky, sum", forward, "sum"),
        ("affine, leaky, moments", forward, "moments"),
        ("moments alone", statistics_of, ""),
    ]
    layouts = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
    for dtype in (torch.float32, torch.bfloat16):
        groups = [form(dtype, kind) for _, form, kind in forms]
        start = time.perf_counter()
        built = kernel.build_many(groups, device=torch.device("cuda", torch.cuda.current_device()))
        print(f"built in {time.perf_counter() - start:.1f} s")
        for (name, _, _), group, made in zip(forms, groups, built, strict=True):
            for where, layout in layouts.items():
                for shape in ((2, 64, 1280, 2048), (1, 16, 256, 256), (1, 3, 1280, 2048)):
                    operands, outputs = tensors(group, shape, layout)
                    window = operands[0]
                    other = torch.empty_like(window)
                    size = window.numel() * window.element_size()
                    moved = size * (1 + len(outputs))
                    copy, fused, calls = (
                        milliseconds(action, rounds)
                        for action in (
                            lambda other=other, window=window: other.copy_(window),
                            lambda made=made, o=operands, r=outputs: made.run(o, r),
                            lambda group=group, o=operands, r=outputs: kernel.Plain(group).run(o, r),
                        )
                    )
                    why = "" if made.compiled else f"  (not compiled: {made.reason})"
                    print(
                        f"{name:24} {str(dtype)[6:]:9} {where:14} {shape!s:20} {fused * 1e3:8.0f} us "
                        f"{moved / fused / 1e6:6.0f} GB/s  copy {2 * size / copy / 1e6:6.0f} GB/s  "
                        f"ATen/fused {calls / fused:5.1f}{why}",
                        flush=True,
                    )
            print(f"{name:24} {overhead(made, group):6.1f} us of Python per call", flush=True)


if __name__ == "__main__":
    main()
