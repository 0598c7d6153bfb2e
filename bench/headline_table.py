"""Table and curves of whatever units of bench/headline.py are done."""

import json
from pathlib import Path

import numpy as np
from headline_scores import BINS, KINDS
from matplotlib.figure import Figure
from numpy.typing import NDArray

PARTS = 2
"""Parts of each test event, one after another."""
DRAWS = 10_000
Units = dict[str, dict[int, dict[str, NDArray]]]


def write_table(results: Path, baseline: str) -> str:
    """Write table.md and curves.png beside the units; returns the table."""
    units: Units = {}
    for path in sorted(results.glob("*.npz")):
        arm, _, seed = path.stem.rpartition("-")
        with np.load(path) as found:
            units.setdefault(arm, {})[int(seed)] = dict(found)
    if not units:
        return "no unit is done"
    logs = {path.stem: [json.loads(x) for x in path.read_text().splitlines()] for path in results.glob("*.jsonl")}
    text = "\n".join(
        [*_scores(units), "", *_differences(units, baseline), "", *_bins(units), "", *_costs(units, logs)]
    )
    (results / "table.md").write_text(text + "\n")
    _curves(logs, results / "curves.png")
    return text


def per_event(counts: NDArray) -> NDArray:
    """Mean IoU of the two classes for every event, (events,) of counts (parts, planes, 3, 3). Empty unions are 1."""
    iou = _iou(counts)[..., 1:].mean(axis=(1, 2))
    return iou.reshape(-1, PARTS).mean(axis=1)


def pooled(counts: NDArray) -> float:
    """The same of all parts together, plane by plane."""
    return float(_iou(counts.sum(0))[..., 1:].mean())


def bootstrap(differences: NDArray, seed: int = 0) -> tuple[float, float]:
    """Central 95 % of the mean of paired differences, (events,), over events drawn again."""
    draws = np.random.default_rng(seed).integers(len(differences), size=(DRAWS, len(differences)))
    low, high = np.percentile(differences[draws].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def _iou(counts: NDArray) -> NDArray:
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    union = counts.sum(-1) + counts.sum(-2) - right
    return np.where(union > 0, right / np.maximum(union, 1), 1.0)


def _scores(units: Units) -> list[str]:
    out = [
        "Mean IoU of cosmic and neutrino pixels, %: per part and plane, then averaged; in brackets pixels pooled.",
        "Means over seeds, and their standard deviation.\n",
        "| arm | seeds | pixels with charge | own resolution | upsampled | cosmic as neutrino | neutrino as cosmic |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, seeds in units.items():
        cells = [_cell([unit[kind] for unit in seeds.values()]) for kind in KINDS[:3]]
        total = sum(unit["charged"].sum((0, 1)) for unit in seeds.values())
        swapped = [f"{100 * total[a, b] / max(total[a].sum(), 1):.1f}" for a, b in ((1, 2), (2, 1))]
        out.append(f"| {arm} | {len(seeds)} | {' | '.join([*cells, *swapped])} |")
    unit = next(iter(next(iter(units.values())).values()))
    best = [_cell([unit[kind]]) for kind in KINDS[3:]]
    return [*out, f"| best answer of a halved network | | {best[0]} | | {best[1]} | | |"]


def _cell(counts: list[NDArray]) -> str:
    each = np.array([100 * per_event(c).mean() for c in counts])
    spread = f" ± {each.std(ddof=1):.2f}" if len(each) > 1 else ""
    return f"{each.mean():.2f}{spread} ({100 * np.mean([pooled(c) for c in counts]):.2f})"


def _differences(units: Units, baseline: str) -> list[str]:
    out = [
        f"Pixels with charge: points above `{baseline}` with the same seed; intervals by drawing events again.\n",
        "| arm | seeds in common | difference | 95 % interval | by seed |",
        "|---|---|---|---|---|",
    ]
    for arm, seeds in units.items():
        common = sorted(seeds.keys() & units.get(baseline, {}).keys())
        if arm == baseline or not common:
            continue
        each = np.array(
            [100 * (per_event(seeds[s]["charged"]) - per_event(units[baseline][s]["charged"])) for s in common]
        )
        low, high = bootstrap(each.mean(axis=0))
        by_seed = " ".join(f"{x:.2f}" for x in each.mean(axis=1))
        out.append(f"| {arm} | {len(common)} | {each.mean():.2f} | {low:.2f} to {high:.2f} | {by_seed} |")
    return out


def _bins(units: Units) -> list[str]:
    out = ["Labelled pixels that get their class, %, all parts and planes together.\n"]
    out += [f"| arm | {' | '.join(BINS)} |", "|---" * (len(BINS) + 1) + "|"]
    for arm, seeds in units.items():
        total = sum(unit["bins"].sum(0) for unit in seeds.values())
        right = np.diagonal(total, axis1=1, axis2=2).sum(1) / np.maximum(total.sum((1, 2)), 1)
        out.append(f"| {arm} | {' | '.join(f'{100 * x:.1f}' for x in right)} |")
    return out


def _costs(units: Units, logs: dict[str, list[dict]]) -> list[str]:
    out = ["| unit | steps | hours of steps | validation mIoU, last quarter |", "|---|---|---|---|"]
    for arm, seeds in units.items():
        for seed in seeds:
            log = logs.get(f"{arm}-{seed}", [])
            steps = [line for line in log if "loss" in line]
            last = [100 * v for step, v in _validations(log) if step > 0.75 * len(steps)]
            hours = sum(line["seconds"] for line in steps) / 3600
            out.append(f"| {arm}-{seed} | {len(steps)} | {hours:.2f} | {' '.join(f'{v:.2f}' for v in last)} |")
    return out


def _validations(log: list[dict]) -> list[tuple[int, float]]:
    """At the network's own resolution, all pixels."""
    found = [(line["step"], line["validation"]) for line in log if "validation" in line]
    return [(step, scores.get("ungated", scores["network"])["mean_iou"]) for step, scores in found]


def _curves(logs: dict[str, list[dict]], path: Path) -> None:
    """Loss and validation of every unit, arms by colour."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    arms = sorted({name.rpartition("-")[0] for name in logs})
    for name, log in sorted(logs.items()):
        arm, _, seed = name.rpartition("-")
        colour, label = f"C{arms.index(arm)}", arm if seed == "0" else None
        losses = np.array([line["loss"] for line in log if "loss" in line])
        width = max(len(losses) // 40, 1)
        means = losses[: len(losses) // width * width].reshape(-1, width).mean(axis=1)
        left.semilogy((np.arange(len(means)) + 0.5) * width, means, color=colour, alpha=0.8, label=label)
        checks = _validations(log)
        if checks:
            right.plot(*zip(*checks, strict=True), color=colour, alpha=0.8, label=label)
    left.set(xlabel="step", ylabel="loss of training")
    right.set(xlabel="step", ylabel="validation mIoU at own resolution")
    left.legend(frameon=False)
    figure.savefig(path, dpi=90)
