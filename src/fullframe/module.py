"""``fullframe.tile``: the tiled module and the tiled step, and their place in autograd."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fullframe.budget import free_bytes, parse_bytes
from fullframe.executor import Run
from fullframe.fingerprint import fingerprint
from fullframe.graph import Graph, Value
from fullframe.plan import Plan
from fullframe.planner import Request, plan
from fullframe.store import Arena, Arenas
from fullframe.tracer import Recording, capture

Tensors = list[torch.Tensor]


@dataclass
class Program:
    """A captured and planned call.

    ``outputs`` is how many tensors are handed out, then come buffers, then gradients of the
    ``wanted`` tensors. ``spec`` rebuilds the outputs; ``fixed`` holds those that are no tensors.
    """

    graph: Graph
    plan: Plan
    spec: Any
    fixed: list[Any]
    outputs: int
    buffers: list[str]
    wanted: int
    differentiable: list[bool]


@dataclass(frozen=True)
class Options:
    """Budget in bytes (None: what is free when first planned), forced tile, worker threads."""

    budget: int | None
    tile: int | tuple[int, ...] | None
    workers: int


class _Pair(nn.Module):
    """Module and criterion under one root, so that both have their parameters replaced."""

    def __init__(self, module: nn.Module, criterion: Callable[..., Any] | None):
        super().__init__()
        self.module = module
        self.criterion = criterion

    def forward(self, args: Any, kwargs: Any) -> Any:
        if self.criterion is None:
            return self.module(*args, **kwargs)
        return self.criterion(self.module(args[0]), args[1])


class Tiled(nn.Module):
    """A module that runs tile by tile; made by `fullframe.tile`.

    Shares parameters, buffers and submodules with the module it wraps: ``state_dict``, ``to``,
    optimisers and hooks see the same objects under the same names.
    """

    def __init__(self, module: nn.Module, criterion: Callable[..., Any] | None, options: Options):
        super().__init__()
        self._parameters = module._parameters
        self._buffers = module._buffers
        self._modules = module._modules
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self.training = module.training
        self.__dict__["_inner"] = _Hidden(_Pair(module, criterion))
        self.__dict__["_options"] = options
        self.__dict__["_programs"] = {}
        self.__dict__["_arenas"] = Arenas()

    def train(self, mode: bool = True) -> Tiled:
        """Set training mode, of the criterion too."""
        self.training = mode
        self._inner.pair.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Tiled:
        self._inner.pair._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_programs"], state["_arenas"] = {}, Arenas()
        return state

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these inputs, before anything runs; printable."""
        return self._program(args, kwargs)[0].plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program, call = self._program(args, kwargs)
        outputs = _run(self, program, call)
        leaves = list(program.fixed)
        found = iter(outputs)
        leaves = [next(found) if leaf is _TENSOR else leaf for leaf in leaves]
        return pytree.tree_unflatten(leaves, program.spec)

    def _program(self, args: Any, kwargs: Any) -> tuple[Program, _Call]:
        call = _Call(self._inner.pair, args, kwargs)
        key = call.key()
        if key not in self._programs:
            self._programs[key] = _compile(call, self._options)
        return self._programs[key], call


class _Hidden:
    """Keeps the wrapped pair out of nn.Module's registration."""

    def __init__(self, pair: _Pair):
        self.pair = pair


