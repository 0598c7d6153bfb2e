"""Random networks against plain PyTorch in float64: how many, which seeds, how long, and what came of them.

    python bench/fuzz.py --first 100000 --count 2000 --checkpoint out/fuzz.jsonl

A run that was stopped goes on where its checkpoint ends; ``--report`` only writes what checkpoints hold, as of
several runs side by side. ``--again`` first judges once more what was found wrong or refused, after it was mended.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from record import setting, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from fuzzing import Tally, again, read, search


def report(tally: Tally) -> str:
    """The outcome as Markdown."""
    head = f"# Random networks against plain PyTorch in float64\n\n{setting()}; checkpoints may be of earlier commits"
    return f"{head}\n\n```\n{tally}\n```\n\n{tally.table()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=100_000)
    parser.add_argument("--count", type=int, default=2_000)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument(
        "--compile-every", type=int, default=20, metavar="N", help="compile each Nth network's kernels"
    )
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--report", type=Path, nargs="+")
    options = parser.parse_args()
    for path in (options.report or [options.checkpoint]) if options.again else []:
        again(path)
    if options.report:
        tally = Tally([r for path in options.report for r in read(path)])
    else:
        tally = search(options.first, options.count, checkpoint=options.checkpoint,
                       compile_every=options.compile_every)  # fmt: skip
    write("fuzz", report(tally))


if __name__ == "__main__":
    main()
