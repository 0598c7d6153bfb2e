"""One tile of a stage: made in Python the first time, while it is recorded, and from its bytecode from then on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from fullframe.bytecode.program import Bytecode
from fullframe.bytecode.recorder import Recorder
from fullframe.codegen.group import Call
from fullframe.codegen.kernel import Kernel
from fullframe.errors import fall_back
from fullframe.ir.graph import Value, reduces
from fullframe.runtime.fused import Kernels, bind
from fullframe.runtime.tasks import Job, Part, Partials, Read, Store, Sum, Target, Task, task_of, tile_at
from fullframe.schedule.plan import LARGE, Plan, Stage
from fullframe.storage.arena import Arena, empty_map, gapless, strides_as
from fullframe.storage.protocol import StoredMap

TRIES = 2  # What a library does once only, when it is first called, may keep the first recording from being used.


class Memory(NamedTuple):
    """What the tiles of a run work with: its values, its arena, the maps that live elsewhere, the device and the
    kernels of fused jobs.

    Tiles are recorded where ``records`` is true. Of maps in ``held`` only a part may be here.
    """

    values: dict[Value, torch.Tensor]
    arena: Arena
    offloaded: Mapping[Value, StoredMap]
    device: torch.device
    kernels: Kernels
    records: bool
    held: Collection[Value] = ()

    def lies(self, value: Value, window: bool, part: torch.Tensor) -> tuple[int, ...]:
        """Strides of a part of a map or window, as they would be if all of the map were here."""
        if window or value not in self.held:
            return part.stride()
        return strides_as(value.shape, self.values[value].stride()) or ()


class Recorded:
    """The bytecode of a task, the values that it reads and writes outside of the arena, with their strides, and what
    its results are: partial results of sums, and untiled values."""

    __slots__ = ("bytecode", "places", "strides", "values")

    def __init__(
        self,
        bytecode: Bytecode,
        values: Sequence[Value],
        strides: Sequence[tuple[int, ...]],
        places: Sequence[Sum | Value],
    ):
        self.bytecode, self.values, self.strides, self.places = bytecode, values, strides, places

    def run(self, values: MutableMapping[Value, torch.Tensor], arena: Arena) -> Partials | None:
        """The partial results, with the untiled values put among ``values``; None where a tensor lies otherwise in
        memory than when it was recorded."""
        bases = [arena.block.data_ptr()]
        for value, stride in zip(self.values, self.strides, strict=True):
            tensor = values[value]
            if tensor.stride() != stride:
                return None
            bases.append(tensor.data_ptr())
        made = self.bytecode.run(bases)
        if made is None:
            return None
        partials = self.hand_out(made, values)
        if len(made) > 1:
            values.update((v, values[v].clone()) for v in self.places if isinstance(v, Value))
        return partials

    def hand_out(self, made: Sequence[torch.Tensor], values: MutableMapping[Value, torch.Tensor]) -> Partials:
        """Results: the untiled values among the others, the partial results returned."""
        partials: Partials = []
        for place, tensor in zip(self.places, made, strict=True):
            if isinstance(place, Sum):
                partials.append((place, tensor))
            else:
                values[place] = tensor
        return partials


class Tile:
    """A tile's task, and its bytecode once it has been recorded."""

    __slots__ = ("recorded", "task", "tries")

    def __init__(self, task: Task, kept: bool):
        self.task = task
        self.recorded: Recorded | None = None
        # What is made anew in each step is not worth a recording.
        self.tries = TRIES if kept and _recordable(task) else 0

    @property
    def settled(self) -> bool:
        """Whether it is known in which way the tile will be made from now on."""
        return self.recorded is not None or not self.tries

    def run(self, memory: Memory) -> Partials:
        """Make the tile; returns its partial result of each sum."""
        if self.recorded is not None:
            partials = self.recorded.run(memory.values, memory.arena)
            if partials is not None:
                return partials
        elif self.tries and memory.records:
            return self._record(memory)
        return _run(self.task, memory)

    def run_in_python(self, memory: Memory) -> Partials:
        """Make the tile without its bytecode, which has failed."""
        return _run(self.task, memory)

    def _record(self, memory: Memory) -> Partials:
        task, values = self.task, memory.values
        others = _outside_arena(task, values, memory.arena)
        recorder = Recorder([memory.arena.block, *(values[v] for v in others)])
        partials = _run(task, memory, recorder)
        untiled = _untiled(task)
        done = recorder.finish([*(made for _, made in partials), *(values[v] for v in untiled)])
        if done is not None:
            strides = [values[v].stride() for v in others]
            self.recorded = Recorded(done, others, strides, [*(place for place, _ in partials), *untiled])
        else:
            self.tries -= 1
            if not self.tries:
                fall_back(
                    f"some tiles run op by op in Python, which is slower, for lack of bytecode: {recorder.refused}"
                )
        return partials


