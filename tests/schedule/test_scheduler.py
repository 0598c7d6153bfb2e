"""Several stages in flight: what they wait for, the order of sums, errors, and the order and memory of the plan."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.bytecode.libtorch import bytecode_available
from fullframe.bytecode.scheduler import HELPER, OWNER, WAITING, NativeScheduler, NativeStage, NativeStages
from fullframe.ir.graph import Value
from fullframe.runtime import executor
from fullframe.schedule.dependencies import dependencies_of
from fullframe.schedule.memory import Lifetimes, lifetimes
from fullframe.schedule.order import interleave
from fullframe.schedule.plan import Plan


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


# The scheduler alone -------------------------------------------------------------------------------


class _Log:
    """Stages made by calls back, of which every event is written down; tiles take a random while."""

    def __init__(self, stages: list[NativeStage], seed: int):
        self.stages, self.draws = stages, random.Random(seed)
        self.events: list[tuple[str, int, int]] = []
        self.threads: dict[int, set[int]] = {}
        self.added: dict[int, list[int]] = {}
        self.most = 0  # tiles that one was begun after the first whose result was not there
        self.poll: Any = lambda: None

    def begin(self, number: int) -> None:
        self.events.append(("begin", number, 0))
        self.added[number] = []

    def tile(self, number: int, k: int, _: Any) -> None:
        self.threads.setdefault(number, set()).add(threading.get_ident())
        self.events.append(("tile", number, k))
        self.most = max(self.most, k - len(self.added[number]) + 1)
        time.sleep(self.draws.random() * 1e-3)

    def add(self, number: int, k: int) -> None:
        self.added[number].append(k)

    def end(self, number: int) -> None:
        self.events.append(("end", number, 0))

    def free(self, number: int) -> None:
        self.events.append(("free", number, 0))

    def run(self, steps: range, max_in_flight: int, most: int, others: int,
            own: Callable[[NativeScheduler], None] = lambda scheduler: scheduler.run(OWNER)) -> None:  # fmt: skip
        calls = (self.begin, self.tile, self.add, self.end, self.free, lambda _: None, lambda: self.poll())
        stages = NativeStages([self.stages[k] for k in steps])
        scheduler = NativeScheduler(stages, steps, max_in_flight, most, (ctypes.c_void_p * 1)(), calls)
        threads = [threading.Thread(target=scheduler.run, args=(HELPER,)) for _ in range(others)]
        for t in threads:
            t.start()
        own(scheduler)
        for t in threads:
            t.join(30)
            assert not t.is_alive()
        scheduler.close()
        scheduler.check()


needs_compiler = pytest.mark.skipif(
    not bytecode_available(), reason="no compiler: no scheduler, but the loop that it is held to"
)


@needs_compiler
@pytest.mark.parametrize("seed", range(8))
def test_every_tile_once_and_none_before_what_it_waits_for(seed):
    draws = random.Random(seed)
    steps, max_in_flight, others = 60, draws.choice([1, 2, 5, 8]), draws.choice([0, 1, 3])
    stages = []
    for k in range(steps):
        recent, tiles = range(max(0, k - max_in_flight + 1), k), draws.choice([1, 1, 3, 9])
        before = [j for j in recent if draws.random() < 0.4]
        stages.append(
            NativeStage(before, tiles, room=False, frees=True, multi_threaded=tiles == 1 and draws.random() < 0.2)
        )
    log, start = _Log(stages, seed), 5
    log.run(range(start, steps), max_in_flight, 4, others)
    assert log.most <= 4
    when: dict[tuple[str, int, int], int] = {event: n for n, event in enumerate(log.events)}
    assert len(when) == len(log.events) == sum(s.tiles for s in stages[start:]) + 3 * (steps - start)
    for k in range(start, steps):
        begun, stage = when["begin", k, 0], stages[k]
        assert log.added[k] == list(range(stage.tiles)), "added up in another order"
        assert all(when["end", j, 0] < begun for j in stage.before if j >= start)
        assert all(when["end", j, 0] < begun for j in range(start, k - max_in_flight + 1))
        assert all(when["end", j, 0] < when["free", k, 0] for j in range(start, k + 1))
        assert not stage.multi_threaded or log.threads[k] == {threading.get_ident()}


@needs_compiler
@pytest.mark.parametrize("mine", [True, False], ids=["caller", "other"])
def test_an_error_in_any_thread_stops_the_rest_and_is_raised(mine):
    done, met, caller = [], threading.Barrier(2), threading.get_ident()

    def tile(_: int, k: int, _block: Any) -> None:
        if k < 2:  # one in each thread
            met.wait(30)
        if (threading.get_ident() == caller) is mine:
            raise ValueError(str(k))
        time.sleep(0.05)
        done.append(k)

    stages = [NativeStage(before, tiles, False, False, False) for before, tiles in (((), 1000), ((0,), 1), ((1,), 1))]
    log = _Log(stages, 0)
    log.tile = tile  # type: ignore[method-assign]
    with pytest.raises(ValueError):
        log.run(range(3), 2, 10, 1)
    assert len(done) < 10


@needs_compiler
@pytest.mark.parametrize("others", [1, 3])
def test_stages_wait_for_meetings_and_others_are_made_meanwhile(others):
    multi_threaded = 4
    stages = [
        NativeStage((), 3, False, True, k == multi_threaded, meetings=m) for k, m in enumerate((0, 0, 1, 0, 1, 2))
    ]
    log = _Log(stages, 0)

    def own(scheduler: NativeScheduler) -> None:
        scheduler.run(WAITING, 2)
        while ("end", 3, 0) not in log.events:  # a stage behind those that wait for the meeting, while it lasts
            time.sleep(1e-3)
        assert not {("begin", k, 0) for k in (2, 4, 5)} & set(log.events)
        scheduler.met()
        scheduler.run(WAITING, 5)
        assert ("begin", 5, 0) not in log.events
        scheduler.met()
        scheduler.run(WAITING, 6)

    log.run(range(6), 6, 4, others, own)
    assert {event for event in log.events if event[0] == "end"} == {("end", k, 0) for k in range(6)}
    owner = threading.get_ident()
    assert [log.threads[k] == {owner} for k in range(6)] == [k == multi_threaded for k in range(6)]
    assert not any(owner in log.threads[k] for k in range(6) if k != multi_threaded)


@needs_compiler
def test_an_error_in_a_helper_ends_the_wait_for_a_meeting():
    log = _Log([NativeStage((), 1, False, True, False), NativeStage((), 1, False, True, False, meetings=1)], 0)

    def tile(*_: Any) -> None:
        raise ValueError

    def own(scheduler: NativeScheduler) -> None:
        scheduler.run(WAITING, 1)
        assert scheduler.failed

    log.tile = tile  # type: ignore[method-assign]
    with pytest.raises(ValueError):
        log.run(range(2), 2, 4, 1, own)


# In a stage -----------------------------------------------------------------------------------------


class _Planes(nn.Module):
    """Three images through the same layers, as three planes of a detector, then together."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)
        )
        self.deep = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.LeakyReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deep = self.deep(torch.cat([self.down(plane) for plane in x.chunk(3, 1)], 1))
        return torch.cat([self.up(plane) for plane in deep.chunk(3, 1)], 1)


