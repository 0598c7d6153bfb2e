"""Random networks at their smallest budget: is it kept, and is not too much counted?

    python bench/budgets.py --first 0 --count 200 --checkpoint out/budgets.jsonl

Each network is drawn on an image of ordinary size and takes its steps in a process of its own (budgeting.py,
which says what measured is). A run that was stopped goes on where its checkpoint ends; ``--report`` only writes what
checkpoints hold, and ``--again`` first measures once more those that were not within the bounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import setting, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from budgeting import ABOVE, BELOW, BESIDE, LEFT, STEPS, Grown, run

Row = dict[str, Any]


def one(seed: int) -> Row:
    """A row of the table, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt"
        try:
            if run("draw", path, str(seed)) == "unusable":
                return {"seed": seed, "left out": "plain PyTorch cannot run it"}
            return {"seed": seed, **eval(run("take", path))}
        except subprocess.TimeoutExpired:
            return {"seed": seed, "left out": "it takes too long"}
        except RuntimeError as error:
            return {"seed": seed, "left out": str(error)}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(rows: list[Row]) -> str:
    """The outcome as Markdown."""
    found = [(r["seed"], Grown(**{k: v for k, v in r.items() if k != "seed"})) for r in rows if "left out" not in r]
    grown = [g for _, g in found]
    ratios = [g.projected / g.measured for g in grown]
    why: dict[str, int] = {}
    for r in rows:
        if "left out" in r:
            why[r["left out"]] = why.get(r["left out"], 0) + 1
    lines = [
        "# Random networks at their smallest budget",
        "",
        f"{setting()}; {STEPS} steps each, in a fresh process",
        "",
        f"{len(grown)} networks. Measured is at most {ABOVE:.2f} times projected + {BESIDE / 1e6:.0f} MB in "
        f"{sum(g.over <= 0 for g in grown)}, projected at most {BELOW} times measured + {LEFT / 1e6:.0f} MB in "
        f"{sum(g.idle <= 0 for g in grown)}. Projected over measured: median {statistics.median(ratios):.2f}, "
        f"from {min(ratios):.2f} to {max(ratios):.2f}.",
        "",
        *(f"Left out {n}: {reason}" for reason, n in why.items()),
        "",
        "| seed | ops | tiles | projected MB | of it fixed | measured MB | of it before the first step | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for seed, g in found:
        mark = "" if g.held else "too much" if g.over > 0 else "too little"
        lines.append(
            f"| {seed} | {g.ops} | {g.tiles} | {g.projected / 1e6:.0f} | {g.fixed / 1e6:.0f} | "
            f"{g.measured / 1e6:.0f} | {g.recorded / 1e6:.0f} | {mark} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--checkpoint", type=Path, default=Path("out/budgets.jsonl"))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    rows = read(options.checkpoint)
    if options.again:
        rows = [r if "left out" in r or Grown(**{k: v for k, v in r.items() if k != "seed"}).held else one(r["seed"])
                for r in rows]  # fmt: skip
        options.checkpoint.write_text("".join(json.dumps(r) + "\n" for r in rows))
    seed = max([options.first, *(r["seed"] + 1 for r in rows)])
    while not options.report and sum("left out" not in r for r in rows) < options.count:
        rows.append(one(seed))
        print(rows[-1], flush=True)
        with options.checkpoint.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        seed += 1
    write("budgets", report(rows))


if __name__ == "__main__":
    main()