class Tiles:
    """The tiles of a plan, made when they are first asked for. Threads may ask at the same time.

    They do not hold the plan, which is the key under which they are found.
    """

    def __init__(self, stages: Sequence[Stage], room: int, offloaded: frozenset[Value] = frozenset()):
        """So many tiles are kept; those of the other stages are made anew each time. What reads or writes maps that
        are ``offloaded`` is made in Python."""
        self.offloaded = [not offloaded.isdisjoint((*s.section.loads, *s.section.outputs)) for s in stages]
        self.kept: list[list[Tile | None] | None] = []
        for stage in stages:
            fits = len(stage.grid) <= room
            room -= len(stage.grid) if fits else 0
            empty: list[Tile | None] = [None] * len(stage.grid)
            self.kept.append(empty if fits else None)

    def tile(self, plan: Plan, number: int, k: int) -> Tile:
        """Tile ``k`` of stage ``number``."""
        kept = self.kept[number]
        found = kept[k] if kept is not None else None
        if found is None:
            stage = plan.stages[number]
            found = Tile(task_of(plan, stage, tile_at(stage, k)), kept is not None and not self.offloaded[number])
            if kept is not None:
                kept[k] = found
        return found

    def settled(self, stages: range) -> bool:
        """Whether it is known of all tiles of these stages in which way they will be made."""
        kept = (self.kept[number] for number in stages)
        return all(tile is not None and tile.settled for found in kept for tile in found or ())


