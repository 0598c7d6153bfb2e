"""Trainings side by side: their scores, and what was done differently."""

import json
from pathlib import Path

from cosmictagger.runs import logged, recorded


def compare(runs: list[Path]) -> str:
    """A table of trainings, and a line for each setting that differs. Raises DataError for a folder without one."""
    recipes, logs = [_recipe(run) for run in runs], [logged(run) for run in runs]
    wide = max(len(str(run)) for run in runs)
    lines = [
        f"{'':<{wide}} {'steps':>7} {'loss':>9} {'best mIoU':>10} {'at step':>8} {'last mIoU':>10} {'s/step':>8}"
    ]
    lines += [f"{run!s:<{wide}} {_line(log)}" for run, log in zip(runs, logs, strict=True)]
    keys = sorted({key for recipe in recipes for key in recipe})
    different = [key for key in keys if len({json.dumps(recipe.get(key)) for recipe in recipes}) > 1]
    if len(runs) > 1:
        lines += ["", "All settings are the same." if not different else "What differs:"]
    return "\n".join([*lines, *(f"  {key}: {' | '.join(str(r.get(key)) for r in recipes)}" for key in different)])


def _line(log: list[dict]) -> str:
    steps = [line for line in log if "loss" in line]
    checks = [(line["validation"]["network"]["mean_iou"], line["step"]) for line in log if "validation" in line]
    if not steps:
        return f"{0:>7}"
    last = steps[-20:]
    loss, seconds = (sum(line[key] for line in last) / len(last) for key in ("loss", "seconds"))
    said = f"{steps[-1]['step']:>7} {loss:>9.4f}"
    if checks:
        best, at = max(checks)
        said += f" {best:>10.4f} {at:>8} {checks[-1][0]:>10.4f}"
    else:
        said += f" {'-':>10} {'-':>8} {'-':>10}"
    return f"{said} {seconds:>8.2f}"


def _recipe(run: Path) -> dict:
    """Every setting by its name, those of the network after `network.`."""
    found = recorded(run)
    return {k: v for k, v in found.items() if k != "network"} | {
        f"network.{k}": v for k, v in found["network"].items()
    }
