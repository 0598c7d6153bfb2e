"""Runs a plan: step by step, tile by tile, on worker threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from copy import copy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from fullframe.bytecode.libtorch import taping
from fullframe.bytecode.recorder import Tape
from fullframe.capture.threads import Turns
from fullframe.codegen.kernel import Plain
from fullframe.ir import region as box
from fullframe.ir.graph import Op, Value
from fullframe.partition.tile_axes import tiled
from fullframe.runtime.accumulate import Summation, add
from fullframe.runtime.fused import Ready, build, ready
from fullframe.runtime.replay_cpu import Reel, taped
from fullframe.runtime.tasks import Job, Partials, Read, Store, Target, Task, Tasks, room_of
from fullframe.runtime.tile import MOVED, RECORDING, Kernels, TapedTask, aligned, apart, as_plain, fit, kept, part_of
from fullframe.schedule.dependencies import Waits, is_expensive, waits_of
from fullframe.schedule.plan import LARGE, Plan
from fullframe.storage.arena import empty_map, empty_output, gapless
from fullframe.storage.heap import Keeper, mapped
from fullframe.storage.offload import Lanes
from fullframe.storage.pool import Stored, Stores

_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}
_RUNTIMES: WeakKeyDictionary[Plan, Runtime] = WeakKeyDictionary()
_LOCK = Turns()


class Runtime:
    """What the runs of a plan share: its kernels and its tasks."""

    def __init__(self, plan: Plan, device: torch.device):
        self.kernels: Kernels = build(plan, device)
        self.constants = {v: t.to(device) for v, t in plan.graph.constants.items()}
        self.tasks = Tasks(plan.steps, room_of(plan))
        # A caller's own memory: what is handed out, and what is not cut into tiles.
        outputs = {v for v in plan.graph.outputs if v is not None}
        self.maps = {v for s in plan.steps for v in s.section.outputs if tiled(v, plan.labels)}
        self.slots = {v: slot for v, slot in plan.slots.items() if v not in outputs}
        self.kept = self.maps - outputs
        self.taping = device.type == "cpu" and not plan.away and taping()
        self.dear = [is_expensive(step) for step in plan.steps]
        self.waits = waits_of(plan, self.dear)
        self.reels: dict[tuple[int, int], Reel | int] = {}  # or how many tiles were on tape
        self.written: set[int] = set()  # from which steps on the plan has run
        self.lanes = Lanes(device, plan.workers) if plan.away and device.type == "cuda" else None

    def reel(self, plan: Plan, start: int, stop: int) -> Reel | None:
        """These steps ready to be played; None as long as more of their tiles come on tape from run to run."""
        found = self.reels.get((start, stop), 0)
        if isinstance(found, Reel):
            return found
        if not self.taping:
            return None
        now = taped(self.tasks, range(start, stop))
        if now == found > 0:
            with RECORDING:
                reel = Reel(plan, self.tasks, self.waits, self.maps, self.kept, range(start, stop))
            self.reels[start, stop] = reel
            return reel
        self.reels[start, stop] = now
        return None


def runtime_of(plan: Plan, device: torch.device) -> Runtime:
    """The runtime of a plan, made when it first runs."""
    with _LOCK:
        if plan not in _RUNTIMES:
            _RUNTIMES[plan] = Runtime(plan, device)
        return _RUNTIMES[plan]


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

    def __init__(self, plan: Plan, stores: Stores, device: torch.device):
        self.plan, self.arena, self.device = plan, stores.arena, device
        self.stores = stores
        self.runtime = runtime_of(plan, device)
        self.values: dict[Value, torch.Tensor] = dict(self.runtime.constants)
        self.position = 0
        self.keeper: Keeper | None = None

    def feed(self, values: Sequence[Value], tensors: Sequence[torch.Tensor]) -> None:
        """Give a run its inputs; a number on the processor, which torch lets meet tensors of a device, goes there."""
        self.values.update(zip(values, (as_plain(t).to(self.device) for t in tensors), strict=True))

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
        self.keeper = self._keeper() if self.plan.tight else None
        flowing = self.plan.workers > 1 and self.device.type == "cpu" and not self.plan.away
        off = torch.autocast(self.device.type, enabled=False)
        with torch.no_grad(), off, mapped(self.plan.tight):
            try:
                reel = self.runtime.reel(self.plan, self.position, end)
                if reel is not None and reel.play(self, threads, pool):
                    pass
                elif flowing and any(step.parallel for step in self.plan.steps[self.position : end]):
                    self._flow(end, threads)
                else:
                    for number in range(self.position, end):
                        self.threads(threads if self.runtime.waits.wide[number] else 1)
                        self._step(number)
            finally:
                self.threads(threads)
        self.position = end

    def _keeper(self) -> Keeper:
        """Until all maps have been written once, nobody can tell their pages from what is kept beside them."""
        counted = self.plan.bytes
        made = sum(v.nbytes for v in {*self.plan.graph.outputs} if v is not None and v not in self.plan.graph.inputs)
        before, self.runtime.written = self.runtime.written, self.runtime.written | {self.position}
        return Keeper(counted.untiled + counted.scratch + made if self.position in before else None)

    def look(self) -> None:
        """Between steps, and now and then within a long one."""
        if self.keeper is not None:
            self.keeper.look()

    def threads(self, count: int) -> None:
        """Threads inside the ops of this thread. After each such op they wait busily for the next, in the way of
        the workers; so only dear steps, not cut into tiles and alone, have them, whatever the number of workers."""
        if self.device.type == "cpu" and torch.get_num_threads() != count:
            torch.set_num_threads(count)

    def _flow(self, end: int, threads: int) -> None:
        """Steps on several threads, of which the calling one is one."""
        work = Work(self.begin, lambda number, k: self.tile(self.task(number, k)), add, self.end, self.free)
        steps, most = range(self.position, end), 2 * self.plan.workers
        flow = Flow(steps, self.runtime.waits, self.plan.ahead, most, work)
        self.threads(1)

        def wide(make: Callable[[], None]) -> None:
            self.threads(threads)
            make()
            self.threads(1)

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
        sums, count = self.begin(number), self.runtime.waits.counts[number]
        if self.plan.steps[number].parallel and self.runtime.lanes:
            self.runtime.lanes.run(count, lambda k: self.tile(self.task(number, k)), lambda p: add(sums, p))
        else:
            for k in range(count):
                add(sums, self.tile(self.task(number, k)))
        self.end(number, sums)
        self.free(number)

    def begin(self, number: int) -> dict[Op, Summation]:
        """Room for what a step makes, and its sums, empty."""
        step = self.plan.steps[number]
        for value in step.section.saves:
            if value in self.plan.away:
                self._away(value).open()
            elif value in self.runtime.maps or 0 in value.shape:  # no job makes what is empty
                self.values[value] = self.allocate(value)
        return {op: Summation(op, self.device, alone=len(step.grid) == 1) for op in step.section.sums}

    def end(self, number: int, sums: dict[Op, Summation]) -> None:
        """Keep what a step has added up."""
        for op, total in sums.items():
            self._keep(op.output, self._own(op.output, total.finish()))

    def free(self, number: int) -> None:
        self.look()
        for value in self.plan.steps[number].frees:
            if value in self.plan.away:
                self._away(value).close()
            self.values.pop(value, None)  # what a reel has made and nobody in Python saw is not there

    def task(self, number: int, k: int) -> Task:
        if self.plan.away and k + self.plan.workers < self.runtime.waits.counts[number]:
            for fetch in self.runtime.tasks.task(self.plan, number, k + self.plan.workers).fetches:
                self._away(fetch.value).expect(fetch.region)
        return self.runtime.tasks.task(self.plan, number, k)

    def allocate(self, value: Value) -> torch.Tensor:
        slot = self.runtime.slots.get(value)
        if slot is None:
            return empty_output(self.plan.graph, value, self.device)
        return self.arena.view(slot)

    def _away(self, value: Value) -> Stored:
        return self.stores.map(self.plan.slots[value])

    def _keep(self, value: Value, tensor: torch.Tensor) -> None:
        """Put what is made in one piece where it lives."""
        if value in self.plan.away:
            self._away(value).open()
            self._away(value).put(box.full(value.shape), tensor)
        else:
            self.values[value] = self.allocate(value).copy_(tensor) if value in self.runtime.kept else tensor

    def tile(self, task: Task) -> Partials:
        """Make one tile; returns its partial result of each sum."""
        known = task.taped
        if known:
            partials = known.run(self.values, self.arena)
            if partials is not None:
                return partials
        elif known is None and self.runtime.taping and fit(task):
            with RECORDING:
                return self._written(task)
        return self.jobs(task)

    def _written(self, task: Task) -> Partials:
        """Make one tile, and put it on tape."""
        others = apart(task, self.values, self.arena)
        tape = Tape([self.arena.block, *(self.values[v] for v in others)])
        partials = self.jobs(task, tape)
        found = kept(task)
        taped = tape.finish([*(made for _, made in partials), *(self.values[v] for v in found)])
        strides = [self.values[v].stride() for v in others]
        if taped is not None:
            task.taped = TapedTask(taped, others, strides, [*(place for place, _ in partials), *found])
        elif tape.refused != MOVED:
            task.taped = False
        return partials

    def jobs(self, task: Task, tape: Tape | None = None) -> Partials:
        windows = {f.value: self._away(f.value).fetch(f.region) for f in task.fetches}
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
        return part_of(windows[read.value] if read.window else self.values[read.value], read.part)

    def _store(self, store: Store, made: torch.Tensor, parts: Sequence[torch.Tensor] = ()) -> None:
        """Keep what was made of these parts."""
        if store.region is None:
            self.values[store.value] = self._own(store.value, made, parts)
        elif store.value in self.plan.away:
            self._away(store.value).put(store.region, part_of(made, store.made))
        else:
            part_of(self.values[store.value], store.to).copy_(part_of(made, store.made))

    def _own(self, value: Value, made: torch.Tensor, parts: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """An untiled value as a tensor that shares no memory with others, if it is small: tapes know arrays by it."""
        if value.nbytes > LARGE:
            return self._apart(made)
        shared = made.untyped_storage().nbytes() != made.nbytes or any(made is part for part in parts)
        return made.clone() if shared or made._base is not None or not gapless(made) else made

    def _apart(self, made: torch.Tensor) -> torch.Tensor:
        """A tensor that does not look into the arena, whose places are used again."""
        shared = made.untyped_storage().data_ptr() == self.arena.block.untyped_storage().data_ptr()
        return made.clone() if shared else made

    def _single(self, job: Job, windows: dict[Value, torch.Tensor], partials: Partials) -> None:
        unit = job.unit
        (op,) = unit.ops or unit.sums
        rule: Any = op.rule
        parts = [self._read(read, windows) for read in job.reads]
        made = rule.run(op, job.region, parts)
        if job.sums:
            (place,) = job.sums
            if place.counted:
                partials.append((place, made))
            return
        if rule.kind == "reduce":  # no tile cuts it: finished at once
            made = rule.finish(op, made)
        for store in job.stores:
            self._store(store, made, parts)
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
        return part_of(self.values[target.value], target.part)


class Work(NamedTuple):
    """What a flow runs: ``begin`` a step, make a ``tile`` of it, ``add`` its partial results in order, ``end`` it,
    and ``free`` what it was the last to read once all before it are done, too."""

    begin: Callable[[int], Any]
    tile: Callable[[int, int], Any]
    add: Callable[[Any, Any], None]
    end: Callable[[int, Any], None]
    free: Callable[[int], None]


class Flow:
    """Runs the ``steps``.

    Every thread that helps calls `run`; one of them with ``own``, through which it makes the wide steps, which no
    other thread takes. No tile is begun that is ``most`` after one whose result is not there yet: results
    that wait for their turn take memory.
    """

    def __init__(self, steps: range, waits: Waits, ahead: int, most: int, work: Work):
        self.stop, self.before, self.counts, self.wide = steps.stop, waits.before, waits.counts, waits.wide
        self.ahead, self.most, self.work = ahead, most, work
        self.base = steps.start  # all steps before it are done
        self.done: set[int] = set()  # and these
        self.open: dict[int, _Open] = {}  # steps of which tiles are to be had, or in work
        self.changed = threading.Condition()
        self.idle = 0  # threads that wait for a change
        self.failed = False
        self._begin()

    def run(self, own: Callable[[Callable[[], None]], None] | None = None) -> None:
        """Make tiles until there are none. Raises what a tile raises, when the other threads have stopped or will."""
        try:
            while (picked := self._pick(own is not None)) is not None:
                step, k = picked
                if own is not None and self.wide[step.number]:
                    own(lambda step=step, k=k: self._make(step, k))
                else:
                    self._make(step, k)
        except BaseException:
            self.fail()
            raise

    def fail(self) -> None:
        """Let no thread begin another tile."""
        with self.changed:
            self.failed = True
            self.changed.notify_all()

    def _make(self, step: _Open, k: int) -> None:
        if not step.put(k, self.work.tile(step.number, k), self.work.add):
            if self.idle and step.tiles:  # one may wait for this result
                with self.changed:
                    self.changed.notify()
            return
        self.work.end(step.number, step.state)
        with self.changed:
            del self.open[step.number]
            self.done.add(step.number)
            while self.base in self.done:
                self.done.remove(self.base)
                self.work.free(self.base)
                self.base += 1
            self._begin()
            if self.idle:
                self._wake()

    def _pick(self, own: bool) -> tuple[_Open, int] | None:
        """A tile to make, of a step that is begun before others; None when all are made or one has failed."""
        with self.changed:
            while not self.failed and self.base < self.stop:
                found = next((s for s in self.open.values() if self._may(s, own)), None)
                if found is not None:
                    found.tiles -= 1
                    return found, found.count - found.tiles - 1
                self.idle += 1
                self.changed.wait()
                self.idle -= 1
            return None

    def _may(self, step: _Open, own: bool) -> bool:
        first = step.count - step.tiles
        return step.tiles > 0 and (own or not self.wide[step.number]) and first - step.next < self.most

    def _begin(self) -> None:
        for k in range(self.base, min(self.stop, self.base + self.ahead)):
            if k in self.open or k in self.done or any(j >= self.base and j not in self.done for j in self.before[k]):
                continue
            self.open[k] = _Open(k, self.counts[k], self.work.begin(k))

    def _wake(self) -> None:
        """Wake threads if there is more to do than the thread that asks will do itself."""
        wide = any(s.tiles and self.wide[s.number] for s in self.open.values())
        more = sum(s.tiles for s in self.open.values()) - 1
        if wide or self.base >= self.stop:
            self.changed.notify_all()
        elif more > 0:
            self.changed.notify(more)


class _Open:
    """A step that has begun: ``tiles`` still to be given away, ``left`` still to be finished."""

    __slots__ = ("count", "left", "lock", "next", "number", "state", "tiles", "waiting")

    def __init__(self, number: int, count: int, state: Any):
        self.number, self.count, self.state = number, count, state
        self.tiles = self.left = count
        self.next, self.waiting = 0, {}
        self.lock = threading.Lock()

    def put(self, k: int, made: Any, add: Callable[[Any, Any], None]) -> bool:
        """Add results in the order of their tiles, whichever comes first: every bit of a sum is then fixed.

        Returns whether this was the last.
        """
        with self.lock:
            self.waiting[k] = made
            while self.next in self.waiting:
                add(self.state, self.waiting.pop(self.next))
                self.next += 1
            self.left -= 1
            return not self.left
