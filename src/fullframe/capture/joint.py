"""The function that is recorded: the forward, and the backward where gradients are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from fullframe import torch_compat
from fullframe.capture.conditions import Conditions
from fullframe.capture.constants import BufferSource
from fullframe.capture.function_mode import CaptureMode
from fullframe.capture.subclasses import OutputClasses, special
from fullframe.device import DEVICES
from fullframe.errors import CaptureError
from fullframe.frontend.aliasing import refuse_changes
from fullframe.frontend.guards import SIDE_EFFECTS
from fullframe.frontend.inputs import Call, Tensors
from fullframe.frontend.opaque_leaves import OpaqueLeaf
from fullframe.frontend.outputs import Tree, flatten
from fullframe.frontend.reads import ReadLog
from fullframe.frontend.side_effects import SideEffectTracker
from fullframe.ir.graph import GraphSignature
from fullframe.storage.arena import packed
from fullframe.torch_compat import pytree

Strides = tuple[int, ...] | None


# What autograd says of a graph that has been changed in place, or run and freed, before its backward.
SPENT = ("inplace operation", "backward through the graph a second time")


class JointFunction:
    """The function that is recorded: forward, and backward where gradients are wanted."""

    def __init__(
        self,
        call: Call,
        capture_mode: CaptureMode,
        read_log: ReadLog,
        opaque: Mapping[int, OpaqueLeaf] | None,
        conditions: Conditions,
    ):
        self.call, self.capture_mode, self.read_log, self.opaque = call, capture_mode, read_log, opaque
        self.conditions = conditions
        fixed = len(call.parameters) + len(call.buffers)
        self.side_effects = SideEffectTracker(call.snapshot, capture_mode.names, call.tensors, fixed)
        self.criterion = call.pair.criterion is not None
        self.signature = GraphSignature()  # once it has been called
        self.at_once = False  # whether there is one gradient to begin with, which is one
        self.returned = Tree(None, ())
        self.strides: tuple[Strides, ...] = ()  # of the outputs, and of the gradients
        self.output_classes = OutputClasses()
        self.differentiable: list[bool] = []
        self.wanted: tuple[int, ...] = ()
        self.detached: list[bool] = []
        self.devices: tuple[torch.device, ...] = ()
        self.lost: dict[int, str] = {}
        self.sources: Tensors = []  # of which gradients are asked
        self.alive: dict[int, int] = {}
        self.roots: dict[int, torch.Tensor] = {}  # of tensors that a former step left without the graph they had

    def __call__(self, *tensors: torch.Tensor) -> tuple[list[Any], Tensors]:
        """What is handed out, kept and differentiated; and placeholders for gradients that come later."""
        call = self.call
        # As in PyTorch, backward runs outside autocast, in the dtypes the forward chose.
        with torch.set_grad_enabled(call.grad):
            made = self._placeholders(tensors)
            placeholders = {id(old): t for t, old in zip(made, call.tensors, strict=True)}
            state = {k: placeholders[id(t)] for k, t in (*call.parameters.items(), *call.buffers.items())}
            arguments = call.rebuild(made[len(made) - len(call.inputs) :], self.opaque)
            given = pytree.tree_flatten(arguments)
            for t, old in zip(made, call.tensors, strict=True):
                if isinstance(old, nn.Parameter):
                    vars(t)["_is_param"] = True  # as isinstance asks
            first = len(call.parameters)
            for k, old in enumerate(call.tensors[first:], first):
                if special(old):
                    self.capture_mode.shadows.give(k, made[k], old)
            marks = [dict(vars(t)) for t in made]
            histories = [t.grad_fn for t in made]
            registered = dict(call.pair.named_buffers(remove_duplicate=False))

            def rest(returned: Any) -> Any:
                if any(g is not None for g in take_grads(self.sources)):
                    raise CaptureError(
                        "the forward or the loss calls backward() itself, which adds to .grad before the step's own "
                        "backward; return that loss as well, or use torch.autograd.grad"
                    )
                self.capture_mode.shadows.open = False
                outputs = self._take(returned)
                self._refuse_parted(registered)
                self.wanted = tuple(self._wanted()) if call.grad else ()
                if not self.criterion:
                    outputs = self._leave(made, outputs)
                    outputs = self._revive(made, histories, outputs)
                self.conditions.late = True
                grads, seeds = self._gradients(outputs, [self.sources[k] for k in self.wanted])
                if self.criterion:  # whose backward may leave tensors too
                    outputs = self._leave(made, outputs)
                self.output_classes = self.capture_mode.shadows.output_classes(outputs)
                return outputs, grads, seeds

            # In the backward too, which may run modules again.
            with self.capture_mode.replacing(placeholders, self._sources(made)), self.conditions:
                outputs, grads, seeds = torch.func.functional_call(
                    call.pair, state, (*arguments, rest), tie_weights=True, strict=True
                )
        refuse_changes(call, arguments, given, zip(made, marks, strict=True))
        kept = self._new_contents(made, state)
        results = [t.detach() for t in outputs]
        self.devices = tuple(t.device for t in results)
        self.strides = tuple(_strides(t) for t in (*results, *grads))
        self._like_parameters(len(results))
        flags = self.conditions.flags
        # What a former call left is there until this one's takes its place: twice in the arithmetic.
        repeated = [results[k] for k in sorted(self.side_effects.used)]
        self.signature = GraphSignature(len(results), len(repeated), len(flags), len(kept), len(grads))
        return [*results, *repeated, *flags, *(_detached(t) for t in kept), *grads], seeds

    def _placeholders(self, tensors: Sequence[torch.Tensor]) -> Tensors:
        """What stands for the call's tensors in its forward, with the attributes that users gave these."""
        call = self.call
        pairs = zip(tensors, call.tensors, strict=True)
        self.sources = [_detached(t).requires_grad_(old.requires_grad) for t, old in pairs]
        # What is no leaf may be changed in place, which a leaf may not.
        made = [t if old.is_leaf else t.clone() for t, old in zip(self.sources, call.tensors, strict=True)]
        self._root(made)
        for t, old in zip(made, call.tensors, strict=True):
            for key, value in old.__dict__.items():
                vars(t).setdefault(key, value)
        self.read_log.follow(zip(made, call.tensors, strict=True))
        return made

    def _new_contents(self, made: Tensors, state: Mapping[str, torch.Tensor]) -> Tensors:
        """What each of the call's tensors holds after it; refused where one is gone, or of another shape or dtype."""
        call = self.call
        kept = list(made)
        first = len(call.parameters)
        kept[first : first + len(call.buffers)] = [state[k] for k in call.buffers]  # they may be assigned anew
        for name, new, old in zip(call.names, kept, call.tensors, strict=True):
            if not isinstance(new, torch.Tensor):
                raise CaptureError(
                    f"the step takes {name} away, which a recorded step would not; give it a number that says so, or "
                    "keep it in an attribute that is no buffer"
                )
            if new.shape != old.shape or new.dtype != old.dtype:
                raise CaptureError(
                    f"{name} changes from {tuple(old.shape)} {old.dtype} to {tuple(new.shape)} {new.dtype} in the "
                    "step; register it with its final shape and dtype"
                )
        return kept

    def _sources(self, made: Tensors) -> Iterator[BufferSource]:
        """Buffers and tensors in attributes, whose numbers a recording may read as they are now."""
        names, tensors = self.call.names, self.call.tensors
        for k in range(len(self.call.parameters), len(made) - len(self.call.inputs)):
            if k not in self.roots and not tensors[k].requires_grad and tensors[k].layout is torch.strided:
                yield BufferSource(k, names[k], tensors[k], made[k])

    def _like_parameters(self, start: int) -> None:
        """The gradient of a parameter lies as it does, which autograd and DistributedDataParallel ask for."""
        own = [*self.strides]
        for k, wanted in enumerate(self.wanted, start):
            if wanted < len(self.call.parameters) and own[k] is not None:
                own[k] = _strides(self.call.tensors[wanted]) or own[k]
        self.strides = tuple(own)

    def _root(self, made: Tensors) -> None:
        """Give what a former step left without its graph something to stand for that graph."""
        others = {id(t) for t in self.call.others}
        for k, old in enumerate(self.call.tensors):
            if self.call.grad and id(old) in others and SIDE_EFFECTS.get(old, False):
                self.roots[k] = made[k].detach().requires_grad_(True)
                self.sources[k] = self.roots[k].clone()
                made[k] = self.sources[k].clone()

    def _leave(self, made: Tensors, outputs: Tensors) -> Tensors:
        """The outputs, and with them what stays behind in attributes and the like."""
        effects = self.side_effects.collect(made, outputs)
        self.differentiable += [t.requires_grad and not self.criterion for t in effects]
        outputs = [*outputs, *effects]
        self.detached = [t.requires_grad and not yes for t, yes in zip(outputs, self.differentiable, strict=True)]
        return outputs

    def _refuse_parted(self, before: dict[str, torch.Tensor]) -> None:
        """Refuse a buffer of two names that is two after the forward."""
        names: dict[int, list[str]] = {}
        for name, t in before.items():
            names.setdefault(id(t), []).append(name)
        now = dict(self.call.pair.named_buffers(remove_duplicate=False))
        for same in names.values():
            if len({id(now.get(name)) for name in same}) > 1:
                parted = " and ".join(name.removeprefix("module.") for name in same)
                raise CaptureError(
                    f"the forward assigns one of {parted} anew, which are the same buffer; change it in place, or "
                    "register two"
                )

    def _revive(self, made: Tensors, histories: Sequence[Any], outputs: Tensors) -> Tensors:
        """The outputs, and with them the new contents of the call's tensors that have a gradient from now on."""
        call, first = self.call, len(self.call.parameters)
        now: list[torch.Tensor | None] = list(made)
        registered = dict(call.pair.named_buffers(remove_duplicate=False))
        now[first : first + len(call.buffers)] = [registered.get(k) for k in call.buffers]
        for k, (t, history) in enumerate(zip(now, histories, strict=True)):
            if isinstance(t, torch.Tensor) and t.grad_fn is not None and t.grad_fn is not history:
                if call.tensors[k].requires_grad and call.tensors[k].is_leaf:
                    raise CaptureError(
                        f"the forward gives {call.names[k]}, of which a gradient is asked, a new value that has a "
                        "graph; keep the new value in another attribute, or detach it"
                    )
                self.alive[k] = len(outputs)
                outputs = [*outputs, t]
        self.differentiable += [True] * len(self.alive)
        self.detached += [False] * len(self.alive)
        return outputs

    def _wanted(self) -> Iterator[int]:
        """Which tensors want a gradient; of those met in attributes only what was used."""
        others = {id(t) for t in self.call.others}
        for k, t in enumerate(self.call.tensors):
            if (id(t) not in others or id(t) in self.capture_mode.used) and t.requires_grad:
                yield k

    def _take(self, returned: Any) -> Tensors:
        self.returned, outputs = flatten(returned, self.call.snapshot, self.call.leaves)
        self.differentiable = [t.requires_grad for t in outputs]
        if self.criterion and not outputs:
            raise ValueError(
                "the criterion must return a loss, or several in tuples, lists or dicts, as tensors; got "
                f"{type(returned).__name__}"
            )
        chosen = [t for t in outputs if t.requires_grad]
        self.at_once = self.criterion and len(chosen) == 1 and chosen[0].dim() == 0
        return outputs

    def _gradients(self, outputs: Tensors, wanted: Tensors) -> tuple[list[Any], Tensors]:
        if not (wanted or self.roots) or not any(self.differentiable):
            return [None] * len(wanted), []
        leaves = [*wanted, *self.roots.values()]
        with ExitStack() as stack:
            for kind in DEVICES:
                stack.enter_context(torch.autocast(kind, enabled=False))
            self.capture_mode.follow_backward()
            failed = self.capture_mode.failed
            try:
                grads, seeds = self._backward(outputs, leaves)
            except (RuntimeError, CaptureError) as error:
                # Of a step's outputs, only the loss must have a gradient: it may be the only one that is asked for.
                if self.at_once or not (self.criterion or any(words in str(error) for words in SPENT)):
                    raise
                self.capture_mode.failed = failed
                self._leave_out(outputs, leaves)
                grads, seeds = self._backward(outputs, leaves)
        return self._with_nested(grads[: len(wanted)]), [] if self.at_once else seeds

    def _with_nested(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The gradients, and what a backward inside of the backward has added up at the call's tensors.

        It may have reached such as the forward had not met, which are wanted from now on.
        """
        nested = take_grads(self.sources)
        more = [k for k, g in enumerate(nested) if g is not None and k not in self.wanted]
        found = [*zip(self.wanted, grads, strict=True), *((k, None) for k in more)]
        self.wanted = (*self.wanted, *more)
        return [g if nested[k] is None else nested[k] if g is None else g + nested[k] for k, g in found]

    def _backward(self, outputs: Tensors, leaves: Tensors) -> tuple[Sequence[torch.Tensor | None], Tensors]:
        """The gradients of the leaves, and those of the outputs that they were made from."""
        chosen = [t for t, yes in zip(outputs, self.differentiable, strict=True) if yes]
        if not chosen:
            return [None] * len(leaves), []
        seeds = [torch.ones_like(t) if self.at_once else torch.empty_like(t) for t in chosen]
        again = not self.at_once  # when it fails for one of several outputs
        take_grads(self.sources)  # of an attempt that failed
        grads = torch.autograd.grad(chosen, leaves, seeds, allow_unused=True, retain_graph=again)
        nested = take_grads(self.roots.values())
        for k, *found in zip(self.roots, grads[len(leaves) - len(self.roots) :], nested, strict=True):
            if any(g is not None for g in found):
                name = self.side_effects.name_of(self.call.tensors[k])
                raise CaptureError(
                    f"the step reads what its last call left under {name}, and its gradient would flow on into that "
                    "call, whose graph is gone; leave it detached (.detach())"
                )
        return grads, seeds

    def _leave_out(self, outputs: Tensors, leaves: Tensors) -> None:
        """Outputs whose own backward fails, and why: as in PyTorch, that is an error only when it is asked for."""
        had = self.differentiable
        first = True
        for k, yes in enumerate(had):
            if yes:
                self.differentiable = [j == k for j in range(len(had))]
                try:
                    self._backward(outputs, leaves)
                except (RuntimeError, CaptureError) as error:
                    if self.criterion and first:
                        raise
                    self.lost[k], self.capture_mode.failed = str(error), None
                first = False
        self.differentiable = [yes and k not in self.lost for k, yes in enumerate(had)]


def take_grads(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor | None]:
    """What lies at tensors as ``.grad``, which is then gone."""
    with torch_compat.no_torch_function():  # the recording's own mode refuses this to the step's code
        found = [(t, t.grad if t.is_leaf else None) for t in tensors]
        for tensor, grad in found:
            if grad is not None:
                tensor.grad = None
    return [grad for _, grad in found]


def _strides(tensor: torch.Tensor | None) -> Strides:
    """Those of a tensor whose elements fill one run of memory."""
    if tensor is None or tensor.layout is not torch.strided or not packed(tensor.shape, tensor.stride()):
        return None
    return tuple(tensor.stride())


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """Without its graph; a sparse one, which no step computes with, as it is: torch 2.14 records no views of it."""
    return tensor.detach() if tensor.layout is torch.strided else tensor
