"""A training's log for TensorBoard, beside its JSON lines; an extra, since TensorBoard brings much with it."""

import threading
from pathlib import Path
from typing import Any

from cosmictagger.atomic import named
from cosmictagger.data import DataError

NAME = "tensorboard"
"""Folder of a training's folder."""


def check_installed() -> None:
    """Raise DataError where TensorBoard is not installed."""
    _writer()


class Board:
    """Writes lines of the log as scalars: learning rate, loss, seconds, and each score of training and validation.

    `step`: where the training goes on from; what an earlier one that was cut off has written after it is not shown.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder / NAME
        with named(self._folder):
            self._writer = _writer()(str(self._folder), purge_step=step + 1 if step else 0)

    def __enter__(self) -> "Board":
        # What fails in the thread that writes is raised here, too, so that it need not be printed there.
        self._hook, threading.excepthook = threading.excepthook, self._ignore
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            with named(self._folder):
                self._writer.close()
        except OSError:
            if kind is None:
                raise
        finally:
            threading.excepthook = self._hook

    def _ignore(self, failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self._hook(failed)

    def add(self, line: dict) -> None:
        """A line as it stands in log.jsonl."""
        with named(self._folder):
            for name, value in _scalars(line).items():
                self._writer.add_scalar(name, value, line["step"])
            if "validation" in line:
                self._writer.flush()


def _scalars(line: dict) -> dict[str, float]:
    names = {
        "loss": "loss",
        "rate": "learning rate",
        "seconds": "seconds/step",
        "waited": "seconds/waited for events",
    }
    out = {name: line[key] for key, name in names.items() if key in line}
    out |= {f"training step/{key}": value for key, value in line.get("train", {}).items()}
    for over, found in line.get("validation", {}).items():
        if isinstance(found, dict):
            out |= {f"validation, {over}/{key}": value for key, value in found.items()}
    return out


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DataError(
            "TensorBoard is not installed: pip install 'fullframe[cosmictagger,tensorboard]', or leave it out"
        ) from error
    return SummaryWriter
