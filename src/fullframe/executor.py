"""Runs a plan: step by step, tile by tile, on worker threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from copy import copy
from functools import cached_property
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fullframe.flow import Flow, Work, waits_of
from fullframe.fusion import Unit
from fullframe.graph import Op, Value
from fullframe.kernels import DeviceKernel, Kernel, Plain, Tape, taping
from fullframe.lowering import build
from fullframe.plan import Plan, Step
from fullframe.ready import Ready, ready
from fullframe.section import tiled
from fullframe.store import Arena, empty_map
from fullframe.taped import Partials, TapedTask, apart, fit
from fullframe.task import Job, Part, Read, Store, Sum, Target, Task, Tasks
from fullframe.tiers import Lanes, fetch, put

MOVED = "a tensor whose layout has changed"
Kernels = dict[Unit, Kernel | DeviceKernel | Plain]
_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}
_RUNTIMES: WeakKeyDictionary[Plan, Runtime] = WeakKeyDictionary()
_LOCK = threading.Lock()
_WRITING = threading.Lock()  # one tile at a time is put on tape, and no other waits for that: its turn comes later


class Runtime:
    """What the runs of a plan share: its kernels and its tasks."""

    def __init__(self, plan: Plan, device: torch.device):
        self.kernels: Kernels = build(plan, device)
        self.constants = {v: t.to(device) for v, t in plan.graph.constants.items()}
        self.tasks = Tasks(plan.steps)
        # A caller's own memory: what is handed out, and what is not cut into tiles.
        outputs = {v for v in plan.graph.outputs if v is not None}
        self.maps = {v for s in plan.steps for v in s.section.outputs if tiled(v, plan.labels)}
        self.slots = {v: slot for v, slot in plan.slots.items() if v not in outputs}
        self.kept = self.maps - outputs
        self.taping = device.type == "cpu" and not plan.away and taping()
        self.dear = [_dear(step) for step in plan.steps]
        self.waits = waits_of(plan, self.dear)
        self.lanes = Lanes(device, plan.workers) if plan.away and device.type == "cuda" else None


def runtime_of(plan: Plan, device: torch.device) -> Runtime:
    """The runtime of a plan, made when it first runs."""
    with _LOCK:
        if plan not in _RUNTIMES:
            _RUNTIMES[plan] = Runtime(plan, device)
        return _RUNTIMES[plan]


DEAR = 300_000_000  # operations: some milliseconds


def _dear(step: Step) -> bool:
    """Whether a step is worth more than one thread."""
    spent = 0
    for op in step.section.ops:
        rule: Any = op.rule
        through = op.inputs[rule.driver] if rule.kind == "reduce" else op.output
        spent += max(rule.cost(op, prod(through.shape)), 100 * prod(op.output.shape) * (rule.kind == "whole"))
    return spent > DEAR


def pool(workers: int) -> ThreadPoolExecutor:
    """The worker threads of this process; made anew after a fork, where threads do not survive."""
    key = (os.getpid(), workers)
    with _LOCK:
        if key not in _POOLS:
            _POOLS[key] = ThreadPoolExecutor(workers, "fullframe", initializer=_start_worker)
        return _POOLS[key]


def _start_worker() -> None:
    # Intra-op threads, grad mode and autocast are thread-local: each worker sets its own.
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes over the process's number when it first asks: now, not later
    torch.set_grad_enabled(False)


class Run:
    """One run of a plan. ``feed`` inputs, ``advance`` over its steps, ``result`` an output."""

    def __init__(self, plan: Plan, arena: Arena, device: torch.device):
        self.plan, self.arena, self.device = plan, arena, device
        self.runtime = runtime_of(plan, device)
        self.values: dict[Value, torch.Tensor] = dict(self.runtime.constants)
        self.position = 0

    def feed(self, values: Sequence[Value], tensors: Sequence[torch.Tensor]) -> None:
        """Give a run its inputs; a number on the processor, which torch lets meet tensors of a device, goes there."""
        self.values.update(zip(values, (_plain(t).to(self.device) for t in tensors), strict=True))

    def result(self, value: Value | None) -> torch.Tensor | None:
        """An output, in memory of its own."""
        if value is None:
            return None
        tensor = self.values[value]
        given = value in self.plan.graph.inputs or value in self.runtime.constants
        return tensor.clone() if given or tensor._base is not None else tensor

    def finished(self, values: dict[Value, torch.Tensor]) -> Run:
        """The same run, done, with these values."""
        other = copy(self)
        other.values, other.position = values, len(self.plan.steps)
        return other

    def advance(self, end: int) -> None:
        """Run the steps up to ``end``; grad mode and autocast are off inside."""
        threads = torch.get_num_threads()
        flowing = self.plan.workers > 1 and self.device.type == "cpu" and not self.plan.away
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            try:
                if flowing and any(step.parallel for step in self.plan.steps[self.position : end]):
                    self._flow(end, threads)
                else:
                    for number in range(self.position, end):
                        alone = self.runtime.dear[number] and self.runtime.waits.counts[number] == 1
                        self._threads(threads if alone else 1)
                        self._step(number)
            finally:
                self._threads(threads)
        self.position = end

    def _threads(self, count: int) -> None:
        """Threads inside the ops of this thread. After each such op they wait busily for the next, in the way of
        the workers; so only dear steps, not cut into tiles and alone, have them, whatever the number of workers."""
        if self.device.type == "cpu" and torch.get_num_threads() != count:
            torch.set_num_threads(count)

    def _flow(self, end: int, threads: int) -> None:
        """Steps on several threads, of which the calling one is one."""
        work = Work(self._begin, lambda number, k: self._tile(self._task(number, k)), _add, self._end, self._free)
        steps, most = range(self.position, end), 2 * self.plan.workers
        flow = Flow(steps, self.runtime.waits, self.plan.ahead, most, work)
        self._threads(1)

        def wide(make: Callable[[], None]) -> None:
            self._threads(threads)
            make()
            self._threads(1)

        others: list[Future[None]] = []
        try:
            for _ in range(self.plan.workers - 1):
                others.append(pool(self.plan.workers - 1).submit(flow.run))
            flow.run(wide)
        except BaseException:
            flow.fail()
            raise
        finally:
            # One that has not begun, behind another step of this process, is not needed any more.
            begun = [other for other in others if not other.cancel()]
            wait(begun)
        for other in begun:
            other.result()

    def _step(self, number: int) -> None:
        sums, count = self._begin(number), self.runtime.waits.counts[number]
        if self.plan.steps[number].parallel and self.runtime.lanes:
            self.runtime.lanes.run(count, lambda k: self._tile(self._task(number, k)), lambda p: _add(sums, p))
        else:
            for k in range(count):
                _add(sums, self._tile(self._task(number, k)))
        self._end(number, sums)
        self._free(number)

    def _begin(self, number: int) -> dict[Op, Summation]:
        """Room for what a step makes, and its sums, empty."""
        step = self.plan.steps[number]
        for value in step.section.saves:
            if value in self.runtime.maps or 0 in value.shape:  # no job makes what is empty
                self.values[value] = self._allocate(value)
        return {op: Summation(op, self.device, alone=len(step.grid) == 1) for op in step.section.sums}

    def _end(self, number: int, sums: dict[Op, Summation]) -> None:
        """Keep what a step has added up."""
        for op, total in sums.items():
            self.values[op.output] = self._keep(op.output, self._apart(total.finish()))

    def _free(self, number: int) -> None:
        for value in self.plan.steps[number].frees:
            del self.values[value]

    def _task(self, number: int, k: int) -> Task:
        return self.runtime.tasks.task(self.plan, number, k)

    def _allocate(self, value: Value) -> torch.Tensor:
        slot = self.runtime.slots.get(value)
        if slot is None:
            return torch.empty(value.shape, dtype=value.dtype, device=self.device)
        return self.arena.view(slot.offset, value.shape, value.dtype)

    def _keep(self, value: Value, tensor: torch.Tensor) -> torch.Tensor:
        return self._allocate(value).copy_(tensor) if value in self.runtime.kept else tensor

    def _tile(self, task: Task) -> Partials:
        """Make one tile; returns its partial result of each sum."""
        taped = task.taped
        if taped:
            partials = taped.run(self.values, self.arena)
            if partials is not None:
                return partials
        elif taped is None and self.runtime.taping and fit(task) and _WRITING.acquire(blocking=False):
            try:
                return self._written(task)
            finally:
                _WRITING.release()
        return self._jobs(task)

    def _written(self, task: Task) -> Partials:
        """Make one tile, and put it on tape."""
        others = apart(task, self.values, self.arena)
        tape = Tape([self.arena.block, *(self.values[v] for v in others)])
        partials = self._jobs(task, tape)
        taped = tape.finish([made for _, made in partials])
        strides = [self.values[v].stride() for v in others]
        if taped is not None:
            task.taped = TapedTask(taped, others, strides, [place for place, _ in partials])
        elif tape.refused != MOVED:
            task.taped = False
        return partials

    def _jobs(self, task: Task, tape: Tape | None = None) -> Partials:
        windows = {f.value: fetch(_part(self.values[f.value], f.part), self.device) for f in task.fetches}
        partials: Partials = []
        for job in task.jobs:
            if job.unit.fused:
                self._fused(job, windows, partials, tape)
            else:
                with tape or nullcontext():
                    self._single(job, windows, partials)
            for value in job.drops:
                del windows[value]
        return partials

    def _read(self, read: Read, windows: dict[Value, torch.Tensor]) -> torch.Tensor:
        if read.empty is not None:
            return torch.empty(read.empty, dtype=read.value.dtype, device=self.device)
        return _part(windows[read.value] if read.window else self.values[read.value], read.part)

    def _store(self, store: Store, made: torch.Tensor) -> None:
        if not store.tiled:
            self.values[store.value] = self._apart(made)
            return
        put(_part(made, store.made), _part(self.values[store.value], store.to))

    def _apart(self, made: torch.Tensor) -> torch.Tensor:
        """A tensor that does not look into the arena, whose places are used again."""
        shared = made.untyped_storage().data_ptr() == self.arena.block.untyped_storage().data_ptr()
        return made.clone() if shared else made

    def _single(self, job: Job, windows: dict[Value, torch.Tensor], partials: Partials) -> None:
        unit = job.unit
        (op,) = unit.ops or unit.sums
        rule: Any = op.rule
        made = rule.run(op, job.region, [self._read(read, windows) for read in job.reads])
        if job.sums:
            (place,) = job.sums
            if place.counted:
                partials.append((place, made))
            return
        if rule.kind == "reduce":  # no tile cuts it: finished at once
            made = rule.finish(op, made)
        for store in job.stores:
            self._store(store, made)
        windows[op.output] = made

    def _fused(self, job: Job, windows: dict[Value, torch.Tensor], partials: Partials, tape: Tape | None) -> None:
        made: dict[Value, torch.Tensor] = {}
        known: Ready | None = job.ready
        places = known.places(self.values, windows, made, self.device) if known else None
        if known is None or places is None:
            sums = self._first(job, windows, made)
            if tape:
                tape.refused = MOVED
        else:
            sums = known.call(places)
            if tape:
                tensors = known.tensors(self.values, windows, made)
                tape.kernel(known.call, tensors, places, [*made.values()], sums)
        with tape or nullcontext():
            for store in job.stores:
                self._store(store, made[store.value])
        for place, partial in zip(job.sums, sums, strict=True):
            if place.counted:
                partials.append((place, partial.view(place.shape)))

    def _first(self, job: Job, windows: dict[Value, torch.Tensor],
               made: dict[Value, torch.Tensor]) -> list[torch.Tensor]:  # fmt: skip
        """Run a fused job on tensors whose layout is not known yet."""
        parts = [self._read(read, windows) for read in job.reads]
        for target in job.targets:
            made[target.value] = self._target(target)
        operands, outputs = [aligned(t, len(job.region)) for t in parts], list(made.values())
        kernel = self.runtime.kernels[job.unit]
        if not isinstance(kernel, Plain) and not self.plan.away:  # whose windows move from tile to tile
            job.ready = ready(job, kernel.call(operands, outputs), self.values, windows, parts, made)
        windows.update((t.value, made[t.value]) for t in job.targets if t.keep)
        return kernel.run(operands, outputs)

    def _target(self, target: Target) -> torch.Tensor:
        if target.shape is not None:
            return empty_map(target.shape, target.value.dtype, self.device)
        return _part(self.values[target.value], target.part)


def _part(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    return tensor if part is None else tensor[part]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor of any kind, as they lie in memory: kernels know of no conjugate or negative bit."""
    tensor = tensor.detach()
    tensor = tensor if type(tensor) is torch.Tensor else tensor.as_subclass(torch.Tensor)
    return tensor.resolve_conj().resolve_neg()


