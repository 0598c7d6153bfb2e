"""How much better is a network that trains on whole resolution than one that trains on halved images?

    python bench/headline.py --preset first --out out/headline
    python bench/headline.py --preset first --out out/headline --unit full-0    # one arm with one seed
    python bench/headline.py --preset first --out out/headline --table          # of whatever units are done

A unit is one arm with one seed, about an hour of one core. It may be stopped at any time, and goes on when it is
asked for again, bit for bit. When it ends, its log and its scores lie in bench/results/headline; with --commit they
are committed. Every arm of a seed sees the same parts of the same events in the same order.

Scores are over test events, two parts of each, one about a neutrino pixel and one about a cosmic pixel. The primary
one is the mean IoU of cosmic and neutrino pixels at full resolution over pixels with charge: the answer of a halved
network is repeated over its squares, and is not blamed for their empty pixels.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from headline_scores import Scored, score, vertices
from headline_table import write_table

from cosmictagger.atomic import replacing
from cosmictagger.batches import Crop, place
from cosmictagger.data import EventFile, writing
from cosmictagger.evaluate import Running, Tagger
from cosmictagger.model import VARIANTS, NetworkConfig
from cosmictagger.progress import progress
from cosmictagger.recipe import Recipe
from cosmictagger.simulate import Detector, simulate_numbered
from cosmictagger.train import Beside, train
from cosmictagger.weights import load_weights

RESULTS = Path(__file__).parent / "results" / "headline"
BUDGET = "3 GB"
SAMPLE = 4021
"""Seed of all events: training, validation and test follow one another."""
TEST_PARTS = 77
"""Seed of where events are cut for validation and test."""


@dataclass(frozen=True)
class Arm:
    """What one side of a comparison does differently."""

    downsample: int = 0
    more_levels: int = 0
    precision: str = "float32"
    loss: str = "light"
    batch: int | None = None
    """None: that of the preset. Others take the same number of images in all."""


ARMS = {
    "half": Arm(downsample=1),
    "full": Arm(),
    "deeper": Arm(more_levels=1),  # full resolution with the field of view, in cm, of the halved network
    "bfloat16": Arm(precision="bfloat16"),
    **{f"{loss}-{n}": Arm(loss=loss, batch=n) for loss in ("focal", "none") for n in (1, 4, 16)},
}


@dataclass(frozen=True)
class Preset:
    """How large everything is."""

    network: NetworkConfig
    events: tuple[int, int, int]
    """Of training, validation and test."""
    arms: tuple[str, ...]
    seeds: int
    crop: tuple[int, int] = (320, 512)
    steps: int = 4000
    batch: int = 2
    validate_every: int = 400
    checkpoint_every: int = 50
    warmup: int = 200
    coarser: int = 1

    def units(self) -> list[str]:
        """The arms of one seed, then those of the next."""
        return [f"{arm}-{seed}" for seed in range(self.seeds) for arm in self.arms]


# a21 with a level less, so that halved parts can be halved as often, and one block a level instead of two
NETWORK = replace(
    VARIANTS["a21"], depth=5, blocks_per_layer=1, blocks_deepest_layer=2, bottleneck_deepest=64, filter_size_deepest=3
)
FIRST = Preset(NETWORK, (400, 100, 100), ("half", "full"), seeds=3)
PRESETS = {
    "tiny": Preset(
        replace(NETWORK, n_initial_filters=2, depth=2, bottleneck_deepest=4),
        (3, 2, 2),
        ("half", "full"),
        seeds=1,
        crop=(32, 64),
        steps=4,
        validate_every=2,
        checkpoint_every=1,
        warmup=2,
        coarser=16,
    ),
    "first": FIRST,
    "five": replace(FIRST, arms=("half", "full", "deeper", "bfloat16"), seeds=5),
    "losses": replace(FIRST, arms=tuple(ARMS)[4:], seeds=3),
}
SAME = {"five": "first", "losses": "first"}
"""Presets whose units count for one another, since nothing but the list of arms differs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="first")
    parser.add_argument("--out", type=Path, default=Path("out/headline"), help="events and checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--unit", help="such as full-0; all of the preset, one after another, if left out")
    parser.add_argument("--table", action="store_true", help="only write the table and the curves")
    parser.add_argument("--commit", action="store_true", help="commit the results of each unit")
    args = parser.parse_args()
    preset, family = PRESETS[args.preset], SAME.get(args.preset, args.preset)
    units = preset.units() if args.unit is None else [args.unit]
    strange = [name for name in units if name.rpartition("-")[0] not in ARMS or not name.rpartition("-")[2].isdigit()]
    if strange:
        parser.error(f"no unit {strange[0]!r}; arms are {', '.join(ARMS)}, and a seed is a number")
    torch.set_num_threads(1)
    results = args.results / family
    for name in [] if args.table else units:
        run_unit(preset, name, args.out / family, results)
        if args.commit:
            _commit(name, results)
    if results.is_dir():
        print(write_table(results, "half"))
    return 0