class _Call:
    """One call taken apart: parameters, buffers and input tensors in a fixed order."""

    def __init__(self, pair: _Pair, args: Any, kwargs: Any):
        self.pair = pair
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.leaves = leaves
        self.inputs: Tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        self.parameters = dict(pair.named_parameters())
        self.buffers = {k: v for k, v in pair.named_buffers() if v is not None}
        self.grad = torch.is_grad_enabled()

    @property
    def wanted(self) -> Tensors:
        """Tensors whose gradient is wanted, parameters first."""
        if not self.grad:
            return []
        candidates = [*self.parameters.values(), *self.inputs]
        return [t for t in candidates if t.requires_grad]

    def key(self) -> Any:
        """Everything the recording reads."""
        tensors = [*self.parameters.items(), *self.buffers.items(), *enumerate(self.inputs)]
        metas = tuple((k, tuple(t.shape), t.dtype, t.device, t.stride(), t.requires_grad) for k, t in tensors)
        others = tuple("T" if isinstance(x, torch.Tensor) else repr(x) for x in self.leaves)
        autocast = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
        )
        modes = (self.grad, autocast, torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
        return metas, others, str(self.spec), modes, fingerprint(self.pair)

    def rebuild(self, inputs: Sequence[torch.Tensor]) -> tuple[Any, Any]:
        found = iter(inputs)
        leaves = [next(found) if isinstance(x, torch.Tensor) else x for x in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


_TENSOR = object()


class _Recorder:
    """The function that is recorded: forward, and backward where gradients are wanted."""

    def __init__(self, call: _Call, criterion: bool):
        self.call, self.criterion = call, criterion
        self.spec: Any = None
        self.fixed: list[Any] = []
        self.differentiable: list[bool] = []

    def __call__(self, *tensors: torch.Tensor) -> Tensors:
        call = self.call
        n, m, k = len(call.parameters), len(call.buffers), len(call.inputs)
        tangents = tensors[n + m + k :]
        with torch.set_grad_enabled(call.grad):
            leaves = [_leaf(t, old) for t, old in zip(tensors[:n], call.parameters.values(), strict=True)]
            inputs = [_leaf(t, old) for t, old in zip(tensors[n + m : n + m + k], call.inputs, strict=True)]
            buffers = [t.clone() for t in tensors[n : n + m]]
            state = {**dict(zip(call.parameters, leaves, strict=True)), **dict(zip(call.buffers, buffers, strict=True))}
            made = torch.func.functional_call(call.pair, state, call.rebuild(inputs), tie_weights=True, strict=True)
            outputs = self.take(made)
            wanted = [t for t in (*leaves, *inputs) if t.requires_grad] if call.grad else []
            grads = self.gradients(outputs, wanted, tangents)
        return [*(t.detach() for t in outputs), *(state[k].detach() for k in call.buffers), *grads]

    def take(self, made: Any) -> Tensors:
        leaves, self.spec = pytree.tree_flatten(made)
        self.fixed = [_TENSOR if isinstance(x, torch.Tensor) else x for x in leaves]
        outputs = [x for x in leaves if isinstance(x, torch.Tensor)]
        self.differentiable = [t.requires_grad for t in outputs]
        if self.criterion:
            if not outputs or outputs[0].dim() != 0:
                shape = tuple(outputs[0].shape) if outputs else None
                raise ValueError(
                    f"the criterion must return a scalar loss, or (loss, extras); got shape {shape}. "
                    "Use reduction='mean' or 'sum'"
                )
            self.differentiable = [outputs[0].requires_grad] + [False] * (len(outputs) - 1)
        return outputs

    def gradients(self, outputs: Tensors, wanted: Tensors, tangents: Sequence[torch.Tensor]) -> list[Any]:
        chosen = [t for t, yes in zip(outputs, self.differentiable, strict=True) if yes]
        if not wanted or not chosen:
            return [None] * len(wanted)
        with ExitStack() as stack:
            # As in PyTorch, backward runs outside autocast, in the dtypes the forward chose.
            for kind in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(kind, enabled=False))
            seeds = [torch.ones_like(chosen[0])] if self.criterion else list(tangents)
            return list(torch.autograd.grad(chosen, wanted, seeds, allow_unused=True))


def _leaf(tensor: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(old.requires_grad)


def _compile(call: _Call, options: Options) -> Program:
    criterion = call.pair.criterion is not None
    recorder = _Recorder(call, criterion)
    tensors = [*call.parameters.values(), *call.buffers.values(), *call.inputs]
    names = [n.removeprefix("module.") for n in (*call.parameters, *call.buffers)]
    names += [f"input{k}" for k in range(len(call.inputs))]
    late: Tensors = []
    if not criterion and call.wanted:
        late = _tangents(call)
        names += [f"grad_output{k}" for k in range(len(late))]
    graph = capture(Recording(recorder, [*tensors, *late], names))
    outputs = len(recorder.differentiable)
    if late:
        graph.early = outputs + len(call.buffers)
        graph.late = frozenset(graph.inputs[len(tensors) :])
    request = _request(graph, call, options, len(graph.outputs) - len(call.wanted))
    return Program(graph, plan(graph, request), recorder.spec, recorder.fixed, outputs, list(call.buffers),
                   len(call.wanted), recorder.differentiable)  # fmt: skip


def _tangents(call: _Call) -> Tensors:
    """Stand-ins for the gradients of the outputs: their shapes come from a recording of the forward."""
    probe = _Recorder(call, False)
    quiet = [*call.parameters.values(), *call.buffers.values(), *call.inputs]

    def forward(*tensors: torch.Tensor) -> Tensors:
        wanted, probe.gradients = probe.gradients, lambda *_: []  # type: ignore[method-assign]
        try:
            return probe(*tensors)
        finally:
            probe.gradients = wanted  # type: ignore[method-assign]

    graph = capture(Recording(forward, quiet, [f"p{k}" for k in range(len(quiet))]))
    shapes = [v for v, yes in zip(graph.outputs, probe.differentiable, strict=False) if yes and v is not None]
    return [torch.empty(1, dtype=v.dtype, device=quiet[0].device).expand(v.shape) for v in shapes]


def _request(graph: Graph, call: _Call, options: Options, first_grad: int) -> Request:
    start = len(call.parameters) + len(call.buffers)
    images = [v for v in graph.inputs[start : start + len(call.inputs)]]
    roots = tuple((v, (0, *range(2, len(v.shape)))) for v in images if len(v.shape) >= 3 and v.dtype.is_floating_point)
    forced: list[tuple[Value, int, int]] | None = None
    if options.tile is not None:
        if not roots:
            raise ValueError("tile= needs an image input with a batch, a channel and spatial axes")
        image = roots[0][0]
        rank = len(image.shape) - 2
        extents = (options.tile,) * rank if isinstance(options.tile, int) else tuple(options.tile)
        if len(extents) != rank:
            raise ValueError(f"tile={options.tile} has {len(extents)} extents; the input has {rank} spatial axes")
        forced = [(image, 0, 1), *((image, a + 2, n) for a, n in enumerate(extents))]
    device = call.inputs[0].device if call.inputs else torch.device("cpu")
    budget = options.budget if options.budget is not None else free_bytes(device)
    free = frozenset(v for v in graph.outputs[first_grad:] if v is not None)
    return Request(budget, options.workers, roots, None if forced is None else tuple(forced), free)


def _run(owner: Tiled, program: Program, call: _Call) -> Tensors:
    wanted = call.wanted
    made = _Function.apply(owner, program, call, *wanted) if wanted else _forward(owner, program, call)[0]
    return list(made)


def _forward(owner: Tiled, program: Program, call: _Call) -> tuple[Tensors, Run, Arena]:
    graph, plan_ = program.graph, program.plan
    tensors = [*call.parameters.values(), *call.buffers.values(), *call.inputs]
    device = call.inputs[0].device if call.inputs else torch.device("cpu")
    arena = owner._arenas.take(plan_.bytes.arena, device)
    run = Run(plan_, arena, device)
    run.feed(graph.inputs[: len(tensors)], tensors)
    run.advance(plan_.early if graph.late else len(plan_.steps))
    outputs = [run.result(v) for v in graph.outputs[: program.outputs]]
    with torch.no_grad():
        new = graph.outputs[program.outputs : program.outputs + len(program.buffers)]
        for name, value in zip(program.buffers, new, strict=True):
            if value is not None and value not in graph.inputs:
                call.buffers[name].copy_(run.values[value])
    if not graph.late:
        owner._arenas.give(arena)
    return [t for t in outputs if t is not None], run, arena


class _Function(torch.autograd.Function):
    """Hands the gradients that a plan made to autograd."""

    @staticmethod
    def forward(ctx: Any, owner: Tiled, program: Program, call: _Call, *wanted: torch.Tensor) -> Any:
        outputs, run, arena = _forward(owner, program, call)
        ctx.owner, ctx.program, ctx.run, ctx.arena = owner, program, run, arena
        ctx.late = bool(program.graph.late)
        if not ctx.late:
            ctx.grads = _gradients(program, run)
            ctx.run = None
        quiet = [t for t, yes in zip(outputs, program.differentiable, strict=True) if not yes]
        ctx.mark_non_differentiable(*quiet)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        program: Program = ctx.program
        if ctx.late:
            if ctx.run is None:
                raise RuntimeError("the backward of a tiled module can run only once; call the module again")
            given = [g for g, yes in zip(upstream, program.differentiable, strict=True) if yes]
            late = [v for v in program.graph.inputs if v in program.graph.late]
            ctx.run.feed(late, given)
            ctx.run.advance(len(program.plan.steps))
            grads = _gradients(program, ctx.run)
            ctx.owner._arenas.give(ctx.arena)
            ctx.run = ctx.arena = None
        else:
            scale = upstream[0]
            grads = ctx.grads if bool(scale == 1) else [None if g is None else g * scale.to(g.dtype) for g in ctx.grads]
        return None, None, None, *grads


def _gradients(program: Program, run: Run) -> list[torch.Tensor | None]:
    start = len(program.graph.outputs) - program.wanted
    return [run.result(v) for v in program.graph.outputs[start:]]


def tile(
    module: nn.Module,
    *,
    loss: Callable[..., Any] | None = None,
    budget: int | str | None = None,
    tile: int | Sequence[int] | None = None,
    workers: int | None = None,
) -> Tiled:
    """Run a module, or its training step, tile by tile within a memory budget.

    ``tile(module)`` has the module's call, output and gradients. ``tile(module, loss=criterion)``
    is a step: ``step(input, target)`` equals ``criterion(module(input), target)``.

    Parameters
    ----------
    module: any convolutional network, shared with the caller, not copied.
    loss: a function or Module of (output, target) that returns a scalar, or (scalar, extras); the
        extras come back detached.
    budget: bytes, or text such as "8 GB" or "7.5 GiB": all that the step keeps and uses beyond
        inputs, parameters and gradients. None: what is free under the container's limit.
    tile: forces the tile, in pixels of the input: one extent per spatial axis or one for all.
    workers: threads over tiles on the CPU; None: one per core.

    Raises
    ------
    BudgetError: (at the first call) no plan fits the budget; the message names the smallest.
    CaptureError: the step depends on data or randomness that a recording would freeze.
    UnsupportedOpError: an op must run whole and does not fit.

    Example
    -------
    >>> import torch, fullframe
    >>> net = torch.nn.Conv2d(1, 2, 3, padding=1)
    >>> step = fullframe.tile(net, loss=torch.nn.functional.cross_entropy, budget="1 GB")
    >>> loss = step(torch.zeros(1, 1, 32, 32), torch.zeros(1, 32, 32, dtype=torch.long))
    >>> loss.backward()
    >>> net.weight.grad.shape
    torch.Size([2, 1, 3, 3])
    """
    nbytes = None if budget is None else parse_bytes(budget)
    extents = tile if tile is None or isinstance(tile, int) else tuple(tile)
    if extents is not None and any(n < 1 for n in ([extents] if isinstance(extents, int) else extents)):
        raise ValueError(f"tile={tile} must be positive, in pixels of the input")
    count = workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Tiled(module, loss, Options(nbytes, extents, count))