def aligned(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """A broadcast operand with leading axes of extent 1, but for a zero-dimensional one."""
    missing = rank - tensor.dim()
    return tensor[(None,) * missing] if missing and tensor.dim() else tensor


def _add(sums: dict[Op, Summation], partials: Partials) -> None:
    for place, partial in partials:
        sums[place.op].add(place, partial)


class Summation:
    """A reduction in progress. Small partial results of whole outputs wait and are then joined, some at a time;
    one that comes ``alone`` is the sum."""

    WAITING, SMALL = 32, 1023  # results, and elements of each: together too few for ATen to split among threads

    def __init__(self, op: Op, device: torch.device, *, alone: bool = False):
        self.op = op
        self.rule: Any = op.rule
        self.device = device
        self.alone = alone
        self.waiting: list[torch.Tensor] = []

    @cached_property
    def total(self) -> torch.Tensor:
        return self.rule.start(self.op, self.op.output.shape, self.device)

    def add(self, place: Sum, partial: torch.Tensor) -> None:
        if place.part is None and self.alone:
            self.total = partial
        elif place.part is not None or self.total.numel() > self.SMALL:
            total = self.total if place.part is None else self.total[place.part]
            self.rule.combine(self.op, total, partial)
        else:
            self.waiting.append(partial)
            if len(self.waiting) == self.WAITING:
                self._join()

    def _join(self) -> None:
        if self.waiting:
            joined = self.waiting[0] if len(self.waiting) == 1 else self.rule.join(self.op, torch.stack(self.waiting))
            self.rule.combine(self.op, self.total, joined)
            self.waiting.clear()

    def finish(self) -> torch.Tensor:
        self._join()
        return self.rule.finish(self.op, self.total)
