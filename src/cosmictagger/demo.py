"""The demonstration: from nothing to a trained network and its report, in minutes on two cores."""

import shutil
from dataclasses import replace
from pathlib import Path

from cosmictagger.data import DataError
from cosmictagger.evaluate import Running
from cosmictagger.model import VARIANTS
from cosmictagger.session import Files, simulate_file, train_with_report
from cosmictagger.train import Recipe

# a21, narrowed until a few dozen steps fit into minutes; the image stays whole
NETWORK = replace(
    VARIANTS["a21"], blocks_per_layer=1, blocks_deepest_layer=2, bottleneck_deepest=32, filter_size_deepest=3
)
# expecting background, the unweighted loss tells tracks from noise within 30 steps; class weights need more of them
DEMO = Recipe(
    NETWORK, loss="none", learning_rate=1e-2, decay=True, background=0.99, steps=80, validate_every=20, minutes=5.0
)
RUNNING = Running(budget="4 GB")
TRAINING_EVENTS, HELD_OUT_EVENTS = 12, 3
SEED = 2027  # not of a sample that the settings above were tried on
MARK = "demo.txt"


def run_demo(out: Path, minutes: float) -> str:
    """Simulate, train, evaluate, report into the folder `out`; returns one line that says what came of it.

    Raises DataError if `out` holds something that is not a demonstration.
    """
    if out.exists() and not (out / MARK).exists() and any(out.iterdir()):
        raise DataError(f"{out}: holds something else; name another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).write_text("Made by `cosmictagger demo`, which empties this folder when it runs again.\n")
    simulate_file(out / "training.h5", TRAINING_EVENTS, SEED)
    simulate_file(out / "held-out.h5", HELD_OUT_EVENTS, SEED, first=TRAINING_EVENTS)
    files = Files(out / "training.h5", out, out / "held-out.h5")
    return train_with_report(files, replace(DEMO, minutes=minutes), RUNNING)
