"""Runs random networks tiled and plain, compares all they leave behind, and keeps count.

The oracle is plain PyTorch in float64 with the same random numbers. A network whose plain gradients
themselves move by more than the tolerance when every weight is changed by 1e-14 of itself is
counted as ill-conditioned unless it is wrong by far more than that.
"""

from __future__ import annotations

import functools
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_plans import PLENTY, abreast, away, in_bands, on_disk
from randomnets import Case, draw
from torch import nn
from torch.utils import _pytree as pytree

import fullframe
from fullframe.compiler.program import Program
from fullframe.compiler.requests import request_for
from fullframe.frontend.inputs import Call
from fullframe.oracle import drawn
from fullframe.runtime import executor
from fullframe.runtime import fused as fused
from fullframe.runtime.replay_cpu import Schedule
from fullframe.schedule import planner, tiling
from fullframe.schedule.verify import verify_plan
from fullframe.tiled import Tiled

TOLERANCE = 1e-9
NOISE = 1e-14  # relative change of every weight that an oracle has to bear
DRAWS = 6  # of that change, where a network is to be found wrong
MARGIN = 30  # and how far beyond its effect a difference is wrong all the same
FLOOR = 1e-6  # of numbers that are all zero but for rounding, as the mean of what a norm made
OUTCOMES = ("right", "wrong", "refused", "ill-conditioned", "PyTorch wrong")
Results = dict[str, dict[str, "torch.Tensor | None"]]


@dataclass
class Record:
    """What became of one seed: one of `OUTCOMES`, or 'unusable' where plain PyTorch cannot run it.

    'PyTorch wrong': in the drawn memory formats plain PyTorch differs, but for contiguous tensors it
    gives the tiled numbers (its instance norm of one image in channels_last is one such case).
    """

    seed: int
    outcome: str
    detail: str = ""
    seconds: float = 0.0
    parts: dict[str, int] = field(default_factory=dict)
    ops: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    recorded: int = 0  # classes of tiles that ran from what was noted of them
    replayed: int = 0  # steps that ran outside of Python
    spilled: int = 0  # maps that lay on a disk in one of its plans


# One step, either way ------------------------------------------------------------------------------


