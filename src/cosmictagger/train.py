"""Training: one loop, one folder that holds all it leaves.

    recipe.json             what was asked for
    log.jsonl               one line per step and per validation
    checkpoint.safetensors  where to go on from
    weights.safetensors     the network so far, to release or to evaluate
    best.safetensors        the network with the best mean IoU of a validation so far
    plan.txt                how the engine runs a step, printed before the first one

A resumed training takes the steps that an uninterrupted one would have taken, with the same events in the same order.
"""

import json
import math
import time
from contextlib import ExitStack, closing
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Adam

from cosmictagger import engine
from cosmictagger.atomic import locked, replacing
from cosmictagger.batches import Batch, Crop, batch_of, cut, flipped_at_random, indices_of_step
from cosmictagger.checkpoint import NAME as CHECKPOINT
from cosmictagger.checkpoint import load_checkpoint, save_checkpoint
from cosmictagger.data import DataError
from cosmictagger.evaluate import Running, Tagger, check_shape_suits, check_suits, evaluate
from cosmictagger.files import Events, ahead
from cosmictagger.memory import PeakMemory
from cosmictagger.metrics import confusion, scores
from cosmictagger.model import UResNet, expect_background
from cosmictagger.objective import PlaneLoss, TaggedLoss
from cosmictagger.progress import Say, silent
from cosmictagger.recipe import Recipe
from cosmictagger.weights import Origin, not_finite, save_weights

BEST = "best.safetensors"


@dataclass(frozen=True)
class Memory:
    """Bytes a training step adds to parameters and gradients: promised by the plan, and seen. None: not known."""

    budget: str | None
    projected: int | None
    measured: int | None


@dataclass(frozen=True)
class Trained:
    """What a training came to."""

    steps: int
    seconds: float
    memory: Memory


@dataclass
class _State:
    """What changes while training."""

    net: UResNet
    optimizer: Adam
    step: int = 0


