"""PyTorch's own databases of operators and modules, tiled against plain PyTorch in float64.

    python bench/databases.py --checkpoint out/databases.jsonl

A run that was stopped goes on where its checkpoint ends; ``--again`` first tries once more what was found wrong,
refused or ended its process, after it was mended. ``--only`` tries entries whose name has this
text, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from record import setting, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from databases import Tally, entries, read, survey


def report(tally: Tally) -> str:
    """The outcome as Markdown."""
    head = "# PyTorch's databases of operators and modules against plain PyTorch in float64"
    return f"{head}\n\n{setting()}\n\n```\n{tally}\n```\n\n{tally.table()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only")
    options = parser.parse_args()
    if options.only:
        print(survey([n for n in entries() if options.only in n], processes=options.processes))
        return
    if options.again and options.checkpoint:
        kept = [r for r in read(options.checkpoint) if r.outcome in ("right", "ill-conditioned", "unusable")]
        options.checkpoint.write_text("".join(json.dumps(asdict(r)) + "\n" for r in kept))
    write("databases", report(survey(checkpoint=options.checkpoint, processes=options.processes)))


if __name__ == "__main__":
    main()
