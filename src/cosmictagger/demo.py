"""The demonstration: from nothing to a trained network and its report, in minutes, also on a slow machine."""

import sys
import time
from dataclasses import replace
from pathlib import Path

from cosmictagger.atomic import part_of_file
from cosmictagger.checkpoint import NAME as CHECKPOINT
from cosmictagger.config import NAME as CONFIG
from cosmictagger.config import Files, Run
from cosmictagger.data import DataError, EventFile
from cosmictagger.evaluate import Running
from cosmictagger.model import VARIANTS
from cosmictagger.recipe import Recipe
from cosmictagger.session import simulate_file, train_with_report
from cosmictagger.train import seconds_per_step

# a21, narrowed until a few dozen steps fit into minutes
NETWORK = replace(
    VARIANTS["a21"], blocks_per_layer=1, blocks_deepest_layer=2, bottleneck_deepest=32, filter_size_deepest=3
)
# expecting background, the unweighted loss tells tracks from noise within 30 steps; class weights need more of them
DEMO = Recipe(
    NETWORK,
    loss="none",
    learning_rate=1e-2,
    schedule="linear",
    background=0.99,
    steps=80,
    minutes=5.0,
    validate_first=True,
)
RUNNING = Running(budget="4 GB")
TRAINING_EVENTS, HELD_OUT_EVENTS = 12, 3
SEED = 2027  # not of a sample that the settings above were tried on
# Parts of an event that are trained on where there is no time for whole ones: sides are divided by these.
DIVISORS = (4, 2, 1)
# A smaller part teaches less: so many times the steps, where they fit.
MOST = 4
# Share of the time that the steps may take; the rest is for scores of whole held-out events, and for delays.
SHARE = 0.7
MARK = "demo.txt"
MARKED = "Made by `cosmictagger demo`, which replaces the files that it has made when it runs again.\n"
WRITTEN = (
    MARK, "training.h5", "held-out.h5", "recipe.json", CONFIG, "plan.txt", "log.jsonl", CHECKPOINT,
    "weights.safetensors", "best.safetensors", "cost.json", "report.html",
)  # fmt: skip


def run_demo(out: Path, minutes: float) -> str:
    """Simulate, train, evaluate, report into the folder `out`; returns one line that says what came of it.

    Raises DataError if `out` holds something that is not a demonstration.
    """
    began = time.monotonic()
    _clear(out)
    (out / MARK).write_text(MARKED)
    simulate_file(out / "training.h5", TRAINING_EVENTS, SEED)
    simulate_file(out / "held-out.h5", HELD_OUT_EVENTS, SEED, first=TRAINING_EVENTS)
    with EventFile(out / "training.h5") as events:
        shape, seconds = events.shape, seconds_per_step(replace(DEMO, crop=_least(events.shape)), events, RUNNING)
    left = max(minutes - (time.monotonic() - began) / 60, minutes / 2)
    recipe, note = suited(shape, seconds, replace(DEMO, minutes=left))
    print(note, file=sys.stderr, flush=True)
    files = Files(out / "training.h5", out, out / "held-out.h5")
    return train_with_report(Run(files, recipe, RUNNING), note=f" {note}")


def _clear(out: Path) -> None:
    """An empty folder: only what an earlier demonstration wrote is removed, file by file."""
    found = sorted(out.iterdir()) if out.exists() else []
    mark = out / MARK
    strange = [path for path in found if not _written(path)]
    if found and not (mark.is_file() and mark.read_bytes() == MARKED.encode()):
        strange = strange or [mark]
    if strange:
        raise DataError(f"{out}: holds something else ({strange[0].name}); name another folder with --out")
    for path in sorted(found, key=lambda path: path.name == MARK):  # the mark last, should this be interrupted
        path.unlink()
    out.mkdir(parents=True, exist_ok=True)


def _written(path: Path) -> bool:
    """Whether a file has a name of a demonstration's, or of one's part that was not finished."""
    return (part_of_file(path) or path.name) in WRITTEN and path.is_file() and not path.is_symlink()


def _least(shape: tuple[int, int]) -> tuple[int, int]:
    return _parts(shape)[0]


def _parts(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """The parts of an event that suit the network, the smallest first."""
    rows, columns = shape
    multiple = 2**DEMO.network.depth
    return [(rows // n, columns // n) for n in DIVISORS if rows // n % multiple == columns // n % multiple == 0]


def suited(shape: tuple[int, int], seconds: float, recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe with steps, and parts of events of a shape, for which there is time; and a sentence on it.

    `seconds`: what a step takes at the smallest part.
    """
    assert recipe.minutes is not None
    least = _least(shape)
    size, fit = least, 0
    for part in _parts(shape):
        share = part[0] * part[1] / (least[0] * least[1])
        steps = int(60 * SHARE * recipe.minutes / max(seconds * share, 1e-9))
        if not fit or steps >= recipe.steps:
            size, fit = part, steps
    whole = size == shape
    steps = max(1, min(fit, recipe.steps if whole else MOST * recipe.steps))
    what = "whole events" if whole else f"parts of {size[0]} x {size[1]}"
    note = (
        f"A step at {least[0]} x {least[1]} pixels takes {seconds:.2f} s on this machine, so within "
        f"{recipe.minutes:.1f} minutes there is time for {steps} steps on {what}; scores are of whole events."
    )
    return replace(recipe, steps=steps, validate_every=max(1, -(-steps // 2)), crop=None if whole else size), note
