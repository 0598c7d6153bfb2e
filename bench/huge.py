"""One training step of a U-Net on pictures up to 51,200 x 51,200, which are never held whole.

    python bench/huge.py --sides 4096 8192 16384 32768 51200 --budget "16 GB" --disk "60 GB" --folder /scratch
    python bench/huge.py --exact        # the same decisions at 2,048 in float64, beside careful plain PyTorch
    python bench/huge.py --agree        # two budgets at 16,384 in float32, one of which makes nothing again

The network has 8, 16, 32, 64, 128 channels, two convolutions with batch norm a level each way, and a loss at full
resolution, in bfloat16. Picture and labels come from objects that make regions when asked for. Each step runs
in a process of its own: measured is the most that is resident, all of Python and torch with it. A row is kept as soon
as it is done, in bench/results/huge.jsonl; ``--only-table`` writes the table of those that are there.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bends import replaced
from exactness import careful_norm
from networks_large import UNet
from record import RESULTS, setting, write
from torch import Tensor, nn

import fullframe
from fullframe.schedule.plan import arithmetic

PERIOD = 1021  # pixels after which the texture comes again
ROWS = RESULTS / "huge.jsonl"


class Texture:
    """A picture or its labels as something that makes its regions: a texture of blobs, again and again."""

    thread_safe = True

    def __init__(self, shape: tuple[int, ...], texture: Tensor):
        self.shape, self.dtype, self._texture = shape, texture.dtype, texture

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        *lead, rows, columns = part
        found = self._texture[tuple(lead)]
        for axis, span in ((-2, rows), (-1, columns)):
            found = _again(found, axis, span)
        return found


def _again(tensor: Tensor, axis: int, span: slice) -> Tensor:
    """A part of a tensor that repeats itself along an axis."""
    start, count = span.start % PERIOD, span.stop - span.start
    if start + count <= tensor.shape[axis]:
        return tensor.narrow(axis, start, count)
    return tensor.index_select(axis, torch.arange(start, start + count) % PERIOD)


def pictures(side: int, dtype: torch.dtype) -> tuple[Texture, Texture]:
    """A picture with three channels and its labels, three classes of bright and dark blobs in noise."""
    torch.manual_seed(1)
    smooth = F.interpolate(torch.randn(1, 1, 64, 64), size=(PERIOD, PERIOD), mode="bicubic")[0, 0]
    labels = (smooth > 0.5).to(torch.uint8) + 2 * (smooth < -0.5).to(torch.uint8)
    picture = torch.randn(3, PERIOD, PERIOD) * 0.5 + torch.tensor([[1.0], [0.5], [-1.0]])[:, :, None] * smooth
    doubled = [t.repeat(*[1] * (t.dim() - 2), 2, 2) for t in (picture.to(dtype)[None], labels[None])]
    return Texture((1, 3, side, side), doubled[0]), Texture((1, side, side), doubled[1])


def pixelwise(output: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(output.float() if output.dtype != torch.float64 else output, label.long())


def most_resident() -> int:
    """The most bytes of this process that were in memory at once."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmHWM"].split()[0]) * 1024


