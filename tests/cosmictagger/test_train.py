"""Training, interrupted and not; weights in and out; the page at the end."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cosmictagger.batches import indices_of_step
from cosmictagger.data import DataError, EventFile
from cosmictagger.evaluate import Running, Tagger, evaluate
from cosmictagger.metrics import all_cosmic, confusion, scores
from cosmictagger.model import UResNet
from cosmictagger.session import Files, train_with_report
from cosmictagger.train import Recipe, _done, read_log, train
from cosmictagger.weights import load_weights, save_weights


@pytest.fixture
def recipe(small) -> Recipe:
    return Recipe(small, steps=4, batch=2, validate_every=2, learning_rate=1e-2)


def test_learning_rate_falls_by_steps_or_by_time(small):
    by_steps = Recipe(small, steps=4, decay=True)
    assert [_done(by_steps, step, 1e6) for step in range(4)] == [0, 0.25, 0.5, 0.75]
    by_time = replace(by_steps, minutes=1)
    assert _done(by_time, 1, 30) == 0.5
    assert _done(by_time, 3, 90) == 0.99


def test_every_event_once_per_epoch_in_an_order_of_the_seed():
    epoch = [k for step in range(3) for k in indices_of_step(step, 2, 6, seed=1)]
    assert sorted(epoch) == list(range(6))
    assert indices_of_step(1, 2, 6, seed=1) == epoch[2:4]
    assert [k for step in range(3) for k in indices_of_step(step, 2, 6, seed=2)] != epoch
    assert len(indices_of_step(0, 5, 2, seed=0)) == 5  # a batch larger than the file


def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(engine, recipe, small_events, tmp_path):
    with EventFile(small_events) as events:
        train(recipe, events, tmp_path / "a", Running(), validation=events)
        train(replace(recipe, steps=2), events, tmp_path / "b", Running(), validation=events)
        train(recipe, events, tmp_path / "b", Running(), validation=events, resume=True)
    a, b = (load_weights(tmp_path / x / "weights.safetensors").state_dict() for x in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    logs = [read_log(tmp_path / x) for x in "ab"]
    for line in logs[0] + logs[1]:
        line.pop("seconds", None)
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [1, 2, 2, 3, 4, 4]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "checkpoint",
        "log.jsonl",
        "plan.txt",
        "recipe.json",
        "weights.safetensors",
    ]


def test_lines_after_the_checkpoint_are_dropped_on_resume(engine, recipe, small_events, tmp_path):
    with EventFile(small_events) as events:
        train(replace(recipe, steps=2), events, tmp_path / "a", Running())
        with (tmp_path / "a" / "log.jsonl").open("a") as log:
            log.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
        train(recipe, events, tmp_path / "a", Running(), resume=True)
    assert [line["step"] for line in read_log(tmp_path / "a")] == [1, 2, 3, 4]


def test_loss_falls_and_scores_are_of_evaluation_mode(engine, recipe, small_events, tmp_path):
    with EventFile(small_events) as events:
        train(replace(recipe, steps=15, validate_every=15), events, tmp_path / "a", Running(), validation=events)
        log = read_log(tmp_path / "a")
        losses = [line["loss"] for line in log if "loss" in line]
        assert losses[-1] < losses[0]
        net = load_weights(tmp_path / "a" / "weights.safetensors")
        found = evaluate(Tagger(net, Running()), events)
        assert found.as_dict() == log[-1]["validation"]
        image, label = (
            torch.from_numpy(np.stack([f(e) for e in events])) for f in (lambda e: e.image(), lambda e: e.truth())
        )
        assert found.baseline == scores(confusion(all_cosmic(image), label))


@pytest.mark.parametrize("running", [Running(precision="bfloat16"), Running(downsample=1)], ids=["bfloat16", "half"])
def test_other_ways_to_run(engine, recipe, small_events, tmp_path, running):
    small_enough = replace(recipe, network=replace(recipe.network, depth=2), steps=2)
    with EventFile(small_events) as events:
        trained = train(small_enough, events, tmp_path / "a", running, validation=events)
    assert trained.steps == 2
    assert trained.memory.projected


def test_time_limit_ends_with_a_checkpoint(engine, recipe, small_events, tmp_path):
    with EventFile(small_events) as events:
        trained = train(replace(recipe, steps=1000, minutes=1e-9), events, tmp_path / "a", Running())
    assert trained.steps == 1
    assert (tmp_path / "a" / "checkpoint").is_dir()


def test_folder_in_use_and_other_recipe_are_refused(engine, recipe, small_events, tmp_path):
    with EventFile(small_events) as events:
        with pytest.raises(DataError, match="no checkpoint to resume"):
            train(recipe, events, tmp_path / "a", Running(), resume=True)
        train(replace(recipe, steps=1), events, tmp_path / "a", Running())
        with pytest.raises(DataError, match="holds a training already"):
            train(recipe, events, tmp_path / "a", Running())
        with pytest.raises(DataError, match="was trained with loss = light, not focal"):
            train(replace(recipe, loss="focal"), events, tmp_path / "a", Running(), resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 0},
        {"steps": 0},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"loss": "heavy"},
        {"minutes": 0},
    ],
    ids=str,
)
def test_recipes_that_make_no_sense(small, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}"):
        Recipe(small, **change)


def test_weights_carry_their_network(small, tmp_path):
    net = UResNet(small)
    save_weights(net, tmp_path / "w.safetensors")
    back = load_weights(tmp_path / "w.safetensors")
    assert back.config == small
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in net.state_dict().items())


def test_public_checkpoint_loads_by_variant(small, tmp_path):
    net = UResNet(small)
    state = {f"model.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "public.ckpt")
    back = load_weights(tmp_path / "public.ckpt", "a21")
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in net.state_dict().items())
    with pytest.raises(DataError, match="name it with --variant"):
        load_weights(tmp_path / "public.ckpt")
    with pytest.raises(DataError, match="does not fit the network"):
        load_weights(tmp_path / "public.ckpt", "polaris")


def test_weights_that_are_none(tmp_path):
    (tmp_path / "a").write_text("no weights")
    with pytest.raises(DataError, match="neither safetensors nor a checkpoint"):
        load_weights(tmp_path / "a", "a21")
    with pytest.raises(DataError, match="no such file"):
        load_weights(tmp_path / "b")


def test_report_holds_everything_in_one_file(engine, recipe, small_events, tmp_path):
    said = train_with_report(Files(small_events, tmp_path / "a", small_events), recipe, Running(budget="1 GB"))
    page = (tmp_path / "a" / "report.html").read_text()
    assert "mIoU" in said
    assert page.count("<img") == 1 + 9  # curves; three pictures of three planes
    assert 'src="http' not in page
    assert (tmp_path / "a" / "plan.txt").read_text().splitlines()[0] in page
    for word in ("every charged pixel cosmic", "projected by the plan", "measured in the first step", "1 GB"):
        assert word in page
    recorded = json.loads((tmp_path / "a" / "recipe.json").read_text())
    assert recorded["budget"] == "1 GB"
