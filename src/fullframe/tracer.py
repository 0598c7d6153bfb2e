"""Capture: the step recorded as one flat graph, from fake tensors, without memory.

The only user of ``make_fx`` and the functional-tensor internals of torch. Forward, loss, backward
and buffer updates are recorded together; functionalisation turns every mutation into a new value,
so no alias survives.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from fullframe.graph import CaptureError, Graph, Value, live_ops, verify
from fullframe.ops import LOWERINGS, Builder

Function = Callable[..., Sequence["torch.Tensor | None"]]


@dataclass
class Recording:
    """A function to record: called with one tensor per input, returns a flat list of tensors."""

    function: Function
    inputs: list[torch.Tensor]
    names: list[str]


def capture(recording: Recording) -> Graph:
    """Record a function as a graph in normal form; raises `CaptureError` where it cannot be."""
    device = recording.inputs[0].device if recording.inputs else torch.device("cpu")
    recorded = _record(recording)
    return _lower(recorded.graph, recorded, recording.names, device)


def _record(recording: Recording) -> Any:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(t.detach()) for t in recording.inputs]
    random_before = random.getstate()
    numpy_before = _numpy_state()
    try:
        with module_paths(), fx_traceback.preserve_node_meta():
            module = make_fx(dispatch_functionalize(recording.function))(*fakes)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise CaptureError(
            f"the step depends on the data of a tensor ({error}), so it cannot be recorded once for all "
            "inputs; compute that value outside the step and pass it in, or use a mask of fixed shape"
        ) from error
    finally:
        torch.clear_autocast_cache()
    if random.getstate() != random_before or _numpy_state() != numpy_before:
        raise CaptureError(
            "the module or the loss drew from Python's or NumPy's random numbers, which would be frozen "
            "into the captured step; draw them outside and pass them in, or use torch's random functions"
        )
    return module


def _numpy_state() -> Any:
    import sys

    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state()[1].tobytes() + bytes(str(numpy.random.get_state()[2]), "ascii")


@contextmanager
def module_paths() -> Iterator[None]:
    """While recording, note on every node the path of the module whose forward made it."""
    stack: list[str] = []
    names: dict[int, str] = {}

    def enter(module: nn.Module, _: Any) -> None:
        if not stack:
            names.update({id(m): f"{type(module).__name__}.{n}" if n else type(module).__name__
                          for n, m in module.named_modules()})  # fmt: skip
        stack.append(names.get(id(module), type(module).__name__))
        fx_traceback.current_meta["path"] = stack[-1]

    def leave(module: nn.Module, *_: Any) -> None:
        if stack:
            stack.pop()
        fx_traceback.current_meta["path"] = stack[-1] if stack else ""

    hooks = nn.modules.module
    first = hooks.register_module_forward_pre_hook(enter)
    last = hooks.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        first.remove()
        last.remove()
        fx_traceback.current_meta.pop("path", None)


def _lower(recorded: FxGraph, module: Any, names: Sequence[str], device: torch.device) -> Graph:
    builder = Builder()
    builder.device = device
    made: dict[Node, Any] = {}
    inputs: list[Value] = []
    constants: dict[Value, Any] = {}
    outputs: list[Value | None] = []
    for node in recorded.nodes:
        if node.op == "placeholder":
            meta = node.meta["val"]
            made[node] = builder.value(meta.shape, meta.dtype, names[len(inputs)])
            inputs.append(made[node])
        elif node.op == "get_attr":
            tensor = getattr(module, str(node.target))
            made[node] = builder.value(tensor.shape, tensor.dtype, f"constant.{node.target}")
            constants[made[node]] = tensor
        elif node.op == "output":
            outputs = [made[n] if isinstance(n, Node) else None for n in node.args[0]]  # type: ignore[union-attr]
        else:
            made[node] = _lower_call(builder, node, made)
    wanted = [v for v in outputs if v is not None]
    graph = Graph(inputs, live_ops(builder.ops, wanted), outputs, constants=constants)
    verify(graph)
    return graph


def _lower_call(builder: Builder, node: Node, made: dict[Node, Any]) -> Any:
    args = tuple(_values(a, made) for a in node.args)
    kwargs = {k: _values(v, made) for k, v in node.kwargs.items()}
    if getattr(node.target, "__name__", "") == "getitem":
        return args[0][args[1]]
    value = node.meta["val"]
    single = isinstance(value, torch.Tensor)
    metas = [value] if single else list(value)
    builder.target, builder.call = str(node.target), node.target  # type: ignore[assignment]
    builder.arguments, builder.keywords = args, kwargs
    builder.meta = [(tuple(m.shape), m.dtype) if isinstance(m, torch.Tensor) else None for m in metas]
    builder.path = node.meta.get("path", "") or builder.path
    lowering = LOWERINGS.get(builder.target)
    result = builder.recorded() if lowering is None else lowering(builder, *args, **kwargs)
    if single:
        return result[0] if isinstance(result, list) else result
    return result


def _values(arg: Any, made: dict[Node, Any]) -> Any:
    if isinstance(arg, Node):
        return made[arg]
    if isinstance(arg, (list, tuple)):
        return [_values(a, made) for a in arg]
    return arg
