"""Every optimiser and every schedule of torch that can be named: built, kept in a checkpoint, and gone on from."""

import json
from dataclasses import replace

import pytest
import torch

from cosmictagger.checkpoint import load_checkpoint, save_checkpoint
from cosmictagger.data import DataError, EventFile
from cosmictagger.evaluate import Running
from cosmictagger.model import UResNet
from cosmictagger.optimizers import build_optimizer, optimizer_names, plain, restored, schedule_names
from cosmictagger.recipe import Recipe
from cosmictagger.schedules import Rates
from cosmictagger.train import read_log, train

ARGUMENTS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"amsgrad": True, "betas": [0.8, 0.99]},
    "RMSprop": {"centered": True, "momentum": 0.5},
}
SCHEDULES = {
    "StepLR": {"step_size": 1, "gamma": 0.7},
    "MultiStepLR": {"milestones": [1, 2, 2], "gamma": 0.7},
    "OneCycleLR": {"max_lr": 0.02, "total_steps": 6},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.02, "step_size_up": 2},
    "ExponentialLR": {"gamma": 0.7},
    "CosineAnnealingLR": {"T_max": 5, "eta_min": 1e-4},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "ReduceLROnPlateau": {"patience": 0, "factor": 0.5, "threshold": 0.9},
}


@pytest.fixture
def recipe(small) -> Recipe:
    return Recipe(replace(small, depth=1), steps=4, validate_every=2, learning_rate=1e-3, crop=(16, 16))


def stepped(recipe, net, optimizer, rates, numbers):
    """Steps with gradients that follow from their numbers."""
    for step in numbers:
        rates.before(step, 0.0)
        draws = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=draws)
        optimizer.step()
        rates.scored(0.5)


def begun(recipe):
    torch.manual_seed(0)
    net = UResNet(recipe.network)
    optimizer = build_optimizer(recipe.optimizer, recipe.optimizer_arguments, net.parameters(), recipe.learning_rate)
    return net, optimizer, Rates(recipe, optimizer)


def goes_on_bit_for_bit(recipe, folder):
    """Four steps at once, and two and two; returns the learning rate after the last."""
    files = [folder / name for name in ("whole", "half", "again")]
    net, optimizer, rates = begun(recipe)
    stepped(recipe, net, optimizer, rates, range(2))
    save_checkpoint(files[1], net, optimizer, 2, rates.state())
    stepped(recipe, net, optimizer, rates, range(2, 4))
    save_checkpoint(files[0], net, optimizer, 4, rates.state())
    net, optimizer, rates = begun(recipe)
    step, schedule = load_checkpoint(files[1], net, optimizer)
    rates.load(schedule)
    stepped(recipe, net, optimizer, rates, range(step, 4))
    save_checkpoint(files[2], net, optimizer, 4, rates.state())
    assert files[0].read_bytes() == files[2].read_bytes() != files[1].read_bytes()
    return optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("name", [name for name in optimizer_names() if name != "Muon"])
def test_each_optimiser_goes_on_bit_for_bit(name, recipe, tmp_path):
    goes_on_bit_for_bit(replace(recipe, optimizer=name, optimizer_arguments=ARGUMENTS.get(name, {})), tmp_path)


@pytest.mark.parametrize("name", schedule_names())
def test_each_schedule_goes_on_bit_for_bit(name, recipe, tmp_path):
    arguments = SCHEDULES.get(name, {})
    rate = goes_on_bit_for_bit(replace(recipe, warmup=1, schedule=name, schedule_arguments=arguments), tmp_path)
    assert rate != recipe.learning_rate or name in ("constant", "CosineAnnealingWarmRestarts")


def test_an_optimiser_that_cannot_train_this_network_is_refused(recipe):
    with pytest.raises(ValueError, match=r"optimizer Muon: .* 2D"):  # a convolution's weights are no matrices
        begun(replace(recipe, optimizer="Muon"))


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
@pytest.mark.parametrize("schedule", ["OneCycleLR", "ReduceLROnPlateau"])
def test_a_training_by_others_than_adam_goes_on_bit_for_bit(schedule, engine, recipe, small_events, tmp_path):
    recipe = replace(recipe, optimizer="SGD", optimizer_arguments={"momentum": 0.9}, warmup=1, schedule=schedule,
                     schedule_arguments=SCHEDULES[schedule], steps=3, validate_every=1, validation_events=1)  # fmt: skip
    with EventFile(small_events) as events:
        train(recipe, events, tmp_path / "a", Running(), validation=events)
        train(replace(recipe, steps=2), events, tmp_path / "b", Running(), validation=events)
        train(recipe, events, tmp_path / "b", Running(), validation=events, resume=True)
    a, b = ((tmp_path / x / "checkpoint.safetensors").read_bytes() for x in "ab")
    assert a == b
    rates = [line["rate"] for line in read_log(tmp_path / "b") if "rate" in line]
    assert rates[-1] < rates[1] if schedule == "ReduceLROnPlateau" else len(set(rates)) == 2


