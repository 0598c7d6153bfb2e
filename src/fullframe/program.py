"""From a call to a program: the step recorded once, and planned."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import RLock
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from fullframe.budget import free_bytes
from fullframe.call import Call, Tensors
from fullframe.cumulative import recordable
from fullframe.fingerprint import Survey, state_of
from fullframe.graph import CaptureError, Graph, Value, followers
from fullframe.lowering import fusable
from fullframe.plan import Plan
from fullframe.planner import Request, plan
from fullframe.tracer import FROZEN, Recording, capture
from fullframe.watch import Watch

TENSOR = object()  # stands for a tensor among the leaves of a program's outputs
PLAIN = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Options:
    """Budget in bytes (None: what is free when first planned), forced tile, worker threads."""

    budget: int | None
    tile: int | tuple[int, ...] | None
    workers: int


@dataclass(frozen=True)
class Program:
    """A captured and planned call.

    The graph's outputs are ``outputs`` tensors to hand out, then the new contents of each of `Call.tensors`, then
    the gradients of those at ``wanted``. ``spec`` rebuilds the call's own output from ``fixed``, where `TENSOR`
    stands for the next tensor. ``lasting`` is False where the forward changes what it reads (a counter) or reads
    what nobody can look at (an iterator), so that the next call must be recorded anew.
    """

    graph: Graph
    plan: Plan
    spec: Any
    fixed: tuple[Any, ...]
    outputs: int
    wanted: tuple[int, ...]
    differentiable: tuple[bool, ...]
    lasting: bool

    @property
    def reached(self) -> list[int]:
        """Those of ``wanted`` that have a gradient; the others take no part in autograd, nor do their hooks."""
        grads = self.graph.outputs[len(self.graph.outputs) - len(self.wanted) :]
        return [k for k, v in zip(self.wanted, grads, strict=True) if v is not None]

    @cached_property
    def changed(self) -> dict[int, Value]:
        """Of each tensor that the step changes in place, by its number, the new contents."""
        return changes(self.graph, self.outputs, len(self.graph.outputs) - len(self.wanted))

    @cached_property
    def read_late(self) -> frozenset[Value]:
        """What the steps read that run once the gradients of the outputs are there."""
        late = self.plan.steps[self.plan.early :] if self.graph.late else ()
        return frozenset(v for step in late for op in step.section.ops for v in op.inputs)

    @cached_property
    def narrow(self) -> bool:
        """Whether anything is computed in float16, whose gradients may need a loss scale."""
        return any(op.output.dtype == torch.float16 for op in self.graph.ops)

    def assemble(self, outputs: Sequence[torch.Tensor]) -> Any:
        """The call's own output from its tensors."""
        found = iter(outputs)
        return pytree.tree_unflatten([next(found) if x is TENSOR else x for x in self.fixed], self.spec)


def changes(graph: Graph, start: int, end: int) -> dict[int, Value]:
    """New contents, by the number of the input, where the output for it is not that input itself."""
    new = enumerate(graph.outputs[start:end])
    return {k: v for k, v in new if v is not None and v is not graph.inputs[k]}


