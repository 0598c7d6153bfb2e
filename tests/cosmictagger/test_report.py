"""The page on a training: its numbers, its pixels, and what a browser makes of it."""

import base64
import json
import re
import shutil
import subprocess
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from cosmictagger.__main__ import main
from cosmictagger.charts import Chart, Line
from cosmictagger.config import Files, Run
from cosmictagger.data import EventFile
from cosmictagger.display import Display, geometry, packed
from cosmictagger.evaluate import Running, Tagger, evaluate
from cosmictagger.findings import BINS, CERTAIN, Findings, average_precision, look, precision_recall
from cosmictagger.model import UResNet
from cosmictagger.recipe import Recipe
from cosmictagger.session import train_with_report
from cosmictagger.simulate import Detector


@pytest.fixture
def run(small, small_events, tmp_path) -> Run:
    network = replace(small, depth=1)
    recipe = Recipe(network, steps=2, validate_every=1, learning_rate=1e-2, crop=(16, 16), validate_first=True)
    return Run(Files(small_events, tmp_path / "run", small_events), recipe, Running("1 GB"))


def looked(small, small_events, **how) -> Findings:
    torch.manual_seed(3)
    net = UResNet(replace(small, depth=1))
    with EventFile(small_events) as events:
        return look(Tagger(net, Running(**how)), events)


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
@pytest.mark.parametrize("downsample", [0, 1])
def test_findings_are_of_the_pixels_that_are_scored(downsample, engine, small, small_events):
    found = looked(small, small_events, downsample=downsample)
    torch.manual_seed(3)
    with EventFile(small_events) as events:
        tagger = Tagger(UResNet(replace(small, depth=1)), Running(downsample=downsample))
        assert evaluate(tagger, events) == found.evaluation
        stored = sum(len(p.rows) for event in events for p in event.charge)
        truth = [event.truth() for event in events]
    assert found.counts.sum() == stored and found.counts.shape == (3, 3, 3, 3)
    assert [int(found.counts[:, :, k].sum()) for k in (1, 2)] == [
        sum(int((t == k).sum()) for t in truth) for k in (1, 2)
    ]
    assert (found.sure.sum((1, 2)) == stored).all()
    assert found.sure[2, 1].sum() == found.counts[:, :, 2].sum()
    ranked = [event.scores.mean_iou for event in found.worst()]
    assert ranked == sorted(ranked) and np.mean(ranked) == pytest.approx(found.evaluation.network.mean_iou)


def test_precision_and_recall_by_hand():
    """Four pixels of the class and three others, at five thresholds."""
    sure = np.zeros((2, BINS), np.int64)
    for of, logits in ((1, [CERTAIN, 2, 2, -3]), (0, [2, 0, -5])):
        for logit in logits:
            sure[of, min(int((logit + CERTAIN) / (2 * CERTAIN) * BINS), BINS - 1)] += 1
    precision, recall = precision_recall(sure)
    assert precision.tolist() == pytest.approx([1, 3 / 4, 3 / 5, 4 / 6, 4 / 7])
    assert recall.tolist() == pytest.approx([1 / 4, 3 / 4, 3 / 4, 1, 1])
    assert average_precision(sure) == pytest.approx(1 / 4 + 1 / 2 * 3 / 4 + 1 / 4 * 4 / 6)
    assert average_precision(np.zeros((2, BINS), np.int64)) is None


