"""A training as a file: read, overridden by the command line, written down, and refused where it makes no sense."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmictagger.__main__ import main
from cosmictagger.config import Files, Run, overridden, read, run_of
from cosmictagger.evaluate import Running
from cosmictagger.model import VARIANTS
from cosmictagger.recipe import Recipe
from cosmictagger.train import read_log

FULL = """
variant: a21
network: {depth: 7, downsampling: convolutional, bias: false}
loss: none
learning_rate: 2e-3
optimizer:
  name: SGD
  momentum: 0.9
  weight_decay: 1e-4
schedule: {name: MultiStepLR, milestones: [10, 20]}
batch: 2
accumulate: 4
crop: [640, 1024]
minutes: 7
precision: bfloat16
downsample: 1
budget: 8 GB
events: training.h5
out: run
"""


def test_a_file_says_everything(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(FULL)
    run = run_of(read(path))
    network = replace(VARIANTS["a21"], depth=7, downsampling="convolutional", bias=False)
    recipe = Recipe(
        network, loss="none", learning_rate=2e-3, optimizer="SGD", schedule="MultiStepLR", batch=2, accumulate=4,
        optimizer_arguments={"momentum": 0.9, "weight_decay": 1e-4}, schedule_arguments={"milestones": [10, 20]},
        crop=(640, 1024), minutes=7,
    )  # fmt: skip
    assert run == Run(Files(Path("training.h5"), Path("run")), recipe, Running("8 GB", "bfloat16", 1))
    path.write_text(run.text())
    assert run_of(read(path)) == run


def test_each_field_of_the_recipe_and_the_running_is_a_key(tmp_path):
    recipe = Recipe(
        VARIANTS["scc21"], "even", 1e-5, 3, 7, 11, 5, 2, 0.5, 0.9, "cosine", 1, (64, 32), True, True, 9,
        "NAdam", {"betas": [0.5, 0.9]}, {}, 2,
    )  # fmt: skip
    assert all(getattr(recipe, name) != value for name, value in vars(Recipe(VARIANTS["uresnet"])).items()
               if name != "schedule_arguments")  # fmt: skip
    run = Run(
        Files(Path("a"), Path("b"), Path("c")), recipe, Running("1 GB", "bfloat16", 1, torch.device("cpu"), 3), True
    )
    (tmp_path / "run.yaml").write_text(run.text())
    assert run_of(read(tmp_path / "run.yaml")) == run


def test_the_command_line_comes_before_the_file_and_a_setting_by_name_before_both():
    file = {"loss": "none", "steps": 5, "optimizer": {"name": "SGD", "momentum": 0.9}, "events": "a", "out": "b"}
    run = run_of(
        overridden(file, {"steps": 6, "loss": None}, ["optimizer.momentum=5e-1", "network.depth=2", "steps=7"])
    )
    assert (run.recipe.loss, run.recipe.steps, run.recipe.network.depth) == ("none", 7, 2)
    assert run.recipe.optimizer_arguments == {"momentum": 0.5}
    run = run_of(
        overridden(
            file, {"optimizer": "AdamW", "schedule": "linear"}, ["schedule.name=StepLR", "schedule.step_size=3"]
        )
    )
    assert (run.recipe.optimizer, run.recipe.optimizer_arguments) == ("AdamW", {})
    assert (run.recipe.schedule, run.recipe.schedule_arguments) == ("StepLR", {"step_size": 3})
    assert run_of(overridden(file, {}, ["schedule=cosine"])).recipe.schedule == "cosine"


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_a_training_from_a_file_leaves_its_settings(engine, small, small_events, tmp_path, capsys):
    config, out = tmp_path / "run.yaml", tmp_path / "run"
    config.write_text(f"events: {small_events}\nout: {out}\nvariant: a21\nsteps: 9\noptimizer: AdamW\n")
    assert main(["train", "--config", str(config), "--steps", "1", "--set", "crop=[16, 16]"]) == 0
    printed = capsys.readouterr().out
    kept = (out / "config.yaml").read_text()
    assert printed.startswith(kept) and "steps: 1\n" in kept and "optimizer: AdamW\n" in kept
    assert json.loads((out / "recipe.json").read_text())["optimizer"] == "AdamW"
    assert main(["train", "--config", str(out / "config.yaml"), "--resume", "--steps", "2"]) == 0
    assert "\nsteps: 2\n" in (out / "config.yaml").read_text()
    assert main(["train", "--out", str(out), "--resume", "--steps", "3"]) == 0  # by the settings that are there
    assert "\nsteps: 3\n" in (out / "config.yaml").read_text() and len(read_log(out)) == 3


WRONG = {
    "unknown key": ("lerning_rate: 1", "run.yaml, line 1: unknown key 'lerning_rate', perhaps learning_rate: choose among events"),
    "unknown inside": ("loss: none\nnetwork:\n  dept: 5", "line 3: unknown key in network 'dept', perhaps depth: choose among n_initial"),
    "value": ("steps: many", "line 1: steps is 'many'; it must be a whole number"),
    "boolean": ("steps: yes", "steps is True; it must be a whole number"),
    "no boolean": ("flips: 1", "flips is 1; it must be true or false"),
    "choice": ("loss: heavy", "loss is 'heavy'; it must be one of none, light, even, focal"),
    "choice inside": ("network: {connections: add}", "network.connections is 'add'; it must be one of concat, sum, none"),
    "choice of numbers": ("downsample: 2", "downsample is 2; it must be one of 0, 1"),
    "or none": ("minutes: soon", "minutes is 'soon'; it must be a number or null"),
    "a pair": ("crop: [64]", "crop is [64]; it must be a list of 2 whole numbers or null"),
    "no section": ("network: 5", "network is 5; it must be a section"),
    "optimiser": ("optimizer: adam", "optimizer is 'adam'; it must be one of ASGD, Adadelta"),
    "nameless": ("optimizer: {weight_decay: 1}", "optimizer has no name: choose one of ASGD"),
    "its argument": ("optimizer: {name: Adam, weight: 1}", "run.yaml: optimizer Adam has no argument 'weight': choose among betas"),
    "a date": ("optimizer: {name: Adam, eps: 2020-01-01}", "optimizer Adam: eps is of type date"),
    "out of range": ("batch: 0", "run.yaml: batch is 0; it must be at least 1"),
    "twice": ("steps: 1\nloss: none\nsteps: 2", "line 3: steps stands twice"),
    "no yaml": ("steps: [1", "line 1: "),
    "code": ("steps: !!python/object/apply:os.system [echo]", "line 1: could not determine a constructor"),
    "a list": ("- steps", "run.yaml: must hold settings"),
    "nothing": ("", "run.yaml: must hold settings"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_a_file_must_not_say_is_one_line_that_names_it(case, tmp_path, capsys):
    text, message = WRONG[case]
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", "events.h5", str(tmp_path / "out"), "--config", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "none.yaml: no such file"),
        (["--set", "steps"], "--set steps: must be key=value"),
        (["--set", "steps=[1"], "--set steps=[1: [1 is not YAML"),
        (["--set", "step=1"], "--set step=1: unknown key 'step', perhaps steps"),
        (["--set", "network.dept=1"], "--set network.dept=1: unknown key in network 'dept'"),
        (["--set", "steps.a=1"], "--set steps.a=1: steps is {'a': 1}; it must be a whole number"),
        (["--optimizer", "adam"], "unknown optimizer 'adam': choose one of ASGD"),
        ([], "events is missing: name it on the command line, or as events in the file of --config"),
    ],
    ids=str,
)
def test_what_a_command_line_must_not_say(arguments, message, capsys):
    assert main(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
