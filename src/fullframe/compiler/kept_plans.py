"""Plans as bytes, and kept on disk beside the kernels, so that a second process need not search for them again.

A plan follows from the graph, the request and the code that plans. The graph is captured anew in every process; what
is kept is found by all of it, so another step, size, budget, release or processor has another plan. Values and ops of
the graph are written down as their numbers in it.
"""

from __future__ import annotations

import io
import pickle
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from fullframe.bytecode.libtorch import bytecode_available
from fullframe.codegen.toolchain import cxx, kept_files
from fullframe.ir.graph import Graph, Op, Value
from fullframe.ops.primitives.elementwise import copied
from fullframe.schedule import verify
from fullframe.schedule.plan import Plan
from fullframe.schedule.planner import plan
from fullframe.schedule.request import Request
from fullframe.version import __version__

ON = True
SECONDS = 0.1  # of planning, from which on a plan is kept
COUNT = 100  # plans that are kept: with one more, that which was kept first goes


def plan_of(graph: Graph, request: Request) -> Plan:
    """The plan of a graph, kept from another time if it has been asked for before. Raises what the planner raises."""
    path = _path(graph, request)
    if path is not None and (found := _kept(path, graph)) is not None:
        return found
    started = time.monotonic()
    made = plan(graph, request)
    if path is not None and time.monotonic() - started >= SECONDS:
        _keep(made, graph, path)
    return made


def _kept(path: Path, graph: Graph) -> Plan | None:
    """A plan that was kept in a file; None where there is none that can be read."""
    content = kept_files.kept(path)
    if content is None:
        return None
    try:
        found = unpacked(content, graph)
    except Exception:  # the file is whole, but of another kind: whatever it holds, it is no plan
        return None
    if not isinstance(found, Plan):
        return None
    if verify.ON:
        verify.verify_plan(found)
    return found


def _keep(made: Plan, graph: Graph, path: Path) -> None:
    with suppress(OSError):  # a disk that is full, say: it is planned again next time
        kept_files.keep(packed(made, graph), path)
        for old in sorted(path.parent.glob("*.plan"), key=lambda p: p.stat().st_mtime)[:-COUNT]:
            old.unlink(missing_ok=True)


def _path(graph: Graph, request: Request) -> Path | None:
    """The file of a plan, by all that it follows from; None where the engine's own code cannot be read."""
    code = _code()
    if not (ON and code):
        return None
    about = [code, *_numbers(), torch.__version__, cxx.isa(), str(bytecode_available())]
    about += (*_asked(request), *lines_of(graph))
    return folder() / f"{sha256(chr(0).join(about).encode()).hexdigest()}.plan"


def folder() -> Path:
    """Where plans are kept."""
    return kept_files.directory()


def _asked(request: Request) -> list[str]:
    """A request as text; sets are put in order."""
    found = []
    for field in fields(request):
        value = getattr(request, field.name)
        if callable(value):
            value = f"{value.__module__}.{value.__qualname__}"
        found.append(f"{field.name} {sorted(map(str, value)) if isinstance(value, frozenset) else value}")
    return found


@cache
def _code() -> str:
    """The engine's own code, in short: what it plans may change from one version to the next."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    try:
        return __version__ + sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest() if files else ""
    except OSError:
        return ""


def _numbers() -> list[str]:
    """The constants of what plans, which may have been changed in this process."""
    found = []
    for name, module in sorted(sys.modules.items()):
        if name.startswith(("fullframe.ops", "fullframe.partition", "fullframe.schedule", "fullframe.storage")):
            numbers = {k: v for k, v in vars(module).items() if k.isupper() and type(v) in (int, float, bool)}
            found.append(f"{name} {numbers}")
    return found


# As text -------------------------------------------------------------------------------------------


def lines_of(graph: Graph) -> list[str]:
    """A graph as text, with all that tells it from another."""
    lines = [f"inputs {[repr(v) for v in graph.inputs]}, late {sorted(v.name for v in graph.late)}"]
    lines += [f"constant {value!r} {digest_of(tensor)}" for value, tensor in graph.constants.items()]
    lines += [f"{op!r} {sorted((k, str(v)) for k, v in op.kwargs.items())} {op.path}" for op in graph.ops]
    strides = sorted((v.name, steps) for v, steps in graph.strides.items())
    return [*lines, f"outputs {graph.outputs}, {graph.signature}, {graph.seed}, {strides}"]


def digest_of(tensor: torch.Tensor) -> str:
    """The numbers of a tensor, in short."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


# As bytes ------------------------------------------------------------------------------------------


_Again = tuple[Callable[..., Op], tuple[Op | Value | tuple[Value, ...], ...]]


class _Packer(pickle.Pickler):
    """Writes values and ops of a graph as their numbers; an op that differs from one of those in what it reads and
    makes alone, as one that a plan makes again does, by its number and these. Others are copies."""

    def __init__(self, file: io.BytesIO, graph: Graph):
        super().__init__(file)
        self.numbers = {id(thing): k for k, thing in enumerate(_things(graph))}
        self.origins = {_form(op): op for op in graph.ops}

    def persistent_id(self, obj: object) -> int | None:
        return self.numbers.get(id(obj))

    def reducer_override(self, obj: object) -> _Again:
        if type(obj) is Op:
            origin = self.origins.get(_form(obj))
            if origin is None:
                return copied, (*obj.inputs, obj.output)
            return _like, (origin, obj.inputs, obj.output)
        return NotImplemented


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, graph: Graph):
        super().__init__(file)
        self.things = _things(graph)

    def persistent_load(self, pid: int) -> Graph | Op | Value:
        return self.things[pid]


def _things(graph: Graph) -> list[Graph | Op | Value]:
    values = dict.fromkeys((*graph.inputs, *graph.constants, *(op.output for op in graph.ops)))
    return [graph, *graph.ops, *values]


def _form(op: Op) -> tuple[str | int, ...]:
    return op.target, id(op.args), id(op.kwargs), id(op.rule), id(op.call)


def _like(op: Op, inputs: tuple[Value, ...], output: Value) -> Op:
    return replace(op, inputs=inputs, output=output)


def packed(made: Plan, graph: Graph) -> bytes:
    """A plan of a graph as bytes."""
    file = io.BytesIO()
    _Packer(file, graph).dump(made)
    return file.getvalue()


def unpacked(data: bytes, graph: Graph) -> Plan:
    """A plan from its bytes, for the graph as it was captured here."""
    return _Unpacker(io.BytesIO(data), graph).load()
