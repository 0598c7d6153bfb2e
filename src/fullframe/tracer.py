"""Capture: the step recorded as one flat graph, from fake tensors, without memory.

The only user of ``make_fx`` and the functional-tensor internals of torch. Forward, loss, backward
and buffer updates are recorded together; functionalisation turns every mutation into a new value,
so no alias survives.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import Node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fullframe.graph import CaptureError, Graph, Value, live_ops, verify
from fullframe.ops import LOWERINGS, Builder
from fullframe.questions import place_of
from fullframe.watch import Watch, reads_data

Function = Callable[..., "tuple[Sequence[torch.Tensor | None], Sequence[torch.Tensor]]"]


@dataclass
class Recording:
    """A function to record: called with one tensor per input, and run on ``device``.

    It returns its outputs, and tensors that stand for inputs that arrive late: whatever it computed
    them from, in the graph they are inputs.
    """

    function: Function
    inputs: list[torch.Tensor]
    names: list[str]
    watch: Watch
    device: torch.device
    undrawn: Callable[[], AbstractContextManager[None]]


def capture(recording: Recording) -> Graph:
    """Record a function as a graph in normal form; raises `CaptureError` where it cannot be."""
    return _lower(_record(recording), recording.names, recording.device)


def _record(recording: Recording) -> Any:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(t.detach()) for t in recording.inputs]
    try:
        with (
            _active(), recording.watch.paths(), fx_traceback.preserve_node_meta(), _uncompiled(), _own_norms(),
            torch.autograd.set_detect_anomaly(False),  # it looks for NaN, and here are no numbers
            torch.autograd.set_multithreading_enabled(False),  # a device's backward stays in this thread
            _Undrawn(mode), recording.undrawn(), _control_flow(recording.watch),
        ):  # fmt: skip
            module = make_fx(dispatch_functionalize(recording.function))(*fakes)
    except NotImplementedError as error:
        if "Generator" not in str(error):  # which a recording of torch 2.11 cannot hold
            raise
        raise _own_generator(recording.watch.current, "the step") from error
    except AssertionError as error:
        if "effect" not in str(error):
            raise
        raise CaptureError(
            f"in {recording.watch.current or 'the step'}, an op talks to other processes or has another effect "
            "beside its result, which cannot be recorded; wrap the tiled module in DistributedDataParallel, not the "
            "other way round"
        ) from error
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise CaptureError(
                f"in {recording.watch.current or 'the step'}, torch.utils.checkpoint with use_reentrant=True cannot "
                "be recorded; use use_reentrant=False, or no checkpoint: a tiled step stores what fits its budget"
            ) from error
        if "already associated to a python object" in str(error):
            raise CaptureError(
                f"in {recording.watch.current or 'the step'}, a tensor of a subclass is made by calling the class, "
                "which cannot be recorded; use tensor.as_subclass(...)"
            ) from error
        if not reads_data(error):
            raise
        raise _data_dependent(recording.watch.current, error) from error
    finally:
        torch.clear_autocast_cache()
    if recording.watch.failed is not None:  # and the step's own code went on as if nothing had been
        raise _data_dependent(recording.watch.current, recording.watch.failed) from recording.watch.failed
    return module


@contextmanager
def _control_flow(watch: Watch) -> Iterator[None]:
    """Name the function of torch's that has failed because it chooses its course by the data."""
    try:
        yield
    except Exception as error:
        frames = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
        names = [n.rpartition(".")[2] for n in frames if n.startswith("torch._higher_order_ops.")]
        found = next((n for n in names if n in ("cond", "while_loop", "scan", "associative_scan", "map")), None)
        if found is None:
            raise
        raise CaptureError(
            f"in {watch.current or 'the step'}, torch's {found} makes the course of the computation depend on the "
            "data, so it cannot be recorded once for all inputs; use torch.where, or Python's own if and for over "
            "what is known"
        ) from error