def test_every_stored_pixel_is_on_the_page(small_events):
    with EventFile(small_events) as events:
        event = events[1]
    tags = tuple(np.arange(len(p.rows)).astype(np.uint8) % 3 for p in event.charge)
    made = json.loads(json.dumps(packed(Display(event, 1, tags, "", ""))))
    assert (made["rows"], made["columns"], made["geometry"]) == (80, 128, None)
    for plane, charge, tag, truth in zip(made["planes"], event.charge, tags, event.truth(), strict=True):
        data, n = zlib.decompress(base64.b64decode(plane["data"])), plane["pixels"]
        words = np.frombuffer(data[: 2 * (80 + 2 * n)], "<u2")
        rows, columns = np.repeat(np.arange(80), words[:80]), words[80 : 80 + n]
        codes = np.frombuffer(data[2 * (80 + 2 * n) :], np.uint8)
        assert len(codes) == n == len(charge.rows)
        image, seen = charge.dense(event.shape, np.float32), np.zeros(event.shape)
        seen[rows, columns] = words[80 + n :] * plane["unit"]
        assert np.abs(seen - image).max() <= plane["unit"] / 2
        said = np.zeros(event.shape, np.uint8)
        said[charge.rows, charge.columns] = tag
        assert np.array_equal(codes & 3, truth[rows, columns]) and np.array_equal(codes >> 2, said[rows, columns])


def test_axes_are_those_of_the_detector():
    known = geometry(Detector().shape)
    assert known == {"offsets": [31, 31, 191], "wire_pitch": 0.3, "row_pitch": 0.3125, "ticks": 4}
    assert geometry((80, 128)) is None


def test_charts_take_any_points():
    assert Chart([Line("a", "a", [])], "x", "y").svg() == ""
    assert Chart([Line("a", "a", [(1, float("nan"))])], "x", "y").svg() == ""
    one = Chart([Line("<a>", "a", [(1, 5.0)])], "x", "y").svg()
    assert "<circle" in one and "&lt;a&gt;" in one and "nan" not in one
    many = Chart([Line("a", "a", [(k, k % 7) for k in range(10_000)])], "x", "y").svg()
    assert len(many) < 40_000 and "<polygon" in many


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_a_page_for_a_training_that_is_there(engine, run, small_events, tmp_path, capsys):
    said = train_with_report(run)
    assert "that it was TRAINED ON" in said  # the events are those of the training
    folder, page = run.files.out, tmp_path / "other.html"
    first = (folder / "report.html").read_text()
    assert "src=" not in first and "href=" not in first and "http" not in re.sub(r'"data": "[^"]*"', "", first)
    for word in (
        "called neutrino",
        "average precision",
        "Worst events",
        "network before training",
        "1 GB",
        "Settings",
    ):
        assert word in first
    assert main(["report", str(folder), "--out", str(page), "--displays", "1"]) == 0
    assert page.read_text().count('"geometry": ') == 1 < first.count('"geometry": ') == 3
    (folder / "config.yaml").unlink()  # as older trainings have none
    (folder / "cost.json").unlink()
    assert main(["report", str(folder)]) == 2
    assert "name some with --events" in capsys.readouterr().err
    assert main(["report", str(folder), "--events", str(small_events), "--displays", "0"]) == 0
    assert "canvas" not in re.sub(
        r"<script.*?</script>|<style.*?</style>", "", (folder / "report.html").read_text(), flags=re.S
    )
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "holds no training" in capsys.readouterr().err


