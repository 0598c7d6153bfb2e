"""What a training's folder says of it."""

import json
from pathlib import Path
from typing import Any

from cosmictagger.data import DataError
from cosmictagger.recipe import completed
from cosmictagger.train import COST, Memory, read_log


def recorded(run: Path) -> dict[str, Any]:
    """The recipe, how it ran and on which data, by name. Raises DataError for a folder without one."""
    try:
        found = completed(json.loads((run / "recipe.json").read_text()))
        found["network"]["depth"]
    except OSError as error:
        raise DataError(f"{run}: holds no training (recipe.json cannot be read)") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{run / 'recipe.json'}: is not the recipe of a training") from error
    return found


def logged(run: Path) -> list[dict]:
    """The lines of the log; none where the training has just begun. Raises DataError where it is none."""
    try:
        return read_log(run)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise DataError(f"{run / 'log.jsonl'}: is not the log of a training") from error


def cost(run: Path) -> tuple[int | None, Memory]:
    """On how many events, and the memory of a step. Older trainings do not say."""
    try:
        found = json.loads((run / COST).read_text())
        return found.pop("events"), Memory(**found)
    except (OSError, ValueError, KeyError, TypeError):
        return None, Memory(None, None, None)


def text(run: Path, name: str) -> str:
    """A text file of the folder; empty where it has none."""
    try:
        return (run / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
