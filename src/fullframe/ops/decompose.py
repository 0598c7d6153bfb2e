"""From recorded ATen calls to a graph of primitives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fullframe import torch_compat
from fullframe.capture.trace import own_generator
from fullframe.errors import CaptureError
from fullframe.ir.graph import Graph, GraphSignature, Value, live_ops, verify
from fullframe.ops.builder.arguments import members
from fullframe.ops.builder.builder import Builder
from fullframe.ops.builder.registry import DECOMPOSITIONS


def decompose_graph(
    module: torch.fx.GraphModule, names: Sequence[str], device: torch.device, signature: GraphSignature
) -> Graph:
    """A recorded module as a graph in normal form, its inputs named."""
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
            if isinstance(tensor, (torch_compat.FakeTensor, torch_compat.FunctionalTensor)):
                path = node.meta.get("custom", {}).get("path", "")
                raise CaptureError(
                    f"in {path or 'the step'}, a function that was traced inside "
                    "of the step (torch.func.linearize does so) keeps a tensor of it as a constant, which has no "
                    "numbers while it is recorded; use torch.func.jvp, or the function itself"
                )
            made[node] = builder.value(tensor.shape, tensor.dtype, f"constant.{node.target}")
            # What lies in memory of NumPy's may be written without torch knowing.
            constants[made[node]] = tensor if tensor.untyped_storage().resizable() else tensor.clone()
        elif node in late:
            meta = node.meta["val"]
            made[node] = builder.value(meta.shape, meta.dtype, f"grad_output{late.index(node)}")
        else:
            made[node] = _decompose_call(builder, node, made)
    outputs = [_as_recorded(builder, made[n], n) if isinstance(n, Node) else None for n in results]
    later = [made[n] for n in late]
    wanted = [v for v in outputs if v is not None]
    ops = live_ops(builder.ops, wanted)
    seed = builder.seed
    inputs += later if seed is None else [*later, seed]
    graph = Graph(inputs, ops, outputs, signature, frozenset(later), constants, seed)
    verify(graph)
    return graph


def _as_recorded(builder: Builder, value: Value, node: Node) -> Value:
    """A result in the dtype that plain PyTorch gives it: statistics are wider within."""
    dtype = node.meta["val"].dtype
    if value.dtype == dtype or node.op == "placeholder":
        return value
    return builder.aten(torch_compat.to_copy, value, dtype=dtype)


def _decompose_call(builder: Builder, node: Node, made: dict[Node, Any]) -> Any:
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
    builder.layouts = [_layout(n) for n in members((*node.args, *node.kwargs.values()), Node)]
    if isinstance(kwargs.get("generator"), torch.Generator):
        raise own_generator(builder.path, builder.target)
    if all(m is not None and 0 in m[0] for m in builder.meta):  # nothing to compute
        nothing = [builder.full(m[0], 0, m[1]) for m in builder.meta if m is not None]
        return nothing[0] if single else nothing
    if any(isinstance(m, torch.Tensor) and m.layout is not torch.strided for m in metas) and _computes(node):
        raise CaptureError(
            f"in {builder.path or 'the step'}, {builder.target} makes a sparse tensor, and a recorded step computes "
            "with dense ones only; stay with dense tensors, or do that outside the step"
        )
    decomposition = DECOMPOSITIONS.get(builder.target)
    result = builder.recorded() if decomposition is None else decomposition(builder, *args, **kwargs)
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
