"""A training with its report, and the demonstration made of the same parts."""

from dataclasses import dataclass, replace
from pathlib import Path

from cosmictagger.config import NAME, Run
from cosmictagger.data import writing
from cosmictagger.display import Display
from cosmictagger.evaluate import Running, Tagger, check_suits
from cosmictagger.files import Events, open_events
from cosmictagger.findings import Findings, look
from cosmictagger.model import UResNet, count_parameters
from cosmictagger.progress import progress, silent
from cosmictagger.report import Report, name_of, verdict, write_report
from cosmictagger.runs import cost, logged, recorded, text
from cosmictagger.simulate import Detector, simulate_numbered
from cosmictagger.train import Beside, Trained, train
from cosmictagger.weights import load_weights
from cosmictagger.world import World

WEIGHTS = "weights.safetensors"
SHOWN = 3
"""Events that a report displays."""


def train_with_report(run: Run, *, resume: bool = False, shown: int = SHOWN, note: str = "") -> str:
    """Train, and write `report.html` if there are validation events, `shown` of them as pictures, and `note`.

    Returns one line that says what came of it, in the first of the processes that train together; in others nothing.
    Raises as `train` does.
    """
    out, first = run.files.out, run.running.world.first
    with open_events(run.files.events) as events:
        if run.files.validation is None:
            _train(run, events, None, resume)
            return f"{_steps(out)}; weights in {out / WEIGHTS}" if first else ""
        with open_events(run.files.validation) as validation:
            _train(run, events, validation, resume)
            alone = replace(run.running, world=World())
            return report_run(out, out / WEIGHTS, validation, alone, Showing(shown, note)) if first else ""


def _train(run: Run, events: Events, validation: Events | None, resume: bool) -> Trained:
    with progress("training") as say:
        beside = Beside(say if run.running.world.first else silent, {NAME: run.text()}, run.tensorboard)
        return train(
            run.recipe, events, run.files.out, run.running, validation=validation, resume=resume, beside=beside
        )


@dataclass(frozen=True)
class Showing:
    """What a report shows besides scores."""

    events: int = SHOWN
    """Displays: the worst ones, and one from the middle."""
    note: str = ""
    """Added to the summary."""
    file: Path | None = None
    """The page; None: report.html in the training's folder."""


def report_run(out: Path, weights: Path, events: Events, running: Running, showing: Showing) -> str:
    """Score weights of the training in the folder `out` on events, and write the page on it.

    Returns one line that says what came of it. Raises DataError where there is no training, or events do not suit.
    """
    about, log, (trained_on, memory) = recorded(out), logged(out), cost(out)
    net = load_weights(weights)
    check_suits(events, net, running)
    with progress("looking at events") as say:
        findings = look(Tagger(net, running), events, say, first=about["validation_events"])
    report = Report(
        title=f"CosmicTagger: {out.resolve().name}",
        verdict=verdict(findings.evaluation, seen=about.get("data") == events.fingerprint()),
        summary=_summary(out, weights, net, events, trained_on) + showing.note,
        log=log,
        findings=findings,
        displays=_displays(findings, events, showing.events),
        memory=memory,
        settings=text(out, NAME) or text(out, "recipe.json"),
        plan=text(out, "plan.txt"),
    )
    page = showing.file or out / "report.html"
    write_report(page, report)
    return f"{_steps(out)}; {report.verdict}; see {page}"


def _steps(out: Path) -> str:
    """How many steps there were, and for how long at most where they are not all."""
    about, steps = recorded(out), max((line["step"] for line in logged(out)), default=0)
    if steps >= about["steps"]:
        return f"{steps} steps"
    within = "" if about["minutes"] is None else f" within {about['minutes']:.1f} minutes"
    return f"{steps} of {about['steps']} steps{within}"


def _summary(out: Path, weights: Path, net: UResNet, events: Events, trained_on: int | None) -> str:
    about = recorded(out)
    rate = f"{about['learning_rate']:g}"
    height, width = (n // 2 ** about["downsample"] for n in about["crop"] or events.shape)
    part, several = "parts of " * bool(about["crop"]), f"{about['accumulate']} times " * (about["accumulate"] > 1)
    on = "" if trained_on is None else f" on {trained_on} events"
    return (
        f"A network of {count_parameters(net):,} parameters took {_steps(out)}, each of "
        f"{several}{part}{about['batch']} event(s) at 3 x {height} x {width} pixels, in {about['precision']}{on}, "
        f"with the loss '{about['loss']}', by {about['optimizer']} with a learning rate of {rate} "
        f"({about['schedule']}), within a budget of {about['budget'] or 'the free memory'}. The scores are of "
        f"{weights.name}."
    )


def _displays(findings: Findings, events: Events, shown: int) -> list[Display]:
    """Of the worst events, and of one from the middle."""
    ranked = findings.worst()
    ranks = list(range(min(shown, len(ranked))))
    if 1 < shown < len(ranked):
        ranks[-1] = max(shown - 1, len(ranked) // 2)
    out = []
    for rank in ranks:
        event = ranked[rank]
        place = f"number {rank + 1} of {len(ranked)}, the worst first"
        caption = f"Event {name_of(event)}, {place}: mIoU {event.scores.mean_iou:.3f}"
        out.append(Display(events[event.index], event.index, event.tags, f"event {event.index}", caption))
    return out


def simulate_file(path: Path, count: int, seed: int, *, first: int = 0, detector: Detector | None = None) -> None:
    """Write `count` simulated events, numbered from `first`, of the sample `seed`. The file appears whole."""
    with progress(f"simulating {path.name}") as say, writing(path) as file:
        for k in range(count):
            file.append(simulate_numbered(seed, first + k, detector))
            say(k + 1, count, "")