def test_a_scheduler_of_torch_is_followed_after_the_warm_up_and_scaled_by_a_changed_rate(recipe):
    recipe = replace(recipe, steps=9, warmup=3, learning_rate=0.5, schedule="MultiStepLR",
                     schedule_arguments={"milestones": [1, 3], "gamma": 0.1})  # fmt: skip
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    rates, seen, kept = Rates(recipe, optimizer), [], {}
    for step in range(9):
        rates.before(step, 0.0)
        seen.append(optimizer.param_groups[0]["lr"])
        kept = rates.state() if step == 5 else kept
    wanted = [0.5 / 3, 1 / 3, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005, 0.005]
    assert seen == pytest.approx(wanted)
    slower = Rates(replace(recipe, learning_rate=0.25), optimizer)
    slower.load(json.loads(json.dumps(kept)))
    slower.before(6, 0.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0025)


def test_onecycle_moves_the_momentum_too(recipe):
    recipe = replace(recipe, optimizer="SGD", optimizer_arguments={"momentum": 0.9}, schedule="OneCycleLR",
                     schedule_arguments={"max_lr": 1.0, "total_steps": 4})  # fmt: skip
    optimizer = build_optimizer("SGD", {"momentum": 0.9}, [torch.nn.Parameter(torch.zeros(1))], 1.0)
    rates, seen = Rates(recipe, optimizer), set()
    for step in range(4):
        rates.before(step, 0.0)
        seen.add(optimizer.param_groups[0]["momentum"])
    assert len(seen) > 1


WRONG = {
    "LBFGS": ({"optimizer": "LBFGS"}, "LBFGS cannot be used: it evaluates a step several times"),
    "unknown optimiser": ({"optimizer": "adam"}, "unknown optimizer 'adam': choose one of ASGD, "),
    "unknown argument": ({"optimizer_arguments": {"weight": 1}}, "optimizer Adam has no argument 'weight': choose among betas"),
    "the wrong way": ({"optimizer_arguments": {"maximize": True}}, "maximize cannot be used: it would make the loss larger"),
    "a rate that is not read": ({"optimizer": "Rprop", "warmup": 1}, "Rprop reads its learning rate once; leave warmup"),
    "the rate": ({"optimizer_arguments": {"lr": 1}}, "lr is not among its arguments here; learning_rate says it"),
    "a function": ({"schedule": "LambdaLR"}, "LambdaLR cannot be used: a function cannot be written down"),
    "missing": ({"schedule": "StepLR"}, "schedule StepLR needs the argument step_size"),
    "for none": ({"schedule": "cosine", "schedule_arguments": {"T_max": 3}}, "cosine has no argument 'T_max': choose among none"),
    "lowest": ({"schedule": "ReduceLROnPlateau", "schedule_arguments": {"mode": "min"}}, "mode must be max"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_named_is_refused_with_what_can(case, recipe):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        replace(recipe, **change)


AT_THE_START = {
    "value": ({"optimizer_arguments": {"weight_decay": -1}}, "optimizer Adam: Invalid weight_decay"),
    "type": ({"optimizer_arguments": {"eps": "small"}}, "optimizer Adam: "),
    "step": ({"optimizer_arguments": {"differentiable": True}}, "optimizer Adam: a leaf Variable that requires grad"),
    "schedule": ({"schedule": "StepLR", "schedule_arguments": {"step_size": 0}}, "schedule StepLR"),
    "too short": ({"schedule": "OneCycleLR", "schedule_arguments": {"max_lr": 1, "total_steps": 3}}, "ends after 3 steps"),
    "no scores": ({"schedule": "ReduceLROnPlateau"}, "follows the scores of validations"),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
@pytest.mark.parametrize("case", AT_THE_START)
def test_values_that_torch_refuses_are_refused_before_anything_is_written(
    case, engine, recipe, small_events, tmp_path
):
    change, message = AT_THE_START[case]
    with EventFile(small_events) as events, pytest.raises(ValueError, match=message):
        train(replace(recipe, **change), events, tmp_path / "a", Running())
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_a_recipe_of_an_older_version_goes_on_and_another_optimiser_is_refused(
    engine, recipe, small_events, tmp_path
):
    with EventFile(small_events) as events:
        train(replace(recipe, steps=2), events, tmp_path / "a", Running())
        path = tmp_path / "a" / "recipe.json"
        recorded = json.loads(path.read_text())
        for key in ("optimizer", "optimizer_arguments", "schedule_arguments", "accumulate"):
            del recorded[key]
        path.write_text(json.dumps(recorded))
        with pytest.raises(DataError, match="was trained with optimizer = Adam, not SGD"):
            train(replace(recipe, optimizer="SGD"), events, tmp_path / "a", Running(), resume=True)
        assert train(recipe, events, tmp_path / "a", Running(), resume=True).steps == 4


def test_what_has_no_place_in_json_is_refused_by_name():
    with pytest.raises(ValueError, match="schedule X: a: b is of type Tensor"):
        plain({"a": {"b": torch.zeros(1)}}, "schedule X")
    for value in ({3: 1.5}, (1, [2, (None, True)]), float("inf"), "x"):
        assert restored(json.loads(json.dumps(plain(value, ""))), value) == value
