"""Writes docs/ops.md: every op with a rule, its proofs, and every network of the zoo with its errors."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, setting

from fullframe.ops.builder.builder import RULES
from fullframe.ops.builder.registry import DECOMPOSITIONS

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests" / room) for room in ("support", "ops")]

HEAD = """# Ops, rules and proofs

Written by `python bench/ops.py`; {setting}.

Each op of a recorded step has one rule, which says what a region of its output reads and runs it on windows.
*enough* and *tight*: NaN outside the footprint never reaches the output, each face inside it does for some numbers;
for pointwise ops each element read stands beside one that is made (`tests/support/footprints.py`, where `loose` names
what may read more, and why). *adds up*: partial results over uneven disjoint covers of the driver give the whole
(the same file). *bitwise*: small whole numbers, no bit of difference (`test_lattice.py`). *network*: a small
network with the op, tiled, against float64 plain PyTorch, loss, every gradient and buffer (`test_rules.py`).
A rule, a class of rules or a decomposition without its case fails the suite (`test_every_rule_has_a_case`,
`test_every_decomposition_has_a_case`).
"""


def rows() -> dict[str, tuple[str, str, str]]:
    """For each op: its family, the rule's class, its proofs."""
    from test_lattice import EXACT

    from fullframe.ops.primitives.elementwise import Pointwise

    found = {}
    for name, rule in sorted(RULES.items(), key=lambda item: (item[1].kind, item[0])):
        proofs = ["adds up"] if rule.kind == "reduce" else ["enough", "tight"]
        proofs += ["bitwise"] if name in EXACT else []
        proofs += [] if type(rule) is Pointwise else ["network"]
        found[name] = (rule.kind, type(rule).__name__, ", ".join(proofs))
    return found


def table(counts: Counter[str]) -> str:
    """The ops by name; ``counts``: distinct ops of that name (shapes, geometry) among the networks."""
    lines = ["| op | family | rule | proofs | cases |", "|---|---|---|---|---|"]
    lines += [f"| `{n}` | {k} | {r} | {p} | {counts[n] or 'schema'} |" for n, (k, r, p) in rows().items()]
    return "\n".join(lines)


def counted() -> tuple[Counter[str], Counter[str], int]:
    """Distinct ops by name, networks by class of rule, and the number of networks."""
    from footprints import signature
    from rule_cases import graph_of
    from usage_cases import CASES

    seen: set[str] = set()
    ops, classes = Counter(), Counter()
    for name in CASES:
        graph = graph_of(name)
        classes.update({type(op.rule).__name__ for op in graph.ops})
        for op in graph.ops:
            if signature(op) not in seen:
                seen.add(signature(op))
                ops[op.target] += 1
    return ops, classes, len(CASES)


def zoo(results: dict[str, Any]) -> str:
    """The networks of the zoo: errors against float64, ours and plain PyTorch's own."""
    lines = [
        "| network | input | tiles | float64: worst | float32: ours, plain | bfloat16: ours, plain | run whole |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, it in sorted(results.items()):
        double = it.get("float64", {})
        whole = ", ".join(sorted({w.split(" ")[0] for w in double.get("whole", [])})) or "nothing"
        errors = [", ".join(_number(it.get(kind, {}).get(side)) for side in ("ours", "plain")) for kind in KINDS]
        cells = [name, it.get("input"), it.get("tiles"), _number(double.get("worst")), *errors, whole]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


KINDS = ("float32", "bfloat16")


def _number(x: Any) -> str:
    return f"{x:.1e}" if isinstance(x, (int, float)) else "-"


def main() -> None:
    torch.set_num_threads(1)
    ops, classes, networks = counted()
    parts = [HEAD.format(setting=setting()), table(ops)]
    rest = ", ".join(f"{name} ({classes[name]})" for name in ("Pointwise", "Table", "Along", "Stacked"))
    parts.append(
        f"{networks} small networks. Besides the ops above there are functions of our own and whatever ATen tags "
        f"as pointwise, under the rules {rest}: in brackets, networks that have one. {len(DECOMPOSITIONS)} "
        "recorded calls have a decomposition into these ops; any other runs whole, and the plan says so, or is "
        "refused where it does not fit."
    )
    file = RESULTS / "zoo.json"
    if file.exists():
        parts += ["## Zoo", zoo(json.loads(file.read_text()))]
    text = "\n\n".join(p.strip() for p in parts) + "\n"
    (ROOT / "docs" / "ops.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