class _Recorder:
    """The function that is recorded: forward, and backward where gradients are wanted."""

    def __init__(self, call: Call, watch: Watch):
        self.call, self.watch = call, watch
        self.criterion = call.pair.criterion is not None
        self.spec: Any = None
        self.fixed: list[Any] = []
        self.differentiable: list[bool] = []
        self.wanted: tuple[int, ...] = ()
        self.stand_ins: dict[int, torch.Tensor] = {}

    def __call__(self, *tensors: torch.Tensor) -> tuple[list[Any], Tensors]:
        """What is handed out, kept and differentiated; and stand-ins for gradients that come later."""
        call = self.call
        # As in PyTorch, backward runs outside autocast, in the dtypes the forward chose.
        with torch.set_grad_enabled(call.grad):
            pairs = zip(tensors, call.tensors, strict=True)
            made = [t.detach().requires_grad_(True) if old.requires_grad else t.clone() for t, old in pairs]
            for t, old in zip(made, call.tensors, strict=True):
                for key, value in old.__dict__.items():  # attributes that users gave it
                    vars(t).setdefault(key, value)
            self.stand_ins = {id(old): t for t, old in zip(made, call.tensors, strict=True)}
            state = {k: self.stand_ins[id(t)] for k, t in (*call.parameters.items(), *call.buffers.items())}
            arguments = call.rebuild(made[len(made) - len(call.inputs) :])

            def rest(returned: Any) -> Any:
                outputs = self._take(returned)
                self.wanted = tuple(self._wanted()) if call.grad else ()
                return outputs, *self._gradients(outputs, [made[k] for k in self.wanted])

            with self.watch.replacing(self.stand_ins):  # in the backward too, which may run modules again
                outputs, grads, seeds = torch.func.functional_call(
                    call.pair, state, (*arguments, rest), tie_weights=True, strict=True
                )
        kept = list(made)
        first = len(call.parameters)
        kept[first : first + len(call.buffers)] = [state[k] for k in call.buffers]  # they may be assigned anew
        for name, new, old in zip(call.names, kept, call.tensors, strict=True):
            if new.shape != old.shape or new.dtype != old.dtype:
                raise CaptureError(
                    f"{name} changes from {tuple(old.shape)} {old.dtype} to {tuple(new.shape)} {new.dtype} in the "
                    "step; register it with its final shape and dtype"
                )
        return [*(t.detach() for t in outputs), *(t.detach() for t in kept), *grads], seeds

    def _wanted(self) -> Iterator[int]:
        """Which tensors want a gradient; of those met in attributes only what was used."""
        others = {id(t) for t in self.call.others}
        for k, t in enumerate(self.call.tensors):
            if t.requires_grad and (id(t) not in others or id(t) in self.watch.used):
                yield k

    def _take(self, returned: Any) -> Tensors:
        leaves, self.spec = pytree.tree_flatten(returned)
        for leaf in leaves:
            if not isinstance(leaf, (torch.Tensor, *PLAIN)):
                raise CaptureError(
                    f"the step returns a {type(leaf).__name__}, which may hide tensors; "
                    "return tensors in tuples, lists or dicts"
                )
        self.fixed = [TENSOR if isinstance(x, torch.Tensor) else x for x in leaves]
        outputs = [x for x in leaves if isinstance(x, torch.Tensor)]
        self.differentiable = [t.requires_grad for t in outputs]
        if self.criterion:
            if not outputs or outputs[0].dim() != 0 or self.fixed[0] is not TENSOR:
                shape = tuple(outputs[0].shape) if outputs else None
                raise ValueError(
                    f"the criterion must return a scalar loss, or (loss, extras); got shape {shape}. "
                    "Use reduction='mean' or 'sum'"
                )
            self.differentiable = [outputs[0].requires_grad] + [False] * (len(outputs) - 1)
        return outputs

    def _gradients(self, outputs: Tensors, wanted: Tensors) -> tuple[list[Any], Tensors]:
        chosen = [t for t, yes in zip(outputs, self.differentiable, strict=True) if yes]
        if not wanted or not chosen:
            return [None] * len(wanted), []
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(kind, enabled=False))
            late = [] if self.criterion else [torch.empty_like(t) for t in chosen]
            seeds = late or [torch.ones_like(chosen[0])]
            self.watch.follow_backward()
            return list(torch.autograd.grad(chosen, wanted, seeds, allow_unused=True)), late


@contextmanager
def _undisturbed(recorder: _Recorder, survey: Survey) -> Iterator[None]:
    """Put back what the recording left in attributes; refuse where that loses something.

    An attribute updated in place (``self.count += 1`` on a tensor) gets its own tensor back: the
    new number is an output of the recording. Any other recorded tensor that stays behind would
    never be brought up to date by the recorded step.
    """
    derived = _derived_weights(survey)
    spaces = {id(s): s for s in _spaces(survey)}
    before = {(name, key): value for name, space in spaces.items() for key, value in _items(space)}
    owners = {id(vars(h)): recorder.watch.names.get(id(h)) or type(h).__name__ for h in survey.holders if _fields(h)}
    owners |= {id(v): owners[id(s)] for s in map(_fields, survey.holders) for v in s.values() if id(s) in owners}
    lost = ""
    try:
        yield
    finally:
        originals = {id(t): old for t, old in zip(recorder.stand_ins.values(), recorder.call.tensors, strict=False)}
        for space in spaces.values():
            for key, value in list(_items(space)):
                old = before.get((id(space), key))
                left = _left(value, old)
                if not left:
                    continue
                updated = all(id(t) in originals for t in left)  # a container made anew, of the same weights
                if value is left[0]:
                    updated = updated and originals[id(value)] is old
                if not updated and (id(space), key) not in derived:
                    lost = lost or f"{str(key)!r} of {owners.get(id(space), 'an object it can reach')}"
                if old is None and isinstance(space, dict) and (id(space), key) not in before:
                    del space[key]
                else:
                    space[key] = old
    if lost:
        raise CaptureError(
            f"the forward stores a tensor under {lost}, which a recorded step would not bring up to date; "
            "return it as an output, or register it as a buffer of fixed shape and copy into it"
        )


def _left(value: Any, old: Any) -> list[torch.Tensor]:
    """The tensors of the recording that an attribute holds: itself, or those in a container that is new."""
    inside = [v for _, v in _items(value)] if isinstance(value, (dict, list)) and value is not old else []
    inside = [v() if isinstance(v, weakref.ref) else v for v in inside]
    return [t for t in (value, *inside) if isinstance(t, (FunctionalTensor, FakeTensor))]


def _fields(holder: Any) -> dict[str, Any]:
    try:
        return object.__getattribute__(holder, "__dict__")
    except AttributeError:
        return {}


def _derived_weights(survey: Survey) -> set[tuple[int, str]]:
    """Weights that the hooks of the older weight and spectral norm make anew before every forward."""
    found = set()
    for holder in survey.holders:
        for hook in (_fields(holder).get("_forward_pre_hooks") or {}).values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                found.add((id(holder.__dict__), hook.name))
    return found


