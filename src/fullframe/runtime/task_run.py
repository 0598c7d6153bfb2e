"""A task run in Python, op by op: what a recording is made of, and the reference for it."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import NamedTuple

import torch

from fullframe.bytecode.recorder import Recorder
from fullframe.codegen.group import Call
from fullframe.codegen.kernel import Kernel
from fullframe.ir.graph import Value, reduces
from fullframe.runtime.fused import Kernels, bind
from fullframe.runtime.tasks import Job, Part, Partials, Read, Store, Target, Task
from fullframe.runtime.tile_classes import span
from fullframe.schedule.request import LARGE
from fullframe.storage.arena import Arena, empty_map, gapless, strides_as
from fullframe.storage.protocol import StoredMap


class Memory(NamedTuple):
    """What the tiles of a run work with: its values, its arena, the maps that live elsewhere, the device and the
    kernels of fused jobs.

    Tiles are recorded where ``records`` is true. Of maps in ``held`` only a part may be here. Untiled values of
    more than ``alone`` bytes are not recorded. While a tile is
    recorded, parts of maps are looked up among ``arrays``, by value and span: tensors whose memory begins with them;
    and what is to be put away from the device is copied to its tensor among ``puts``.
    """

    values: dict[Value, torch.Tensor]
    arena: Arena
    offloaded: Mapping[Value, StoredMap]
    device: torch.device
    kernels: Kernels
    records: bool
    held: Collection[Value] = ()
    alone: int = LARGE
    arrays: Mapping[tuple[Value, Hashable], torch.Tensor] = MappingProxyType({})
    puts: Mapping[Store, torch.Tensor] = MappingProxyType({})

    def part(self, value: Value, part: Part) -> torch.Tensor:
        """A part of a stored map."""
        found = self.arrays.get((value, span(part))) if self.arrays else None
        return part_of(self.values[value], part) if found is None else found

    def lies(self, value: Value, window: bool, part: torch.Tensor) -> tuple[int, ...]:
        """Strides of a part of a map or window, as they would be if all of the map were here."""
        if window or value not in self.held:
            return part.stride()
        return strides_as(value.shape, self.values[value].stride()) or ()


def part_of(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    return tensor if part is None else tensor[part]


Windows = dict[Value, torch.Tensor]


def run_task(
    task: Task, memory: Memory, recorder: Recorder | None = None, fetched: Sequence[torch.Tensor] | None = None
) -> Partials:
    """Do a task's jobs one after the other, and note them with a recorder that is given; returns the partial result
    of each sum. ``fetched``: what the task fetches, if that has been done."""
    if fetched is None:
        fetched = [memory.offloaded[f.value].fetch(f.region) for f in task.fetches]
    windows = {f.value: made for f, made in zip(task.fetches, fetched, strict=True)}
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
    known = job.bound if recorder is None else None
    places = known.places(memory.values, windows, made, memory.device) if known else None
    if known is None or places is None:
        call, tensors, fresh = _prepare(job, memory, windows, made)
        places = [t.data_ptr() for t in tensors]
    else:
        call, tensors, fresh = known.call, [], []
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
    return part_of(windows[read.value], read.part) if read.window else memory.part(read.value, read.part)


def _target(target: Target, memory: Memory) -> torch.Tensor:
    if target.shape is not None:
        return empty_map(target.shape, target.value.dtype, memory.device)
    return memory.part(target.value, target.part)


def _store(store: Store, made: torch.Tensor, memory: Memory, parts: Sequence[torch.Tensor] = ()) -> None:
    """Keep what was made of these parts."""
    if store.region is None:
        memory.values[store.value] = own(store.value, made, memory.arena, memory.alone, parts)
    elif store in memory.puts:
        memory.puts[store].copy_(part_of(made, store.made))
    elif store.value in memory.offloaded:
        memory.offloaded[store.value].put(store.region, part_of(made, store.made))
    else:
        memory.part(store.value, store.to).copy_(part_of(made, store.made))


def own(
    value: Value, made: torch.Tensor, arena: Arena, alone: int, parts: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """An untiled value as a tensor that shares no memory with others, if it is recorded, which those of more than
    ``alone`` bytes are not: bytecode knows arrays by it."""
    if value.nbytes > alone:
        # It must not look into the arena, whose places are used again.
        inside = made.untyped_storage().data_ptr() == arena.block.untyped_storage().data_ptr()
        return made.clone() if inside else made
    shared = made.untyped_storage().nbytes() != made.nbytes or any(made is part for part in parts)
    return made.clone() if shared or made._base is not None or not gapless(made) else made