def part_of(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    return tensor if part is None else tensor[part]


def _recordable(task: Task) -> bool:
    """Whether what it makes besides maps is small."""
    return all(v.nbytes <= LARGE for v in _untiled(task))


def _outside_arena(task: Task, values: Mapping[Value, torch.Tensor], arena: Arena) -> list[Value]:
    """What a task reads, and the maps it writes, that are neither windows nor in the arena."""
    found = dict.fromkeys(
        value
        for job in task.jobs
        for value in (
            *(r.value for r in job.reads if not r.window and r.empty is None),
            *(t.value for t in job.targets if t.shape is None),
            *(s.value for s in job.stores if s.region is not None),
        )
    )
    block = arena.block.untyped_storage().data_ptr()
    return [v for v in found if values[v].untyped_storage().data_ptr() != block]


def _untiled(task: Task) -> list[Value]:
    """The untiled values that a task makes."""
    return [s.value for job in task.jobs for s in job.stores if s.region is None]


# In Python -----------------------------------------------------------------------------------------

Windows = dict[Value, torch.Tensor]


def _run(task: Task, memory: Memory, recorder: Recorder | None = None) -> Partials:
    """Do a task's jobs one after the other, and note them with a recorder that is given."""
    windows = {f.value: memory.offloaded[f.value].fetch(f.region) for f in task.fetches}
    partials: Partials = []
    for job in task.jobs:
        if job.group.fused:
            _fused(job, memory, windows, partials, recorder)
        else:
            with recorder or nullcontext():
                _single(job, memory, windows, partials)
        for value in job.frees:
            del windows[value]
    return partials


def _single(job: Job, memory: Memory, windows: Windows, partials: Partials) -> None:
    """Run one op by its rule."""
    group = job.group
    (op,) = group.ops or group.sums
    parts = [_read(read, memory, windows) for read in job.reads]
    made = op.rule.run(op, job.region, parts)
    if job.sums:
        (place,) = job.sums
        if place.counted:  # it will be added to, and must not be memory that was read
            shared = any(made.untyped_storage().data_ptr() == part.untyped_storage().data_ptr() for part in parts)
            partials.append((place, made.clone() if shared else made))
        return
    if reduces(op.rule):  # no tile cuts it: finished at once
        made = op.rule.finish(op, made)
    for store in job.stores:
        _store(store, made, memory, parts)
    windows[op.output] = made


def _fused(job: Job, memory: Memory, windows: Windows, partials: Partials, recorder: Recorder | None) -> None:
    """Run the kernel of several ops."""
    made: Windows = {}
    known = job.bound
    places = known.places(memory.values, windows, made, memory.device) if known else None
    if known is None or places is None:
        call, tensors, fresh = _prepare(job, memory, windows, made)
        places = [t.data_ptr() for t in tensors]
    else:
        call, fresh = known.call, [*made.values()]
        tensors = known.tensors(memory.values, windows, made) if recorder else ()
    sums = call(places)
    if recorder:
        recorder.kernel(call, tensors, places, fresh, sums)
    with recorder or nullcontext():
        for store in job.stores:
            _store(store, made[store.value], memory)
    for place, partial in zip(job.sums, sums, strict=True):
        if place.counted:
            partials.append((place, partial.view(place.shape)))


def _prepare(job: Job, memory: Memory, windows: Windows,
             made: Windows) -> tuple[Call, list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """The call of a job's kernel on tensors whose layout is not known yet, the tensors, and which of them are new."""
    parts = [_read(read, memory, windows) for read in job.reads]
    for target in job.targets:
        made[target.value] = _target(target, memory)
    operands, outputs = [aligned(t, len(job.region)) for t in parts], list(made.values())
    kernel = memory.kernels[job.group]
    if memory.held and isinstance(kernel, Kernel):  # the order of sums must not depend on how much of a map is here
        lies = [
            memory.lies(r.value, r.window or r.empty is not None, t) for r, t in zip(job.reads, parts, strict=True)
        ]
        lies += [memory.lies(t.value, t.shape is not None, made[t.value]) for t in job.targets]
        call = kernel.call(operands, outputs, lies)
    else:
        call = kernel.call(operands, outputs)
    job.bound = bind(job, call, memory.values, windows, parts, made)
    windows.update((t.value, made[t.value]) for t in job.targets if t.keep)
    return call, [*operands, *outputs], [made[t.value] for t in job.targets if t.shape is not None]


def aligned(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """A broadcast operand with leading axes of extent 1, but for a zero-dimensional one."""
    missing = rank - tensor.dim()
    return tensor[(None,) * missing] if missing and tensor.dim() else tensor


def _read(read: Read, memory: Memory, windows: Windows) -> torch.Tensor:
    if read.empty is not None:
        return torch.empty(read.empty, dtype=read.value.dtype, device=memory.device)
    return part_of(windows[read.value] if read.window else memory.values[read.value], read.part)


def _target(target: Target, memory: Memory) -> torch.Tensor:
    if target.shape is not None:
        return empty_map(target.shape, target.value.dtype, memory.device)
    return part_of(memory.values[target.value], target.part)


def _store(store: Store, made: torch.Tensor, memory: Memory, parts: Sequence[torch.Tensor] = ()) -> None:
    """Keep what was made of these parts."""
    if store.region is None:
        memory.values[store.value] = own(store.value, made, memory.arena, parts)
    elif store.value in memory.offloaded:
        memory.offloaded[store.value].put(store.region, part_of(made, store.made))
    else:
        part_of(memory.values[store.value], store.to).copy_(part_of(made, store.made))


def own(value: Value, made: torch.Tensor, arena: Arena, parts: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """An untiled value as a tensor that shares no memory with others, if it is small: bytecode knows arrays by it."""
    if value.nbytes > LARGE:
        # It must not look into the arena, whose places are used again.
        inside = made.untyped_storage().data_ptr() == arena.block.untyped_storage().data_ptr()
        return made.clone() if inside else made
    shared = made.untyped_storage().nbytes() != made.nbytes or any(made is part for part in parts)
    return made.clone() if shared or made._base is not None or not gapless(made) else made
