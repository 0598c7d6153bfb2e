"""Every network of the zoo against plain PyTorch, and the seconds that capture and planning take.

    python bench/zoo.py [names] [--again] [--share K N] [--parts float64 float32 bfloat16 planning]

For each network of support/zoo: in float64 three tile sizes in training and in evaluation mode (the step with its
loss tiled in training mode, the module alone in evaluation, its running statistics those of the image), loss,
outputs, every gradient and every buffer; where they are further apart than 1e-9 of scale, also how far plain PyTorch
moves with one rounding of every weight. In float32 and bfloat16 autocast the relative L2 error of all gradients
against plain PyTorch in float64; and capture plus planning of the published network at its usual size, in processor
seconds of one thread.

An error of a few roundings that a network has multiplied is a random number, and a ratio of two of them is what
chance makes it: a number at the bend of a ReLU that falls on the other side is worth a thousand times the usual
error, and a norm over two values can multiply as much. So weights and image are drawn three times, nine times where
one draw is beyond the bound, and 36 times where the median of the nine is. A row has the median of our error over
plain PyTorch's and the worst single draw, and as a control the same of plain PyTorch in another arrangement
(channels last) over plain PyTorch.

Each finished part of a row is kept in bench/results/zoo.json, from which a later run goes on; bench/results/zoo.md
is the table.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import json
import os
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, setting

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from zoo import ENTRIES, Entry, build, image_of
from zoo.compare import TIMES, PlainError, case_of, draws, gaps, middle, one_rounding, plain, tiled
from zoo.losses import LOSSES, Reported, target_of

import fullframe

KEPT = RESULTS / "zoo.json"
BOUND = 1e-9  # of scale, in float64
BUDGET = 16_000_000_000  # bytes, of the plans at the usual size; the least that would do where that is too small
Row = dict[str, Any]


def double(entry: Entry) -> Row:
    """Worst difference in float64 over three tiles and both modes, with what, and the floor where it is large."""
    worst: list[tuple[float, str]] = []
    cases: dict[str, Any] = {}
    whole: Counter[str] = Counter()
    for mode in entry.modes:
        case = case_of(entry, mode == "training").to(torch.float64)
        truth = plain(case)
        cases[mode] = case, truth
        for tile in entry.tiles:
            found, plan = tiled(case, tile, module=mode == "evaluation")
            gap, where = max(gaps(found, truth))
            worst.append((gap, f"{where} ({mode}, tile {tile})"))
            whole.update({name.split(" (")[0]: 1 for name in plan.whole})
    gap, where = max(worst)
    floor: Row = {}
    if gap > BOUND:
        case, truth = next(kept for mode, kept in cases.items() if f"({mode}, " in where)
        floor = dict(zip(("floor", "floor where"), max(gaps(plain(one_rounding(case)), truth)), strict=True))
    return {"worst": gap, "where": where, **floor, "whole": sorted(whole), "all": worst}


def single(entry: Entry, half: bool) -> Row:
    """Relative L2 errors of all gradients against float64, ours and plain PyTorch's, over some draws."""
    found = draws(entry, half)
    ratios, controls = [d.ratio for d in found], [d.control for d in found]
    return {
        "plain": middle([d.plain for d in found]), "ours": middle([d.ours for d in found]), "ratio": middle(ratios),
        "largest": max(ratios), "control": middle(controls), "control largest": max(controls),
        "draws": [[d.ours, d.plain, d.other] for d in found],
    }  # fmt: skip


