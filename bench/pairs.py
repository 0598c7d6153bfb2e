"""The step of another checkout against that of this one: interleaved pairs, and the interval of their median ratio.

    git worktree add ../before COMMIT
    python bench/pairs.py ../before --pairs 9

Two processes take the same steps in turns, one with the engine of the other checkout's ``src``, so that whatever else
the machine does meets both alike. The interval is that of the sign test: of so many pairs, the median of all lies
between the ranked ratios printed with at least 95 % confidence (Conover, Practical Nonparametric Statistics).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from math import comb
from pathlib import Path

import torch
import torch.nn.functional as F
from record import setting, write
from torch import Tensor, nn

HERE = Path(__file__).parents[1]
WARM = 5  # steps before the first pair: kernels are compiled, tiles recorded, the clock has risen


class UNet(nn.Module):
    """Two convolutions with batch norm a level each way, skips, four levels (Ronneberger et al., 2015)."""

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64, 128)):
        super().__init__()
        pairs = list(zip((3, *channels), channels, strict=False))
        self.down = nn.ModuleList(self.double(a, b) for a, b in pairs)
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs[1:])
        self.joined = nn.ModuleList(self.double(2 * a, a) for a, _ in pairs[1:])
        self.head = nn.Conv2d(channels[0], 3, 1)

    @staticmethod
    def double(cin: int, cout: int) -> nn.Sequential:
        first = nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()
        return nn.Sequential(*first, nn.Conv2d(cout, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for k, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if k else x)
            skips.append(x)
        for up, joined, skip in reversed(list(zip(self.up, self.joined, skips[:-1], strict=True))):
            x = joined(torch.cat([skip, up(F.interpolate(x, scale_factor=2.0))], 1))
        return self.head(x)


def case(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Network, loss, image and target, from a fixed seed."""
    torch.manual_seed(0)
    if name == "uresnet":
        import rivals

        net, loss, image, label = rivals.case("uresnet", 1, 1024)
        return net, loss, image, label
    return UNet(), nn.CrossEntropyLoss(), torch.randn(8, 3, 256, 256), torch.randint(0, 3, (8, 256, 256))


def serve(name: str) -> None:
    """Take a step for every line of standard input; answer with its seconds and its loss."""
    import time

    import fullframe

    net, loss, image, label = case(name)
    step = fullframe.tile(net, loss=loss, budget="8 GB")
    print(fullframe.__file__, flush=True)
    for _ in sys.stdin:
        net.zero_grad(set_to_none=True)
        start = time.perf_counter()
        value = step(image, label)
        value.backward()
        print(time.perf_counter() - start, value.item(), flush=True)


def start(name: str, source: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(source)}
    command = [sys.executable, __file__, str(source), "--serve", name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    found = process.stdout.readline().strip()
    if not found.startswith(str(source)):
        raise SystemExit(f"the step is that of {found or 'nothing'}, not of {source}")
    return process


def ask(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Seconds and loss of one step."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    seconds, loss = map(float, process.stdout.readline().split())
    return seconds, loss


def interval(ratios: list[float]) -> tuple[float, float]:
    """Ranked ratios between which the median lies with at least 95 % confidence; all where they are few."""
    n, ranked = len(ratios), sorted(ratios)
    below, k = 0.0, 0
    while (below := below + comb(n, k) / 2**n) <= 0.025:
        k += 1
    k = max(0, k - 1)
    return ranked[k], ranked[n - 1 - k]


def compared(name: str, before: Path, pairs: int) -> str:
    """A row of the table."""
    old, new = start(name, before), start(name, HERE / "src")
    for _ in range(WARM):
        losses = ask(old)[1], ask(new)[1]
    seconds = [(ask(old)[0], ask(new)[0]) for _ in range(pairs)]
    for process in (old, new):
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    ratios = [b / a for a, b in seconds]
    low, high = interval(ratios)
    middle = [statistics.median(s) for s in zip(*seconds, strict=True)]
    return (
        f"| {name} | {middle[0]:.3f} | {middle[1]:.3f} | {statistics.median(ratios):.3f} | {low:.3f} to {high:.3f} | "
        f"{losses[0]:.6g}, {losses[1]:.6g} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout, or its src")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--cases", default="uresnet,unet")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return
    before = (given.before / "src" if (given.before / "src").is_dir() else given.before).resolve()
    command = ["git", "log", "-1", "--format=%h %s"]
    commit = subprocess.run(command, cwd=before, capture_output=True, text=True, check=False).stdout.strip()
    rows = [compared(name, before, given.pairs) for name in given.cases.split(",")]
    head = (
        "# The step before and after\n\n" + f"before: {commit}; {given.pairs} interleaved pairs, after {WARM} steps"
    )
    notes = "uresnet: 3 x 640 x 1024, batch 1; unet: 16 to 128 channels, 3 x 256 x 256, batch 8; float32"
    table = [
        "| step | before, s | after, s | after / before | its interval | losses |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    write("pairs", "\n".join([f"{head}; {notes}", "", *table, "", f"bench/pairs.py, {setting()}"]))


if __name__ == "__main__":
    main()
