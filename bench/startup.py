"""How long it takes until a first step runs: capture, planning and the first steps, each in a process of its own.

    python bench/startup.py [--cases unet64 unet256 uresnet-half uresnet] [--rounds 3]

Of each case: seconds of recording a call and planning it, on one core, where the engine's own kernels have been
compiled before but no plan is kept; those of a further size of the image; and the first twelve steps of a step on all
cores, that of the first without recording and planning, with kernels compiled anew and then, in a second process,
with those and the plan that the first has left. UResNet at full size takes no steps, which would take minutes. In
each process there is an optimiser of torch.optim, which imports what a recording needs, as in every training. Medians
over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pairs import UNet
from record import setting, write
from torch import Tensor, nn

CASES = ("unet64", "unet256", "resnet18", "uresnet-half", "uresnet")
STEPS = 12


def case(name: str) -> tuple[nn.Module, nn.Module | Any, list[tuple[Tensor, Tensor]]]:
    """Network, loss, and an image with its target in two sizes."""
    torch.manual_seed(0)
    if name.startswith("uresnet"):
        import rivals

        halvings = (1, 2) if name.endswith("half") else (0, 1)
        net, loss, image, label = rivals.case("uresnet", halvings[0], 0)
        return net, loss, [(image, label), rivals.case("uresnet", halvings[1], 0)[2:]]
    if name == "resnet18":
        from small import resnet18

        sizes = [(torch.randn(8, 3, n, n), torch.arange(8)) for n in (224, 192)]
        return resnet18(), F.cross_entropy, sizes
    side = int(name.removeprefix("unet"))
    batch = 8 if side > 64 else 1
    sizes = [(torch.randn(batch, 3, n, n), torch.randint(0, 3, (batch, n, n))) for n in (side, side * 3 // 4)]
    return UNet(), F.cross_entropy, sizes


def plan_only(name: str) -> dict[str, float]:
    """Seconds of recording and of planning, of the first size and of a further one, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    import fullframe
    from fullframe.compiler import pipeline

    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    planning = [0.0]
    inner = pipeline.plan_for

    def timed(*args: Any) -> Any:
        started = time.perf_counter()
        try:
            return inner(*args)
        finally:
            planning[0] += time.perf_counter() - started

    pipeline.plan_for = timed
    net, loss, sizes = case(name)
    step = fullframe.tile(net, loss=loss, budget="8 GB", workers=2)
    found = {}
    for which, data in zip(("", " of a further size"), sizes, strict=True):
        planning[0], started = 0.0, time.perf_counter()
        step.plan(*data)
        found[f"both{which}"] = time.perf_counter() - started
        found[f"planning{which}"] = planning[0]
    return found


def first_steps(name: str) -> dict[str, Any]:
    """Seconds of recording and planning, and of the first steps."""
    import fullframe

    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    net, loss, (data, _) = case(name)
    step = fullframe.tile(net, loss=loss, budget="8 GB")
    started = time.perf_counter()
    step.plan(*data)
    planned = time.perf_counter() - started
    steps = []
    for _ in range(0 if name == "uresnet" else STEPS):
        net.zero_grad(set_to_none=True)
        started = time.perf_counter()
        step(*data).backward()
        steps.append(time.perf_counter() - started)
    return {"both": planned, "steps": steps}


def serve(what: str, name: str, cache: str) -> dict[str, Any]:
    """What a process of its own finds, with a folder for what it keeps between processes."""
    command = [sys.executable, __file__, "--serve", what, "--cases", name]
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, rounds: int) -> str:
    """A line of the table."""
    plans, anew, kept = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            anew.append(serve("steps", name, cache))
            kept.append(serve("steps", name, cache))
            for path in Path(cache).rglob("*.plan"):
                path.unlink()
            plans.append(serve("plan", name, cache))

    def middle(found: list[dict[str, Any]], *path: Any) -> float:
        return statistics.median(_reached(f, path) for f in found)

    both, more = middle(plans, "both"), middle(plans, "both of a further size")
    head = (
        f"| {name} | {both:.2f} s | {middle(plans, 'planning'):.2f} s | {more:.2f} s, {more / both:.2f} | "
        f"{middle(anew, 'both'):.2f} s, {middle(kept, 'both'):.2f} s |"
    )
    print(head, flush=True)
    if not kept[0]["steps"]:
        return f"{head} | | |"
    tenth = statistics.median(middle(kept, "steps", k) for k in (9, 10, 11))
    first, second, third = (middle(anew, "steps", k) / tenth for k in range(3))
    later = [middle(kept, "steps", k) / tenth for k in range(3)]
    return (
        f"{head} {tenth * 1e3:.0f} ms | {first:.1f}, {second:.1f}, {third:.1f} | "
        f"{', '.join(f'{n:.1f}' for n in later)} |"
    )


def _reached(found: Any, path: tuple[Any, ...]) -> float:
    for key in path:
        found = found[key]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", choices=("plan", "steps"))
    options = parser.parse_args()
    if options.serve:
        print(json.dumps((plan_only if options.serve == "plan" else first_steps)(options.cases[0])))
        return
    lines = [
        "# Until a first step runs", "", setting(), "",
        "| | recorded and planned, one core | of it planning | a further size, of the first | all "
        "cores; then in a second process | step 10 | steps 1 to 3, times step 10 | in a second process |",
        "|---|---|---|---|---|---|---|---|",
        *(row(name, options.rounds) for name in options.cases),
    ]  # fmt: skip
    write("startup", "\n".join(lines))


if __name__ == "__main__":
    main()
