"""The command line: `cosmictagger simulate | train | evaluate | predict | report | compare | demo`."""

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import App, CycloptsError, Parameter

import fullframe
from cosmictagger.atomic import replacing
from cosmictagger.compare import compare
from cosmictagger.config import NAME, overridden, read, run_of
from cosmictagger.data import DataError, EventFile
from cosmictagger.demo import DEMO, run_demo
from cosmictagger.evaluate import Evaluation, Running, Tagger, check_suits, evaluate, evaluate_tags, predict
from cosmictagger.files import files_of, open_events
from cosmictagger.progress import progress
from cosmictagger.report import SCORES
from cosmictagger.runs import recorded
from cosmictagger.session import SHOWN, WEIGHTS, Showing, report_run, simulate_file, train_with_report
from cosmictagger.weights import Origin, load_origin, load_weights
from cosmictagger.world import World, joined

app = App(
    name="cosmictagger",
    help="Tag cosmic-ray and neutrino pixels in three-plane wire images, at full resolution within a memory budget.",
    help_format="plaintext",
    version=fullframe.__version__,
)


@Parameter(name="*")
@dataclass(frozen=True)
class RunningOptions:
    """How the network runs."""

    budget: str | None = None
    """Memory for a step beyond parameters and gradients, e.g. "8 GB". Default: what is free."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Arithmetic. Default: that of the weights, or float32."""
    downsample: Literal[0, 1] | None = None
    """0: full resolution. 1: half of it, charge averaged, labels the largest of four. Default: as for the weights, or
    0."""
    device: Literal["cpu", "cuda"] | None = None
    """Where to compute. Default: cpu."""
    disk: str | None = None
    """Room on a disk for maps that do not fit the budget, e.g. "60 GB". Default: none."""
    folder: str | None = None
    """Where they lie there. Default: the temporary folder."""

    def running(self, weights: Path | None = None) -> Running:
        """How to run, as weights were trained; refused where something else is asked for."""
        origin = None if weights is None else load_origin(weights)
        for name in ("precision", "downsample"):
            asked = getattr(self, name)
            if origin is not None and asked is not None and asked != getattr(origin, name):
                was = getattr(origin, name)
                raise DataError(f"{weights}: was trained with {name} = {was}, not {asked}; leave --{name} out")
        origin = origin or Origin()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise DataError("no CUDA device was found; leave --device out to compute on the CPU")
        precision, downsample = self.precision or origin.precision, self.downsample
        downsample = origin.downsample if downsample is None else downsample
        device = torch.device(self.device or "cpu")
        return Running(self.budget, precision, downsample, device, disk=self.disk, folder=self.folder)


@Parameter(name="*")
@dataclass(frozen=True)
class TrainingOptions:
    """What is trained, and for how long."""

    validation: Path | None = None
    """Events, named as those to train on, that are not trained on."""
    variant: Literal["uresnet", "a21", "scc21", "polaris"] | None = None
    """Network. Default: uresnet."""
    loss: Literal["none", "light", "even", "focal"] | None = None
    """Weights of the pixels: none, by class (light), by class frequency (even), by difficulty (focal). Default:
    light."""
    optimizer: str | None = None
    """One of torch.optim. Default: Adam."""
    learning_rate: float | None = None
    """Of the optimizer, once warm. Default: 3e-4."""
    batch: int | None = None
    """Events that go through the network together. Default: 1."""
    accumulate: int | None = None
    """Batches whose gradients make a step, which is that of one large batch but for batch norm. Default: 1."""
    steps: int | None = None
    """Training steps in all, those before a resume included. Default: 1000."""
    minutes: float | None = None
    """Stop after the step that passes this time. Default: no limit."""
    schedule: str | None = None
    """How the learning rate goes: constant; linear or cosine, to zero by the last step or the end of the minutes; or
    one of torch.optim.lr_scheduler. Default: constant."""
    warmup: int | None = None
    """Steps over which the learning rate rises first. Default: 0."""
    flips: bool | None = None
    """Mirror events along the drift and turn them about it, at random. Default: no."""
    validate_every: int | None = None
    """Steps between validations; a checkpoint is written each time. Default: 100."""
    validation_events: int | None = None
    """Score the first so many of the validation events. Default: all of them."""
    tensorboard: bool | None = None
    """Write the log for TensorBoard, too, into a folder of OUT. Default: no."""
    seed: int | None = None
    """Of the initial weights and the order of events. Default: 0."""


@Parameter(name="*")
@dataclass(frozen=True)
class FileOptions:
    """Settings from a file."""

    config: Path | None = None
    """YAML file of settings: all that the options here say, by the same names, and more (docs/training.md). What the
    command line says comes before it."""
    set: Annotated[list[str], Parameter(negative=())] = field(default_factory=list)
    """A setting by its name in such a file, e.g. "optimizer.weight_decay=0.01" or "network.depth=5"; may be repeated,
    and comes before all others."""


