"""Runs a plan: stage by stage, tile by tile.

Where tiles can be recorded, one scheduler, which is C++, gives them to worker threads and calls back for what Python
has to do (`replay_cpu`). Elsewhere the stages run one after the other in a loop that is written here: on a processor
without a compiler as the plain reference, and on other devices, which do their own work at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from types import MappingProxyType
from weakref import WeakKeyDictionary

import torch

from fullframe.bytecode.libtorch import bytecode_available, release
from fullframe.capture.threads import ForkSafeLock
from fullframe.device import BYTECODE, device_of
from fullframe.distributed.mesh import Domain
from fullframe.ir import region as box
from fullframe.ir.graph import Value
from fullframe.partition.tile_axes import tiled
from fullframe.runtime import ranks, replay_ranks
from fullframe.runtime.accumulate import Sums
from fullframe.runtime.fused import Kernels, build
from fullframe.runtime.progress import Progress
from fullframe.runtime.replay_cpu import Schedule
from fullframe.runtime.replay_ranks import SharedSchedule
from fullframe.runtime.task_run import Memory, own
from fullframe.runtime.tasks import Partials, part_in, place_of, room_of, tiles_of
from fullframe.runtime.tile import Tile, Tiles
from fullframe.runtime.workers import pool
from fullframe.schedule.dependencies import dependencies_of, is_expensive
from fullframe.schedule.plan import Plan
from fullframe.storage.arena import empty_output, strides_as
from fullframe.storage.heap import LARGEST, HeapTrimmer, keep, mapped
from fullframe.storage.pool import Stores
from fullframe.storage.protocol import StoredMap

_RUNTIMES: WeakKeyDictionary[Plan, Runtime] = WeakKeyDictionary()
_LOCK = ForkSafeLock()
_NONE: Mapping[Value, StoredMap] = MappingProxyType({})


class Runtime:
    """What the runs of a plan share: its kernels, its tiles, and how its stages are scheduled."""

    def __init__(self, plan: Plan, device: torch.device):
        self.kernels: Kernels = build(plan, device)
        self.constants = {v: t.to(device) for v, t in plan.graph.constants.items()}
        # A caller's own memory: what is handed out, and what is not cut into tiles.
        outputs = {v for v in plan.graph.outputs if v is not None}
        self.maps = {v for s in plan.stages for v in s.section.outputs if tiled(v, plan.tile_axes)}
        self.slots = {v: slot for v, slot in plan.slots.items() if v not in outputs}
        self.kept = (self.maps - outputs).difference(plan.offloaded)
        self.records = device_of(device).replay == BYTECODE and bytecode_available()
        mine = [tiles_of(plan, number) for number in range(len(plan.stages))] if plan.share else None
        self.tiles = Tiles(plan.stages, room_of(plan), frozenset(plan.offloaded), records=self.records, mine=mine)
        self.dependencies = dependencies_of(plan, [is_expensive(stage) for stage in plan.stages])
        self.schedules: dict[tuple[int, int, bool], Schedule] = {}
        self.written: set[int] = set()  # from which stages on the plan has run
        self.streams = device_of(device).streams(plan.workers, device) if plan.offloaded else None

    def schedule(self, plan: Plan, stages: range, values: dict[Value, torch.Tensor]) -> Schedule:
        """These stages for the scheduler: with their bytecode once all tiles are settled, unless what they read lies
        otherwise in memory than when they were recorded; else each tile is made by a call back."""
        if self.tiles.settled(stages):
            found = self._scheduled(plan, stages, True)
            if found.fits(values):
                return found
        return self._scheduled(plan, stages, False)

    def _scheduled(self, plan: Plan, stages: range, replayed: bool) -> Schedule:
        key = stages.start, stages.stop, replayed
        with _LOCK:
            if key not in self.schedules:
                kind = Schedule if plan.share is None else SharedSchedule
                self.schedules[key] = kind(
                    plan, self.tiles if replayed else None, self.dependencies, self.maps, self.kept, stages
                )
            return self.schedules[key]


def runtime_of(plan: Plan, device: torch.device) -> Runtime:
    """The runtime of a plan, made when it first runs."""
    with _LOCK:
        if plan not in _RUNTIMES:
            _RUNTIMES[plan] = Runtime(plan, device)
        return _RUNTIMES[plan]


class Run:
    """One run of a plan. ``feed`` inputs, ``advance`` over its stages, ``result`` an output.

    Of the inputs and outputs that live in objects of the caller's it is given these, as ``external``.
    """

    def __init__(
        self, plan: Plan, stores: Stores, device: torch.device, domain: Domain | None = None,
        external: Mapping[Value, StoredMap] = _NONE,
    ):  # fmt: skip
        self.plan, self.arena, self.device, self.domain = plan, stores.arena, device, domain
        self.offloaded = {v: external[v] if v in plan.external else stores.map(plan.slots[v]) for v in plan.offloaded}
        self.opened: set[Value] = set()  # of the maps that live elsewhere
        self.runtime = runtime_of(plan, device)
        self.values: dict[Value, torch.Tensor] = dict(self.runtime.constants)
        self.position = 0
        self.trimmer: HeapTrimmer | None = None
        self.progress = Progress(plan)

    def feed(self, values: Sequence[Value], tensors: Sequence[torch.Tensor]) -> None:
        """Give a run its inputs; a number on the processor, which torch lets meet tensors of a device, goes there."""
        for value, tensor in zip(values, tensors, strict=True):
            self.values[value] = self._held(value, _as_plain(tensor).to(self.device))

    def _held(self, value: Value, tensor: torch.Tensor) -> torch.Tensor:
        """A rank's rows of an input where there is room for those of others that it reads."""
        share = self.plan.share
        if share is None or value not in share.given or share.room[value] == value.shape == tensor.shape:
            return tensor
        room = share.room[value]
        made = torch.empty_strided(
            room, strides_as(room, tensor.stride()) or (), dtype=value.dtype, device=self.device
        )
        made = self._narrowed(value, made)
        made[part_in(self.plan, value, share.given[value]) or ...].copy_(tensor)
        return made

    def _narrowed(self, value: Value, made: torch.Tensor) -> torch.Tensor:
        """What a rank has of a map, in the memory that there is for it."""
        held = self.plan.share and self.plan.share.held.get(value)
        return made[tuple(slice(n) for n in box.shape_of(held))] if held else made

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of what is to be fed for an input: of one that is divided that of this rank's rows."""
        given = self.plan.share and self.plan.share.given.get(value)
        return box.shape_of(given) if given else value.shape

    def part(self, value: Value) -> torch.Tensor:
        """A value as it is handed out: of one that is divided among ranks the rows of this one."""
        share = self.plan.share
        part = None if share is None or value not in share.parts else part_in(self.plan, value, share.parts[value])
        return self.values[value] if part is None else self.values[value][part]

    def result(self, value: Value | None) -> torch.Tensor | None:
        """An output, in memory of its own."""
        if value is None:
            return None
        tensor = self.part(value)
        given = value in self.plan.graph.inputs or value in self.runtime.constants
        return tensor.clone() if given or tensor._base is not None else tensor

    def finished(self, values: dict[Value, torch.Tensor]) -> Run:
        """The same run, done, with these values."""
        other = copy(self)
        other.values, other.position = values, len(self.plan.stages)
        return other

    def advance(self, end: int) -> None:
        """Run the stages up to ``end``; grad mode and autocast are off inside."""
        threads, stages = torch.get_num_threads(), range(self.position, end)
        self.trimmer = self._trimmer() if self.plan.tight else None
        keep(self.plan.keeps)
        off = torch.autocast(self.device.type, enabled=False)
        with torch.no_grad(), off, mapped(self.plan.tight):
            try:
                if self.domain is not None and self.runtime.records:
                    scheduled = partial(self.runtime.schedule, self.plan, stages, self.values)
                    replay_ranks.advance(self, self.domain, stages, threads, scheduled)
                elif self.domain is not None:
                    ranks.advance(self, self.domain, stages, threads, self.runtime.dependencies.multi_threaded)
                elif self.runtime.records:
                    self.runtime.schedule(self.plan, stages, self.values).replay(self, threads, pool)
                else:
                    self._one_by_one(stages, threads)
            finally:
                self.threads(threads)
                if self.runtime.records:
                    release(0 if self.plan.tight else LARGEST)
        self.position = end

    def _one_by_one(self, stages: range, threads: int) -> None:
        """The reference: the stages in their order, and the tiles of each in theirs."""
        streams = self.runtime.streams
        for number in stages:
            self.threads(threads if self.runtime.dependencies.multi_threaded[number] else 1)
            sums, stage = self.begin(number), self.plan.stages[number]
            make, places = partial(self.make, number), [place_of(stage, k) for k in range(len(stage.grid))]
            if streams and stage.parallel:
                streams.run(len(places), make, lambda k, made, sums=sums, places=places: sums.add(places[k], made))
            else:
                for k, place in enumerate(places):
                    sums.add(place, make(k))
            self.end(number, sums)
            self.free(number)

    def begin(self, number: int) -> Sums:
        """Room for what a stage makes, and its sums, empty."""
        stage = self.plan.stages[number]
        for value in stage.section.saves:
            if value in self.offloaded:
                self._open(value)
            elif value in self.runtime.maps or 0 in value.shape:  # no job makes what is empty
                self.values[value] = self.allocate(value)
        return Sums(stage.section.sums, len(stage.grid), self.device, together=not self.runtime.records)

    def make(self, number: int, k: int) -> Partials:
        """Make a tile of a stage; returns its partial result of each sum."""
        if self.offloaded and k + self.plan.workers < self.runtime.dependencies.counts[number]:
            for value, region in self.tile(number, k + self.plan.workers).fetches():
                self.offloaded[value].expect(region)
        made = self.tile(number, k).run(self.memory)
        self.progress.tiles[number] += 1
        return made

    def end(self, number: int, sums: Sums) -> None:
        """Keep what a stage has added up."""
        for op, total in sums.finish().items():
            self._keep(op.output, own(op.output, total, self.arena, self.plan.alone))

    def _keep(self, value: Value, made: torch.Tensor) -> None:
        """Put what is made in one piece where it lives."""
        if value in self.offloaded:
            self._open(value)
            self.offloaded[value].put(box.full(value.shape), made)
        else:
            self.values[value] = self.allocate(value).copy_(made) if value in self.runtime.kept else made

    def _open(self, value: Value) -> None:
        self.opened.add(value)
        self.offloaded[value].open()

    def free(self, number: int) -> None:
        """Let go of what nothing reads after a stage, once all before it are done, too."""
        self.progress.done = number + 1
        self.poll()
        for value in self.plan.stages[number].frees:
            if value in self.opened:
                self.opened.discard(value)
                self.offloaded[value].close()
            self.values.pop(value, None)  # what bytecode has made and nobody in Python saw is not there

    def tile(self, number: int, k: int) -> Tile:
        return self.runtime.tiles.tile(self.plan, number, k)

    @property
    def memory(self) -> Memory:
        """What its tiles work with."""
        return Memory(
            self.values, self.arena, self.offloaded, self.device, self.runtime.kernels, self.runtime.records,
            self.plan.share.held if self.plan.share else {}, self.plan.alone
        )  # fmt: skip

    def allocate(self, value: Value) -> torch.Tensor:
        """Room for a value: in the arena, or on its own where it is handed out."""
        slot = self.runtime.slots.get(value)
        if slot is None:
            room = self.plan.share and self.plan.share.room.get(value)
            return self._narrowed(value, empty_output(self.plan.graph, value, self.device, room))
        return self._narrowed(value, self.arena.view(slot))

    def poll(self) -> None:
        """Between stages, and now and then within a long one."""
        self.progress.poll()
        if self.trimmer is not None:
            self.trimmer.poll()

    def threads(self, count: int) -> None:
        """Threads inside the ops of this thread. After each such op they wait busily for the next, in the way of the
        workers; so only expensive stages, not cut into tiles and alone, have them, whatever the number of workers."""
        if device_of(self.device).on_host and torch.get_num_threads() != count:
            torch.set_num_threads(count)

    def _trimmer(self) -> HeapTrimmer:
        """Until all maps have been written once, nobody can tell their pages from what is kept beside them."""
        counted = self.plan.bytes
        other = self.plan.external.union(self.plan.graph.inputs)
        made = sum(v.nbytes for v in {*self.plan.graph.outputs} if v is not None and v not in other)
        before, self.runtime.written = self.runtime.written, self.runtime.written | {self.position}
        return HeapTrimmer(
            counted.untiled + counted.scratch + counted.spare + made if self.position in before else None
        )


def _as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor of any kind, as they lie in memory: kernels know of no conjugate or negative bit."""
    tensor = tensor.detach()
    tensor = tensor if type(tensor) is torch.Tensor else tensor.as_subclass(torch.Tensor)
    return tensor.resolve_conj().resolve_neg()
