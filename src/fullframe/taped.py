"""Tasks on tape: a tile that has run once in Python, and then runs in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fullframe.graph import Value
from fullframe.kernels import Taped
from fullframe.store import Arena
from fullframe.task import Sum, Task

Partials = list[tuple[Sum, torch.Tensor]]


class TapedTask:
    """A task's tape, what it reads and writes outside of the arena, and what its partial results are of."""

    __slots__ = ("places", "strides", "tape", "values")

    def __init__(
        self, tape: Taped, values: Sequence[Value], strides: Sequence[tuple[int, ...]], places: Sequence[Sum]
    ):
        self.tape, self.values, self.strides, self.places = tape, values, strides, places

    def run(self, values: Mapping[Value, torch.Tensor], arena: Arena) -> Partials | None:
        """The partial results; None where a tensor lies otherwise in memory than when the tape was written."""
        bases = [arena.block.data_ptr()]
        for value, stride in zip(self.values, self.strides, strict=True):
            tensor = values[value]
            if tensor.stride() != stride:
                return None
            bases.append(tensor.data_ptr())
        made = self.tape.run(bases)
        return None if made is None else list(zip(self.places, made, strict=True))


def apart(task: Task, values: Mapping[Value, torch.Tensor], arena: Arena) -> list[Value]:
    """What a task reads and writes that is neither a window nor in the arena."""
    found = dict.fromkeys(
        value
        for job in task.jobs
        for value in (
            *(r.value for r in job.reads if not r.window and r.empty is None),
            *(t.value for t in job.targets if t.shape is None),
            *(s.value for s in job.stores),
        )
    )
    block = arena.block.untyped_storage().data_ptr()
    return [v for v in found if values[v].untyped_storage().data_ptr() != block]


def fit(task: Task) -> bool:
    """Whether a task may go on tape: its kernels' calls are known, and it makes only parts of maps and sums."""
    return not task.fetches and all(
        (job.ready is not None or not job.unit.fused) and all(s.tiled for s in job.stores) for job in task.jobs
    )