_TRAINING, _RUNNING, _FILE = TrainingOptions(), RunningOptions(), FileOptions()


@app.command(name="simulate")
def simulate_command(out: Path, *, events: int = 10, seed: int = 0, first: int = 0) -> None:
    """Simulate events with their truth: cosmic muons over one neutrino interaction.

    Parameters
    ----------
    out
        larcv3 HDF5 file to write.
    events
        How many.
    seed
        Of the sample; the same seed and number give the same event.
    first
        Number of the first event.
    """
    if events < 1 or seed < 0 or first < 0:
        raise DataError("--events must be at least 1, --seed and --first at least 0")
    simulate_file(out, events, seed, first=first)
    print(f"{events} events in {out}")


@app.command(name="train")
def train_command(
    events: Path | None = None,
    out: Path | None = None,
    *,
    resume: bool = False,
    file: FileOptions = _FILE,
    training: TrainingOptions = _TRAINING,
    running: RunningOptions = _RUNNING,
) -> None:
    """Train a network on events with truth.

    Leaves its settings, a log, a checkpoint, the weights and, with validation events, report.html. Started by
    torchrun, the processes make each step together, each with its rows of every image and a budget of its own.

    Parameters
    ----------
    events
        larcv3 HDF5 file to train on; or a folder of them, a pattern in quotes, or several with commas between.
    out
        Folder for everything the training leaves.
    resume
        Go on with the training that the folder holds, with its settings where nothing else is said.
    """
    options = {"events": events, "out": out, **vars(training), **vars(running)}
    kept = None if out is None or not resume else out / NAME
    source = kept if file.config is None and kept is not None and kept.is_file() else file.config
    settings = {} if source is None else read(source)
    run = run_of(overridden(settings, options, file.set))
    with joined() as world:
        run = replace(run, running=together(run.running, world))
        if world.first:
            print(run.text(), flush=True)
        outcome = train_with_report(run, resume=resume)
        if world.first:
            print(outcome)


def together(running: Running, world: World) -> Running:
    """How each of the processes that train together runs. Raises DataError for what they cannot do."""
    if world.size == 1:
        return running
    if running.budget is None:
        raise DataError(f"{world.size} processes train together: name the budget of each, e.g. --budget '4 GB'")
    if running.device.type != "cpu":
        raise DataError(f"{world.size} processes train together on processors alone; leave --device out")
    if running.disk is not None:
        raise DataError(f"{world.size} processes keep what they store in memory; leave --disk out")
    return replace(running, world=world)


@app.command(name="evaluate")
def evaluate_command(
    events: Path,
    weights: Path | None = None,
    *,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    variant: Literal["uresnet", "a21", "scc21", "polaris"] | None = None,
    connections: Literal["sum", "none"] | None = None,
    running: RunningOptions = _RUNNING,
) -> None:
    """Score a network, or the tags that `predict` has written, on events with truth.

    The score is of what `predict` writes: over pixels with charge, at full resolution. That over all pixels of the
    images that the network takes stands beside it.

    Parameters
    ----------
    events
        larcv3 HDF5 file; or a folder of them, a pattern in quotes, or several with commas between.
    weights
        Weights of a training, or a checkpoint of the public CosmicTagger. Without them the file's tags are scored.
    json_file
        File to write the scores to as well.
    variant
        Network, where neither the weights nor their shapes say it.
    connections
        Whether the network adds its skips or drops them, where the weights' shapes do not say it.
    """
    how = running.running(weights)
    net = None if weights is None else load_weights(weights, variant, connections=connections)
    with ExitStack() as stack:
        part = None if json_file is None else stack.enter_context(replacing(json_file))  # fails before the work
        file = stack.enter_context(open_events(events))
        say = stack.enter_context(progress("evaluating"))
        if net is None:
            found = evaluate_tags(file, say)
        else:
            check_suits(file, net, how)
            found = evaluate(Tagger(net, how), file, say)
        if part is not None:
            part.write_text(json.dumps(found.as_dict(), indent=2) + "\n")
    print(_scores(found))


def _scores(found: Evaluation) -> str:
    """A table: over pixels with charge, the baseline there, and over all pixels where that is known."""
    columns = {"with charge": found.network, "all charge cosmic": found.baseline}
    if found.ungated is not None:
        columns["all pixels"] = found.ungated
    lines = [f"{f'{found.events} events':<30}" + "".join(f"{name:>19}" for name in columns)]
    for key, name in SCORES.items():
        lines.append(f"{name:<30}" + "".join(f"{scores.as_dict()[key]:>19.4f}" for scores in columns.values()))
    return "\n".join(lines)


