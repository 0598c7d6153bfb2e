"""How far a piece of work is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Say = Callable[[int, int, str], None]
"""say(done, total, text)"""
SECONDS_BETWEEN_LINES = 10.0


def silent(done: int, total: int, text: str) -> None:
    """For work that nobody watches."""


@contextmanager
def progress(title: str) -> Iterator[Say]:
    """Yield say(done, total, text). Everything goes to standard error."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(title, total=None, text="")
            yield lambda done, total, text: bar.update(task, completed=done, total=total, text=text)
    else:
        yield _plain_lines(title)


def _plain_lines(title: str) -> Say:
    last = -SECONDS_BETWEEN_LINES

    def say(done: int, total: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done in (1, total) or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            print(f"{title}: {done}/{total} {text}".rstrip(), file=sys.stderr, flush=True)

    return say