class _Undrawn(TorchDispatchMode):
    """Random numbers made from nothing, for which no fake tensor asks, are fake too: torch's generators stay as they
    are, from which other threads may be drawing."""

    supports_higher_order_operators = True

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self.fake if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()) else nullcontext():
            return func(*args, **(kwargs or {}))


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Inside, functions that torch.compile made run as they were written."""
    dynamo = sys.modules.get("torch._dynamo")
    with dynamo.config.patch(error_on_nested_fx_trace=False) if dynamo else nullcontext():
        yield


def _own_generator(path: str, what: str) -> CaptureError:
    return CaptureError(
        f"in {path or 'the step'}, {what} draws from a generator of its own, which a recorded step cannot follow; "
        "leave generator= out, or draw outside the step and pass the numbers in"
    )


@contextmanager
def _own_norms() -> Iterator[None]:
    """Inside, CUDA tensors are normed by torch's own ops and not by those of its library."""
    enabled = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(enabled)


def _data_dependent(path: str, error: Exception) -> CaptureError:
    if isinstance(error, CaptureError):
        return error
    op = str(getattr(error, "func", "")) or "the numbers of a tensor"
    where = place_of(error)
    return CaptureError(
        f"in {path or 'the step'}, {f'at {where}, ' if where else ''}the course of the computation depends on the "
        f"data ({op}), so it cannot be "
        "recorded once for all inputs; compute that value outside the step and pass it in, or use a mask of fixed "
        "shape (torch.where) in place of an if or of a selection"
    )


def _lower(module: Any, names: Sequence[str], device: torch.device) -> Graph:
    builder = Builder()
    builder.device = device
    made: dict[Node, Any] = {}
    inputs: list[Value] = []
    constants: dict[Value, Any] = {}
    nodes = list(module.graph.nodes)
    results, late = nodes[-1].args[0]
    for node in nodes[:-1]:
        if node.op == "placeholder":
            meta = node.meta["val"]
            made[node] = builder.value(meta.shape, meta.dtype, names[len(inputs)])
            inputs.append(made[node])
        elif node.op == "get_attr":
            tensor = getattr(module, str(node.target))
            if not isinstance(tensor, torch.Tensor):  # a generator
                made[node] = tensor
                continue
            made[node] = builder.value(tensor.shape, tensor.dtype, f"constant.{node.target}")
            # What lies in memory of NumPy's may be written without torch knowing.
            constants[made[node]] = tensor if tensor.untyped_storage().resizable() else tensor.clone()
        elif node in late:
            meta = node.meta["val"]
            made[node] = builder.value(meta.shape, meta.dtype, f"grad_output{late.index(node)}")
        else:
            made[node] = _lower_call(builder, node, made)
    outputs = [_as_recorded(builder, made[n], n) if isinstance(n, Node) else None for n in results]
    later = [made[n] for n in late]
    wanted = [v for v in outputs if v is not None]
    ops = live_ops(builder.ops, wanted)
    seed = builder.seed
    inputs += later if seed is None else [*later, seed]
    graph = Graph(inputs, ops, outputs, late=frozenset(later), constants=constants, seed=seed)
    verify(graph)
    return graph


def _as_recorded(builder: Builder, value: Value, node: Node) -> Value:
    """A result in the dtype that plain PyTorch gives it: statistics are wider within."""
    dtype = node.meta["val"].dtype
    if value.dtype == dtype or node.op == "placeholder":
        return value
    return builder.aten(torch.ops.aten._to_copy.default, value, dtype=dtype)


