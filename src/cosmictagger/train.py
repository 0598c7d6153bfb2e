"""Training: one loop, one folder that holds all it leaves.

    recipe.json             what was asked for, as a training that goes on compares it
    config.yaml             the same and where events come from, for `cosmictagger train --config`
    log.jsonl               one line per step and per validation
    checkpoint.safetensors  where to go on from
    weights.safetensors     the network so far, to release or to evaluate
    best.safetensors        the network with the best mean IoU of a validation so far
    plan.txt                how the engine runs a step, printed before the first one
    cost.json               on how many events, and bytes that a step adds: promised, and seen in the first step

A resumed training takes the steps that an uninterrupted one would have taken, with the same events in the same order.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch.optim import Optimizer

from cosmictagger.atomic import locked, named, replacing, swept
from cosmictagger.board import Board, check_installed
from cosmictagger.checkpoint import NAME as CHECKPOINT
from cosmictagger.checkpoint import load_checkpoint, save_checkpoint
from cosmictagger.data import DataError
from cosmictagger.evaluate import Running, Tagger, check_shape_suits, check_suits, evaluate
from cosmictagger.files import Events, ahead
from cosmictagger.metrics import scores
from cosmictagger.model import UResNet, expect_background
from cosmictagger.optimizers import build_optimizer
from cosmictagger.parts import Part, Steps, part_of
from cosmictagger.progress import Say, silent
from cosmictagger.recipe import Recipe, completed
from cosmictagger.schedules import Rates
from cosmictagger.weights import Origin, not_finite, save_weights

BEST, COST = "best.safetensors", "cost.json"
_WRITTEN = {"recipe.json", "plan.txt", "log.jsonl", CHECKPOINT, "weights.safetensors", BEST, COST}


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


@dataclass(frozen=True)
class Beside:
    """What goes along with a training."""

    say: Say = silent
    """Told after each step."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text of more files that the folder is to hold."""
    tensorboard: bool = False
    """Write the log for TensorBoard, too; see `board`."""


@dataclass
class _State:
    """What changes while training."""

    net: UResNet
    optimizer: Optimizer
    rates: Rates
    step: int = 0


_ALONE = Beside()