def step(side: int, options: argparse.Namespace) -> dict[str, Any]:
    """One step in this process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(0)
    net = UNet(tuple(options.channels << k for k in range(5))).bfloat16()
    tiled = fullframe.tile(net, loss=pixelwise, budget=options.budget, disk=options.disk, folder=options.folder)
    picture, labels = pictures(side, torch.bfloat16)
    started = time.monotonic()
    plan = tiled.plan(picture, labels)
    planned = time.monotonic() - started
    print(plan, flush=True)
    loss = tiled(picture, labels)
    loss.backward()
    seconds = time.monotonic() - started - planned
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    return {
        "side": side, "channels": options.channels, "budget": options.budget, "disk": options.disk,
        "planning": planned, "seconds": seconds, "resident": most_resident(), "projected": plan.projected_bytes,
        "on disk": plan.bytes.disk, "read": plan.disk_traffic.read, "written": plan.disk_traffic.written,
        "arithmetic": arithmetic(plan) / max(1.0, plan.fastest), "loss": float(loss.detach()), "setting": setting(),
    }  # fmt: skip


class Smooth(UNet):
    """The network with functions that have no bend, so that no rounding becomes a decision."""

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for k, level in enumerate(self.down):
            x = self._level(level, F.avg_pool2d(x, 2) if k else x)
            skips.append(x)
        for k in reversed(range(len(self.up))):
            enlarged = F.interpolate(self.smaller[k](x), scale_factor=2, mode="nearest")
            x = self._level(self.up[k], torch.cat([skips[k], enlarged], 1))
        return self.head(x)

    @staticmethod
    def _level(level: Any, x: Tensor) -> Tensor:
        for conv, norm in zip(level.convs, level.norms, strict=True):
            x = F.silu(norm(conv(x)))
        return x


def apart(made: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(made, wanted, strict=True))


def results(net: nn.Module, loss: Tensor) -> list[Tensor]:
    loss.backward()
    buffers = [b for b in net.buffers() if b.is_floating_point()]
    return [loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None), *buffers]


def tiled_results(kind: type[UNet], side: int, dtype: torch.dtype, **limits: Any) -> tuple[list[Tensor], Any]:
    """Loss, gradients and buffers of a step within limits, and its plan."""
    torch.manual_seed(0)
    net = kind().to(dtype)
    tiled = fullframe.tile(net, loss=pixelwise, **limits)
    data = pictures(side, dtype)
    plan = tiled.plan(*data)
    return results(net, tiled(*data)), plan


def said(plan: fullframe.Plan) -> str:
    again = arithmetic(plan) / max(1.0, plan.fastest)
    return f"{plan.projected_bytes / 1e9:.2f} GB and {plan.bytes.disk / 1e9:.2f} GB on disk, arithmetic {again:.2f}"


def exact(options: argparse.Namespace) -> None:
    """At 2,048 in float64, stored maps within the share of the picture that 16 + 60 GB have at 51,200."""
    side, dtype = 2_048, torch.float64
    limits = {"budget": options.budget, "disk": options.disk, "folder": options.folder}
    made, plan = tiled_results(UNet, side, dtype, **limits)
    torch.manual_seed(0)
    net = UNet().to(dtype)
    whole = tuple(source[tuple(slice(0, n) for n in source.shape)] for source in pictures(side, dtype))
    with replaced(batch_norm=careful_norm):
        wanted = results(net, pixelwise(net(whole[0]), whole[1]))
    report("exact", [f"{side:,} float64, {said(plan)}: {apart(made, wanted):.2g} from careful plain PyTorch"])


def agree(options: argparse.Namespace) -> None:
    """In float32, a plan that makes nothing again and one that does."""
    side = options.sides[0] if options.sides else 8_192
    limits = {"budget": options.budget, "folder": options.folder}
    plenty, first = tiled_results(Smooth, side, torch.float32, disk=options.disk, **limits)
    little, second = tiled_results(Smooth, side, torch.float32, disk=options.less, **limits)
    report("agree", [f"{side:,} float32: {said(first)}; {said(second)}: {apart(little, plenty):.2g} apart"])


def report(name: str, lines: list[str]) -> None:
    write(
        f"huge-{name}",
        "\n".join([f"# One step at two budgets, or beside plain PyTorch: {name}", "", setting(), "", *lines]),
    )


def table() -> str:
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    lines = [
        "# One training step of a U-Net in bfloat16", "",
        "The loss is at full resolution; picture and labels come from a source by regions (`bench/huge.py`).", "",
        "| side | channels | budget | on disk | most resident | read and written there | arithmetic | planning | "
        "time | ns a pixel | Mpx/s | loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        pixels = r["side"] ** 2
        lines.append(
            f"| {r['side']:,} | {r['channels']} | {r['budget']} + {r['disk']} | {r['on disk'] / 1e9:.1f} GB "
            f"| {r['resident'] / 1e9:.2f} GB | {r['read'] / 1e9:.0f} + {r['written'] / 1e9:.0f} GB "
            f"| {r['arithmetic']:.2f} | {r['planning']:.0f} s | {r['seconds'] / 60:.1f} min "
            f"| {r['seconds'] / pixels * 1e9:.0f} | {pixels / r['seconds'] / 1e6:.2f} | {r['loss']:.5f} |"
        )
    return "\n".join([*lines, "", *(f"- {r['side']:,}: {r['setting']}" for r in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[])
    parser.add_argument("--budget", default="16 GB")
    parser.add_argument("--disk", default="60 GB")
    parser.add_argument("--folder", default=None)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--here", action="store_true", help="in this process")
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--agree", action="store_true")
    parser.add_argument("--less", default="0 GB", help="of disk, for the second of the two that are to agree")
    options = parser.parse_args()
    if options.exact or options.agree:
        (exact if options.exact else agree)(options)
        return
    if options.here:
        row = step(options.sides[0], options)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return
    for side in options.sides if not options.only_table else ():
        again = ["--budget", options.budget, "--disk", options.disk, "--channels", str(options.channels)]
        again += ["--folder", options.folder] if options.folder else []
        subprocess.run([sys.executable, __file__, "--here", "--sides", str(side), *again], check=True)
    write("huge", table())


if __name__ == "__main__":
    main()
