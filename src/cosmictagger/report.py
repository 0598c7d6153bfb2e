"""One HTML file, with everything in it, that shows what a training did and where its network is wrong."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from cosmictagger.atomic import replacing
from cosmictagger.charts import Chart, Line
from cosmictagger.data import CLASS_NAMES
from cosmictagger.display import Display, packed
from cosmictagger.evaluate import Evaluation
from cosmictagger.findings import Findings, Found, average_precision, precision_recall
from cosmictagger.train import Memory

SCORES = {
    "mean_iou": "mIoU (cosmic and neutrino)",
    "cosmic_iou": "cosmic IoU",
    "neutrino_iou": "neutrino IoU",
    "nonzero_accuracy": "accuracy, labelled pixels",
    "accuracy": "accuracy, all pixels",
}
WORST = 10
"""Events of the table of the worst."""
GATED = "Pixels with charge, at full resolution."


@dataclass(frozen=True)
class Report:
    """What goes on the page."""

    title: str
    summary: str
    verdict: str
    log: list[dict]
    """Lines of a training's log."""
    findings: Findings
    displays: list[Display]
    memory: Memory
    settings: str
    plan: str


def write_report(path: Path, report: Report) -> None:
    """Write the page; it appears whole, and loads nothing from elsewhere."""
    page = files("cosmictagger") / "page"
    style, script = ((page / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    body = [
        f"<header><h1>{html.escape(report.title)}</h1><button id='theme' type='button'>Dark</button></header>",
        f"<p>{html.escape(report.summary)}</p>",
        _result(report),
        "<h2>Course of the training</h2>" + _course(report.log),
        "<h2>Classes</h2>" + _classes(report.findings),
        "<h2>Worst events</h2>" + _worst(report.findings, report.displays),
        _displays(report.displays),
        "<h2>Cost</h2>" + _cost(report.memory, report.log),
        _folded("Settings", report.settings),
        _folded("Plan of a training step", report.plan),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(report.title)}</title><style>{style}</style>"
    )
    text = (
        f'<!doctype html>\n<html lang="en" data-theme="light"><head>{head}</head>\n<body>\n'
        + "\n".join(body)
        + f"\n<script>{script}</script>\n</body></html>\n"
    )
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def verdict(found: Evaluation, *, seen: bool = False) -> str:
    """One sentence: the network's mIoU beside that of calling every charged pixel cosmic. `seen`: in training."""
    ours, base = found.network.mean_iou, found.baseline.mean_iou
    word = "above" if ours > base else "NOT ABOVE"
    events = "1 event" if found.events == 1 else f"{found.events} events"
    on = "that it was TRAINED ON" if seen else "not trained on"
    said = f"mIoU {ours:.3f} on {events} {on}, {word} the {base:.3f} of calling every charged pixel cosmic"
    return said if ours > base else f"{said}: THE NETWORK HAS NOT LEARNED ENOUGH, train longer"


def _result(report: Report) -> str:
    found, log = report.findings.evaluation.as_dict(), report.log
    columns = {"network": found["network"], "every charged pixel cosmic": found["baseline"]}
    if "ungated" in found:
        columns["network, all pixels"] = found["ungated"]
    if log and log[0]["step"] == 0 and "validation" in log[0]:
        columns["network before training"] = log[0]["validation"]["network"]
    rows = [(name, *(f"{scores[key]:.4f}" for scores in columns.values())) for key, name in SCORES.items()]
    good = found["network"]["mean_iou"] > found["baseline"]["mean_iou"]
    return (
        f'<h2>Result</h2><p class="{"good" if good else "bad"}">{html.escape(report.verdict)}.</p>'
        + _table(("", *columns), rows)
        + '<p class="note">Means over events and planes. Scores are over pixels with charge at full resolution, '
        "unless all pixels are named.</p>"
    )


def _course(log: list[dict]) -> str:
    steps = [line for line in log if "loss" in line]
    checks = [(line["step"], line["validation"]) for line in log if "validation" in line]
    scores = [Line("training step, all pixels", "d", [(s["step"], s["train"]["mean_iou"]) for s in steps])]
    if checks:
        held = [(step, v["network"]["mean_iou"]) for step, v in checks]
        base = checks[-1][1]["baseline"]["mean_iou"]
        ends = [held[0][0], max(held[-1][0], steps[-1]["step"] if steps else 0)]
        scores.append(Line("held out, pixels with charge", "a", held, dots=True))
        scores.append(Line("every charged pixel cosmic", "b", [(x, base) for x in ends], dashed=True))
    by_class = [
        Line(name, colour, [(step, v["network"][f"{name}_iou"]) for step, v in checks], dots=True)
        for name, colour in (("cosmic", "a"), ("neutrino", "b"))
    ]
    charts = [
        Chart([Line("loss", "a", [(s["step"], s["loss"]) for s in steps])], "step", "loss"),
        Chart(scores, "step", "mIoU", high=1.0),
        Chart(by_class, "step", "IoU, held out", high=1.0),
        Chart([Line("learning rate", "c", [(s["step"], s["rate"]) for s in steps if "rate" in s])], "step", "rate"),
    ]
    return f'<div class="side">{"".join(f"<figure>{svg}</figure>" for svg in (c.svg() for c in charts) if svg)}</div>'


def _classes(findings: Findings) -> str:
    counts = findings.counts.sum(0)  # planes, truths, tags
    pooled = counts.sum(0)
    confusion = [
        (name, *(f"{int(n):,} ({_share(n, pooled[k].sum())})" for n in pooled[k]), f"{int(pooled[k].sum()):,}")
        for k, name in enumerate(CLASS_NAMES)
    ]
    rows = []
    for k, name in enumerate(CLASS_NAMES):
        right, truth, said = pooled[k, k], pooled[k].sum(), pooled[:, k].sum()
        average = average_precision(findings.sure[k])
        ious = [_share(c[k, k], c[k].sum() + c[:, k].sum() - c[k, k]) for c in counts]
        row = (_share(right, said), _share(right, truth), _share(right, truth + said - right))
        rows.append((name, *row, "-" if average is None else f"{average:.4f}", *ious))
    planes = [f"IoU, plane {p}" for p in range(len(counts))]
    return (
        "<h3>Confusion</h3>"
        + _table(("truth", *(f"called {name}" for name in CLASS_NAMES), "all"), confusion)
        + "<h3>By class</h3>"
        + _table(("", "precision", "recall", "IoU", "average precision", *planes), rows)
        + f'<p class="note">{GATED} Pixels of all events and planes are counted together.</p>'
        + f'<h3>Precision and recall</h3><figure class="one">{_precision_recall(findings)}</figure>'
    )


def _precision_recall(findings: Findings) -> str:
    lines, pooled = [], findings.counts.sum((0, 1))
    for k, colour in ((1, "a"), (2, "b")):
        precision, recall = precision_recall(findings.sure[k])
        lines.append(Line(CLASS_NAMES[k], colour, list(zip(recall.tolist(), precision.tolist(), strict=True))))
        truth, said = int(pooled[k].sum()), int(pooled[:, k].sum())
        if truth and said:
            right = int(pooled[k, k])
            lines.append(Line(f"{CLASS_NAMES[k]}, as tagged", colour, [(right / truth, right / said)], dots=True))
    return Chart(lines, "recall", "precision", high=1.0, ends=(0.0, 1.0)).svg()


def _worst(findings: Findings, displays: list[Display]) -> str:
    shown = {display.index: k for k, display in enumerate(displays)}
    rows = []
    for event in findings.worst()[:WORST]:
        counts, found = event.counts.sum((0, 1)), event.scores
        missed, false = int(counts[2, :2].sum()), int(counts[:2, 2].sum())
        button = f'<button type="button" data-event="{shown.get(event.index)}">show</button>'
        rows.append(
            (
                html.escape(name_of(event)),
                *(f"{x:.4f}" for x in (found.mean_iou, found.cosmic_iou, found.neutrino_iou)),
                f"{missed:,} of {int(counts[2].sum()):,}",
                f"{false:,}",
                button if event.index in shown else "",
            )
        )
    head = ("event", "mIoU", "cosmic IoU", "neutrino IoU", "neutrino pixels missed", "false neutrino pixels", "")
    return _table(head, rows, escaped=True) + f'<p class="note">{GATED}</p>'


def name_of(event: Found) -> str:
    """By run, subrun and event where the file has them."""
    known = min(event.number) >= 0
    return (
        f"{event.index} (run {event.number[0]}, {event.number[1]}, {event.number[2]})" if known else str(event.index)
    )


def _displays(displays: list[Display]) -> str:
    if not displays:
        return ""
    made = [packed(display) for display in displays]
    known = all(event["geometry"] for event in made)
    units = [("cm", "cm"), ("wire", "wire, tick"), ("pixel", "column, row")]
    bars = [
        _buttons("event", [(k, d.name) for k, d in enumerate(displays)]),
        _buttons("plane", [(k, f"plane {k}") for k in range(len(displays[0].event.charge))]),
        _buttons("layer", [(name, name) for name in ("charge", "truth", "prediction", "errors")]),
        _buttons("unit", units if known else units[-1:]),
        _buttons("zoom", [("out", "−"), ("in", "+"), ("one", "1:1"), ("all", "whole")]),
    ]
    data = json.dumps(made).replace("<", "\\u003c")
    return (
        '<section id="displays"><h2>Events, pixel by pixel</h2><p id="caption"></p>'
        f'<div class="bar">{"".join(bars)}</div><canvas id="view" tabindex="0" aria-label="event display"></canvas>'
        '<div class="key" id="legend"></div><p id="readout">Point at a pixel. Wheel, pinch or double click to '
        "magnify, drag to move.</p></section>"
        f'<script type="application/json" id="events">{data}</script>'
    )


def _buttons(name: str, choices: Sequence[tuple[str | int, str]]) -> str:
    made = "".join(
        f'<button type="button" data-{name}="{value}">{html.escape(text)}</button>' for value, text in choices
    )
    return f'<div class="group" role="group" aria-label="{name}">{made}</div>'


def _cost(memory: Memory, log: list[dict]) -> str:
    steps = sorted(line["seconds"] for line in log if "loss" in line)
    waited = sum(line.get("waited", 0.0) for line in log)
    rows = [
        ("memory budget of a step", memory.budget or "none given"),
        ("projected by the plan", _bytes(memory.projected)),
        ("measured in the first step", _bytes(memory.measured)),
    ]
    if steps:
        rows.append(("time of a step, in the middle", f"{steps[len(steps) // 2]:.2f} s"))
        rows.append(("all steps", f"{sum(steps) / 60:.1f} min, and {waited / 60:.1f} min waiting for events"))
    note = "Memory beyond parameters and their gradients. Measured: growth of the process at its highest."
    return _table((), rows) + f'<p class="note">{note}</p>'


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>" if text else ""


def _share(part: object, whole: object) -> str:
    return f"{float(part) / float(whole):.4f}" if float(whole) else "-"  # pyright: ignore[reportArgumentType]


def _bytes(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e9:.3f} GB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, escaped: bool = False) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{c if escaped else html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    top = line(head, "th") if head else ""
    return f'<div class="scroll"><table>{top}{"".join(line(row, "td") for row in rows)}</table></div>'