def planning(entry: Entry) -> Row:
    """Capture and planning of the published network at its usual size, then the plan asked for again."""
    net, image, loss = build(entry, full=True), image_of(entry.usual_shape), LOSSES[entry.loss]
    output = _shapes(copy.deepcopy(net), entry.usual_shape)
    target = target_of(loss, output, image.dim())
    target = [t.float() for t in target] if isinstance(target, list) else target
    target = target.float() if isinstance(target, torch.Tensor) and target.is_floating_point() else target
    step, plan, first = _planned(net, Reported(loss.make()), image, target)
    start = time.process_time()
    step.plan(image, target)
    again = time.process_time() - start
    whole = Counter(name.split(" (")[0] for name in plan.whole)
    return {
        "shape": list(entry.usual_shape), "seconds": first, "again": again, "ops": len(plan.graph.ops),
        "projected": plan.projected_bytes, "whole": dict(whole),
        "parameters": sum(p.numel() for p in net.parameters()),
    }  # fmt: skip


def _planned(
    net: torch.nn.Module, criterion: torch.nn.Module, image: torch.Tensor, target: Any
) -> tuple[Any, fullframe.Plan, float]:
    """The step, its plan, and the seconds that took."""
    budget = BUDGET
    while True:
        step = fullframe.tile(net, loss=criterion, budget=budget, workers=2)
        start = time.process_time()
        try:
            return step, step.plan(image, target), time.process_time() - start
        except fullframe.BudgetError as error:
            if budget != BUDGET:
                raise
            budget = error.smallest


def _shapes(net: torch.nn.Module, shape: tuple[int, ...]) -> Any:
    """The output at an image's shape, as tensors of zeros, made without running it; ``net`` is spoilt."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import _pytree as pytree

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        state = {k: mode.from_tensor(t) for k, t in (*net.named_parameters(), *net.named_buffers())}
        made = torch.func.functional_call(net, state, (torch.empty(shape),))
    return pytree.tree_map(lambda t: torch.zeros(t.shape) if isinstance(t, torch.Tensor) else t, made)


PARTS: dict[str, Callable[[Entry], Row]] = {
    "float64": double,
    "float32": lambda entry: single(entry, False),
    "bfloat16": lambda entry: single(entry, True),
    "planning": planning,
}


def measured(entry: Entry, part: str) -> Row:
    """A part of a row; what went wrong in place of it, where something did."""
    started = time.process_time()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            made = PARTS[part](entry)
    except fullframe.FullframeError as error:
        made = {"refused": f"{type(error).__name__}: {error}"}
    except PlainError as error:
        made = {"plain fails": str(error)[:2000]}
    except Exception as error:
        made = {"error": f"{type(error).__name__}: {error}"[:2000]}
    gc.collect()
    return made | {"took": round(time.process_time() - started, 1)}


def key(entry: Entry) -> str:
    return f"{entry.family}/{entry.name}"


def load() -> dict[str, Row]:
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def save(rows: dict[str, Row]) -> None:
    order = [key(e) for e in ENTRIES]
    kept = {k: rows[k] for k in order if k in rows}
    RESULTS.mkdir(exist_ok=True)
    new = KEPT.with_suffix(".new")
    new.write_text(json.dumps(kept, indent=1) + "\n")
    os.replace(new, KEPT)


# The table ---------------------------------------------------------------------------------------


def _bad(part: Row | None) -> str:
    if part is None:
        return "not run"
    said = {"refused": "refused", "error": "failed", "plain fails": "plain PyTorch fails"}
    return next((words for k, words in said.items() if k in part), "")


def _errors(row: Row, part: str) -> str:
    found = row.get(part)
    if found is None or _bad(found):
        return _bad(found)
    return (
        f"**{found['ratio']:.2f}** ({found['ours']:.1e}, plain {found['plain']:.1e}), "
        f"worst {found['largest']:.2f} of {len(found['draws'])}; "
        f"control {found['control']:.2f}, worst {found['control largest']:.2f}"
    )


def _exact(found: Row | None) -> str:
    if found is None or _bad(found):
        return _bad(found)
    floor = f"; plain moves by {found['floor']:.1e}, {found['floor where']}" if "floor" in found else ""
    return f"{found['worst']:.1e}, {found['where']}{floor}"


def line(name: str, row: Row) -> str:
    family, _, title = name.partition("/")
    exact, plans = row.get("float64"), row.get("planning")
    whole = ", ".join((exact or {}).get("whole", ())) or "none"
    refused = next((row[p]["refused"] for p in PARTS if "refused" in row.get(p, {})), "none")
    usual = _bad(plans) or f"{plans['seconds']:.1f} ({'x'.join(map(str, plans['shape']))}, {plans['ops']} ops)"
    size, tiles = "x".join(map(str, row["input"])), ", ".join(map(str, row["tiles"]))
    cells = [title, family, size, tiles, row["loss"], _exact(exact), _errors(row, "float32"),
             _errors(row, "bfloat16"), whole, refused.split("\n")[0], usual]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _summary(part: str, found: list[Row]) -> str:
    """How many of a part's rows keep to the bound, and how far the others and the control are."""
    ratios, controls = (sorted(r[k] for r in found) for k in ("ratio", "control"))
    return (
        f"{part}: error over plain PyTorch's, median of the draws: {sum(r <= TIMES for r in ratios)} of "
        f"{len(found)} at most {TIMES}, middle {ratios[len(ratios) // 2]:.2f}, largest {ratios[-1]:.2f}; "
        f"plain PyTorch's control: {sum(r <= TIMES for r in controls)}, {controls[len(controls) // 2]:.2f}, "
        f"{controls[-1]:.2f}"
    )