CLICKS = """
<script>
const note = {errors: []};
window.addEventListener("error", e => note.errors.push(e.message));
const until = async ready => { for (let k = 0; k < 200 && !ready(); k++) await new Promise(r => setTimeout(r, 20)); };
const shown = () => document.getElementById("displays").dataset.shown;
const click = (name, value) => document.querySelector(`button[data-${name}="${value}"]`).click();
window.addEventListener("load", async () => {
  const canvas = document.getElementById("view");
  await until(shown);
  note.first = shown();
  note.wide = document.documentElement.scrollWidth <= window.innerWidth;
  for (const layer of ["charge", "truth", "prediction"]) { click("layer", layer); await until(() => shown().includes(layer)); }
  click("plane", 1); await until(() => shown().includes(" 1 "));
  click("event", 1); await until(() => shown().startsWith("1 "));
  note.last = shown();
  note.legend = document.getElementById("legend").textContent;
  const box = canvas.getBoundingClientRect(), before = viewer.scale;
  const at = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true, cancelable: true};
  canvas.dispatchEvent(new WheelEvent("wheel", {...at, deltaY: -500}));
  note.magnified = viewer.scale / before;
  const left = viewer.left;
  canvas.dispatchEvent(new PointerEvent("pointerdown", {...at, pointerId: 1}));
  canvas.dispatchEvent(new PointerEvent("pointermove", {...at, clientX: at.clientX - 40, pointerId: 1}));
  note.moved = (viewer.left - left) * viewer.scale;
  canvas.dispatchEvent(new PointerEvent("pointerup", {...at, pointerId: 1}));
  const p = viewer.pixels, i = p.count >> 1, f = viewer.field;
  viewer.reset(); viewer.draw();
  for (const [id, x] of [[11, -20], [12, 20]]) {
    canvas.dispatchEvent(new PointerEvent("pointerdown", {...at, clientX: at.clientX + x, pointerId: id}));
  }
  canvas.dispatchEvent(new PointerEvent("pointermove", {...at, clientX: at.clientX + 60, pointerId: 12}));
  note.pinched = viewer.scale / before;
  for (const pointerId of [11, 12]) canvas.dispatchEvent(new PointerEvent("pointerup", {...at, pointerId}));
  canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "0", bubbles: true}));
  note.whole = viewer.scale / before;
  const x = f.x + (p.column[i] + .5 - viewer.left) * viewer.scale, y = f.y + (p.row[i] + .5 - viewer.top) * viewer.scale;
  viewer.tell(x, y);
  note.told = document.getElementById("readout").textContent;
  note.pixel = [p.row[i], p.column[i], p.charge[i], p.truth[i], p.prediction[i]];
  note.counts = [0, 1, 2].map(k => p.prediction.filter(x => x === k).length);
  const ratio = window.devicePixelRatio;
  note.colour = [...canvas.getContext("2d").getImageData(Math.floor(x * ratio), Math.floor(y * ratio), 1, 1).data];
  note.theme = [document.documentElement.dataset.theme];
  document.getElementById("theme").click();
  note.theme.push(document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor);
  document.querySelector("details").open = true;
  document.body.replaceChildren(JSON.stringify(note));
  document.body.id = "note";
});
</script>
"""


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
@pytest.mark.parametrize("size", ["1280,900", "500,800"])  # headless Chromium makes no narrower windows
def test_a_browser_shows_every_layer_magnifies_and_tells(size, engine, run, small_events, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    train_with_report(run)
    page = tmp_path / "page.html"
    page.write_text((run.files.out / "report.html").read_text().replace("</head>", f"{CLICKS}</head>"))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               f"--window-size={size}", "--virtual-time-budget=20000", "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found = re.search(r'<body id="note">(.*?)</body>', done.stdout, re.S)
    assert found, (done.stdout[-300:], done.stderr[-300:])
    note = json.loads(found[1])
    assert note["errors"] == [] and note["wide"]
    assert (note["first"], note["last"]) == ("0 2 errors pixel", "1 1 prediction pixel")
    assert note["legend"] == "".join(
        f"{n}: {c}" for n, c in zip(("background", "cosmic", "neutrino"), note["counts"], strict=True)
    )
    assert note["magnified"] > 2 and note["moved"] == pytest.approx(40, abs=1)
    assert note["pinched"] == pytest.approx(2, rel=0.01) and note["whole"] == 1
    row, column, charge, truth, said = note["pixel"]
    names = ("background", "cosmic", "neutrino")
    assert (
        note["told"]
        == f"column {column} · row {row} · charge {charge:.1f} · truth {names[truth]} · prediction {names[said]}"
    )
    assert note["colour"] == [[107, 116, 128, 255], [63, 167, 255, 255], [255, 176, 0, 255]][said]
    assert note["theme"][:2] in (["light", "dark"], ["dark", "light"])
    assert note["theme"][2] == ("rgb(18, 22, 27)" if note["theme"][1] == "dark" else "rgb(255, 255, 255)")
