"""Everything a user of `cosmictagger` may get wrong, as commands: files, configurations, weights and folders.

Of each case there is a name, a command in which {...} stands for the files below, and a word that its one line says.
`materials(folder)` makes the files.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import torch

from cosmictagger.data import CHARGE, LABEL, EventFile, writing
from cosmictagger.evaluate import Running
from cosmictagger.model import VARIANTS, UResNet
from cosmictagger.recipe import Recipe
from cosmictagger.simulate import Detector, simulate_numbered
from cosmictagger.train import train
from cosmictagger.weights import Origin, save_weights

NETWORK = replace(
    VARIANTS["a21"], n_initial_filters=2, depth=3, blocks_per_layer=1, blocks_deepest_layer=1, filter_size_deepest=3,
    bottleneck_deepest=4,
)  # fmt: skip
"""Small enough for images of 80 x 128 pixels."""

TRAIN = "train {events} {out} --config {good}"

EVENTS = {
    "no such events": ("train {tmp}/none.h5 {out} --config {good}", "no such file"),
    "text for events": ("train {text} {out} --config {good}", "not an HDF5 file"),
    "an empty file for events": ("train {empty} {out} --config {good}", "not an HDF5 file"),
    "half a file of events": ("train {half} {out} --config {good}", "truncated"),
    "a folder without events": ("train {void} {out} --config {good}", "no .h5"),
    "a pattern that nothing has": ("train {tmp}/in/*.x {out} --config {good}", "no file has such a name"),
    "events named twice": ("train {events},{events} {out} --config {good}", "named twice"),
    "files of two sizes": ("train {events},{large} {out} --config {good}", "images are"),
    "events without labels": ("train {bare} {out} --config {good}", "no group " + LABEL),
    "charge that is NaN": ("train {nan} {out} --config {good}", "NaN"),
    "a pixel outside the image": ("train {outside} {out} --config {good}", "outside the image"),
    "labels of another event": ("train {swapped} {out} --config {good}", "labels of another event"),
    "validation events that are none": (TRAIN + " --validation {text}", "not an HDF5 file"),
    "validation events of another size": (TRAIN + " --validation {odd}", "does not suit"),
    "a NaN, to evaluate": ("evaluate {nan} {weights} --json {out}", "NaN"),
    "a NaN, to predict": ("predict {nan} {weights} {out}", "NaN"),
    "one bad file of several, to predict": ("predict {events},{text} {weights} {out}", "not an HDF5 file"),
    "no tags to evaluate": ("evaluate {events} --json {out}", "name weights"),
    "tags over the events": ("predict {events} {weights} {events}", "would replace the events"),
    "images that do not suit the network": ("train {odd} {out} --config {good}", "does not suit"),
}

SETTINGS = {
    "no such configuration": ("train {events} {out} --config {tmp}/none.yaml", "no such file"),
    "a folder for a configuration": ("train {events} {out} --config {void}", "void"),
    "bytes for a configuration": ("train {events} {out} --config {weights}", "is not YAML"),
    "an empty configuration": ("train {events} {out} --config {empty}", "must hold settings"),
    "an unknown key": (TRAIN + " --set lerning_rate=1", "perhaps learning_rate"),
    "an unknown key of the network": (TRAIN + " --set network.dept=1", "perhaps depth"),
    "text for a number": (TRAIN + " --set steps=many", "a whole number"),
    "no step": (TRAIN + " --steps 0", "at least 1"),
    "a learning rate below zero": (TRAIN + " --learning-rate=-1", "must be positive"),
    "a learning rate that is NaN": (TRAIN + " --learning-rate nan", "must be positive"),
    "no time": (TRAIN + " --minutes 0", "must be positive"),
    "a seed below zero": (TRAIN + " --seed=-1", "seed is -1"),
    "a share of background beyond one": (TRAIN + " --set background=2", "background"),
    "a crop larger than the event": (TRAIN + " --set crop=[800,800]", "no parts of"),
    "a crop of nothing": (TRAIN + " --set crop=[0,0]", "crop is"),
    "no depth": (TRAIN + " --set network.depth=0", "depth"),
    "no filters": (TRAIN + " --set network.n_initial_filters=0", "n_initial_filters"),
    "a word for the normalization": (TRAIN + " --set network.normalization=group", "normalization"),
    "no threads": (TRAIN + " --set threads=0", "threads is 0"),
    "an unknown optimiser": (TRAIN + " --optimizer Adma", "Adam"),
    "an argument that the optimiser lacks": (TRAIN + " --set optimizer.momentum=1", "momentum"),
    "an argument that the schedule lacks": (TRAIN + " --set schedule={{name:StepLR}}", "schedule"),
    "a setting that is none": (TRAIN + " --set steps", "key=value"),
    "a budget that is none": (TRAIN + " --budget much", "much"),
    "a budget that is too small": (TRAIN + " --budget 10KB", "smallest that would do"),
    "a disk without a budget": (TRAIN + " --set budget=null --disk 1GB", "budget="),
    "an unknown option": (TRAIN + " --lerning-rate 1", "--learning-rate"),
    "an unknown command": ("trian", "trian"),
    "no folder to write to": ("train {events}", "out is missing"),
}  # fmt: skip

WEIGHTS = {
    "no such weights": ("predict {events} {tmp}/none {out}", "no such file"),
    "a folder for weights": ("predict {events} {void} {out}", "void"),
    "text for weights": ("predict {events} {text} {out}", "neither safetensors nor"),
    "an empty file for weights": ("predict {events} {empty} {out}", "neither safetensors nor"),
    "half a file of weights": ("predict {events} {cutweights} {out}", "neither safetensors nor"),
    "weights with code": ("predict {events} {code} {out}", "might be code"),
    "weights of another network": ("predict {events} {weights} {out} --variant uresnet", "does not fit"),
    "a checkpoint of no network": ("predict {events} {other} {out}", "holds no CosmicTagger network"),
    "weights that are NaN": ("predict {events} {nanweights} {out}", "NaN"),
    "another resolution than trained": (
        "evaluate {events} {weights} --downsample 1 --json {out}",
        "leave --downsample",
    ),
    "another precision than trained": ("predict {events} {weights} {out} --precision bfloat16", "leave --precision"),
}

FOLDERS = {
    "a file where a folder is to be": ("train {events} {text} --config {good}", "is not a folder"),
    "a folder below a file": ("train {events} {text}/run --config {good}", "text"),
    "a folder that cannot be made": ("train {events} /proc/none/run --config {good}", "/proc/none"),
    "a folder with a training": ("train {events} {run} --config {good}", "holds a training already"),
    "a folder with nothing to resume": (TRAIN + " --resume", "leave --resume out"),
    "other events to resume on": ("train {others} {run} --config {good} --resume", "other events"),
    "another network to resume": ("train {events} {run} --config {good} --resume --set network.depth=2", "network"),
    "half a checkpoint to resume": ("train {events} {cutrun} --config {good} --resume", "checkpoint"),
    "a recipe that is none": ("train {events} {norecipe} --config {good} --resume", "recipe.json"),
    "a log that is none": ("report {nolog} --events {events} --out {out}", "log.jsonl"),
    "a report on nothing": ("report {void} --events {events} --out {out}", "holds no training"),
    "a comparison with nothing": ("compare {run} {void}", "holds no training"),
    "events written over a folder": ("simulate {void}", "is a folder"),
    "scores written over a folder": ("evaluate {events} {weights} --json {void}", "is a folder"),
    "tags for two files into one": ("predict {events},{others} {weights} {text}", "is not a folder"),
    "a demonstration over other things": ("demo --out {inputs}", "holds something else"),
    "no events to simulate": ("simulate {out} --events 0", "at least 1"),
}  # fmt: skip

CASES = {"events": EVENTS, "configurations": SETTINGS, "weights": WEIGHTS, "folders": FOLDERS}


def materials(folder: Path) -> dict[str, str]:
    """Make all files that the cases name in a new folder; returns their paths by name."""
    names = {name: folder / name for name in (
        "events", "others", "large", "odd", "half", "bare", "nan", "outside", "swapped", "text", "empty", "void",
        "good", "weights", "cutweights", "nanweights", "code", "other", "run", "cutrun", "norecipe", "nolog",
    )}  # fmt: skip
    folder.mkdir()
    for name, first, scale in (("events", 0, 16), ("others", 5, 16), ("large", 0, 8), ("odd", 0, 80)):
        with writing(names[name]) as file:
            for k in range(2):
                file.append(simulate_numbered(7, first + k, Detector().coarser(scale)))
    names["text"].write_text("no events here\n")
    names["empty"].write_bytes(b"")
    names["void"].mkdir()
    _bad_events(names)
    _bad_weights(names)
    settings = "network: " + json.dumps(asdict(NETWORK)) + "\nsteps: 2\nbudget: 1 GB\n"
    names["good"].write_text(settings)
    recipe = Recipe(NETWORK, steps=2)
    with EventFile(names["events"]) as events:
        train(recipe, events, names["run"], Running(budget="1 GB"))
    for name in ("cutrun", "norecipe", "nolog"):
        shutil.copytree(names["run"], names[name])
    os.truncate(names["cutrun"] / "checkpoint.safetensors", 1000)
    (names["norecipe"] / "recipe.json").write_text("{")
    (names["nolog"] / "log.jsonl").write_text("{")
    return {name: str(path) for name, path in names.items()} | {"inputs": str(folder)}


def _bad_events(names: dict[str, Path]) -> None:
    whole = names["events"].read_bytes()
    names["half"].write_bytes(whole[: len(whole) // 2])

    def spoil(name: str, change: Callable[[h5py.File], None]) -> None:
        names[name].write_bytes(whole)
        with h5py.File(names[name], "r+") as file:
            change(file)

    def altered(group: str, column: str, value: float) -> Callable[[h5py.File], None]:
        def change(file: h5py.File) -> None:
            rows = file[f"{group}/voxels"][:]
            rows[column][[0, -1]] = value  # in both events, whichever is read first
            file[f"{group}/voxels"][:] = rows

        return change

    def swap(file: h5py.File) -> None:
        rows = file[f"{LABEL}/extents"][:]
        file[f"{LABEL}/extents"][:] = rows[::-1].copy()

    def bare(file: h5py.File) -> None:
        del file[LABEL]

    spoil("bare", bare)
    spoil("nan", altered(CHARGE, "value", np.nan))
    spoil("outside", altered(CHARGE, "id", 80 * 128))
    spoil("swapped", swap)


def _bad_weights(names: dict[str, Path]) -> None:
    torch.manual_seed(0)
    net = UResNet(NETWORK)
    save_weights(net, names["weights"], Origin())  # as a training leaves them: with what they were trained on
    names["cutweights"].write_bytes(names["weights"].read_bytes()[:2000])
    torch.save({"a": torch.zeros(3)}, names["other"])
    torch.save({"state_dict": net.state_dict(), "what": Strange()}, names["code"])
    with torch.no_grad():
        next(net.parameters()).fill_(torch.nan)
    save_weights(net, names["nanweights"])


class Strange:
    """What a checkpoint may not hold: an object of a class of somebody's own."""
