"""Capture: the step recorded as one flat graph, from fake tensors, without memory.

The only user of ``make_fx`` and the functional-tensor internals of torch. Forward, loss, backward
and buffer updates are recorded together; functionalisation turns every mutation into a new value,
so no alias survives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from fullframe.capture.function_mode import CaptureMode
from fullframe.capture.joint import JointFunction
from fullframe.errors import CaptureError
from fullframe.frontend.inputs import Pair


@dataclass
class Recording:
    """A function to record: called with one tensor per input, and run on ``device``.

    It returns its outputs, as its signature says, and tensors that stand for inputs that arrive late: whatever it
    computed them from, in the graph they are inputs.
    """

    function: JointFunction
    inputs: list[torch.Tensor]
    names: list[str]
    capture_mode: CaptureMode
    device: torch.device
    undrawn: Callable[[], AbstractContextManager[None]]


def own_generator(path: str, what: str) -> CaptureError:
    return CaptureError(
        f"in {path or 'the step'}, {what} draws from a generator of its own, which a recorded step cannot follow; "
        "leave generator= out, or draw outside the step and pass the numbers in"
    )


_STATE = threading.local()


DEEPEST = 8  # calls of a tiled module inside of each other


@contextmanager
def nested(pair: Pair) -> Iterator[None]:
    """Inside, a tiled module is at work as a part of what is recorded; refuses one that calls itself without end."""
    inside: list[int] = _STATE.__dict__.setdefault("inside", [])
    if inside.count(id(pair)) >= DEEPEST:
        raise CaptureError(
            f"the tiled {type(pair.module).__name__} calls itself, {DEEPEST} times over, from its own forward, loss "
            "or hooks; let those call the plain module, or another one"
        )
    inside.append(id(pair))
    try:
        yield
    finally:
        inside.pop()


def recording() -> bool:
    """Whether a step is being recorded on this thread."""
    return getattr(_STATE, "active", False)
