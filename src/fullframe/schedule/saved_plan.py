"""A plan kept in a file: the numbers that it was made from, and what came of them.

Planning follows from the graph and these numbers alone, so the file need not hold the plan itself: it is made anew
from them, and what comes of it is compared. A budget that was taken from what was free, and a number of workers that
followed from the machine, are then those of the time when the plan was saved.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fullframe.errors import FullframeError
from fullframe.ir.graph import Graph

if TYPE_CHECKING:
    from fullframe.schedule.plan import Plan


class Limits(NamedTuple):
    """What a plan was asked to keep to: bytes of the budget, of a disk and of the host's memory beside a device's;
    the workers that it is made for, how fast the disk and the processor are, and bytes that were yet to be taken by
    imports."""

    budget: int
    disk: int
    host: int
    workers: int
    rate: int
    speed: int
    imports: int


NUMBERS = Limits._fields


@dataclass(frozen=True)
class SavedPlan:
    """``budget``, ``disk`` and ``host`` in bytes, ``rate`` in million bytes a second, ``speed`` in million operations
    a second, ``imports`` in bytes; ``call``: what the step was given, in short; ``plan``: the plan."""

    budget: int
    disk: int
    host: int
    workers: int
    rate: int
    speed: int
    imports: int
    call: str
    plan: str

    def verify(self, found: Plan) -> None:
        """Raise `FullframeError` where the plan for the call that was saved is another one."""
        if call_of(found.graph) == self.call and digest(found) != self.plan:
            raise FullframeError(
                "the plan made from the numbers of plan= is another than the one that was saved, so bits may differ: "
                "the network, fullframe, torch, the compiler or the processor is another; leave out plan=, or save "
                "the plan anew"
            )


def save(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan down, as JSON, whole or not at all. Raises OSError where the file cannot be written."""
    assert plan.limits is not None
    limits = dict(zip(NUMBERS, plan.limits, strict=True))
    text = json.dumps(limits | {"call": call_of(plan.graph), "plan": digest(plan)}, indent=1) + "\n"
    to = Path(path)
    part = to.with_name(f"{to.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        os.replace(part, to)
    finally:
        part.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> SavedPlan:
    """Read a plan that `save` has written. Raises OSError, or ValueError where the file is something else."""
    try:
        found = json.loads(Path(path).read_text())
        kinds = {f.name: int if f.name in NUMBERS else str for f in fields(SavedPlan)}
        if set(found) != set(kinds) or any(type(found[name]) is not kind for name, kind in kinds.items()):
            raise ValueError("other entries")
        if min(found[name] for name in NUMBERS) < 0 or min(found["workers"], found["rate"], found["speed"]) < 1:
            raise ValueError("numbers out of range")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)} is not a plan that Plan.save() has written: {error}") from error
    return SavedPlan(**found)


def call_of(graph: Graph) -> str:
    """What a step is given and asked for, in short: shapes and types of its inputs, and the kinds of its outputs."""
    return _short(*((v.shape, str(v.dtype)) for v in graph.inputs), graph.signature, len(graph.late))


def digest(plan: Plan) -> str:
    """All that decides what a step computes and in which order, in short."""
    stages = [
        ([op.target for op in s.section.ops], s.grid.axes, s.parallel, s.reversed, len(s.groups)) for s in plan.stages
    ]
    text = str(replace(plan, timed=None))  # what is measured may be another number every time
    return _short(text, stages, [(v.name, slot.offset, slot.tier) for v, slot in plan.slots.items()],
                  plan.max_in_flight, plan.alone, plan.tight, plan.keeps, plan.early)  # fmt: skip


def _short(*parts: object) -> str:
    return sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
