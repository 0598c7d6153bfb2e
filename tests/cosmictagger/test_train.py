"""Training, interrupted and not; weights in and out; the page at the end."""

import json
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cosmictagger import weights
from cosmictagger.atomic import locked
from cosmictagger.batches import indices_of_step
from cosmictagger.compare import compare
from cosmictagger.config import Files, Run
from cosmictagger.data import DataError, EventFile, writing
from cosmictagger.evaluate import Running, Tagger, evaluate
from cosmictagger.metrics import all_cosmic, confusion, scores
from cosmictagger.model import UResNet
from cosmictagger.recipe import Recipe
from cosmictagger.session import train_with_report
from cosmictagger.simulate import Detector, simulate_numbered
from cosmictagger.train import read_log, train
from cosmictagger.weights import Origin, load_origin, load_weights, save_weights


@pytest.fixture
def recipe(small) -> Recipe:
    return Recipe(small, steps=4, batch=2, validate_every=2, learning_rate=1e-2)


def test_learning_rate_rises_then_falls_by_steps_or_by_time(small):
    by_steps = Recipe(small, steps=4, learning_rate=1.0, schedule="linear")
    assert [by_steps.rate(step, 1e6) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    by_time = replace(by_steps, minutes=1)
    assert by_time.rate(1, 30) == 0.5
    assert by_time.rate(3, 90) == pytest.approx(0.01)
    warm = Recipe(small, steps=12, learning_rate=1.0, schedule="cosine", warmup=4)
    assert [warm.rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert warm.rate(8) == pytest.approx(0.5)
    assert 0 < warm.rate(11) < 0.05
    assert Recipe(small, steps=3, learning_rate=1.0).rate(2) == 1


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
        line.pop("waited", None)
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [1, 2, 2, 3, 4, 4]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "best.safetensors",
        "checkpoint.safetensors",
        "cost.json",
        "log.jsonl",
        "plan.txt",
        "recipe.json",
        "weights.safetensors",
    ]


@pytest.mark.rest
def test_a_training_that_ends_while_it_saves_goes_on_from_the_checkpoint_before(
    engine, recipe, small_events, tmp_path, monkeypatch
):
    recipe = replace(recipe, steps=3, validate_every=1)

    def ends(tensors, path, metadata):
        if json.loads(metadata.get("training", "{}")).get("step") == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save_file(tensors, path, metadata=metadata)

    with EventFile(small_events) as events:
        train(recipe, events, tmp_path / "a", Running())
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(weights, "save_file", ends)
            train(recipe, events, tmp_path / "b", Running())
        train(recipe, events, tmp_path / "b", Running(), resume=True)
    a, b = (load_file(tmp_path / x / "checkpoint.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert [line["step"] for line in read_log(tmp_path / "b")] == [1, 2, 3]


class Payload:
    """Pickled, it makes a file where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.rest
def test_nothing_that_is_resumed_can_run_code(recipe, small_events, tmp_path):
    ran, out = tmp_path / "ran", tmp_path / "a"
    with EventFile(small_events) as events:
        train(replace(recipe, steps=1), events, out, Running())
        made = out / "checkpoint.safetensors"
        whole = made.read_bytes()
        made.unlink()
        (out / "checkpoint").mkdir()
        (out / "checkpoint" / ".metadata").write_bytes(pickle.dumps(Payload(ran)))
        with pytest.raises(
            DataError, match="no checkpoint to resume from, but for an older one, which could hold code"
        ):
            train(recipe, events, out, Running(), resume=True)
        for content in (pickle.dumps(Payload(ran)), whole[:-9], b""):
            made.write_bytes(content)
            with pytest.raises(DataError, match="is not a checkpoint of a training"):
                train(recipe, events, out, Running(), resume=True)
        torch.save(Payload(ran), made)
        with pytest.raises(DataError, match="is not a checkpoint of a training"):
            train(recipe, events, out, Running(), resume=True)
    assert not ran.exists()


@pytest.mark.parametrize("change", ["missing", "shape", "more", "step"])
@pytest.mark.rest
def test_a_checkpoint_of_another_training_is_refused(change, recipe, small_events, tmp_path):
    made = tmp_path / "a" / "checkpoint.safetensors"
    with EventFile(small_events) as events:
        train(replace(recipe, steps=1), events, tmp_path / "a", Running())
        content, step = load_file(made), 0 if change == "step" else 1
        if change == "missing":
            del content["optimizer/1/exp_avg"]
        if change == "shape":
            content["optimizer/1/exp_avg"] = torch.zeros(1, 2, 3)
        if change == "more":
            content["optimizer/99/exp_avg"] = torch.zeros(3)
        save_file(content, made, metadata={"training": json.dumps({"step": step})})
        with pytest.raises(DataError, match="does not fit the training"):
            train(recipe, events, tmp_path / "a", Running(), resume=True)


@pytest.mark.rest
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
        counts = confusion(all_cosmic(image), label)
        counts[..., 0, 0] = 0  # pixels without charge
        assert found.baseline == scores(counts)
        with Tagger(net, Running()) as tagger:
            assert found.ungated == scores(confusion(tagger(image), label))


@pytest.mark.parametrize("running", [Running(precision="bfloat16"), Running(downsample=1)], ids=["bfloat16", "half"])
def test_other_ways_to_run(engine, recipe, small_events, tmp_path, running):
    small_enough = replace(recipe, network=replace(recipe.network, depth=2), steps=2)
    with EventFile(small_events) as events:
        trained = train(small_enough, events, tmp_path / "a", running, validation=events)
    assert trained.steps == 2
    assert trained.memory.projected


@pytest.mark.rest
def test_a_training_that_ended_before_its_first_checkpoint_begins_again(
    engine, recipe, small_events, tmp_path, monkeypatch
):
    def ends(*_, **__):
        raise KeyboardInterrupt

    with EventFile(small_events) as events:
        train(recipe, events, tmp_path / "a", Running())
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(weights, "save_file", ends)
            train(recipe, events, tmp_path / "b", Running())
        with pytest.raises(DataError, match="was trained with loss = light, not none"):
            train(replace(recipe, loss="none"), events, tmp_path / "b", Running(), resume=True)
        train(recipe, events, tmp_path / "b", Running(), resume=True)
    a, b = (load_file(tmp_path / x / "checkpoint.safetensors") for x in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [line["step"] for line in read_log(tmp_path / "b")] == [1, 2, 3, 4]


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_a_training_that_diverged_goes_on_with_a_smaller_rate(engine, recipe, small_events, tmp_path):
    with EventFile(small_events) as events:
        train(replace(recipe, steps=1), events, tmp_path / "a", Running())
        with pytest.raises(ArithmeticError, match="resume with a smaller learning rate"):
            train(
                replace(recipe, learning_rate=1e30, validate_every=9), events, tmp_path / "a", Running(), resume=True
            )
        assert train(recipe, events, tmp_path / "a", Running(), resume=True).steps == 4


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_other_events_and_a_folder_at_work_are_refused(engine, recipe, small_events, tmp_path):
    with writing(tmp_path / "others.h5") as out:
        for number in range(3):
            out.append(simulate_numbered(8, number, Detector().coarser(16)))
    with EventFile(small_events) as events, EventFile(tmp_path / "others.h5") as others:
        train(replace(recipe, steps=1), events, tmp_path / "a", Running())
        with pytest.raises(DataError, match="was trained on other events"):
            train(recipe, others, tmp_path / "a", Running(), resume=True)
        with locked(tmp_path / "a"), pytest.raises(BlockingIOError, match="another process works in it"):
            train(recipe, events, tmp_path / "a", Running(), resume=True)
        assert train(recipe, events, tmp_path / "a", Running(), resume=True).steps == 4


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_weights_say_where_they_come_from_and_the_best_are_kept(engine, recipe, small_events, tmp_path):
    network = replace(recipe.network, depth=2)
    with EventFile(small_events) as events:
        train(replace(recipe, network=network), events, tmp_path / "a", Running(downsample=1), validation=events)
        origin = load_origin(tmp_path / "a" / "best.safetensors")
        assert origin == Origin(downsample=1, precision="float32", data=events.fingerprint())
        best = evaluate(Tagger(load_weights(tmp_path / "a" / "best.safetensors"), Running(downsample=1)), events)
    found = [line["validation"]["network"]["mean_iou"] for line in read_log(tmp_path / "a") if "validation" in line]
    assert best.network.mean_iou == max(found)


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_trainings_side_by_side(engine, recipe, small_events, tmp_path):
    with EventFile(small_events) as events:
        train(replace(recipe, flips=True), events, tmp_path / "a", Running(), validation=events)
        train(replace(recipe, steps=2), events, tmp_path / "b", Running())
    text = compare([tmp_path / "a", tmp_path / "b"])
    best = max(line["validation"]["network"]["mean_iou"] for line in read_log(tmp_path / "a") if "validation" in line)
    assert f"{best:.4f}" in text
    assert "  flips: True | False" in text and "  steps: 4 | 2" in text and "loss:" not in text
    with pytest.raises(DataError, match="holds no training"):
        compare([tmp_path / "a", tmp_path])
    (tmp_path / "b" / "recipe.json").write_text("[]")
    with pytest.raises(DataError, match="is not the recipe of a training"):
        compare([tmp_path / "b"])


def test_weights_of_nan_are_refused(small, tmp_path):
    net = UResNet(small)
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] = float("nan")
    save_weights(net, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match="NaN or infinite"):
        load_weights(tmp_path / "w.safetensors")


def test_time_limit_ends_with_a_checkpoint(engine, recipe, small_events, tmp_path):
    with EventFile(small_events) as events:
        trained = train(replace(recipe, steps=1000, minutes=1e-9), events, tmp_path / "a", Running())
    assert trained.steps == 1
    assert (tmp_path / "a" / "checkpoint.safetensors").is_file()


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
        {"schedule": "steps"},
        {"warmup": -1},
        {"checkpoint_every": 0},
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
    assert load_weights(tmp_path / "public.ckpt").config == small  # by its shapes
    with pytest.raises(DataError, match="does not fit the network"):
        load_weights(tmp_path / "public.ckpt", "polaris")


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_as_the_public_trainer_writes_it(old, small, tmp_path):
    """Its optimiser and scheduler keep NumPy's numbers."""
    net = UResNet(small)
    optimizer = torch.optim.Adam(net.parameters(), lr=np.float64(1e-3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(0.5))
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    numbers = {kind: np.dtype(kind).type(1) for kind in ("f4", "f8", "i4", "i8", "?")}
    content = {"global_step": np.int64(7), "state_dict": net.state_dict(), "optimizer": optimizer.state_dict(),
               "scheduler": scheduler.state_dict(), "more": numbers}  # fmt: skip
    path = tmp_path / "model-7.ckpt"
    torch.save(content, path)
    if old:
        renamed(path)
    back = load_weights(path, "a21")
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in net.state_dict().items())


def renamed(path):
    """As NumPy 1 named its module."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in parts.items():
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            file.writestr(name, data)


@pytest.mark.parametrize("where", ["alone", "beside weights"])
def test_a_foreign_checkpoint_does_not_run_code(where, small, tmp_path):
    content = Payload(tmp_path / "ran")
    if where == "beside weights":
        content = {"state_dict": UResNet(small).state_dict(), "optimizer": content}
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(DataError, match=r"nor a checkpoint of tensors: it holds \S+, which might be code"):
        load_weights(tmp_path / "model.ckpt", "a21")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists(), "it would have"


def test_weights_that_are_none(tmp_path):
    (tmp_path / "a").write_text("no weights")
    with pytest.raises(DataError, match="neither safetensors nor a checkpoint"):
        load_weights(tmp_path / "a", "a21")
    with pytest.raises(DataError, match="no such file"):
        load_weights(tmp_path / "b")


@pytest.mark.rest
def test_report_holds_everything_in_one_file(engine, recipe, small_events, tmp_path):
    said = train_with_report(Run(Files(small_events, tmp_path / "a", small_events), recipe, Running(budget="1 GB")))
    page = (tmp_path / "a" / "report.html").read_text()
    assert "mIoU" in said
    assert "mIoU" in page and 'src="http' not in page
    assert (tmp_path / "a" / "plan.txt").read_text().splitlines()[0] in page
    for word in ("every charged pixel cosmic", "projected by the plan", "measured in the first step", "1 GB"):
        assert word in page
    recorded = json.loads((tmp_path / "a" / "recipe.json").read_text())
    assert recorded["budget"] == "1 GB"
