"""Runs a plan: step by step, tile by tile, on worker threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from copy import copy
from functools import cached_property
from itertools import count
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fullframe.fusion import Unit
from fullframe.graph import Op, Value
from fullframe.kernels import DeviceKernel, Kernel, Plain
from fullframe.lowering import build
from fullframe.plan import Plan, Step
from fullframe.ready import Ready, ready
from fullframe.section import tiled
from fullframe.store import Arena, empty_map
from fullframe.task import Job, Part, Read, Store, Sum, Target, Task, Tasks
from fullframe.tiers import Lanes, fetch, put

Kernels = dict[Unit, Kernel | DeviceKernel | Plain]
_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}
_RUNTIMES: WeakKeyDictionary[Plan, Runtime] = WeakKeyDictionary()
_LOCK = threading.Lock()


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
        self.wide = [len(step.grid) == 1 and _dear(step) for step in plan.steps]
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
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            try:
                for number in range(self.position, end):
                    self._threads(threads if self.runtime.wide[number] else 1)
                    self._step(number)
            finally:
                self._threads(threads)
        self.position = end

    def _threads(self, count: int) -> None:
        """Threads inside the ops of this thread. After each such op they wait busily for the next, in the way of
        the workers; so only steps that are dear and not cut into tiles have them, whatever the number of workers."""
        if self.device.type == "cpu" and torch.get_num_threads() != count:
            torch.set_num_threads(count)

    def _step(self, number: int) -> None:
        step = self.plan.steps[number]
        for value in step.section.saves:
            if value in self.runtime.maps or 0 in value.shape:  # no job makes what is empty
                self.values[value] = self._allocate(value)
        count = len(step.grid)
        sums = {op: Summation(op, self.device, alone=count == 1) for op in step.section.sums}
        if step.parallel and self.plan.workers > 1 and self.device.type == "cpu":
            in_order = InOrder(lambda partials: _add(sums, partials))
            _share(self.plan.workers, count, lambda k: in_order.put(k, self._tile(self._task(number, k))))
        elif step.parallel and self.runtime.lanes:
            self.runtime.lanes.run(count, lambda k: self._tile(self._task(number, k)), lambda p: _add(sums, p))
        else:
            for k in range(count):
                _add(sums, self._tile(self._task(number, k)))
        for op, total in sums.items():
            self.values[op.output] = self._keep(op.output, self._apart(total.finish()))
        for value in step.frees:
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
        windows = {f.value: fetch(_part(self.values[f.value], f.part), self.device) for f in task.fetches}
        partials: Partials = []
        for job in task.jobs:
            run = self._fused if job.unit.fused else self._single
            run(job, windows, partials)
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

    def _fused(self, job: Job, windows: dict[Value, torch.Tensor], partials: Partials) -> None:
        made: dict[Value, torch.Tensor] = {}
        known: Ready | None = job.ready
        places = known.places(self.values, windows, made, self.device) if known else None
        sums = self._first(job, windows, made) if known is None or places is None else known.call(places)
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


Partials = list[tuple[Sum, torch.Tensor]]


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


class InOrder:
    """Hands results on in the order of their numbers, whichever thread brings them first.

    The order of a sum is then fixed, and with it every bit of the result, for any number of
    workers; results waiting are at most as many as there are workers, give or take one.
    """

    def __init__(self, take: Callable[[Any], None]):
        self._take, self._next = take, 0
        self._waiting: dict[int, Any] = {}
        self._lock = threading.Lock()

    def put(self, number: int, result: Any) -> None:
        with self._lock:
            self._waiting[number] = result
            while self._next in self._waiting:
                self._take(self._waiting.pop(self._next))
                self._next += 1


def _share(workers: int, jobs: int, job: Callable[[int], None]) -> None:
    """Run jobs 0..n-1 on the workers, in order of their number, each as soon as one is free.

    The calling thread is one of the workers: of the others one fewer has to be woken for every step.
    """
    numbers = count()

    def work() -> None:
        try:
            while (k := next(numbers)) < jobs:
                job(k)
        except BaseException:
            while next(numbers) < jobs:  # nobody needs the rest
                pass
            raise

    others = [pool(workers - 1).submit(work) for _ in range(min(workers, jobs) - 1)]
    try:
        work()
    finally:
        wait(others)
    for other in others:
        other.result()
