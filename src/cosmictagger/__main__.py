"""The command line: `cosmictagger simulate | train | evaluate | predict | demo`."""

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import App, CycloptsError, Parameter

from cosmictagger.atomic import replacing
from cosmictagger.data import DataError, EventFile
from cosmictagger.demo import DEMO, run_demo
from cosmictagger.evaluate import Running, Tagger, check_suits, evaluate, predict
from cosmictagger.progress import progress
from cosmictagger.recipe import Recipe
from cosmictagger.report import SCORES
from cosmictagger.session import Files, simulate_file, train_with_report
from cosmictagger.weights import load_weights, named_variant

app = App(
    name="cosmictagger",
    help="Tag cosmic-ray and neutrino pixels in three-plane wire images, at full resolution within a memory budget.",
    help_format="plaintext",
    version=lambda: version("fullframe"),
)


@Parameter(name="*")
@dataclass(frozen=True)
class RunningOptions:
    """How the network runs."""

    budget: str | None = None
    """Memory for a step beyond parameters and gradients, e.g. "8 GB". Default: what is free."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic."""
    downsample: Literal[0, 1] = 0
    """0: full resolution. 1: half of it, charge averaged, labels the largest of four."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""

    def running(self) -> Running:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise DataError("no CUDA device was found; leave --device out to compute on the CPU")
        return Running(self.budget, self.precision, self.downsample, torch.device(self.device))


@Parameter(name="*")
@dataclass(frozen=True)
class TrainingOptions:
    """What is trained, and for how long."""

    variant: Literal["uresnet", "a21", "scc21", "polaris"] = "uresnet"
    """Network."""
    loss: Literal["none", "light", "even", "focal"] = "light"
    """Weights of the pixels: none, by class (light), by class frequency (even), by difficulty (focal)."""
    learning_rate: float = 3e-4
    """Of Adam."""
    batch: int = 1
    """Events per step."""
    steps: int = 1000
    """Training steps in all, those before a resume included."""
    minutes: float | None = None
    """Stop after the step that passes this time."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls to zero, by the last step or the end of the minutes."""
    warmup: int = 0
    """Steps over which the learning rate rises first."""
    validate_every: int = 100
    """Steps between validations; a checkpoint is written each time."""
    seed: int = 0
    """Of the initial weights and the order of events."""

    def recipe(self) -> Recipe:
        return Recipe(
            network=named_variant(self.variant),
            loss=self.loss,
            learning_rate=self.learning_rate,
            batch=self.batch,
            steps=self.steps,
            seed=self.seed,
            validate_every=self.validate_every,
            minutes=self.minutes,
            schedule=self.schedule,
            warmup=self.warmup,
        )


_TRAINING, _RUNNING = TrainingOptions(), RunningOptions()


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
    events: Path,
    out: Path,
    *,
    validation: Path | None = None,
    resume: bool = False,
    training: TrainingOptions = _TRAINING,
    running: RunningOptions = _RUNNING,
) -> None:
    """Train a network on events with truth.

    Leaves a log, a checkpoint, the weights and, with validation events, report.html.

    Parameters
    ----------
    events
        larcv3 HDF5 file to train on.
    out
        Folder for everything the training leaves.
    validation
        larcv3 HDF5 file of events that are not trained on.
    resume
        Go on with the training that the folder holds.
    """
    print(train_with_report(Files(events, out, validation), training.recipe(), running.running(), resume=resume))


@app.command(name="evaluate")
def evaluate_command(
    events: Path,
    weights: Path,
    *,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    variant: Literal["uresnet", "a21", "scc21", "polaris"] | None = None,
    running: RunningOptions = _RUNNING,
) -> None:
    """Score a network on events with truth.

    Parameters
    ----------
    events
        larcv3 HDF5 file.
    weights
        Weights of a training, or a checkpoint of the public CosmicTagger.
    json_file
        File to write the scores to as well.
    variant
        Network, where the weights do not say it.
    """
    how = running.running()
    net = load_weights(weights, variant)
    with ExitStack() as stack:
        part = None if json_file is None else stack.enter_context(replacing(json_file))  # fails before the work
        file = stack.enter_context(EventFile(events))
        say = stack.enter_context(progress("evaluating"))
        check_suits(file, net, how)
        found = evaluate(Tagger(net, how), file, say)
        if part is not None:
            part.write_text(json.dumps(found.as_dict(), indent=2) + "\n")
    network, baseline = found.network.as_dict(), found.baseline.as_dict()
    print(f"{found.events} events{'':<22}network  all charge cosmic")
    for key, name in SCORES.items():
        print(f"{name:<30}{network[key]:>8.4f}{baseline[key]:>19.4f}")


@app.command(name="predict")
def predict_command(
    events: Path,
    weights: Path,
    out: Path,
    *,
    variant: Literal["uresnet", "a21", "scc21", "polaris"] | None = None,
    running: RunningOptions = _RUNNING,
) -> None:
    """Tag the pixels of events, with or without truth.

    Parameters
    ----------
    events
        larcv3 HDF5 file.
    weights
        Weights of a training, or a checkpoint of the public CosmicTagger.
    out
        larcv3 HDF5 file to write: the charge, and for each of its pixels 0, 1 (cosmic) or 2 (neutrino).
    variant
        Network, where the weights do not say it.
    """
    how = running.running()
    if out.exists() and events.exists() and out.samefile(events):
        raise DataError(f"{out}: would replace the events; name another file")
    net = load_weights(weights, variant)
    with EventFile(events, labels=False) as file, progress("tagging") as say:
        check_suits(file, net, how)
        predict(Tagger(net, how), file, out, say)
    print(f"tags of {out} are in the product sparse2d_cosmictagger")


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
    except (CycloptsError, ValueError, ArithmeticError, OSError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"cosmictagger: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cosmictagger: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
