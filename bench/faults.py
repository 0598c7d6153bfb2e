"""What goes wrong in the middle of a step whose maps live on a disk: what the user sees, and what is left.

    python bench/faults.py [--kills 20] [--folder DIR]

A training of a few steps keeps a checkpoint and its plan after each. It is killed (SIGKILL) at random moments and
begun again until it is done; then its parameters are those of a training that nobody disturbed, or not. A folder on a
small file system that is mounted for the purpose (root alone can) is too small; reads and writes fail; Ctrl-C comes
at random moments of a step. After each, parameters and buffers are compared with those before, and the next step with
one that nobody disturbed. For the purpose maps go to the disk rather than that anything is made again.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import setting, write
from torch import Tensor, nn

import fullframe
from fullframe.schedule import planner

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from disks import UNet

STEPS, SIDE = 6, 768
State = list[Tensor]


def case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return UNet(), torch.randn(1, 1, SIDE, SIDE), torch.randint(0, 3, (1, SIDE, SIDE))


def tiled(net: nn.Module, folder: Path, **given: Any) -> fullframe.Tiled:
    """A step whose maps go to a disk."""
    planner.PER_BYTE, planner.LITTLE = 0, 2
    given = given if "plan" in given else given | {"disk": "1 GB"}
    return fullframe.tile(net, loss=F.cross_entropy, folder=folder, **given)


def smallest(folder: Path) -> int:
    net, image, label = case()
    try:
        tiled(net, folder, budget=1).plan(image, label)
    except fullframe.BudgetError as error:
        return error.smallest
    raise SystemExit("a budget of one byte was accepted")


def state(net: nn.Module) -> State:
    return [t.detach().clone() for t in (*net.parameters(), *net.buffers())]


def same(a: State, b: State) -> bool:
    return all(map(torch.equal, a, b))


# A training that is killed -------------------------------------------------------------------------


def train(folder: Path, kept: Path) -> None:
    """Go on with a training until it is done; a checkpoint is there whole or not at all."""
    net, image, label = case()
    plan = kept / "plan.json"
    step = tiled(net, folder, **({"plan": plan} if plan.exists() else {"budget": smallest(folder)}))
    if not plan.exists():
        step.plan(image, label).save(plan)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    first = 0
    if (kept / "last.pt").exists():
        saved = torch.load(kept / "last.pt")
        net.load_state_dict(saved["net"])
        optimiser.load_state_dict(saved["optimiser"])
        first = saved["steps"]
    for k in range(first, STEPS):
        print(f"step {k}", flush=True)
        optimiser.zero_grad()
        step(image, label).backward()
        optimiser.step()
        torch.save({"net": net.state_dict(), "optimiser": optimiser.state_dict(), "steps": k + 1}, kept / "part.pt")
        os.replace(kept / "part.pt", kept / "last.pt")


def run(folder: Path, kept: Path, seconds: float | None) -> bool:
    """Run a training, killed so many seconds after its first step began; whether it came to its end."""
    command = [sys.executable, __file__, "--train", str(kept), "--folder", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        if seconds is not None:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the training ended with {process.returncode}")
    return process.returncode == 0


def killed(folder: Path, kills: int) -> list[str]:
    chance, left, done = random.Random(0), 0, 0
    with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as disturbed:
        started = time.monotonic()
        run(folder, Path(calm), None)
        whole = time.monotonic() - started
        wanted = torch.load(Path(calm) / "last.pt")["net"]
        count, equal = 0, True
        while count < kills:
            ended = run(folder, Path(disturbed), chance.uniform(0, whole / STEPS))
            left += len(os.listdir(folder))
            count += not ended
            if ended:
                found = torch.load(Path(disturbed) / "last.pt")["net"]
                equal &= all(torch.equal(found[k], wanted[k]) for k in wanted)
                done += 1
                for path in Path(disturbed).iterdir():
                    path.unlink()
        if not done:
            run(folder, Path(disturbed), None)
            found = torch.load(Path(disturbed) / "last.pt")["net"]
            equal, done = all(torch.equal(found[k], wanted[k]) for k in wanted), 1
    return [
        f"| SIGKILL at a random moment, {count} times | nothing | {left} files in the folder | "
        f"{done} trainings resumed to their end: parameters {'equal to the last bit' if equal else 'DIFFERENT'} |"
    ]


# Faults in one process -----------------------------------------------------------------------------


@contextmanager
def failing(name: str, after: int, error: Callable[[], BaseException]) -> Iterator[None]:
    """Let a call of the system fail from its so manieth on."""
    real, calls = getattr(os, name), iter(range(10**9))

    def call(*args: Any) -> Any:
        if next(calls) >= after:
            raise error()
        return real(*args)

    setattr(os, name, call)
    try:
        yield
    finally:
        setattr(os, name, real)


def seen(step: Callable[[], Any]) -> str:
    try:
        step()
    except BaseException as error:
        text = " ".join(str(error).split())
        return f"`{type(error).__name__}{': ' if text else ''}{text}`"
    return "nothing"


def row(name: str, folder: Path, fault: Callable[[Callable[[], Any]], str]) -> str:
    """A step is disturbed; then one is taken that is not."""
    net, image, label = case()
    step = tiled(net, folder, budget=smallest(folder))
    step(image, label).backward()
    calm = case()[0]
    calm.load_state_dict(net.state_dict())
    before = state(net)
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    said = fault(lambda: step(image, label).backward())
    unchanged = same(state(net), before) and same([p.grad for p in net.parameters() if p.grad is not None], gradients)
    net.zero_grad()
    step(image, label).backward()
    tiled(calm, folder, budget=smallest(folder))(image, label).backward()
    after = [p.grad for p in net.parameters() if p.grad is not None]
    right = same(after, [p.grad for p in calm.parameters() if p.grad is not None]) and same(state(net), state(calm))
    kept = "nothing changed" if unchanged else "CHANGED" if said != "nothing" else "the step was done"
    return f"| {name} | {said} | {kept} | {'right' if right or said == 'nothing' else 'WRONG'} |"


def interrupted(seconds: float) -> Callable[[Callable[[], Any]], str]:
    """Ctrl-C, so many seconds after the step began."""

    def fault(step: Callable[[], Any]) -> str:
        timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        try:
            return seen(step)
        finally:
            timer.cancel()
            timer.join()

    return fault


def small_disk() -> str:
    """A folder on a file system of 40 million bytes."""
    with tempfile.TemporaryDirectory() as folder:
        image, place = Path(folder) / "image", Path(folder) / "place"
        place.mkdir()
        try:
            image.write_bytes(b"")
            os.truncate(image, 40_000_000)
            subprocess.run(["mkfs.ext4", "-q", image], check=True)
            subprocess.run(["mount", "-o", "loop", image, place], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return f"| a disk that is too small | not tried: {error} | | |"
        try:
            (place / "filled").write_bytes(bytes(30_000_000))
            net, picture, label = case()
            before = state(net)
            said = seen(lambda: tiled(net, place, budget=smallest(Path(folder)))(picture, label))
            kept = "nothing changed" if same(state(net), before) else "CHANGED"
            return f"| a disk that is too small | {said.replace(str(place), 'DIR')} | {kept} | |"
        finally:
            subprocess.run(["umount", place], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--train", type=Path)
    options = parser.parse_args()
    if options.train is not None:
        train(options.folder, options.train)
        return
    chance = random.Random(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        net, image, label = case()
        plan = tiled(net, folder, budget=smallest(folder)).plan(image, label)
        started = time.monotonic()
        step = tiled(net, folder, budget=smallest(folder))
        step(image, label).backward()
        started = time.monotonic()
        step(image, label).backward()
        seconds = time.monotonic() - started
        broken = {
            "a read fails": ("preadv", lambda: OSError(errno.EIO, os.strerror(errno.EIO))),
            "a write fails": ("pwritev", lambda: OSError(errno.EIO, os.strerror(errno.EIO))),
            "the disk is full at a write": ("pwritev", lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        }
        rows = killed(folder, options.kills)
        rows.append(small_disk())
        for what, (name, error) in broken.items():

            def fault(step: Callable[[], Any], name: str = name, error: Any = error) -> str:
                with failing(name, 7, error):
                    return seen(step)

            rows.append(row(what, folder, fault).replace(str(folder), "DIR"))
        rows += [
            row(f"Ctrl-C after {at:.0%} of a step", folder, interrupted(at * seconds))
            for at in sorted(chance.uniform(0.02, 0.95) for _ in range(6))
        ]
    lines = [
        "# Faults in a step with a disk", "", setting(), "",
        f"{plan.bytes.disk / 1e6:.0f} MB of maps on disk beside {plan.projected_bytes / 1e6:.0f} MB of memory; a "
        f"step takes {seconds:.1f} s.", "",
        "| what | what the user sees | parameters, buffers and gradients | the next step |", "|---|---|---|---|",
        *rows,
    ]  # fmt: skip
    write("faults", "\n".join(lines))


if __name__ == "__main__":
    main()
