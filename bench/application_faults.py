"""What goes wrong around `cosmictagger`: what the user sees, and what is left.

    python bench/application_faults.py [--kills 10]

Every command of bench/application_cases.py is run as a program. It has to end with status 2 and one line that says
why, and must leave no file, whole or in part, nor change one. Then a file system of a few megabytes, mounted for the
purpose (root alone can), is nearly full under each command that writes. Then a training is killed (SIGKILL) at
random moments, the first of them before and in its first steps, and resumed until it is done: all that it leaves is
that of a training that nobody disturbed, byte for byte. Exit status 1 if anything is not so.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from application_cases import CASES, materials
from record import setting, write

PROGRAM = [sys.executable, "-m", "cosmictagger"]
STEPS = 40
Row = tuple[str, str, bool]
"""What, what the user sees, and whether it is as it must be."""


def command(text: str, names: dict[str, str]) -> list[str]:
    """A command of a case as words."""
    return [word.format(**names) for word in shlex.split(text)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, and every folder with none."""
    found = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in found}


def seen(arguments: list[str], folder: Path, *, keep: bool = False) -> tuple[str, bool]:
    """What the user sees of a command that has to fail, and whether that is one line, status 2 and nothing else."""
    before = contents(folder)
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, check=False, cwd=folder)
    # a line of progress is no message
    lines = done.stderr.splitlines()
    said = [line for line in lines if line.startswith("cosmictagger: ")]
    right = done.returncode == 2 and len(said) == 1 and lines[-1] == said[0] and "Traceback" not in done.stderr
    after = contents(folder)
    unchanged = after == before
    if not keep:
        _remove(folder, set(after) - set(before))  # so that the next case begins as this one did
    text = said[0] if said else " ".join(lines[-1:])
    more = "" if right else f" (status {done.returncode}, {len(lines)} lines)"
    return text + more + ("" if unchanged else " (FILES WERE LEFT OR CHANGED)"), right and unchanged


