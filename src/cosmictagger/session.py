"""A training with its report, and the demonstration made of the same parts."""

from pathlib import Path

from cosmictagger.config import NAME, Run
from cosmictagger.data import writing
from cosmictagger.display import Panel, event_panels
from cosmictagger.evaluate import Running, Tagger
from cosmictagger.files import Events, open_events
from cosmictagger.model import UResNet, count_parameters
from cosmictagger.progress import progress
from cosmictagger.recipe import Recipe
from cosmictagger.report import Report, last_validation, verdict, write_report
from cosmictagger.simulate import Detector, simulate_numbered
from cosmictagger.train import Beside, Trained, read_log, train
from cosmictagger.weights import load_weights


def train_with_report(run: Run, *, resume: bool = False, shown: int = 1, note: str = "") -> str:
    """Train, and write `report.html` if there are validation events, `shown` of them as pictures, and `note`.

    Returns one line that says what came of it. Raises as `train` does.
    """
    files, recipe, running = run.files, run.recipe, run.running
    with open_events(files.events) as events:
        if files.validation is None:
            trained = _train(run, events, None, resume)
            return f"{_steps(recipe, trained)}; weights in {files.out / 'weights.safetensors'}"
        with open_events(files.validation) as validation:
            trained = _train(run, events, validation, resume)
            log = read_log(files.out)
            net = load_weights(files.out / "weights.safetensors")
            report = Report(
                title="CosmicTagger: training report",
                summary=_summary(recipe, running, trained, net, (len(events), *events.shape)) + note,
                log=log,
                memory=trained.memory,
                plan=(files.out / "plan.txt").read_text(),
                events=_pictures(net, validation, running, shown),
            )
    write_report(files.out / "report.html", report)
    scored = last_validation(log)
    said = verdict(scored) if scored else "no validation"
    return f"{_steps(recipe, trained)}; {said}; see {files.out / 'report.html'}"


def _train(run: Run, events: Events, validation: Events | None, resume: bool) -> Trained:
    with progress("training") as say:
        beside = Beside(say, {NAME: run.text()}, run.tensorboard)
        return train(
            run.recipe, events, run.files.out, run.running, validation=validation, resume=resume, beside=beside
        )


def _steps(recipe: Recipe, trained: Trained) -> str:
    """How many steps there were, and whether time ran out."""
    if trained.steps >= recipe.steps:
        return f"{trained.steps} steps"
    return f"{trained.steps} of {recipe.steps} steps, as its {recipe.minutes:.1f} minutes were over"


def _summary(recipe: Recipe, running: Running, trained: Trained, net: UResNet, size: tuple[int, int, int]) -> str:
    count, rows, columns = size
    side = 2**running.downsample
    height, width = (n // side for n in recipe.crop or (rows, columns))
    part = "parts of " if recipe.crop else ""
    return (
        f"A network of {count_parameters(net):,} parameters took {_steps(recipe, trained)}, each of "
        f"{part}{recipe.batch} event(s) at 3 x {height} x {width} pixels, in {running.precision}, on {count} events, "
        f"with the loss '{recipe.loss}' and a learning rate of {recipe.learning_rate:g}, within a budget of "
        f"{running.budget or 'the free memory'}, in {trained.seconds:.0f} s, validation included."
    )


def _pictures(net: UResNet, events: Events, running: Running, shown: int) -> list[tuple[str, list[list[Panel]]]]:
    out = []
    with Tagger(net, running) as tagger:
        for index in range(min(shown, len(events))):
            batch = tagger.load(events, index)
            assert batch.label is not None  # `train` has scored it
            tags = tagger(batch.image)
            arrays = (x[0].cpu().numpy() for x in (batch.image, batch.label, tags))
            out.append((f"Event {index}, not trained on", event_panels(*arrays)))
    return out


def simulate_file(path: Path, count: int, seed: int, *, first: int = 0, detector: Detector | None = None) -> None:
    """Write `count` simulated events, numbered from `first`, of the sample `seed`. The file appears whole."""
    with progress(f"simulating {path.name}") as say, writing(path) as file:
        for k in range(count):
            file.append(simulate_numbered(seed, first + k, detector))
            say(k + 1, count, "")
