"""The table of what makes events hard to tag, real beside simulated, and whether each gate of the simulator holds.

    python bench/gates.py --real sbnd_events.h5 --events 100 > bench/results/gates.md

Exit status 1 if a gate fails. Quantities are those of cosmictagger.quantities; gates and bounds stand there, too.
"""

import argparse
import sys
import time
from datetime import date
from pathlib import Path

from cosmictagger.data import EventFile
from cosmictagger.quantities import BANDS, PER_PLANE, Comparison, compare
from cosmictagger.simulate import simulate_numbered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, required=True, help="a larcv3 file of real events")
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with EventFile(args.real) as real:
        found = compare(real, (simulate_numbered(args.seed, k) for k in range(args.events)))
        count = len(real)
    print(f"# {count} real and {args.events} simulated events (seed {args.seed}), {date.today()}\n")
    print(f"Simulated at {_rate(args.seed):.1f} events a second of one core's time.\n")
    print("\n".join(_table(found)))
    failed = [c.name for c in found if c.gated and not c.holds]
    gates = sum(c.gated for c in found)
    print(f"\n{gates - len(failed)} of {gates} gates hold." + (f" Not: {', '.join(failed)}." if failed else ""))
    return 1 if failed else 0


def _rate(seed: int, events: int = 20) -> float:
    began = time.process_time()
    for k in range(events):
        simulate_numbered(seed, k)
    return events / (time.process_time() - began)


def _table(found: list[Comparison]) -> list[str]:
    out = [
        "| quantity / plane | real events | real, mean | simulated, mean | ratio | central 90 % | gate |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in found:
        real, simulated = c.real.mean(), c.simulated.mean()
        each = " ".join(f"{x:.4g}" for x in c.real)
        verdict = "" if not c.gated else "holds" if c.holds else "**fails**"
        if c.name in BANDS:
            verdict += " ({} to {})".format(*BANDS[c.name])
        low, high = c.central
        out.append(
            f"| {c.name} | {each} | {real:.4g} | {simulated:.4g} | {simulated / real:.2f} "
            f"| {low:.4g} to {high:.4g} | {verdict} |"
        )
    return [*out, "", *(f"- `{name}`: {words}" for name, words in PER_PLANE.items())]


if __name__ == "__main__":
    sys.exit(main())
