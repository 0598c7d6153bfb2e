"""Inference on whole pictures and volumes: tiled within a budget, untiled, and in windows that overlap.

    python bench/inference.py [--only latent-2048 decoder-4096 volume-256 volume-512] [--rounds 3]

A latent decoder (group norm, SiLU, nearest enlargement, attention at the bottom), the decoder of eight residual
blocks of bench/plans.py, and a U-Net that finds faults in seismic volumes (batch norm in evaluation; Wu et al., 2019,
with half its channels). Each way runs in a process of its own. Memory is the growth of the resident set at its
highest beyond input and output; time is the median of the rounds after the first call. Windows cover the picture, a
quarter of each shared with the next, blended linearly; *apart* is the largest difference from the untiled output
relative to its largest number, and *seam* how much rougher an output's difference from the untiled one is along the
lines where windows begin than elsewhere. Where the untiled network does not fit, what it needs is not known and is
not guessed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks_large import Block, Decoder
from record import setting, write
from torch import Tensor, nn

import fullframe
from cosmictagger.memory import PeakMemory

SPARE = 2_000_000_000  # bytes that the system keeps; an untiled call that wants more than the others is ended
ENDED = "does not fit in this machine's memory"


class Attention(nn.Module):
    """Attention of every position to every other, with group norm, beside a short cut; by linear layers over
    positions, as latent decoders have it."""

    def __init__(self, width: int, groups: int = 8) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.three = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(positions)[:, None] for layer in self.three)
        found = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + found.transpose(1, 2).reshape(x.shape)


class LatentDecoder(nn.Module):
    """From a latent to a picture eight times as large: a block, attention, a block, then two blocks a resolution."""

    def __init__(self, widths: tuple[int, ...] = (64, 64, 32, 16), inputs: int = 4) -> None:
        super().__init__()
        first = widths[0]
        self.bottom = nn.Sequential(
            nn.Conv2d(inputs, first, 3, padding=1), Block(first, first), Attention(first), Block(first, first)
        )
        self.rest = Decoder(widths, first)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.bottom(x))


class Faults(nn.Module):
    """Four levels of two convolutions with batch norm, in three dimensions; the probability of a fault."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32, 64)) -> None:
        super().__init__()
        pairs = list(zip((1, *widths), widths, strict=False))
        self.down = nn.ModuleList(self.double(a, b) for a, b in pairs)
        self.up = nn.ModuleList(self.double(a + b, a) for a, b in pairs[1:])
        self.head = nn.Conv3d(widths[0], 1, 1)

    @staticmethod
    def double(cin: int, cout: int) -> nn.Sequential:
        first = nn.Conv3d(cin, cout, 3, padding=1), nn.BatchNorm3d(cout), nn.ReLU()
        return nn.Sequential(*first, nn.Conv3d(cout, cout, 3, padding=1), nn.BatchNorm3d(cout), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for k, block in enumerate(self.down):
            x = block(F.max_pool3d(x, 2) if k else x)
            skips.append(x)
        for block, skip in reversed(list(zip(self.up, skips[:-1], strict=True))):
            x = block(torch.cat([skip, F.interpolate(x, scale_factor=2.0, mode="nearest")], 1))
        return torch.sigmoid(self.head(x))


class Case:
    """A network with its input, the ways it is run in, and how windows are cut: pixels of the input, and how many of
    the output come of one."""

    def __init__(self, net: Callable[[], nn.Module], shape: tuple[int, ...], budgets: tuple[str, ...], window: int,
                 scale: int):  # fmt: skip
        self.net, self.shape, self.budgets, self.window, self.scale = net, shape, budgets, window, scale

    def made(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        net = self.net().eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
        return net, torch.randn(1, *self.shape)

    @property
    def ways(self) -> list[str]:
        return [*self.budgets, "untiled", "windows"]


CASES = {
    "latent-2048": Case(LatentDecoder, (4, 256, 256), ("400 MB", "2 GB"), 64, 8),
    "latent-4096": Case(LatentDecoder, (4, 512, 512), ("1.2 GB", "5 GB"), 64, 8),
    "decoder-4096": Case(Decoder, (4, 512, 512), ("1.4 GB", "5 GB"), 128, 8),
    "volume-256": Case(Faults, (1, 256, 256, 256), ("500 MB", "4 GB"), 96, 1),
    "volume-512": Case(Faults, (1, 512, 512, 512), ("4 GB", "16 GB"), 96, 1),
    "volume-768": Case(Faults, (1, 768, 768, 768), ("16 GB",), 96, 1),
}


def starts(extent: int, window: int) -> list[int]:
    """Where windows begin that share a quarter with the next."""
    stride = window * 3 // 4
    return sorted({min(k, extent - window) for k in range(0, extent - window + stride, stride)})


def windowed(net: nn.Module, image: Tensor, window: int, scale: int) -> Tensor:
    """The output put together from windows, blended linearly where they overlap."""
    axes = image.shape[2:]
    far = torch.arange(window * scale) + 0.5
    ramp = torch.minimum(far, far.flip(0)).clamp(max=window * scale / 4)
    weight = torch.ones(())
    for k in range(len(axes)):
        weight = weight * ramp.view(*[-1 if a == k else 1 for a in range(len(axes))])
    total = norm = torch.zeros(())
    for at in product(*(starts(n, window) for n in axes)):
        made = net(image[(..., *(slice(k, k + window) for k in at))])
        if not total.dim():
            whole = [n * scale for n in axes]
            total, norm = made.new_zeros(*made.shape[:2], *whole), made.new_zeros(1, 1, *whole)
        there = (..., *(slice(k * scale, (k + window) * scale) for k in at))
        total[there] += made * weight
        norm[there] += weight
    return total.div_(norm)


def serve(name: str, way: str, rounds: int, path: Path) -> None:
    """Run one way, leave its output, and print what it took."""
    case = CASES[name]
    net, image = case.made()
    again = 0.0
    if way == "windows":
        call: Callable[[], Tensor] = lambda: windowed(net, image, case.window, case.scale)  # noqa: E731
    elif way == "untiled":
        call = lambda: net(image)  # noqa: E731
    else:
        tiled: Any = fullframe.tile(net, budget=way)
        call = lambda: tiled(image)  # noqa: E731
    times = []
    with torch.no_grad():
        with PeakMemory(torch.device("cpu")) as peak:
            started = time.perf_counter()
            output = call()
            first = time.perf_counter() - started
        for _ in range(rounds):
            del output
            started = time.perf_counter()
            output = call()
            times.append(time.perf_counter() - started)
        if way not in ("windows", "untiled"):
            plan = tiled.plan(image)
            from fullframe.schedule.plan import arithmetic

            again = arithmetic(plan) / max(1.0, plan.fastest)
    torch.save(output, path)
    seconds = statistics.median(times) if times else first
    print(
        json.dumps({"first": first, "seconds": seconds, "bytes": (peak.added or 0) - output.nbytes, "again": again})
    )


def apart(made: Tensor, untiled: Tensor, lines: int) -> tuple[float, float]:
    """The largest difference, relative to the largest number; and how much rougher it is where windows begin."""
    error = (made - untiled).double()
    step = error.diff(dim=-1).abs().mean(dim=tuple(range(error.dim() - 1)))
    edges = torch.zeros(step.shape, dtype=torch.bool)
    edges[lines - 1 :: lines] = True
    rest = float(step[~edges].mean())
    return float(error.abs().max() / untiled.abs().max()), float(step[edges].mean()) / rest if rest else 1.0


def table(name: str, rounds: int) -> list[str]:
    """The lines of a case."""
    case, lines = CASES[name], []
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {}
        for way in case.ways:
            command = [sys.executable, __file__, "--serve", way, "--only", name, "--rounds", str(rounds)]
            done = subprocess.run([*command, "--folder", folder], capture_output=True, text=True, check=False)
            found[way] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
            print(name, way, found[way] or done.stderr[-300:], flush=True)
        reference = found["untiled"] and torch.load(Path(folder) / "untiled", mmap=True)
        for way in case.ways:
            row = found[way]
            if row is None:
                lines.append(f"| {name} | {way} | {ENDED} | | | | |")
                continue
            far = seam = "-"
            if reference is not None and way != "untiled":
                made = torch.load(Path(folder) / way, mmap=True)
                numbers = apart(made, reference, case.window * case.scale * 3 // 4)
                far, seam = f"{numbers[0]:.1e}", f"{numbers[1]:.2f}"
            ratio = f"{row['seconds'] / found['untiled']['seconds']:.2f}" if found["untiled"] else "-"
            again = f"{row['again']:.2f}" if row["again"] else "-"
            lines.append(
                f"| {name} | {way} | {row['seconds']:.1f} s | {ratio} | {row['bytes'] / 1e9:.2f} GB | {again} | "
                f"{far} | {seam} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=["latent-2048", "decoder-4096", "volume-256"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.serve:
        import resource

        free = int(next(s for s in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in s).split()[1])
        limit = free * 1024 - SPARE
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        serve(options.only[0], options.serve, options.rounds, options.folder / options.serve)
        return
    lines = [
        "# Inference on whole pictures and volumes", "", setting(), "",
        "| | way or budget | time | times untiled | memory beside input and output | arithmetic | apart | seam |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in options.only:
        lines += table(name, options.rounds)
    write("inference", "\n".join(lines))


if __name__ == "__main__":
    main()
