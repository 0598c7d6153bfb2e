"""Runs a plan: step by step, tile by tile, on worker threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fullframe import region as box
from fullframe.fusion import Unit, Work, work_of
from fullframe.graph import Op, Value
from fullframe.kernels import Kernel, Plain
from fullframe.lowering import build
from fullframe.plan import Plan, Step
from fullframe.region import Region
from fullframe.section import Section, Tile, own_region, tiled
from fullframe.store import Arena, empty_map

Kernels = dict[Unit, Kernel | Plain]
_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}
_KERNELS: WeakKeyDictionary[Plan, Kernels] = WeakKeyDictionary()
_LOCK = threading.Lock()


def kernels_of(plan: Plan, device: torch.device) -> Kernels:
    """The kernels of a plan, built when it first runs."""
    with _LOCK:
        if plan not in _KERNELS:
            _KERNELS[plan] = build(plan, device)
        return _KERNELS[plan]


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
    torch.set_grad_enabled(False)


class Run:
    """One run of a plan. ``feed`` inputs, ``advance`` over its steps, ``result`` an output."""

    def __init__(self, plan: Plan, arena: Arena, device: torch.device):
        self.plan, self.arena, self.device = plan, arena, device
        self.kernels = kernels_of(plan, device)
        self.values: dict[Value, torch.Tensor] = dict(plan.graph.constants)
        self.outputs = {v for v in plan.graph.outputs if v is not None}
        self.position = 0

    def feed(self, values: Sequence[Value], tensors: Sequence[torch.Tensor]) -> None:
        self.values.update(zip(values, (t.detach() for t in tensors), strict=True))

    def result(self, value: Value | None) -> torch.Tensor | None:
        """An output, in memory of its own."""
        if value is None:
            return None
        tensor = self.values[value]
        return tensor.clone() if value in self.plan.graph.inputs or tensor._base is not None else tensor

    def advance(self, end: int) -> None:
        """Run the steps up to ``end``; grad mode and autocast are off inside."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for step in self.plan.steps[self.position : end]:
                self._step(step)
        self.position = end

    def _step(self, step: Step) -> None:
        labels = self.plan.labels
        for value in step.section.saves:
            if tiled(value, labels):
                self.values[value] = self._allocate(value)
        sums = [Summation(op, self.device) for op in step.section.sums]
        tiles = list(step.grid.tiles())
        if step.parallel and self.plan.workers > 1 and self.device.type == "cpu":
            in_order = InOrder(lambda partials: _add(sums, partials))
            _share(self.plan.workers, len(tiles), lambda k: in_order.put(k, self._tile(step, tiles[k])))
        else:
            for tile in tiles:
                _add(sums, self._tile(step, tile))
        for total in sums:
            self.values[total.op.output] = self._keep(total.op.output, total.finish())
        for value in step.frees:
            del self.values[value]

    def _allocate(self, value: Value) -> torch.Tensor:
        slot = self.plan.slots.get(value)
        if slot is None or value in self.outputs:
            return torch.empty(value.shape, dtype=value.dtype, device=self.device)
        return self.arena.view(slot.offset, value.shape, value.dtype)

    def _keep(self, value: Value, tensor: torch.Tensor) -> torch.Tensor:
        if not tiled(value, self.plan.labels) or value in self.outputs:
            return tensor
        return self._allocate(value).copy_(tensor)

    def _tile(self, step: Step, tile: Tile) -> Partials:
        """Make one tile; returns the partial result of each sum with its place in the output."""
        section = step.section
        works, regions = work_of(step.units, section.saves, frozenset(section.sums), self.plan.labels, tile)
        windows: dict[Value, torch.Tensor] = {}
        partials: Partials = {}
        last = {value: k for k, work in enumerate(works) for value in work.unit.reads}
        for k, work in enumerate(works):
            unit = work.unit
            reads = self._windows(work, windows, regions)
            if unit.fused:
                self._fused(work, reads, windows, tile, partials)
            else:
                self._single(work, reads, windows, tile, section, partials)
            for value in unit.reads:
                if last[value] == k:
                    windows.pop(value, None)
        # Tiles that differ only in labels a driver lacks share its region: the first counts it.
        return {op: made for op, made in partials.items() if self._first(op, tile)}

    def _first(self, op: Op, tile: Tile) -> bool:
        rule: Any = op.rule
        labels = self.plan.labels[op.inputs[rule.driver]]
        return all(span.low == 0 or label in labels for label, span in tile.items())

    def _apart(self, made: torch.Tensor) -> torch.Tensor:
        """A tensor that does not look into the arena, whose places are used again."""
        shared = made.untyped_storage().data_ptr() == self.arena.block.untyped_storage().data_ptr()
        return made.clone() if shared else made

    def _windows(
        self, work: Work, windows: dict[Value, torch.Tensor], regions: dict[Value, Region]
    ) -> list[torch.Tensor]:
        found = []
        for value, read in zip(work.unit.reads, work.reads, strict=True):
            window = windows.get(value)
            if window is None and box.is_empty(read):  # none of it was made for this tile
                found.append(torch.empty(box.shape_of(read), dtype=value.dtype, device=self.device))
            elif window is None:
                tensor = self.values[value]
                found.append(tensor if box.shape_of(read) == tuple(tensor.shape) else tensor[box.slices(read)])
            elif read == regions[value]:
                found.append(window)
            else:
                found.append(window[box.slices(read, regions[value])])
        return found

    def _single(self, work: Work, reads: list[torch.Tensor], windows: dict[Value, torch.Tensor], tile: Tile,
                section: Section, partials: Partials) -> None:  # fmt: skip
        unit = work.unit
        (op,) = unit.ops or unit.sums
        rule: Any = op.rule
        made = rule.run(op, work.region, reads)
        if op in section.sums:
            partials[op] = rule.out_region(op, work.region), made
            return
        region = work.region
        if rule.kind == "reduce":  # no tile cuts it: finished at once
            made, region = rule.finish(op, made), rule.out_region(op, region)
        for value in unit.saves:
            if tiled(value, self.plan.labels):
                own = own_region(value, self.plan.labels, tile)
                self.values[value][box.slices(own)] = made[box.slices(own, region)]
            else:
                self.values[value] = self._apart(made)
        windows[op.output] = made

    def _fused(self, work: Work, reads: list[torch.Tensor], windows: dict[Value, torch.Tensor], tile: Tile,
               partials: Partials) -> None:  # fmt: skip
        unit = work.unit
        kernel = self.kernels[unit]
        targets: dict[Value, torch.Tensor] = {}
        for value in (*unit.saves, *unit.makes):
            if value in unit.saves and unit.own:
                targets[value] = self.values[value][box.slices(work.region)]
            elif value not in targets:
                targets[value] = empty_map(box.shape_of(work.region), value.dtype, self.device)
            if value in unit.makes:
                windows[value] = targets[value]
        operands = [aligned(t, len(work.region)) for t in reads]
        sums = kernel.run(operands, list(targets.values()))
        for value in () if unit.own else unit.saves:  # the halo is another tile's to store
            own = own_region(value, self.plan.labels, tile)
            self.values[value][box.slices(own)] = targets[value][box.slices(own, work.region)]
        for op, partial in zip(unit.sums, sums, strict=True):
            rule: Any = op.rule
            region = rule.out_region(op, work.region)
            partials[op] = region, partial.view(box.shape_of(region))


Partials = dict[Op, tuple[Region, torch.Tensor]]


def aligned(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """A broadcast operand with leading axes of extent 1, but for a zero-dimensional one."""
    missing = rank - tensor.dim()
    return tensor[(None,) * missing] if missing and tensor.dim() else tensor


def _add(sums: Sequence[Summation], partials: Partials) -> None:
    for total in sums:
        if total.op in partials:
            total.add(*partials[total.op])


class Summation:
    """A reduction in progress."""

    def __init__(self, op: Op, device: torch.device):
        self.op = op
        self.rule: Any = op.rule
        self.total = self.rule.start(op, op.output.shape, device)

    def add(self, region: Region, partial: torch.Tensor) -> None:
        self.rule.combine(self.op, self.total[box.slices(region)], partial)

    def finish(self) -> torch.Tensor:
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
    """Run jobs 0..n-1 on the workers, in order of their number, each as soon as one is free."""
    numbers = count()

    def work() -> None:
        while (k := next(numbers)) < jobs:
            job(k)

    futures = [pool(workers).submit(work) for _ in range(min(workers, jobs))]
    error = None
    for future in futures:
        error = future.exception() or error
    if error is not None:
        raise error