def table(rows: dict[str, Row]) -> str:
    head = ("network", "library", "input", "tiles", "loss", "float64: worst difference over scale, with what",
            "float32: ours / plain", "bfloat16: ours / plain", "runs whole", "refused",
            "capture and planning, s (usual size)")  # fmt: skip
    whole: Counter[str] = Counter(op for r in rows.values() for op in r.get("float64", {}).get("whole", ()))
    done = [r["float64"] for r in rows.values() if "worst" in r.get("float64", {})]
    within = sum(r["worst"] <= BOUND for r in done)
    seconds = [r["planning"]["seconds"] for r in rows.values() if "seconds" in r.get("planning", {})]
    refused = sum(any("refused" in r.get(p, {}) for p in PARTS) for r in rows.values())
    lines = [
        f"{len(rows)} networks; {within} of {len(done)} within 1e-9 of scale in float64; {refused} refused",
        *(_summary(p, found) for p in ("float32", "bfloat16")
          if (found := [r[p] for r in rows.values() if "ratio" in r.get(p, {})])),
        f"capture and planning: largest {max(seconds, default=0):.1f} s, {sum(s <= 20 for s in seconds)} of "
        f"{len(seconds)} at most 20 s; processor time, one thread",
        "networks in which an op ran whole: " + (", ".join(f"{k} {n}" for k, n in whole.most_common()) or "none"),
    ]  # fmt: skip
    lines = [f"- {x}" for x in lines]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *(line(k, r) for k, r in rows.items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; all without one")
    parser.add_argument("--again", action="store_true", help="run what is kept already")
    parser.add_argument("--failed", action="store_true", help="run again what failed")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("K", "N"), help="every Nth, from K on")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [e for n in options.names for e in ENTRIES if n in key(e)] if options.names else ENTRIES
    chosen = chosen[options.share[0] :: options.share[1]]
    for entry in chosen:
        for part in options.parts:
            rows = load()
            row = rows.setdefault(key(entry), {})
            row |= {"input": list(entry.shape), "tiles": list(entry.tiles), "loss": entry.loss}
            kept = row.get(part)
            if kept is not None and not options.again and not (options.failed and _bad(kept)):
                continue
            made = measured(entry, part)
            rows = load()
            rows.setdefault(key(entry), row)[part] = made
            save(rows)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            shown = {k: v for k, v in made.items() if k != "all"}
            print(f"{part} {key(entry)}: {shown} peak {peak:.1f} GB", flush=True)
    (RESULTS / "zoo.md").write_text(
        table(load()) + f"\n\nbench/zoo.py, {setting()}; rows kept from earlier runs included\n"
    )


if __name__ == "__main__":
    main()