def run_unit(preset: Preset, name: str, out: Path, results: Path) -> None:
    """Train one arm with one seed, or go on with it, and score it; nothing is done where its scores exist."""
    if (results / f"{name}.npz").is_file():
        return
    arm_name, _, seed = name.rpartition("-")
    arm = ARMS[arm_name]
    files = _events(preset, out / "events")
    running = Running(BUDGET, arm.precision, arm.downsample, threads=1)
    folder = out / name
    with (
        EventFile(files["training"]) as events,
        EventFile(files["validation"]) as validation,
        progress(name) as say,
    ):
        recipe = recipe_of(preset, arm, int(seed))
        again = (folder / "recipe.json").is_file()
        train(recipe, events, folder, running, validation=validation, resume=again, beside=Beside(say))
    with EventFile(files["test"]) as test:
        tagger = Tagger(load_weights(folder / "weights.safetensors"), running)
        found = score(tagger, test, json.loads(files["vertices"].read_text()))
    results.mkdir(parents=True, exist_ok=True)
    with replacing(results / f"{name}.jsonl") as part:
        part.write_bytes((folder / "log.jsonl").read_bytes())
    _save(results / f"{name}.npz", found)


def recipe_of(preset: Preset, arm: Arm, seed: int) -> Recipe:
    """The training of an arm: as many images as in all others."""
    batch = arm.batch or preset.batch
    each = preset.batch / batch
    return Recipe(
        replace(preset.network, depth=preset.network.depth + arm.more_levels),
        loss=arm.loss,
        learning_rate=3e-3,
        batch=batch,
        steps=round(preset.steps * each),
        seed=seed,
        validate_every=max(1, round(preset.validate_every * each)),
        checkpoint_every=max(1, round(preset.checkpoint_every * each)),
        schedule="cosine",
        warmup=max(1, round(preset.warmup * each)),
        crop=preset.crop,
    )


def _events(preset: Preset, folder: Path) -> dict[str, Path]:
    """The files of events, simulated where they are missing. Validation and test are cut once and for all."""
    files = {name: folder / f"{name}.h5" for name in ("training", "validation", "test")}
    files["vertices"] = folder / "vertices.json"
    detector = Detector().coarser(preset.coarser) if preset.coarser > 1 else Detector()
    first = 0
    for name, count in zip(("training", "validation", "test"), preset.events, strict=True):
        numbers = range(first, first + count)
        first += count
        if files[name].is_file() and (name != "test" or files["vertices"].is_file()):
            continue
        seen = []
        with progress(f"simulating {name}") as say, writing(files[name]) as file:
            for k in numbers:
                event = simulate_numbered(SAMPLE, k, detector)
                for about in (1, 2) if name != "training" else (0,):
                    part = event
                    if about:
                        start = place(event, Crop(preset.crop, (TEST_PARTS, about), about), k)
                        part = event.part(start, preset.crop)
                        seen.append(vertices(SAMPLE, k, detector, start))
                    file.append(part)
                say(k + 1 - numbers.start, count, "")
        if name == "test":
            with replacing(files["vertices"]) as part:
                part.write_text(json.dumps(seen) + "\n")
    return files


def _save(path: Path, found: Scored) -> None:
    with replacing(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **found.arrays())


def _commit(name: str, results: Path) -> None:
    """Commit what a unit left, and nothing else."""
    paths = [str((results / f"{name}{suffix}").resolve()) for suffix in (".npz", ".jsonl")]
    subprocess.run(["git", "add", "--", *paths], cwd=RESULTS.parent, check=True)
    arm, _, seed = name.rpartition("-")
    message = f"Score the headline's arm {arm} with seed {seed}"
    changed = subprocess.run(["git", "diff", "--cached", "--quiet", "--", *paths], cwd=RESULTS.parent, check=False)
    if changed.returncode:
        subprocess.run(["git", "commit", "--quiet", "-m", message, "--", *paths], cwd=RESULTS.parent, check=True)


if __name__ == "__main__":
    sys.exit(main())