def _lower_call(builder: Builder, node: Node, made: dict[Node, Any]) -> Any:
    args = tuple(_values(a, made) for a in node.args)
    kwargs = {k: _values(v, made) for k, v in node.kwargs.items()}
    if getattr(node.target, "__name__", "") == "getitem":
        return args[0][args[1]]
    value = node.meta.get("val")
    if not _tensors(value):
        return None  # a mark for the profiler, say
    single = isinstance(value, torch.Tensor)
    metas = list(value) if isinstance(value, (list, tuple)) else [value]
    builder.target, builder.call = str(node.target), node.target  # type: ignore[assignment]
    builder.arguments, builder.keywords = args, kwargs
    builder.meta = [(tuple(m.shape), m.dtype) if isinstance(m, torch.Tensor) else None for m in metas]
    builder.path = node.meta.get("custom", {}).get("path", "")
    builder.follow(node.meta.get("custom", {}).get("state", builder.state))
    builder.layouts = [_layout(n) for n in _nodes((*node.args, *node.kwargs.values()))]
    if isinstance(kwargs.get("generator"), torch.Generator):
        raise _own_generator(builder.path, builder.target)
    if all(m is not None and 0 in m[0] for m in builder.meta):  # nothing to compute
        nothing = [builder.full(m[0], 0, m[1]) for m in builder.meta if m is not None]
        return nothing[0] if single else nothing
    if any(isinstance(m, torch.Tensor) and m.layout is not torch.strided for m in metas) and _computes(node):
        raise CaptureError(
            f"in {builder.path or 'the step'}, {builder.target} makes a sparse tensor, and a recorded step computes "
            "with dense ones only; stay with dense tensors, or do that outside the step"
        )
    lowering = LOWERINGS.get(builder.target)
    result = builder.recorded() if lowering is None else lowering(builder, *args, **kwargs)
    _refuse_misshapen(builder, result)
    if single:
        return result[0] if isinstance(result, list) else result
    return result


def _refuse_misshapen(builder: Builder, result: Any) -> None:
    """Refuse a call whose shape torch's recording gets wrong: what follows was recorded for that shape."""
    made = result if isinstance(result, (list, tuple)) else [result]
    for value, meta in zip(made, builder.meta, strict=False):
        if isinstance(value, Value) and meta is not None and value.shape != meta[0] and 0 not in value.shape:
            raise CaptureError(
                f"in {builder.path or 'the step'}, {builder.target} makes a tensor of shape {value.shape}, which "
                f"torch's own recording takes for {meta[0]}; name the axes it reduces, or write it in another way"
            )


def _computes(node: Node) -> bool:
    """Whether a call is more than another name of a tensor."""
    return str(node.target) not in ("aten.detach.default", "aten.alias.default")


def _nodes(arg: Any) -> Iterator[Node]:
    """The nodes among a call's arguments, in their order."""
    if isinstance(arg, Node):
        yield arg
    elif isinstance(arg, (list, tuple)):
        for a in arg:
            yield from _nodes(a)


def _layout(node: Node) -> tuple[tuple[int, ...], int] | None:
    """Strides and offset of a tensor as it was recorded; None where they are not known."""
    meta = node.meta.get("val")
    if not isinstance(meta, torch.Tensor) or meta.layout is not torch.strided:
        return None
    return tuple(meta.stride()), int(meta.storage_offset())


def _values(arg: Any, made: dict[Node, Any]) -> Any:
    if isinstance(arg, Node):
        return made[arg]
    if isinstance(arg, (list, tuple)):
        return [_values(a, made) for a in arg]
    return arg


def _tensors(value: Any) -> bool:
    found = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(t, torch.Tensor) for t in found)


_STATE = threading.local()


@contextmanager
def _active() -> Iterator[None]:
    _STATE.active = True
    try:
        yield
    finally:
        _STATE.active = False


DEEPEST = 8  # calls of a tiled module inside of each other


@contextmanager
def nested(pair: Any) -> Iterator[None]:
    """Inside, a tiled module is at work as a part of what is recorded; refuses one that calls itself without end."""
    inside: list[int] = _STATE.__dict__.setdefault("inside", [])
    if inside.count(id(pair)) >= DEEPEST:
        raise CaptureError(
            f"the tiled {type(pair.module).__name__} calls itself, {DEEPEST} times over, from its own forward, loss "
            "or hooks; let those call the plain module, or another one"
        )
    inside.append(id(pair))
    try:
        yield
    finally:
        inside.pop()


def recording() -> bool:
    """Whether a step is being recorded on this thread."""
    return getattr(_STATE, "active", False)
