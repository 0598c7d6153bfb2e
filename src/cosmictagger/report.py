"""One HTML file, with everything in it, that shows what a training did."""

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from cosmictagger.atomic import replacing
from cosmictagger.display import Panel
from cosmictagger.train import Memory

BLUE = "#3a5fcd"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1240px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: .2em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse }
td, th { padding: .25em .9em; border-bottom: 1px solid #d5d9de; text-align: right }
td:first-child, th:first-child { text-align: left } img { max-width: 100%; display: block }
.planes { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px } figure { margin: 0 }
figcaption { font-size: .85em; color: #555 } .key span { padding: 0 .5em; margin-right: .6em; color: #fff }
pre { background: #f4f5f7; padding: 1em; overflow: auto; max-height: 40em; font-size: 12px; line-height: 1.35 }
"""
SCORES = {
    "mean_iou": "mIoU (cosmic and neutrino)",
    "cosmic_iou": "cosmic IoU",
    "neutrino_iou": "neutrino IoU",
    "nonzero_accuracy": "accuracy, labelled pixels",
    "accuracy": "accuracy, all pixels",
}

SCORED = "<p>Scores are over pixels with charge at full resolution, unless all pixels are named.</p>"


@dataclass(frozen=True)
class Report:
    """What goes on the page."""

    title: str
    summary: str
    log: list[dict]
    """Lines of a training's log; the last validation is the result."""
    memory: Memory
    plan: str
    events: list[tuple[str, list[list[Panel]]]]
    """Captions and pictures of some events the network was not trained on."""


def write_report(path: Path, report: Report) -> None:
    """Write the page; it appears whole."""
    body = [
        f"<h1>{html.escape(report.title)}</h1><p>{html.escape(report.summary)}</p>",
        _result(report.log),
        "<h2>Training</h2>" + _curves(report.log),
        "<h2>Memory of a training step</h2>" + _memory(report.memory),
        *(_event(caption, planes) for caption, planes in report.events),
        f"<h2>Plan of a training step</h2><pre>{html.escape(report.plan)}</pre>",
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(report.title)}</title><style>{STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")


def verdict(validation: dict) -> str:
    """One sentence: the network's mIoU beside that of calling every charged pixel cosmic."""
    ours, base = validation["network"]["mean_iou"], validation["baseline"]["mean_iou"]
    word = "above" if ours > base else "NOT ABOVE"
    count = validation["events"]
    events = "1 event" if count == 1 else f"{count} events"
    said = f"mIoU {ours:.3f} on {events} not trained on, {word} the {base:.3f} of calling every charged pixel cosmic"
    return said if ours > base else f"{said}: THE NETWORK HAS NOT LEARNED ENOUGH, train longer"


def last_validation(log: list[dict]) -> dict | None:
    """The most recent validation of a training's log."""
    return next((line["validation"] for line in reversed(log) if "validation" in line), None)


def _result(log: list[dict]) -> str:
    validation = last_validation(log)
    if validation is None:
        return ""
    rows: list[tuple[str, ...]] = [
        (name, f"{validation['network'][key]:.4f}", f"{validation['baseline'][key]:.4f}")
        for key, name in SCORES.items()
    ]
    head, first = ("", "network", "every charged pixel cosmic"), log[0]
    if "ungated" in validation:
        head = (*head, "network, all pixels")
        rows = [(*row, f"{validation['ungated'][key]:.4f}") for row, key in zip(rows, SCORES, strict=True)]
    if "validation" in first and first["step"] == 0:
        head = (*head, "network before training")
        rows = [(*row, f"{first['validation']['network'][key]:.4f}") for row, key in zip(rows, SCORES, strict=True)]
    return f"<h2>Result</h2><p>{html.escape(verdict(validation))}.</p>{_table(head, rows)}{SCORED}"


def _memory(memory: Memory) -> str:
    rows = [
        ("budget", memory.budget or "none given"),
        ("projected by the plan", _bytes(memory.projected)),
        ("measured in the first step", _bytes(memory.measured)),
    ]
    note = "Beyond parameters and their gradients. Measured: growth of the process at its highest."
    return _table(("", "memory"), rows) + f"<p>{note}</p>"


def _bytes(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e9:.3f} GB"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _curves(log: list[dict]) -> str:
    steps = [line for line in log if "loss" in line]
    at = [line["step"] for line in steps]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(at, [line["loss"] for line in steps], color=BLUE)
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    right.plot(at, [line["train"]["mean_iou"] for line in steps], color="#b8bec6", label="training step, all pixels")
    checks = [(line["step"], line["validation"]) for line in log if "validation" in line]
    if checks:
        at = [step for step, _ in checks]
        right.plot(
            at, [v["network"]["mean_iou"] for _, v in checks], "o-", color=BLUE, label="held out, pixels with charge"
        )
        level = checks[-1][1]["baseline"]["mean_iou"]
        right.axhline(level, color="#c4501b", linestyle="--", label="every charged pixel cosmic")
    right.set(xlabel="step", ylabel="mIoU", ylim=(0, 1))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return _image(out.getvalue(), "loss and mIoU by step")


def _event(caption: str, planes: list[list[Panel]]) -> str:
    key = "".join(
        f'<span style="background:{colour}">{name}</span>'
        for name, colour in (("charge without a tag", "#6b7480"), ("cosmic", "#3fa7ff"), ("neutrino", "#c98a00"))
    )
    cells = "".join(
        f"<figure>{_image(panel.png, panel.title)}<figcaption>{html.escape(panel.title)}</figcaption></figure>"
        for row in planes
        for panel in row
    )
    return f'<h2>{html.escape(caption)}</h2><p class="key">{key}</p><div class="planes">{cells}</div>'


def _image(png: bytes, text: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