def _step(workers: int) -> tuple[Plan, list[torch.Tensor]]:
    torch.manual_seed(0)
    net = _Planes()
    image, target = torch.randn(1, 3, 96, 80), torch.randn(1, 9, 96, 80)
    step = fullframe.tile(net, loss=F.mse_loss, tile=16, workers=workers)
    found = []
    for _ in range(4):
        loss = step(image, target)
        loss.backward()
        found += [loss.detach(), *(b.clone() for b in net.buffers())]
    return step.plan(image, target), [*found, *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_same_bits_as_the_reference_loop(monkeypatch, workers):
    """Four stages: made by calls back, recorded, and replayed."""
    with monkeypatch.context() as patch:
        patch.setattr(executor, "bytecode_available", lambda: False)
        _, truth = _step(1)
    draws, make = random.Random(0), executor.Run.make

    def slow(self: Any, number: int, k: int) -> Any:
        time.sleep(draws.random() * 1e-3)
        return make(self, number, k)

    monkeypatch.setattr(executor.Run, "make", slow)
    plan, found = _step(workers)
    assert workers == 1 or plan.max_in_flight > 1
    assert all(map(torch.equal, found, truth))


def test_what_a_step_reads_or_overwrites_is_waited_for():
    plan, _ = _step(2)
    dependencies = dependencies_of(plan, [False] * len(plan.stages))
    assert (
        sum(len(b) < min(k, plan.max_in_flight - 1) for k, b in enumerate(dependencies.before)) > len(plan.stages) / 2
    )
    after: list[set[int]] = []
    for k, step in enumerate(plan.stages):
        after.append(set(dependencies.before[k]).union(*(after[j] for j in dependencies.before[k])))
        made, read = set(step.section.outputs), set(step.section.loads)
        for j in range(max(0, k - plan.max_in_flight + 1), k):
            other = plan.stages[j].section
            reads = read & set(other.outputs)
            shared = any(
                _overlap(plan, v, w) for v in made for w in (*other.outputs, *other.loads)
            )  # and what it makes may not lie where another still reads
            assert j in after[k] or not (reads or shared)


def _overlap(plan: Plan, v: Value, w: Value) -> bool:
    if v not in plan.slots or w not in plan.slots:
        return False
    a, b = plan.slots[v], plan.slots[w]
    return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


@pytest.mark.rest
def test_stages_in_flight_do_not_outlive_the_arena():
    plan, _ = _step(2)
    one, _ = _step(1)
    assert plan.bytes.arena <= one.bytes.arena + sum(v.nbytes for v in plan.graph.inputs)
    assert plan.bytes.scratch >= one.bytes.scratch


# The order -----------------------------------------------------------------------------------------


def _sections(seed: int) -> tuple[list[Any], dict[Value, int]]:
    """Random sections in a runnable order, and the bytes of what they make."""
    draws = random.Random(seed)
    made: list[Value] = []
    sections: list[Any] = []
    for k in range(40):
        loads = tuple(dict.fromkeys(draws.choice(made[-9:]) for _ in range(draws.randint(1, 3)))) if made else ()
        value = Value(f"v{k}", (1,), torch.float32, 4)
        sections.append(SimpleNamespace(loads=loads, outputs=(value,)))
        made.append(value)
    return sections, {v: draws.choice([1, 10, 100]) for v in made}


@pytest.mark.parametrize("seed", range(20))
def test_interleaving_keeps_the_order_runnable_and_the_peak(seed):
    sections, sizes = _sections(seed)
    early, kept = seed % 40, [sections[-1].outputs[0]]
    order = interleave(sections, early, kept, sizes)
    assert sorted(map(id, order)) == sorted(map(id, sections))
    assert {id(s) for s in order[:early]} == {id(s) for s in sections[:early]}
    done: set[Value] = set()
    for section in order:
        assert done.issuperset(section.loads)
        done.update(section.outputs)

    def peak(steps: list[Any]) -> int:
        return max(lifetimes(steps, kept).usage(len(steps), sizes))

    def bound(steps: list[Any]) -> int:
        return sum(bool(set(b.loads) & set(a.outputs)) for a, b in pairwise(steps))

    assert peak(order) <= peak(sections)
    assert bound(order) <= bound(sections)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_trivial_and_waits_for_nothing_comes_just_before_its_reader(seed):
    draws = random.Random(seed)
    sections, sizes = _sections(seed)
    readers, lone = [*sections], []
    for k in range(8):
        value = Value(f"w{k}", (1,), torch.float32, 4)
        lone.append(SimpleNamespace(loads=(), outputs=(value,)))
        sizes[value] = draws.choice([1, 10])
        for reader in draws.sample(readers, 2):
            reader.loads = (*reader.loads, value)
        sections.insert(min(sections.index(r) for r in sections if value in r.loads), lone[-1])
    kept = [sections[-1].outputs[0]]
    order = interleave(sections, 0, kept, sizes, lambda s: any(s is one for one in lone))
    assert sorted(map(id, order)) == sorted(map(id, sections))
    done: set[Value] = set()
    for section in order:
        assert done.issuperset(section.loads)
        done.update(section.outputs)
    for k, section in enumerate(order):
        if any(section is one for one in lone):
            after = next(s for s in order[k:] if not any(s is one for one in lone))
            assert section.outputs[0] in after.loads
    usage = [max(lifetimes(steps, kept).usage(len(steps), sizes)) for steps in (order, sections)]
    assert usage[0] <= usage[1]


@pytest.mark.parametrize("seed", range(10))
def test_lingering_stays_below_the_peak(seed):
    sections, sizes = _sections(seed)
    lives = lifetimes(sections, ())
    longer = lives.lingering(len(sections), sizes, 5)
    assert max(longer.usage(len(sections), sizes)) == max(lives.usage(len(sections), sizes))
    assert longer.first == lives.first
    assert all(lives.last[v] <= last <= min(lives.last[v] + 5, len(sections) - 1) for v, last in longer.last.items())
    assert isinstance(longer, Lifetimes) and longer.last != lives.last
