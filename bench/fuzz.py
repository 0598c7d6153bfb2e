"""Random networks against plain PyTorch in float64: how many, which seeds, how long, and what came of them.

    python bench/fuzz.py --first 100000 --count 2000 --checkpoint out/fuzz.jsonl

A run that was stopped goes on where its checkpoint ends; ``--report`` only writes what the checkpoint holds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from record import setting, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzzing import Tally, read, search


def report(tally: Tally) -> str:
    """The outcome as Markdown."""
    head = "# Random networks against plain PyTorch in float64"
    return f"{head}\n\n{setting()}\n\n```\n{tally}\n```\n\n{tally.table()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=100_000)
    parser.add_argument("--count", type=int, default=2_000)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.report:
        tally = Tally(read(options.checkpoint))
    else:
        tally = search(options.first, options.count, checkpoint=options.checkpoint)
    write("fuzz", report(tally))


if __name__ == "__main__":
    main()
