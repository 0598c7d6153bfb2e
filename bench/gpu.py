"""Training steps on an NVIDIA GPU: tiled and plain PyTorch in one run, exactness in float64, and maps on the host.

    python bench/gpu.py [--rounds N] [--size ROWS COLUMNS] [--skip speed exact host]

UResNet, batch 1, a simulated or real event, enlarged by repetition where --size asks for more than 1280 x 2048.
Plain PyTorch runs as it comes and in channels_last; float32 convolutions may use TF32 in every variant, as torch
has it by default. Times are medians of the later steps between device events; memory is what torch's allocator
handed out at its highest, beyond what was there before the step; first and second are whole wall-clock steps
(recording, planning and compiling; recording as a CUDA graph).
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from record import setting, write
from uresnet import event, network

import fullframe

GB = 1e9
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def enlarged(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An event of this size: averaged down, or repeated."""
    halvings = next((n for n in (2, 1) if rows <= 1280 >> n and columns <= 2048 >> n), 0)
    image, label, _ = event(halvings)
    times = -(-rows // image.shape[2]), -(-columns // image.shape[3])
    image, label = image.repeat(1, 1, *times), label.repeat(1, 1, *times)
    return image[..., :rows, :columns].cuda(), label[..., :rows, :columns].cuda()


def steps(net: Any, run: Step, image: torch.Tensor, label: torch.Tensor, half: bool, rounds: int) -> list[float]:
    """Seconds of each step, optimiser left out."""
    found = []
    for _ in range(rounds):
        for p in net.parameters():
            p.grad = None
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            loss = run(image, label)
        loss.backward()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found


def measured(variant: str, size: tuple[int, int], half: bool, rounds: int, budget: Any = None) -> str:
    """One row: name, later step, first and second step, memory beyond, loss, plan."""
    gc.collect()
    torch.cuda.empty_cache()
    net, criterion = network()
    net, criterion = net.cuda(), criterion.cuda()
    image, label = enlarged(*size)
    if variant == "channels_last":
        net, image = net.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    step = fullframe.tile(net, loss=criterion, budget=budget)
    plain: Step = lambda x, y: criterion(net(x), y)  # noqa: E731
    run: Step = step if variant == "tiled" else plain
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    name = f"{variant}, {'bfloat16' if half else 'float32'}, 3 x {size[0]} x {size[1]}"
    name += f", budget {budget}" if budget else ""
    try:
        found = steps(net, run, image, label, half, rounds + 2)
    except (torch.OutOfMemoryError, fullframe.FullframeError) as error:
        return f"| {name} | {type(error).__name__}: {str(error)[:150]} | | | | |"
    peak = torch.cuda.max_memory_allocated() - before
    planned = ""
    if variant == "tiled":
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            b = step.plan(image, label).bytes
        planned = f"projected {b.total / GB:.2f} GB, of it maps {b.arena / GB:.2f}; on the host {b.host / GB:.2f}"
    middle = statistics.median(found[2:])
    row = f"| {name} | {1e3 * middle:.1f} ms | {found[0]:.1f} s, {found[1]:.2f} s | {peak / GB:.2f} GB | {planned} |"
    print(row, flush=True)
    return row


def profiled(variant: str, size: tuple[int, int], half: bool) -> str:
    """Where a later step's time goes: milliseconds and calls by kernel."""
    net, criterion = network()
    net, criterion = net.cuda(), criterion.cuda()
    image, label = enlarged(*size)
    if variant == "channels_last":
        net, image = net.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
    plain: Step = lambda x, y: criterion(net(x), y)  # noqa: E731
    run: Step = fullframe.tile(net, loss=criterion) if variant == "tiled" else plain
    steps(net, run, image, label, half, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps(net, run, image, label, half, 1)
    found = sorted(profile.key_averages(), key=lambda e: -e.device_time_total)
    total = sum(e.device_time_total for e in found)
    lines = [f"{variant}, {size}, {'bfloat16' if half else 'float32'}: {total / 1e3:.1f} ms in {len(found)} kernels"]
    lines += [f"{e.device_time_total / 1e3:8.2f} ms {e.count:6d} x {e.key[:150]}" for e in found[:25]]
    return "\n".join(lines)


def exact(size: tuple[int, int]) -> str:
    """Largest differences of loss, gradients and buffers in float64, over three steps, as initialised."""
    net, criterion = network()
    net, criterion = net.double().cuda(), criterion.double().cuda()
    image, label = enlarged(*size)
    image = image.double()
    lines = []
    for name, options in (("whole maps", {}), ("tiles of 40 x 56", {"tile": (40, 56)}), ("maps on the host", {})):
        ours, plain = copy.deepcopy(net), copy.deepcopy(net)
        budget: Any = None
        if name == "maps on the host":
            budget = least(ours, criterion, image, label)
        step = fullframe.tile(ours, loss=criterion, budget=budget, **options)
        worst = [0.0, 0.0, 0.0]
        for _ in range(3):
            a, b = step(image, label), criterion(plain(image), label)
            a.backward()
            b.backward()
            grads = [(p.grad, q.grad) for p, q in zip(ours.parameters(), plain.parameters(), strict=True)]
            scale = max(float(q.abs().max()) for _, q in grads)
            worst[0] = max(worst[0], abs(float(a - b)) / abs(float(b)))
            worst[1] = max(worst[1], max(float((p - q).abs().max()) for p, q in grads) / scale)
            pairs = [(x, y) for x, y in zip(ours.buffers(), plain.buffers(), strict=True) if x.is_floating_point()]
            worst[2] = max([worst[2], *(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)])
            with torch.no_grad():  # the same weights again, so that errors do not add up
                for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
                    q -= 1e-3 * q.grad
                    p.copy_(q)
                    p.grad = q.grad = None
        away = f" ({step.plan(image, label).bytes.host / GB:.2f} GB there)" if budget else ""
        loss, grad, buffer = worst
        lines.append(f"| {name}{away} | {loss:.1e} | {grad:.1e} | {buffer:.1e} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def least(net: Any, criterion: Any, image: torch.Tensor, label: torch.Tensor) -> int:
    """The smallest budget that would do, with maps on the host."""
    try:
        fullframe.tile(net, loss=criterion, budget=1).plan(image, label)
    except fullframe.BudgetError as error:
        return error.smallest
    raise AssertionError("a step fits into one byte")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", type=int, nargs=2, default=(640, 1024))
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 2048))
    parser.add_argument("--large", type=int, nargs=2, default=(5120, 8192))
    parser.add_argument("--profile", action="store_true", help="print where the time goes, and nothing else")
    parser.add_argument("--skip", nargs="*", default=[], choices=("speed", "exact", "host"))
    given = parser.parse_args()
    if given.profile:
        for half in (False, True):
            print("\n".join(profiled(v, tuple(given.size), half) for v in ("tiled", "channels_last")), flush=True)
        return
    text = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cudnn {torch.backends.cudnn.version()}"]
    head = "| variant | step | first, second step | memory added | plan |\n|---|---|---|---|---|"
    if "exact" not in given.skip:
        text += ["", "float64, UResNet as initialised, 3 x 192 x 256, against plain PyTorch on the same device:", ""]
        text += ["| maps | loss | gradients | statistics |\n|---|---|---|---|", exact((192, 256))]
    if "speed" not in given.skip:
        text += ["", head]
        for size in (given.small, given.size):
            for half in (False, True):
                text += [measured(v, tuple(size), half, given.rounds) for v in ("eager", "channels_last", "tiled")]
    if "host" not in given.skip:
        text += ["", head]
        text += [measured("tiled", tuple(given.size), True, 2, b) for b in ("4 GB", "2 GB")]
        text += [measured(v, tuple(given.large), True, 1) for v in ("tiled", "eager")]
    write("gpu", "\n".join(text) + f"\n\nbench/gpu.py, {setting()}")


if __name__ == "__main__":
    main()