def train(
    recipe: Recipe,
    events: Events,
    out: Path,
    running: Running,
    *,
    validation: Events | None = None,
    resume: bool = False,
    say: Say = silent,
) -> Trained:
    """Train and leave everything in the folder `out`.

    Nothing is written before the data, the plan and the budget are known to be good. Raises DataError for events or
    a folder that cannot be used, ValueError for a budget too small, and ArithmeticError if the loss is not finite.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is not a folder")
    with ExitStack() as held:
        if out.exists():
            held.enter_context(locked(out))
        return _train(recipe, (events, validation, out), running, resume, say, held)


def _train(
    recipe: Recipe,
    files: tuple[Events, Events | None, Path],
    running: Running,
    resume: bool,
    say: Say,
    held: ExitStack,
) -> Trained:
    """The same in a folder that nobody else works in, or that is yet to be made."""
    events, validation, out = files
    torch.manual_seed(recipe.seed)
    described = _described(recipe, running, events.fingerprint())
    state = _start(recipe, out, running, described if resume else None)
    check_shape_suits(events, recipe.crop or events.shape, state.net, running)
    if validation is not None:
        check_suits(validation, state.net, running)
        for index in range(_scored(recipe, validation)):
            validation[index]  # a bad event is found before hours of training, not after
    step = engine.training_step(state.net, TaggedLoss(PlaneLoss(recipe.loss)), running.budget, running.threads)
    plan, projected = _plan(step, _batch(recipe, 0, events, running), running)
    if not out.exists():
        out.mkdir(parents=True)
        held.enter_context(locked(out))
    _write(out / "recipe.json", json.dumps(described, indent=2) + "\n")
    _write(out / "plan.txt", plan + "\n")
    seconds, measured = _loop(recipe, state, step, files, running, say, held)
    return Trained(state.step, seconds, Memory(running.budget, projected, measured))


def _loop(
    recipe: Recipe,
    state: _State,
    step: engine.Step,
    files: tuple[Events, Events | None, Path],
    running: Running,
    say: Say,
    held: ExitStack,
) -> tuple[float, int | None]:
    """Take the steps; returns seconds, and the bytes that the first step added."""
    events, validation, out = files
    origin = Origin(running.downsample, running.precision, events.fingerprint())
    log = _Log(out / "log.jsonl", state.step)
    best = max((v["network"]["mean_iou"] for v in log.validations()), default=-1.0)

    tagger = Tagger(state.net, running) if validation is not None else None
    if tagger is not None and validation is not None and recipe.validate_first and state.step == 0:
        log.add({"step": 0, "validation": evaluate(tagger, validation, first=recipe.validation_events).as_dict()})
    start, measured, late = time.monotonic(), None, False
    load = partial(_batch, recipe, events=events, running=replace(running, device=torch.device("cpu")))
    # nothing is read during the first step, so that its memory is its own
    batches = held.enter_context(closing(ahead(load, range(state.step, recipe.steps), alone=1)))
    while state.step < recipe.steps and not late:
        asked = time.monotonic()
        batch = next(batches).to(running.device)
        waited = time.monotonic() - asked
        _set_rate(state.optimizer, recipe.rate(state.step, time.monotonic() - start))
        line, added = _one_step(step, state, batch, running, measured is None)
        line["waited"] = round(waited, 4)
        measured = added if measured is None else measured
        log.add(line)
        text = f"loss {line['loss']:.4f}  mIoU {line['train']['mean_iou']:.3f}  {line['seconds']:.1f} s/step"
        say(state.step, recipe.steps, text)
        late = recipe.minutes is not None and time.monotonic() - start > 60 * recipe.minutes
        if late or state.step % recipe.validate_every == 0 or state.step == recipe.steps:
            if tagger is not None and validation is not None:
                found = evaluate(tagger, validation, first=recipe.validation_events).as_dict()
                log.add({"step": state.step, "validation": found})
                if found["network"]["mean_iou"] > best:
                    best = found["network"]["mean_iou"]
                    save_weights(state.net, out / BEST, origin)
            _save(state, out, origin)
        elif recipe.saves(state.step):
            _save(state, out, origin)
    return time.monotonic() - start, measured


def seconds_per_step(recipe: Recipe, events: Events, running: Running) -> float:
    """How long a step of a recipe takes here, once it has been recorded. Nothing is kept of it."""
    net = UResNet(recipe.network)
    state = _State(net, Adam(net.parameters(), recipe.learning_rate))
    step = engine.training_step(net, TaggedLoss(PlaneLoss(recipe.loss)), running.budget, running.threads)
    taken = [
        _one_step(step, state, _batch(recipe, k, events, running), running, False)[0]["seconds"] for k in range(4)
    ]
    return min(taken[2:])  # the first records, and the second notes what the others repeat


def read_log(out: Path) -> list[dict]:
    """The lines of a training's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _set_rate(optimizer: Adam, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _one_step(
    step: engine.Step, state: _State, batch: Batch, running: Running, measure: bool
) -> tuple[dict, int | None]:
    """Take a training step; returns its line of the log and, if asked, the bytes it added."""
    began = time.monotonic()
    without_gradients = all(p.grad is None for p in state.net.parameters())
    with PeakMemory(running.device, wanted=measure) as peak:
        with running.autocast():
            loss, tags = step(batch.image, _truth(batch))
        loss.backward()
    added = peak.added
    if added is not None and without_gradients:
        # gradients are the user's, whoever computes them
        added = max(0, added - sum(p.grad.nbytes for p in state.net.parameters() if p.grad is not None))
    value = loss.item()
    if not math.isfinite(value):
        raise ArithmeticError(
            f"the loss is {value} at step {state.step + 1}; resume with a smaller learning rate than {_rate(state):g}"
        )
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    found = scores(confusion(tags, _truth(batch))).as_dict()
    seconds = round(time.monotonic() - began, 3)
    return {"step": state.step, "loss": value, "rate": _rate(state), "seconds": seconds, "train": found}, added


def _rate(state: _State) -> float:
    return state.optimizer.param_groups[0]["lr"]


def _truth(batch: Batch) -> Tensor:
    if batch.label is None:
        raise DataError("training needs events with labels")
    return batch.label


def _scored(recipe: Recipe, validation: Events) -> int:
    """How many events a validation scores: the first so many, always the same."""
    count = len(validation)
    return count if recipe.validation_events is None else min(recipe.validation_events, count)


