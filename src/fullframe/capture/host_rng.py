"""Whether a step draws from Python's or NumPy's own random numbers while it is recorded."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fullframe.errors import CaptureError

FROZEN = (
    "they would be frozen into the captured step. Draw them outside and pass them in, or use torch's random functions"
)


class Drawn(CaptureError):
    """The step has drawn, or another thread has."""

    def __init__(self) -> None:
        super().__init__(f"the module or the loss drew from Python's or NumPy's random numbers; {FROZEN}")


@contextmanager
def by_state() -> Iterator[None]:
    """Raises `Drawn` at the end if the numbers that come next are others than at the beginning, in any thread."""
    before = random.getstate(), _numpy_state()
    yield
    if (random.getstate(), _numpy_state()) != before:
        raise Drawn


@contextmanager
def by_calls() -> Iterator[None]:
    """Raises `Drawn` at the end if this thread has drawn, or any has drawn from NumPy, whose calls cannot be seen.

    Every call is looked at, which takes its time.
    """
    before = _numpy_state()
    found = False

    def look(_frame: FrameType, event: str, called: object) -> None:
        nonlocal found
        if event == "c_call" and getattr(called, "__self__", None) is random._inst:
            found = True

    former = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(former)
    if found or _numpy_state() != before:
        raise Drawn


def _numpy_state() -> object:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    state = numpy.random.get_state()
    return state[1].tobytes(), state[2:]