def _remove(folder: Path, paths: set[str]) -> None:
    for path in sorted(map(Path, paths), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def wrong(kinds: list[str], few: int | None = None) -> Iterator[Row]:
    """Every case of some kinds, or so many of each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = materials(folder / "in") | {"tmp": str(folder), "out": str(folder / "result")}
        for kind in kinds:
            for what, (text, wanted) in list(CASES[kind].items())[:few]:
                said, right = seen(command(text, names), folder)
                yield what, said.replace(name, "DIR"), right and wanted in said


# A disk that is full ---------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, free: int) -> Iterator[Path]:
    """A file system mounted below `folder`, with so many bytes free. Raises OSError or CalledProcessError."""
    image, place = folder / "image", folder / "place"
    place.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 8_000_000)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        state = os.statvfs(place)
        with suppress(OSError), (place / "filled").open("wb", buffering=0) as file:  # full before, by its own tables
            for _ in range(max(0, state.f_bavail * state.f_frsize - free) // 1024):
                file.write(bytes(1024))
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        place.rmdir()
        image.unlink()


FULL = {
    "simulate": ("simulate {disk}/a.h5 --events 2", 40_000),
    "predict": ("predict {events} {weights} {disk}/tags.h5", 30_000),
    "evaluate": ("evaluate {events} {weights} --json {disk}/scores.json", 0),
    "report": ("report {run} --events {events} --out {disk}/page.html", 20_000),
    "train, before its first step": ("train {events} {disk}/run --config {good}", 4_096),
}
FILLING = "train {events} {disk}/run --config {good} --steps 3 --set checkpoint_every=1"


def full() -> Iterator[Row]:
    """Commands that write, on a disk that is full; where it fills in the middle of a training, that can go on."""
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as elsewhere:
        names = materials(Path(elsewhere) / "in")

        def shown(said: str) -> str:
            return said.replace(f"{name}/place", "DISK").replace(elsewhere, "DIR")

        try:
            for what, (text, free) in FULL.items():
                with small_disk(Path(name), free) as disk:
                    kept = contents(disk).keys()
                    said, right = seen(command(text, names | {"disk": str(disk)}), disk, keep=True)
                    left = [Path(path) for path in contents(disk).keys() - kept]
                    # a training's folder may be there, with whole files only
                    whole = "(status" not in said and not any(path.suffix == ".part" for path in left)
                    right = right or (what.startswith("train") and "No space left" in said and whole)
                yield f"full disk: {what}", shown(said.replace(" (FILES WERE LEFT OR CHANGED)", "")), right
            yield from _filling(Path(name), names, shown)
        except (OSError, subprocess.CalledProcessError) as error:
            yield "full disk", f"not tried: {error}", True


def _filling(folder: Path, names: dict[str, str], shown: Callable[[str], str]) -> Iterator[Row]:
    """The disk fills between two checkpoints; with room again, the training goes on to the same bytes."""
    with small_disk(folder, 5_000_000) as disk:
        calm = Path(names["inputs"]).parent / "calm"
        subprocess.run([*PROGRAM, *command(FILLING.replace("{disk}/run", str(calm)), names)], capture_output=True,
                       check=True)  # fmt: skip
        used = sum(path.stat().st_size for path in calm.iterdir())
        (disk / "more").write_bytes(bytes(max(0, os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - used)))
        arguments = command(FILLING, names | {"disk": str(disk)})
        done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, check=False)
        said = [line for line in done.stderr.splitlines() if line.startswith("cosmictagger: ")]
        right = done.returncode == 2 and len(said) == 1 and "No space left" in said[0]
        right &= not list((disk / "run").glob(".*.part"))
        (disk / "more").unlink()
        again = subprocess.run([*PROGRAM, *arguments, "--resume"], capture_output=True, text=True, check=False)
        right &= again.returncode == 0 and left_by(calm) == left_by(disk / "run")
        end = "resumed with room again: equal to the last bit" if right else f"DIFFERENT; {again.stderr[-300:]}"
        yield "full disk: train, between checkpoints", f"{shown(' '.join(said))}; {end}", right


# Kills -----------------------------------------------------------------------------------------------


def left_by(run: Path) -> dict[str, object]:
    """All that a training leaves but for what says how long it took and how much it used."""
    out: dict[str, object] = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix == ".safetensors"}
    times = ("seconds", "waited")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return out | {"log": [{k: v for k, v in line.items() if k not in times} for line in log]}


def moments(kills: int, seconds: float) -> list[float | int]:
    """When to kill: a whole number says after so many lines of the log, the others are seconds since the start."""
    chance = random.Random(0)
    first = range(min(4, max(1, kills // 3)))
    return [*first, *(chance.uniform(0, seconds) for _ in range(kills - len(first)))]


def killed(kills: int) -> Iterator[Row]:
    """A training is killed at each moment, and resumed till it ends; each time from a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = materials(folder / "in")
        text = "train {events} {out} --config {good} --validation {others} --set checkpoint_every=3"
        text += f" --steps {STEPS} --validate-every 10 --flips --set schedule=cosine"
        begun = time.monotonic()
        calm = folder / "calm"
        subprocess.run([*PROGRAM, *command(text, names | {"out": str(calm)})], capture_output=True, check=True)
        seconds, wanted = time.monotonic() - begun, left_by(calm)
        for number, moment in enumerate(moments(kills, seconds)):
            out = folder / f"run{number}"
            arguments = command(text, names | {"out": str(out)})
            steps = _kill(arguments, out, moment)
            # whoever was killed before anything was written begins again
            again = [*arguments, "--resume"] if (out / "recipe.json").exists() else arguments
            done = subprocess.run([*PROGRAM, *again], capture_output=True, text=True, check=False)
            same = done.returncode == 0 and left_by(out) == wanted and not list(out.glob(".*"))
            when = f"after {moment} lines of the log" if isinstance(moment, int) else f"after {moment:.1f} s"
            end = "resumed: equal to the last bit" if same else f"DIFFERENT; {done.stderr[-300:]}"
            yield f"SIGKILL {when} ({steps} steps logged)", end, same


def _kill(arguments: list[str], out: Path, moment: float | int) -> int:
    """Run a command and kill it; returns the lines that its log has then."""
    log = out / "log.jsonl"
    with subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        if isinstance(moment, int):
            while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= moment):
                time.sleep(0.002)
        else:
            with suppress(subprocess.TimeoutExpired):
                process.wait(moment)
        process.kill()
    return log.read_bytes().count(b'"loss"') if log.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    rows: list[Row] = []
    for found in (wrong(list(CASES)), full(), killed(options.kills)):
        for row in found:
            rows.append(row)
            print(*row, sep=" | ", file=sys.stderr, flush=True)
    bad = sum(not right for *_, right in rows)
    lines = [
        "# Faults around the application", "", setting(), "",
        f"{len(rows) - bad} of {len(rows)} end as they must: one line, status 2, nothing half-written; killed "
        f"trainings of {STEPS} steps go on to the same bytes.", "",
        "| what | what the user sees | |", "|---|---|---|",
        *(f"| {what} | `{said.replace('|', '/')}` | {'' if right else '**not so**'} |" for what, said, right in rows),
    ]  # fmt: skip
    write("application-faults", "\n".join(lines))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