def _batch(recipe: Recipe, step: int, events: Events, running: Running) -> Batch:
    indices = indices_of_step(step, recipe.batch, len(events), recipe.seed)
    crop = None if recipe.crop is None else Crop(recipe.crop, (recipe.seed, step))
    found = [events[index] for index in indices]
    if crop is not None:
        found = [cut(event, crop, index) for event, index in zip(found, indices, strict=True)]
    if recipe.flips:
        found = [flipped_at_random(e, (recipe.seed, step, k)) for k, e in enumerate(found)]
    return batch_of(found, downsample=running.downsample, device=running.device)


def _plan(step: engine.Step, batch: Batch, running: Running) -> tuple[str, int | None]:
    """The printed plan of a step and the bytes it promises. Raises ValueError if the budget is too small."""
    with running.autocast():
        plan = step.plan(batch.image, _truth(batch))
    return str(plan), plan.projected_bytes


def _described(recipe: Recipe, running: Running, data: str) -> dict:
    """What must not change when a training goes on, and what may."""
    described = asdict(recipe)
    described.update(precision=running.precision, downsample=running.downsample, budget=running.budget, data=data)
    return json.loads(json.dumps(described))


# The learning rate may, so that a training that diverged can go on with a smaller one.
_MAY_CHANGE = (
    "steps", "learning_rate", "validate_every", "checkpoint_every", "validate_first", "validation_events", "minutes",
    "budget",
)  # fmt: skip
_DEFAULTS = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}


def _start(recipe: Recipe, out: Path, running: Running, resumed: dict | None) -> _State:
    """A new network, or the one of the folder's checkpoint, if its training is the one that `resumed` describes."""
    net = UResNet(recipe.network)
    if recipe.background is not None:
        expect_background(net, recipe.background)
    net = net.to(running.device)
    state = _State(net, Adam(net.parameters(), recipe.learning_rate))
    kept = out / CHECKPOINT
    if resumed is None:
        if kept.exists() or (out / "log.jsonl").exists():
            raise DataError(f"{out}: holds a training already; go on with --resume, or name another folder")
        return state
    old = (out / "checkpoint").is_dir()
    if not (kept.exists() or old) and (out / "recipe.json").is_file():
        _check_described(resumed, out)
        return state  # it ended before its first checkpoint
    if not kept.is_file():
        raise DataError(
            f"{out}: no checkpoint to resume from" + ", but for an older one, which could hold code" * old
        )
    _check_described(resumed, out)
    state.step = load_checkpoint(kept, state.net, state.optimizer)
    return state


def _check_described(asked: dict, out: Path) -> None:
    """Raise DataError unless the training of a folder is the one that is asked for."""
    try:
        before = json.loads((out / "recipe.json").read_text())
        before = {**_DEFAULTS, **before}  # an older version knew fewer settings
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{out / 'recipe.json'}: cannot be read, so nothing can be resumed") from error
    for key, value in asked.items():
        if key == "data" and before.get(key) != value:
            raise DataError(f"{out}: was trained on other events; resume it on those")
        if key not in _MAY_CHANGE and before.get(key) != value:
            raise DataError(f"{out}: was trained with {key} = {before.get(key)}, not {value}")


def _save(state: _State, out: Path, origin: Origin) -> None:
    """Checkpoint and weights; an interruption leaves the ones before, and so do weights that are not numbers."""
    problem = not_finite(state.net.state_dict())
    if problem:
        raise ArithmeticError(f"{problem} after step {state.step}; resume with a smaller learning rate")
    save_checkpoint(out / CHECKPOINT, state.net, state.optimizer, state.step)
    save_weights(state.net, out / "weights.safetensors", origin)


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text)


class _Log:
    """JSON lines, each on disk as soon as it is added; lines after `step` are of a training that was cut off."""

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text().splitlines() if step and path.exists() else []
        _write(path, "".join(line + "\n" for line in lines if _step_of(line) <= step))
        self._path = path
        self._validations = [json.loads(line) for line in path.read_text().splitlines() if '"validation"' in line]

    def validations(self) -> list[dict]:
        """Scores before this training went on."""
        return [line["validation"] for line in self._validations]

    def add(self, line: dict) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # half a line, from when the machine stopped
