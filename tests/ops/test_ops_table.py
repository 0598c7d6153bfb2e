"""docs/ops.md tells of the rules that there are."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_of_ops_is_up_to_date() -> None:
    sys.path.append(str(ROOT / "bench"))
    import ops

    written = [line for line in (ROOT / "docs" / "ops.md").read_text().splitlines() if line.startswith("| `")]
    found = [tuple(cell.strip(" `") for cell in line.strip("|").split("|")[:4]) for line in written]
    assert found == [(name, *row) for name, row in ops.rows().items()], "run python bench/ops.py"