def _spaces(survey: Survey) -> list[Any]:
    """Dictionaries and lists where a forward may leave tensors."""
    spaces: list[Any] = [*survey.containers]
    for holder in survey.holders:
        space = getattr(holder, "__dict__", None)
        if space is not None:
            spaces.append(space)
            spaces += [v for v in space.values() if isinstance(v, (dict, list))]
    return spaces


def _items(space: Any) -> Iterator[tuple[Any, Any]]:
    yield from space.items() if isinstance(space, dict) else enumerate(space)


def compile_call(call: Call, options: Options) -> Program:
    """Record and plan a call; raises `CaptureError`, `BudgetError` or `UnsupportedOpError`."""
    with _ONE_AT_A_TIME:
        return _compile(call, options)


_ONE_AT_A_TIME = RLock()  # a recording patches torch for the whole process


def _compile(call: Call, options: Options) -> Program:
    watch = Watch(call.pair)
    recorder = _Recorder(call, watch)
    before = Survey([call.pair]).key
    numbers = [state_of(g) for g in call.survey.generators]
    # Recorded draws advance torch's generators, and plans would then change what is drawn afterwards.
    unmoved = torch.random.fork_rng([call.device] if call.device.type == "cuda" else [])
    with (
        torch.inference_mode(False), unmoved, _undisturbed(recorder, call.survey), recordable(call.pair),
        _forgetful(call.survey.caches),
    ):  # fmt: skip
        graph = capture(Recording(recorder, call.tensors, call.names, watch))
    if [state_of(g) for g in call.survey.generators] != numbers:
        raise CaptureError(f"the module or the loss drew from a generator of its own; {FROZEN}")
    after = Survey([call.pair])
    if any(isinstance(t, (FunctionalTensor, FakeTensor)) for t in after.tensors):
        raise CaptureError("the forward stores a tensor in an object that it can reach; return it as an output")
    outputs = len(recorder.differentiable)
    first_grad = outputs + len(call.tensors)
    changed = changes(graph, outputs, first_grad)
    _refuse_shared(changed, call, watch.used)
    late = followers(graph.ops, graph.late)
    for k, value in changed.items():
        if value in late:
            raise CaptureError(
                f"the backward changes {call.names[k]}, which a tiled module hands on before it; use "
                "fullframe.tile(net, loss=criterion), or change it outside"
            )
    if graph.late:
        graph.early = first_grad
    request = _request(graph, call, options, first_grad)
    return Program(
        graph, plan(graph, request), recorder.spec, tuple(recorder.fixed), outputs,
        recorder.wanted, tuple(recorder.differentiable), after.key == before and call.survey.lasting,
    )  # fmt: skip


@contextmanager
def _forgetful(caches: Sequence[Any]) -> Iterator[None]:
    """Caches of functions must not hand numbers into a recording, nor tensors of the recording out of it."""
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


def _refuse_shared(changed: Iterable[int], call: Call, used: set[int]) -> None:
    """Refuse changes in place of memory that two of the call's tensors share, if both are used."""
    unused = {id(t) for t in call.others} - used
    for k in changed:
        for j, other in enumerate(call.tensors):
            if j != k and id(other) not in unused and _overlap(call.tensors[k], other):
                raise CaptureError(
                    f"the step changes {call.names[k]} in place, and {call.names[j]} shares its memory; a recorded "
                    "step keeps them apart. Give one of them memory of its own (clone)"
                )


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors may have an element in common: the ranges they span in one memory."""
    if {a.layout, b.layout} != {torch.strided} or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    spans = []
    for t in (a, b):
        start = t.storage_offset() * t.itemsize
        reach = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) + 1
        spans.append((start, start + reach * t.itemsize))
    return min(end for _, end in spans) > max(start for start, _ in spans)


def _request(graph: Graph, call: Call, options: Options, first_grad: int) -> Request:
    end = len(call.tensors)
    images = [
        (v, axes) for v, axes in zip(graph.inputs[end - len(call.inputs) : end], call.spatial, strict=True) if axes
    ]
    roots = tuple((v, (0, *axes)) for v, axes in images)
    forced: list[tuple[Value, int, int]] | None = None
    if options.tile is not None:
        if not roots:
            raise ValueError("tile= needs an image input with a batch, a channel and spatial axes")
        image, axes = images[0]
        extents = (options.tile,) * len(axes) if isinstance(options.tile, int) else tuple(options.tile)
        if len(extents) != len(axes):
            raise ValueError(
                f"tile={options.tile} has {len(extents)} extents; the input has {len(axes)} spatial axes"
            )
        forced = [(image, 0, 1), *((image, a, n) for a, n in zip(axes, extents, strict=True))]
    budget = options.budget if options.budget is not None else free_bytes(call.device)
    free = frozenset(v for v in graph.outputs[first_grad:] if v is not None)
    return Request(budget, options.workers, roots, fusable, None if forced is None else tuple(forced), free)