@app.command(name="predict")
def predict_command(
    events: Path,
    weights: Path,
    out: Path,
    *,
    variant: Literal["uresnet", "a21", "scc21", "polaris"] | None = None,
    connections: Literal["sum", "none"] | None = None,
    running: RunningOptions = _RUNNING,
) -> None:
    """Tag the pixels of events, with or without truth.

    Parameters
    ----------
    events
        larcv3 HDF5 file; or a folder of them, a pattern in quotes, or several with commas between.
    weights
        Weights of a training, or a checkpoint of the public CosmicTagger.
    out
        larcv3 HDF5 file to write: all that the events' file holds, and for each pixel with charge its class, 0, 1
        (cosmic) or 2 (neutrino), and how probable each class is. For several files a folder, in which each keeps its
        name.
    variant
        Network, where neither the weights nor their shapes say it.
    connections
        Whether the network adds its skips or drops them, where the weights' shapes do not say it.
    """
    how = running.running(weights)
    pairs = _pairs(events, out)
    net = load_weights(weights, variant, connections=connections)
    for path, _ in pairs:
        with EventFile(path, labels=False) as file:
            check_suits(file, net, how)
    for path, result in pairs:
        with EventFile(path, labels=False) as file, progress(f"tagging {path.name}") as say:
            predict(Tagger(net, how), file, result, say)
    print(f"{out}: classes are in the product sparse2d_cosmictagger, probabilities in sparse2d_cosmictagger_<class>")


def _pairs(events: Path, out: Path) -> list[tuple[Path, Path]]:
    """Files of events, and where the tags of each go. Raises DataError where one would replace another."""
    paths = files_of(events)
    if len(paths) == 1 and not out.is_dir():
        pairs = [(paths[0], out)]
    else:
        if out.exists() and not out.is_dir():
            raise DataError(f"{out}: is not a folder, which {len(paths)} files of events need")
        pairs = [(path, out / path.name) for path in paths]
    names = [result for _, result in pairs]
    for path, result in pairs:
        if names.count(result) > 1:
            raise DataError(f"{path}: another file has this name, too; name their folders one by one")
        if result.exists() and any(p.exists() and result.samefile(p) for p in paths):
            raise DataError(f"{result}: would replace the events; name another file")
    return pairs


@app.command(name="report")
def report_command(
    run: Path,
    *,
    events: Path | None = None,
    weights: Path | None = None,
    out: Path | None = None,
    displays: int = SHOWN,
    running: RunningOptions = _RUNNING,
) -> None:
    """Write one HTML page on a training: its course, where its network is wrong, and events pixel by pixel.

    Parameters
    ----------
    run
        Folder that `train` has left.
    events
        Events with truth, named as for `train`. Default: the validation events of the training.
    weights
        Weights to score. Default: those after the last checkpoint; the folder's best.safetensors are of the best
        validation.
    out
        The page. Default: report.html in the folder.
    displays
        Events to show, the worst first.
    """
    if displays < 0:
        raise DataError("--displays must be at least 0")
    weights = run / WEIGHTS if weights is None else weights
    recorded_budget = recorded(run)["budget"]
    how = running.running(weights)
    how = replace(how, budget=how.budget or recorded_budget)
    if events is None:
        kept = run / NAME
        found = read(kept).get("validation") if kept.is_file() else None
        if found is None:
            raise DataError(f"{run}: does not say which events it was validated on; name some with --events")
        events = Path(found)
    with open_events(events) as file:
        print(report_run(run, weights, file, how, Showing(displays, file=out)))


@app.command(name="compare")
def compare_command(runs: Annotated[list[Path], Parameter(negative=())], /) -> None:
    """Show trainings side by side: how far they are, their best and last validations, and how their recipes differ.

    Parameters
    ----------
    runs
        Folders that `train` has left.
    """
    print(compare(runs))


@app.command(name="demo")
def demo_command(*, out: Path = Path("out/demo"), minutes: float = DEMO.minutes or 5.0) -> None:
    """Simulate, train at full resolution, evaluate on other events, and write a report.

    Where there is no time for whole events it trains on parts of them, and says so.

    Parameters
    ----------
    out
        Folder for everything; the files of an earlier demonstration are replaced, and nothing else is touched.
    minutes
        Time for all but the last scores and the report, of which half at least is for training.
    """
    print(run_demo(out, minutes))


def main(arguments: list[str] | None = None) -> int:
    """Run a command line. Whatever the user can put right is one line on standard error and status 2."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, ValueError, ArithmeticError, OSError, MemoryError, fullframe.RankError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"cosmictagger: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cosmictagger: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