class State:
    """All that a step may change in a network and its criterion, to be put back."""

    def __init__(self, case: Case):
        self.roots = [case.net, *([case.loss] if isinstance(case.loss, nn.Module) else [])]
        self.saved = {k: t.detach().clone() for k, t in self.tensors()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for k, root in enumerate(self.roots):
            yield from ((f"{k}.parameter.{n}", t) for n, t in root.named_parameters())
            yield from ((f"{k}.buffer.{n}", t) for n, t in root.named_buffers())

    def restore(self, noise: float = 0.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for k, t in self.tensors():
                t.copy_(self.saved[k])
                t.grad = None
                if noise and t.is_floating_point():
                    t.mul_(1 + noise * torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device))

    def results(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Gradients and buffers."""
        grads = {k: t.grad if t.grad is None else t.grad.clone() for k, t in self.tensors() if ".parameter." in k}
        return grads, {k: t.detach().clone() for k, t in self.tensors() if ".buffer." in k}


def leaves_of(value: Any, step: int, dense: bool = False) -> Any:
    """The argument of a step: leaves of their own with the strides of the drawn ones; other numbers in a second
    step.
    """

    def made(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        new = t.detach() * 0.9 if step else t.detach()
        return (new.contiguous() if dense else new).requires_grad_(t.requires_grad)

    return pytree.tree_map(made, value)


def scalar_of(case: Case, made: Any) -> torch.Tensor:
    """The loss; for a module, a sum that every element of every output reaches with another weight."""
    outputs = [t for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]
    if case.loss is not None:
        return outputs[0]
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for k, t in enumerate(outputs):
        weight = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        if len(outputs) == 1 or k not in case.unused:
            total = total + ((t * weight).sum() + 0.5 * (t * t * weight).sum()) / t.numel() ** 0.5
    return total


def run_steps(case: Case, state: State, run: Any, noise: float = 0.0, dense: bool = False, seed: int = 0) -> Results:
    """One or two steps by ``run`` (input, target), with a small change of the weights between.

    ``noise``: relative change of the weights before, drawn from ``seed``.
    ``dense``: with weights and images in contiguous memory.
    """
    state.restore(noise, seed)
    if dense:
        for _, t in state.tensors():
            t.data = t.data.contiguous()
    torch.manual_seed(1)
    found: Results = {"output": {}, "gradient": {}, "buffer": {}}
    for step in range(1 + case.again):
        argument = leaves_of(case.input, step, dense)
        made = run(argument, case.target)
        total = scalar_of(case, made)
        if total.requires_grad:
            total.backward()
        inputs = [t for t in pytree.tree_leaves(argument) if isinstance(t, torch.Tensor)]
        grads, buffers = state.results()
        grads |= {f"input {k}": t.grad for k, t in enumerate(inputs)}
        outputs = [t for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]
        for kind, these in (("output", dict(enumerate(outputs))), ("gradient", grads), ("buffer", buffers)):
            found[kind] |= {f"{name}, step {step}": t if t is None else t.detach() for name, t in these.items()}
        with torch.no_grad():
            for k, t in state.tensors():
                if ".parameter." in k and t.grad is not None:
                    t.sub_(0.01 * t.grad / (1 + t.grad.abs().max()))
                t.grad = None
    return found


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g.contiguous()


@contextmanager
def mended() -> Iterator[None]:
    """Plain PyTorch without two faults of its norms where channels lie innermost.

    Of one image they give wrong gradients; and the process ends where a group norm has a gradient and its input none.
    """

    def dense(norm: Any) -> Any:
        return lambda *args, **kwargs: _Dense.apply(norm(*args, **kwargs))

    def wanted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        apart = torch.is_grad_enabled() and not x.requires_grad
        return usual[2](x.detach().requires_grad_() if apart else x, *args, **kwargs)

    usual = F.instance_norm, F.batch_norm, F.group_norm
    F.instance_norm, F.batch_norm, F.group_norm = dense(usual[0]), dense(usual[1]), wanted
    try:
        yield
    finally:
        F.instance_norm, F.batch_norm, F.group_norm = usual


def plain(case: Case) -> Any:
    def run(argument: Any, target: Any) -> Any:
        with drawn(), mended():
            made = case.net(argument)
            return made if case.loss is None else case.loss(made, target)

    return run


def tiled_run(case: Case, step: Tiled) -> Any:
    return lambda argument, target: step(argument) if case.loss is None else step(argument, target)


def worst_of(expected: Results, found: Results) -> tuple[float, str]:
    """The largest difference, relative to the largest gradient, or to an output's or buffer's own largest number."""
    gaps = [(0.0, "nothing")]
    for kind, tensors in expected.items():
        largest = max((_largest(t) for t in tensors.values() if t is not None), default=0.0)
        for name, a in tensors.items():
            b, where = found[kind][name], f"{kind} {name}"
            if a is None or b is None:
                gaps.append((0.0 if a is b else float("inf"), f"{where}: None on one side"))
            elif (a.shape, a.dtype) != (b.shape, b.dtype):
                gaps.append((float("inf"), f"{where}: {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}"))
            elif a.numel():
                scale = largest if kind == "gradient" else _largest(a)
                gap = _largest(a.double() - b.double())
                gaps.append((gap / max(scale, FLOOR), where))
    return max(gaps, key=lambda g: float("inf") if g[0] != g[0] else g[0])


def _largest(t: torch.Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


# Plans ---------------------------------------------------------------------------------------------


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run fusion groups by ATen: small networks would spend their time compiling."""
    old = executor.build
    executor.build = functools.partial(fused.build, compile=False)
    try:
        yield
    finally:
        executor.build = old


@contextmanager
def settings(case: Case, compiled: bool) -> Iterator[None]:
    """Cut maps from ``case.strips`` bytes on, as large images are; run fusion groups by ATen unless ``compiled``."""
    old = tiling.WINDOW, tiling.LEAST, tiling.ROWS, executor.build
    tiling.WINDOW, tiling.LEAST, tiling.ROWS = case.strips, case.strips // 4, 2
    executor.build = functools.partial(fused.build, compile=compiled)
    try:
        yield
    finally:
        tiling.WINDOW, tiling.LEAST, tiling.ROWS, executor.build = old


def called(case: Case, step: Tiled) -> Call:
    """The first call."""
    argument = leaves_of(case.input, 0)
    return Call(step._fullframe["pair"], (argument,) if case.loss is None else (argument, case.target), {})


def planned(case: Case) -> tuple[Tiled, Any, Program, planner.Request]:
    """The tiled network with the program of its first call, planned for the drawn budget, and what was asked for."""
    step = fullframe.tile(case.net, loss=case.loss, tile=case.tile, budget=PLENTY, workers=1)
    call = called(case, step)
    program = step._program(call)
    options = step._fullframe["options"]
    request = request_for(program.graph, call, options)
    try:
        smallest = planner.plan(program.graph, replace(request, budget=1)).projected_bytes
    except fullframe.BudgetError as error:
        smallest = error.smallest
    budget = int(smallest + case.tight * max(0, program.plan.projected_bytes - smallest))
    if case.tight < 1:
        request = replace(request, budget=budget)
        program = replace(program, plan=planner.plan(program.graph, request))
    return step, _key(call, program), program, request


# One network ---------------------------------------------------------------------------------------


def judged(case: Case, seed: int, compiled: bool = False) -> Record:
    """Run a case both ways and say what became of it."""
    record = Record(seed, "unusable", parts=case.used)
    state = State(case)
    try:
        expected = run_steps(case, state, plain(case))
    except (RuntimeError, ValueError, IndexError) as error:
        record.detail = str(error)[:200]
        return record
    if not all(bool(t.isfinite().all()) for ts in expected.values() for t in ts.values() if t is not None):
        record.detail = "plain PyTorch gives numbers that are not finite"
        return record
    try:
        with settings(case, compiled):
            _tiled_sides(case, state, expected, record)
            if compiled and record.outcome == "right":
                _again_and_again(case, state, record)
    except fullframe.FullframeError as error:
        record.outcome, record.detail = "refused", f"{type(error).__name__}: {error}"[:300]
    except Exception as error:  # the seed must reach the report, whatever went wrong
        record.outcome, record.detail = "wrong", f"{type(error).__name__}: {str(error)[:300]}"
    return record


def _tiled_sides(case: Case, state: State, expected: Results, record: Record) -> None:
    state.restore()
    step, key, program, request = planned(case)
    record.ops = sorted({op.target for op in program.graph.ops})
    record.whole = list(program.plan.whole)
    verify_plan(program.plan)
    programs = step._fullframe["programs"]
    assert key in programs or not program.lasting, "the planned program would not be the one that runs"
    programs[key] = program
    found = run_steps(case, state, tiled_run(case, step))
    worst, where = worst_of(expected, found)
    record.outcome, record.detail = "right", f"{worst:.1e}"
    if not worst <= TOLERANCE:
        own = _own(case, state, expected)
        bad = not worst <= max(TOLERANCE, MARGIN * own)
        record.outcome = "wrong" if bad else "ill-conditioned"
        record.detail = f"{worst:.2g} at {where}; plain PyTorch moves by {own:.2g}"
        if bad and worst_of(run_steps(case, state, plain(case), dense=True), found)[0] <= TOLERANCE:
            record.outcome = "PyTorch wrong"
            record.detail = f"{worst:.2g} at {where}; as plain PyTorch gives it for contiguous tensors"
    elif _key(called(case, step), program) != key:
        pass  # it keeps something since the first call, and will be recorded and planned anew
    elif record.seed % 3 == 0:
        programs[key] = replace(program, plan=replace(abreast(program.graph, request), workers=2))
        again = run_steps(case, state, tiled_run(case, step))
        worst, where = worst_of(found, again)
        if worst > _order(case):
            record.outcome, record.detail = "wrong", f"two workers give other bits: {worst:.2g} at {where}"
    elif record.seed % 3 == 1:
        for tier, made in (("the second tier", away), ("a disk", on_disk)):
            programs[key] = replace(program, plan=made(program.graph, request))
            record.spilled = len(programs[key].plan.offloaded)
            with in_bands(record.seed % 2 == 0):
                worst, where = worst_of(found, run_steps(case, state, tiled_run(case, step)))
            if not worst <= TOLERANCE:
                bad = not worst <= MARGIN * _own(case, state, expected)
                record.outcome = "wrong" if bad else "ill-conditioned"
                record.detail = f"maps in {tier} differ: {worst:.2g} at {where}"
                return


def _key(call: Call, program: Program) -> Any:
    call.take_snapshot(program.reads)
    return program.reads, call.key(program.reads), program.answers


def _own(case: Case, state: State, expected: Results) -> float:
    """How far plain PyTorch's results move with the last bits of the weights.

    Several draws: a norm makes rounding errors of a constant map, whose sign a ReLU takes for a number.
    """
    return max(worst_of(expected, run_steps(case, state, plain(case), NOISE, seed=k))[0] for k in range(DRAWS))


def _again_and_again(case: Case, state: State, record: Record) -> None:
    """Later steps run from what earlier ones noted; they must give the same bits."""
    state.restore()
    step, key, program, request = planned(case)
    plans = program.plan, replace(abreast(program.graph, request), workers=2)
    for plan in plans:
        step._fullframe["programs"][key] = replace(program, plan=plan)
        first = run_steps(case, state, tiled_run(case, step))
        for _ in range(5):
            worst, where = worst_of(first, run_steps(case, state, tiled_run(case, step)))
            if worst > _order(case):
                record.outcome, record.detail = "wrong", f"a later step gives other bits: {worst:.2g} at {where}"
    record.recorded = sum(1 for plan in plans for t in _tiles(plan) if t.recorded)
    record.replayed = sum(len(s.native) for plan in plans for s in _schedules(plan))


def _tiles(plan: fullframe.Plan) -> Iterator[Any]:
    """The classes of tiles that a plan's runs have met."""
    return executor.runtime_of(plan, torch.device("cpu")).tiles.classes()


def _schedules(plan: fullframe.Plan) -> list[Schedule]:
    """What was scheduled of a plan."""
    return list(executor.runtime_of(plan, torch.device("cpu")).schedules.values())


def _order(case: Case) -> float:
    """How far the same step may differ from itself: not at all, but on a device, whose libraries add up in any
    order."""
    return 1e-12 if any(p.is_cuda for p in case.net.parameters()) else 0.0


# Many networks -------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts over many networks, from their records."""

    records: list[Record] = field(default_factory=list)

    def of(self, *outcomes: str) -> list[Record]:
        return [r for r in self.records if r.outcome in outcomes]

    @property
    def networks(self) -> int:
        return len(self.records) - len(self.of("unusable"))

    def __str__(self) -> str:
        seeds = [r.seed for r in self.records]
        spent = sum(r.seconds for r in self.records)
        counts = {k: len(self.of(k)) for k in OUTCOMES}
        lines = [f"seeds {stretches(seeds)}, {spent:.0f} s of CPU time: {self.networks} networks, "
                 + ", ".join(f"{n} {k}" for k, n in counts.items())]  # fmt: skip
        recorded = [r.recorded for r in self.records if r.recorded]
        replayed = sum(r.replayed for r in self.records)
        lines += [
            f"  of {len(recorded)} networks {sum(recorded)} classes of tiles ran from bytecode, and {replayed} steps outside of Python"
        ]
        lines += [
            f"  of {sum(r.spilled > 0 for r in self.records)} networks {sum(r.spilled for r in self.records)} maps lay on a disk"
        ]
        lines += [f"  refused {n}: {why}" for why, n in Counter(r.detail for r in self.of("refused")).most_common()]
        lines += [f"  run whole {n}: {op}" for op, n in self.whole().most_common()]
        return "\n".join(lines + [f"seed {r.seed} {r.outcome}: {r.detail}" for r in self.of("wrong")])

    def whole(self) -> Counter[str]:
        """Networks by op that ran whole."""
        return Counter(name.split(" ")[0] for r in self.records for name in set(r.whole))

    def table(self) -> str:
        """Networks that used each part and each op."""
        done = self.of(*OUTCOMES)
        parts = Counter(name.strip() for r in done for name in {p.strip() for p in r.parts})
        ops = Counter(op for r in done for op in r.ops)
        rows = ["| part | networks |", "|---|---|", *(f"| {k} | {n} |" for k, n in sorted(parts.items()))]
        return "\n".join(
            [*rows, "", "| op | networks |", "|---|---|", *(f"| {k} | {n} |" for k, n in sorted(ops.items()))]
        )


def stretches(numbers: list[int]) -> str:
    """Whole numbers in words, runs of neighbours together."""
    ends: list[list[int]] = []
    for n in sorted(set(numbers)):
        if ends and ends[-1][1] == n - 1:
            ends[-1][1] = n
        else:
            ends.append([n, n])
    return ", ".join(f"{low} to {high}" if high > low else str(low) for low, high in ends)


def again(checkpoint: Path) -> None:
    """Judge once more what was found wrong or refused, and keep the new records."""
    records = read(checkpoint)
    for k, old in enumerate(records):
        case = draw(old.seed) if old.outcome in ("wrong", "refused") else None
        if case is not None:
            records[k] = judged(case, old.seed)
            records[k].seconds = old.seconds
    checkpoint.write_text("".join(json.dumps(asdict(r)) + "\n" for r in records))


def read(checkpoint: Path) -> list[Record]:
    """The records of an earlier search."""
    return [Record(**json.loads(line)) for line in checkpoint.read_text().splitlines()]


def search(first: int, count: int, *, checkpoint: Path | None = None, compile_every: int = 20) -> Tally:
    """Judge networks from seed ``first`` on until ``count`` could be used; goes on where a checkpoint ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tally, seed = Tally(), first
    if checkpoint is not None and checkpoint.exists():
        tally.records = read(checkpoint)
        seed = max([first, *(r.seed + 1 for r in tally.records)])
    while tally.networks < count:
        start = time.process_time()
        case = draw(seed)
        record = Record(seed, "unusable") if case is None else judged(case, seed, seed % compile_every == 0)
        record.seconds = round(time.process_time() - start, 3)
        tally.records.append(record)
        if checkpoint is not None:
            with checkpoint.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")
        seed += 1
    return tally