def train(
    recipe: Recipe,
    events: Events,
    out: Path,
    running: Running,
    *,
    validation: Events | None = None,
    resume: bool = False,
    beside: Beside = _ALONE,
) -> Trained:
    """Train and leave everything in the folder `out`.

    Nothing is written before the data, the plan and the budget are known to be good. Raises DataError for events or
    a folder that cannot be used, ValueError for a budget too small, and ArithmeticError if the loss is not finite.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is not a folder")
    with ExitStack() as held:
        if out.exists() and running.world.first:
            held.enter_context(locked(out))
        return _train(recipe, (events, validation, out), running, resume, beside, held)


def _train(
    recipe: Recipe,
    files: tuple[Events, Events | None, Path],
    running: Running,
    resume: bool,
    beside: Beside,
    held: ExitStack,
) -> Trained:
    """The same in a folder that nobody else works in, or that is yet to be made."""
    events, validation, out = files
    if beside.tensorboard:
        check_installed()
    torch.manual_seed(recipe.seed)
    described = _described(recipe, running, events.fingerprint())
    state = _start(recipe, out, running, described if resume else None)
    check_shape_suits(events, recipe.crop or events.shape, state.net, running)
    if validation is not None:
        check_suits(validation, state.net, running)
        for index in range(_scored(recipe, validation)):
            validation[index]  # a bad event is found before hours of training, not after
    if state.rates.follows_scores and validation is None:
        raise ValueError(f"schedule {recipe.schedule} follows the scores of validations: name validation events")
    steps = Steps(state.net, recipe, running)
    # Processes that train together agree on the plan here, so that all have looked at the folder before one writes.
    plan, projected = steps.plan(part_of(0, recipe, events, running))
    promised = Memory(running.budget, projected, None)
    if running.world.first:
        if not out.exists():
            out.mkdir(parents=True)
            held.enter_context(locked(out))
        swept(out, _WRITTEN | set(beside.files))
        texts = {"recipe.json": json.dumps(described, indent=2) + "\n", "plan.txt": plan + "\n", **beside.files}
        for name, text in texts.items():
            _write(out / name, text)
        _write_cost(out, promised, events)
    seconds, measured = _loop(recipe, state, steps, files, running, beside, held)
    memory = replace(promised, measured=measured)
    if running.world.first:
        _write_cost(out, memory, events)
    return Trained(state.step, seconds, memory)


def _write_cost(out: Path, memory: Memory, events: Events) -> None:
    _write(out / COST, json.dumps({"events": len(events), **asdict(memory)}) + "\n")


def _loop(
    recipe: Recipe,
    state: _State,
    steps: Steps,
    files: tuple[Events, Events | None, Path],
    running: Running,
    beside: Beside,
    held: ExitStack,
) -> tuple[float, int | None]:
    """Take the steps; returns seconds, and the bytes that the first step added."""
    events, validation, out = files
    origin = Origin(running.downsample, running.precision, events.fingerprint())
    world = running.world
    board = held.enter_context(Board(out, state.step)) if beside.tensorboard and world.first else None
    log = _Log(out / "log.jsonl", state.step, board) if world.first else _NoLog()
    best = max((v["network"]["mean_iou"] for v in log.validations()), default=-1.0)

    tagger = Tagger(state.net, running) if validation is not None else None
    if tagger is not None and validation is not None and recipe.validate_first and state.step == 0:
        log.add({"step": 0, "validation": evaluate(tagger, validation, first=recipe.validation_events).as_dict()})
    start, measured, late = time.monotonic(), None, False

    def spent() -> float:
        return world.agreed(time.monotonic() - start)

    load = partial(part_of, recipe=recipe, events=events, running=replace(running, device=torch.device("cpu")))
    numbers = steps.numbers(state.step, recipe.steps)
    # nothing is read during the first part that is learned from, so that its memory is its own
    coming = _Coming(held.enter_context(closing(ahead(load, numbers, alone=steps.before + 1))), running.device)
    while state.step < recipe.steps and not late:
        state.rates.before(state.step, spent())
        line, added = _one_step(steps, state, coming, measured is None)
        measured = added if measured is None else measured
        log.add(line)
        text = f"loss {line['loss']:.4f}  mIoU {line['train']['mean_iou']:.3f}  {line['seconds']:.1f} s/step"
        beside.say(state.step, recipe.steps, text)
        late = recipe.minutes is not None and spent() > 60 * recipe.minutes
        if late or state.step % recipe.validate_every == 0 or state.step == recipe.steps:
            if tagger is not None and validation is not None:
                found = evaluate(tagger, validation, first=recipe.validation_events).as_dict()
                log.add({"step": state.step, "validation": found})
                if state.step % recipe.validate_every == 0:  # others come from where a training was to end
                    state.rates.scored(found["network"]["mean_iou"])
                if found["network"]["mean_iou"] > best:
                    best = found["network"]["mean_iou"]
                    if world.first:
                        save_weights(state.net, out / BEST, origin)
            _save(state, out, origin, world.first)
        elif recipe.saves(state.step):
            _save(state, out, origin, world.first)
    return time.monotonic() - start, measured


def seconds_per_step(recipe: Recipe, events: Events, running: Running) -> float:
    """How long a step of a recipe takes here, once it has been recorded. Nothing is kept of it."""
    state = _new(recipe, running)
    steps = Steps(state.net, recipe, running)
    parts = (part_of(number, recipe, events, running) for number in steps.numbers(0, 4))
    coming = _Coming(parts, running.device)
    taken = [_one_step(steps, state, coming, False)[0]["seconds"] for _ in range(4)]
    return min(taken[2:])  # the first records, and the second notes what the others repeat


def read_log(out: Path) -> list[dict]:
    """The lines of a training's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class _Coming:
    """Parts as they come, on the device; `waited` adds up the seconds until they do."""

    def __init__(self, parts: Iterator[Part], device: torch.device) -> None:
        self._parts, self._device, self.waited = parts, device, 0.0

    def __iter__(self) -> "_Coming":
        return self

    def __next__(self) -> Part:
        asked = time.monotonic()
        part = next(self._parts).to(self._device)
        self.waited += time.monotonic() - asked
        return part


def _one_step(steps: Steps, state: _State, coming: _Coming, measure: bool) -> tuple[dict, int | None]:
    """Take a training step; returns its line of the log and, if asked, the bytes it added."""
    began, coming.waited = time.monotonic(), 0.0
    without_gradients = all(p.grad is None for p in state.net.parameters())
    taken = steps.take(coming, measure=measure)
    value, added = taken.loss, taken.added
    if added is not None and without_gradients:
        # gradients are the user's, whoever computes them
        added = max(0, added - sum(p.grad.nbytes for p in state.net.parameters() if p.grad is not None))
    if not math.isfinite(value):
        raise ArithmeticError(
            f"the loss is {value} at step {state.step + 1}; resume with a smaller learning rate than {_rate(state):g}"
        )
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    found = scores(taken.counts).as_dict()
    line = {"step": state.step, "loss": value, "rate": _rate(state)}
    seconds = round(time.monotonic() - began - coming.waited, 3)
    return {**line, "seconds": seconds, "waited": round(coming.waited, 4), "train": found}, added


