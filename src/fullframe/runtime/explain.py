"""How a call ran, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from fullframe import torch_compat
from fullframe.codegen.toolchain import cxx
from fullframe.compiler.program import Program
from fullframe.device import CXX, device_of
from fullframe.runtime.executor import Runtime, runtime_of
from fullframe.runtime.tasks import tiles_of
from fullframe.schedule.plan import Plan, human, ranks
from fullframe.storage.protocol import DISK


def explain(program: Program, place: torch.device, reason: str) -> str:
    """How a program ran on a device, a line for each matter.

    ``reason`` says why it was captured in this call; it is empty where the capture of a former one was used.
    """
    plan = program.expected().plan
    runtime = runtime_of(plan, place)
    capture = f"made in this call ({reason})" if reason else "that of a former call"
    lasting = "" if program.lasting else "; not kept, for the call changes what it reads"
    stored = ", ".join(_stored(plan))
    return "\n".join((
        f"capture: {capture}{lasting}",
        f"plan: {len(plan.stages)} stages, {human(plan.projected_bytes)} projected of a budget of "
        f"{human(plan.budget)}, {plan.workers} workers",
        f"kernels: {_kernels(runtime, place)}",
        f"tiles: {', '.join(_tiles(runtime, plan))}",
        *_wider(plan),
        f"ops run whole: {', '.join(plan.whole) or 'none'}",
        f"stored maps: {stored or 'none'}",
        *([f"ranks: {ranks(plan.share)}; stages run one after the other, from Python"] if plan.share else []),
    ))  # fmt: skip


def _wider(plan: Plan) -> Iterator[str]:
    """Where products are made in a wider type than what they are made of, for lack of an instruction."""
    if torch_compat.has_bfloat16():
        return
    wide = [
        op
        for op in plan.graph.ops
        if op.rule.heavy
        and op.inputs[0].dtype == torch.bfloat16
        and torch.float32 in (op.inputs[-1].dtype, op.output.dtype)
    ]
    if wide:
        yield f"products of bfloat16: {len(wide)} ops make them in float32, since this processor has none of bfloat16"


def _stored(plan: Plan) -> Iterator[str]:
    for name, n in plan.bytes.stores.items():
        if n and name == DISK:
            read, written = plan.disk_traffic
            yield f"{human(n)} on disk ({human(read)} read and {human(written)} written in a step)"
        elif n:
            yield f"{human(n)} in the memory of the {name}"


def _kernels(runtime: Runtime, place: torch.device) -> str:
    kernels = list(runtime.kernels.values())
    reasons = Counter(kernel.reason for kernel in kernels if not kernel.compiled)
    made = sum(kernel.compiled for kernel in kernels)
    maker = cxx.isa() if device_of(place).toolchain == CXX else device_of(place).toolchain or "none"
    words = [f"{made} of {len(kernels)} fused groups compiled ({maker})"]
    words += [f"{n} run by torch's ops: {reason}" for reason, n in reasons.items()]
    return "; ".join(words)


def _tiles(runtime: Runtime, plan: Plan) -> Iterator[str]:
    ways = Counter(
        runtime.tiles.stages[number].way(stage, k)
        for number, stage in enumerate(plan.stages)
        for k in tiles_of(plan, number)
    )
    count, recorded, open_yet = ways.total(), ways[True], ways[None]
    yield f"{recorded} of {count} in bytecode"
    if not runtime.records:
        yield "the others in Python (no bytecode: another device, or no compiler)"
    elif recorded < count:
        yield f"{open_yet} not recorded yet"
        yield (
            f"{count - recorded - open_yet} in Python (no instruction for what they do, offloaded maps, "
            "or too many to keep)"
        )
