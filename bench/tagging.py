"""How well a trained network tags whole events, held-out simulated ones and real ones, beside public thresholds.

    python bench/tagging.py WEIGHTS --simulated held-out.h5 [--real sbnd_events.h5] [--budget "4 GB"]

Thresholds of the public CosmicTagger: 95 % of the labelled pixels right, an intersection over union of 90 % for
cosmic and 70 % for neutrino pixels. It counts over all pixels of the images that the network takes; beside that stand
the scores of what `predict` writes, at full resolution over pixels with charge. Exit status 1 where one is missed
over all pixels. A file of which the weights say that they were trained on it is refused.
"""

import argparse
import sys
from pathlib import Path

from record import setting, write

from cosmictagger.evaluate import Evaluation, Running, Tagger, check_suits, evaluate
from cosmictagger.files import open_events
from cosmictagger.model import UResNet
from cosmictagger.progress import progress
from cosmictagger.weights import Origin, load_origin, load_weights

WANTED = {"nonzero_accuracy": 0.95, "cosmic_iou": 0.90, "neutrino_iou": 0.70}
NAMES = {"nonzero_accuracy": "non-background accuracy", "cosmic_iou": "cosmic IoU", "neutrino_iou": "neutrino IoU"}


def scored(net: UResNet, events: Path, origin: Origin, budget: str | None) -> Evaluation:
    """Scores on a file of events. Raises DataError if it cannot be used, SystemExit if it was trained on."""
    running = Running(budget, origin.precision, origin.downsample)
    with open_events(events) as file, progress(f"tagging {events.name}") as say:
        if file.fingerprint() == origin.data:
            raise SystemExit(f"{events}: the network was trained on these events")
        check_suits(file, net, running)
        return evaluate(Tagger(net, running), file, say)


def rows(what: str, found: Evaluation) -> tuple[list[str], bool]:
    """Lines of the table, and whether no threshold is missed."""
    out, held = [], True
    assert found.ungated is not None
    for key, wanted in WANTED.items():
        each = [100 * scores.as_dict()[key] for scores in (found.ungated, found.network, found.baseline)]
        held &= each[0] >= 100 * wanted
        verdict = "reached" if each[0] >= 100 * wanted else "**missed**"
        numbers = " | ".join(f"{x:.2f}" for x in each)
        out.append(f"| {what} ({found.events}) | {NAMES[key]} | {100 * wanted:.0f} | {numbers} | {verdict} |")
    return out, held


def main(arguments: list[str] | None = None, name: str = "tagging") -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--simulated", type=Path, required=True)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--budget")
    options = parser.parse_args(arguments)
    origin, net = load_origin(options.weights) or Origin(), load_weights(options.weights)
    lines, held = [], True
    for what, events in {"simulated": options.simulated, "real": options.real}.items():
        if events is not None:
            more, good = rows(what, scored(net, events, origin, options.budget))
            lines, held = [*lines, *more], held and good
    head = [
        "# Tags of whole events, %", "", setting(), "",
        f"{options.weights.name}: {origin.precision}, images {'halved' if origin.downsample else 'as they are'}.", "",
        "| events | score | wanted | all pixels | pixels with charge | all charge cosmic | |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    write(name, "\n".join([*head, *lines]))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