def _rate(state: _State) -> float:
    return state.optimizer.param_groups[0]["lr"]


def _scored(recipe: Recipe, validation: Events) -> int:
    """How many events a validation scores: the first so many, always the same."""
    count = len(validation)
    return count if recipe.validation_events is None else min(recipe.validation_events, count)


def _described(recipe: Recipe, running: Running, data: str) -> dict:
    """What must not change when a training goes on, and what may."""
    described = asdict(recipe)
    described.update(precision=running.precision, downsample=running.downsample, budget=running.budget, data=data)
    described.update(disk=running.disk, folder=running.folder)
    return json.loads(json.dumps(described))


# The learning rate may, so that a training that diverged can go on with a smaller one.
_MAY_CHANGE = (
    "steps", "learning_rate", "validate_every", "checkpoint_every", "validate_first", "validation_events", "minutes",
    "budget", "disk", "folder",
)  # fmt: skip


def _new(recipe: Recipe, running: Running) -> _State:
    """An untrained network. Raises ValueError for values that its optimiser or its schedule does not take."""
    net = UResNet(recipe.network)
    if recipe.background is not None:
        expect_background(net, recipe.background)
    net = net.to(running.device)
    optimizer = build_optimizer(recipe.optimizer, recipe.optimizer_arguments, net.parameters(), recipe.learning_rate)
    return _State(net, optimizer, Rates(recipe, optimizer))


def _start(recipe: Recipe, out: Path, running: Running, resumed: dict | None) -> _State:
    """A new network, or the one of the folder's checkpoint, if its training is the one that `resumed` describes."""
    state = _new(recipe, running)
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
        why = ", but for an older one, which could hold code" if old else "; leave --resume out to begin a training"
        raise DataError(f"{out}: no checkpoint to resume from{why}")
    _check_described(resumed, out)
    state.step, schedule = load_checkpoint(kept, state.net, state.optimizer)
    try:
        state.rates.load(schedule)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{kept}: does not fit the training: its schedule is not {recipe.schedule}") from error
    return state


def _check_described(asked: dict, out: Path) -> None:
    """Raise DataError unless the training of a folder is the one that is asked for."""
    try:
        before = json.loads((out / "recipe.json").read_text())
        before = completed(before)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{out / 'recipe.json'}: cannot be read, so nothing can be resumed") from error
    for key, value in asked.items():
        if key == "data" and before.get(key) != value:
            raise DataError(f"{out}: was trained on other events; resume it on those")
        if key not in _MAY_CHANGE and before.get(key) != value:
            raise DataError(f"{out}: was trained with {key} = {before.get(key)}, not {value}")


def _save(state: _State, out: Path, origin: Origin, writes: bool) -> None:
    """Checkpoint and weights; an interruption leaves the ones before, and so do weights that are not numbers."""
    problem = not_finite(state.net.state_dict())
    if problem:
        raise ArithmeticError(f"{problem} after step {state.step}; resume with a smaller learning rate")
    if not writes:
        return
    save_checkpoint(out / CHECKPOINT, state.net, state.optimizer, state.step, state.rates.state())
    save_weights(state.net, out / "weights.safetensors", origin)


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text)


class _Log:
    """JSON lines, each on disk as soon as it is added; lines after `step` are of a training that was cut off."""

    def __init__(self, path: Path, step: int, board: Board | None) -> None:
        lines = path.read_text().splitlines() if step and path.exists() else []
        _write(path, "".join(line + "\n" for line in lines if _step_of(line) <= step))
        self._path, self._board = path, board
        self._validations = [json.loads(line) for line in path.read_text().splitlines() if '"validation"' in line]

    def validations(self) -> list[dict]:
        """Scores before this training went on."""
        return [line["validation"] for line in self._validations]

    def add(self, line: dict) -> None:
        with named(self._path), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            self._board.add(line)


class _NoLog:
    """Of a process that leaves writing to another."""

    def validations(self) -> list[dict]:
        return []

    def add(self, line: dict) -> None:
        pass


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # half a line, from when the machine stopped
