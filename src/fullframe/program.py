"""From a call to a program: the step recorded once, and planned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from threading import active_count
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fullframe.ambient import trimmed, unhooked, unlogged
from fullframe.asked import asked_of, backward_of, sources
from fullframe.budget import free_bytes
from fullframe.caches import unspoilt
from fullframe.call import Call, Tensors
from fullframe.changes import ROOTS, difference, words
from fullframe.cumulative import recordable
from fullframe.drawing import FROZEN, Drawn, by_calls, by_state
from fullframe.fingerprint import LEFT, Survey, state_of
from fullframe.graph import CaptureError, FullframeError, Graph, Value, followers
from fullframe.handed import Handed
from fullframe.known import Source
from fullframe.left import Leaving, recorded
from fullframe.lowering import fusable
from fullframe.narrow import Terms, narrowed, reorder
from fullframe.patched import RECORDING
from fullframe.places import Left, Place
from fullframe.plan import Plan
from fullframe.planner import FIXED, Request, plan
from fullframe.questions import Asked, Questions, recorded_as, settle
from fullframe.reads import EVERYTHING, Notes, Reads
from fullframe.returned import Tree, put_together, take_apart
from fullframe.store import packed
from fullframe.subclasses import Dressing, refuse_dispatching, special
from fullframe.tracer import Recording, capture
from fullframe.watch import Watch

Strides = tuple[int, ...] | None
WINDOWS = 32  # so many of the largest windows fit in the budget of a device
AHEAD = 8  # steps that may be in flight: two or three sections of each of two branches, and small ones between


@dataclass(frozen=True)
class Options:
    """Budget in bytes (None: what is free when first planned), forced tile, worker threads."""

    budget: int | None
    tile: int | tuple[int, ...] | None
    workers: int


@dataclass(eq=False)
class Asks:
    """Of which outputs a backward may ask the gradient: what that needs, and what has been planned for it.

    ``graph`` is given the gradient of each, ``late`` by the output's number. A step's first scalar is taken for its
    loss until a backward asks for others, too: ``guess`` is what the next forward is planned for.
    """

    graph: Graph
    late: dict[int, Value]
    request: Request
    device: torch.device
    guess: frozenset[int]
    programs: dict[tuple[frozenset[int], bool], Program] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Program:
    """A captured and planned call.

    The graph's outputs are ``outputs`` tensors to hand out (those of the call's own output, then those left behind),
    then up to ``start`` those left behind again, then the new contents of each of `Call.tensors`, then the gradients
    of those at ``wanted``. ``returned`` says how to make the call's own output of its tensors, ``places`` where the
    forward leaves tensors, and ``cut`` which of those handed out have lost a graph.
    ``lasting`` is False where the forward changes what it reads (a counter) or reads what nobody can look at (an
    iterator), so that the next call must be recorded anew. ``reads`` is what belongs to its key, and the terms of all
    numbers and places here. ``devices`` are where the outputs belong, ``unused`` the numbers of tensors that were met
    and not read. ``lost`` are outputs that no gradient can be asked of, and why. ``alive`` are tensors of the call,
    by number, that have a graph when it ends, and the outputs that bring it.
    ``asked`` are the outputs whose gradients the graph is given, in the order of ``late``, or the one whose gradient
    it takes to be one. ``asks`` are the others of which they may be asked; None where there is only that one.
    ``moved`` is a place, in words, that the forward itself changes. ``dressing`` says of which classes the outputs
    are. ``strides`` are those of the outputs, and then of the gradients, in plain PyTorch. ``conditions`` are what
    the recording has assumed to hold or not, whose truth is the last of the outputs up to ``start``.
    """

    graph: Graph
    plan: Plan
    returned: Tree
    outputs: int
    start: int
    wanted: tuple[int, ...]
    differentiable: tuple[bool, ...]
    lasting: bool
    places: tuple[Place, ...] = ()
    cut: tuple[bool, ...] = ()
    reads: Reads = EVERYTHING
    devices: tuple[torch.device, ...] = ()
    unused: frozenset[int] = frozenset()
    lost: dict[int, str] = field(default_factory=dict)
    alive: dict[int, int] = field(default_factory=dict)
    asked: tuple[int, ...] = ()
    asks: Asks | None = None
    moved: str = ""
    dressing: Dressing = field(default_factory=Dressing)
    strides: tuple[Strides, ...] = ()
    conditions: tuple[Asked, ...] = ()

    def expected(self) -> Program:
        """As it is planned for the outputs whose gradients were asked for lately."""
        return self if self.asks is None else self._version(self.asks.guess, False)

    def once_more(self, used: frozenset[int]) -> Program:
        """What makes only the gradients, from those of these outputs."""
        return self._version(used, True)

    def _version(self, used: frozenset[int], alone: bool) -> Program:
        asks = self.asks
        assert asks is not None
        if used == frozenset(self.asked) and not alone:
            return self
        if (used, alone) not in asks.programs:
            graph = asked_of(asks.graph, {asks.late[k] for k in used}, asks.device)
            graph = backward_of(graph) if alone else graph
            planned = plan(graph, _freed(asks.request, graph, len(self.wanted)))
            found = replace(self, graph=graph, plan=planned, asked=tuple(sorted(used)), asks=None)
            asks.programs[used, alone] = found
        return asks.programs[used, alone]

    @property
    def answers(self) -> tuple[bool, ...]:
        """The answers that were assumed."""
        return tuple(a.answer for a in self.conditions if a.answer is not None)

    def settle(self, values: Mapping[Value, torch.Tensor]) -> bool:
        """Look at what the recording has assumed (`questions.settle`)."""
        flags = self.graph.outputs[self.start - len(self.conditions) : self.start]
        return settle(self.conditions, [None if v is None else values.get(v) for v in flags])

    @property
    def gradients(self) -> list[Value | None]:
        """Of each of ``wanted``, whichever output it is asked of."""
        graph = self.graph if self.asks is None else self.asks.graph
        return graph.outputs[len(graph.outputs) - len(self.wanted) :]

    @property
    def reached(self) -> list[int]:
        """Those of ``wanted`` that have a gradient; the others take no part in autograd, nor do their hooks."""
        return [k for k, v in zip(self.wanted, self.gradients, strict=True) if v is not None]

    @cached_property
    def again(self) -> list[int]:
        """The call's tensors that gradients follow from: what it takes to make them once more."""
        if self.asks is None:
            return []
        graph = self.asks.graph
        found = sources(graph, (v for v in self.gradients if v is not None)) - graph.late - {graph.seed}
        return [k for k, v in enumerate(graph.inputs) if v in found]

    @cached_property
    def changed(self) -> dict[int, Value]:
        """Of each tensor that the step changes in place, by its number, the new contents."""
        return changes(self.graph, self.start, len(self.graph.outputs) - len(self.wanted))

    @cached_property
    def made(self) -> frozenset[Value]:
        """The values that a run is there for: outputs, new contents, gradients."""
        first = len(self.graph.outputs) - len(self.wanted)
        found = (*self.graph.outputs[: self.start], *self.graph.outputs[first:])
        return frozenset((*(v for v in found if v is not None), *self.changed.values()))

    @cached_property
    def read(self) -> frozenset[Value]:
        """The values that a run needs. It is given no others, or it would keep what former calls left behind."""
        return self.made | {v for op in self.graph.ops for v in op.inputs}

    @cached_property
    def read_late(self) -> frozenset[Value]:
        """What is read once the gradients of the outputs are there: by the steps that then run, or handed on."""
        if not self.graph.late:
            return frozenset()
        late = (op for step in self.plan.steps[self.plan.early :] for op in step.section.ops)
        grads = self.graph.outputs[len(self.graph.outputs) - len(self.wanted) :]
        return frozenset((*(v for op in late for v in op.inputs), *(v for v in grads if v is not None)))

    @cached_property
    def ruled(self) -> bool:
        """Whether every op is the engine's own or has a rule."""
        return all(op.rule.kind != "whole" or op.target.startswith("tile.") for op in self.graph.ops)

    @cached_property
    def narrow(self) -> bool:
        """Whether anything is computed in float16, whose gradients may need a loss scale."""
        return any(op.output.dtype == torch.float16 for op in self.graph.ops)

    def assemble(self, call: Call, outputs: Sequence[torch.Tensor]) -> Any:
        """The call's own output from its tensors."""
        return put_together(self.returned, outputs, call.survey)

    def leave(self, call: Call, outputs: Sequence[torch.Tensor]) -> None:
        """Put the call's tensors where its forward leaves them."""
        Left(call.survey, outputs, self.cut, call.tensors).put(self.places)


def changes(graph: Graph, start: int, end: int) -> dict[int, Value]:
    """New contents, by the number of the input, where the output for it is not that input itself."""
    new = enumerate(graph.outputs[start:end])
    return {k: v for k, v in new if v is not None and v is not graph.inputs[k]}


class _Recorder:
    """The function that is recorded: forward, and backward where gradients are wanted."""

    def __init__(
        self, call: Call, watch: Watch, notes: Notes, handed: Mapping[int, Handed] | None, questions: Questions
    ):
        self.call, self.watch, self.notes, self.handed = call, watch, notes, handed
        self.questions = questions
        fixed = len(call.parameters) + len(call.buffers)
        self.leaving = Leaving(call.survey, watch.names, call.tensors, fixed)
        self.criterion = call.pair.criterion is not None
        self.at_once = False  # whether there is one gradient to begin with, which is one
        self.returned = Tree(None, ())
        self.strides: tuple[Strides, ...] = ()  # of the outputs, and of the gradients
        self.dressing = Dressing()
        self.differentiable: list[bool] = []
        self.wanted: tuple[int, ...] = ()
        self.cut: list[bool] = []
        self.devices: tuple[torch.device, ...] = ()
        self.lost: dict[int, str] = {}
        self.sources: Tensors = []  # of which gradients are asked
        self.alive: dict[int, int] = {}
        self.roots: dict[int, torch.Tensor] = {}  # of tensors that a former step left without the graph they had

    def __call__(self, *tensors: torch.Tensor) -> tuple[list[Any], Tensors]:
        """What is handed out, kept and differentiated; and stand-ins for gradients that come later."""
        call = self.call
        # As in PyTorch, backward runs outside autocast, in the dtypes the forward chose.
        with torch.set_grad_enabled(call.grad):
            pairs = zip(tensors, call.tensors, strict=True)
            self.sources = [_detached(t).requires_grad_(old.requires_grad) for t, old in pairs]
            # What is no leaf may be changed in place, which a leaf may not.
            made = [t if old.is_leaf else t.clone() for t, old in zip(self.sources, call.tensors, strict=True)]
            self._root(made)
            for t, old in zip(made, call.tensors, strict=True):
                for key, value in old.__dict__.items():  # attributes that users gave it
                    vars(t).setdefault(key, value)
            self.notes.follow(zip(made, call.tensors, strict=True))
            stand_ins = {id(old): t for t, old in zip(made, call.tensors, strict=True)}
            state = {k: stand_ins[id(t)] for k, t in (*call.parameters.items(), *call.buffers.items())}
            arguments = call.rebuild(made[len(made) - len(call.inputs) :], self.handed)
            given = pytree.tree_flatten(arguments)
            for t, old in zip(made, call.tensors, strict=True):
                if isinstance(old, nn.Parameter):
                    vars(t)["_is_param"] = True  # as isinstance asks
            first = len(call.parameters)
            for k, old in enumerate(call.tensors[first:], first):
                if special(old):
                    self.watch.shadows.give(k, made[k], old)
            marks = [dict(vars(t)) for t in made]
            histories = [t.grad_fn for t in made]
            registered = dict(call.pair.named_buffers(remove_duplicate=False))

            def rest(returned: Any) -> Any:
                if any(g is not None for g in take_grads(self.sources)):
                    raise CaptureError(
                        "the forward or the loss calls backward() itself, which adds to .grad before the step's own "
                        "backward; return that loss as well, or use torch.autograd.grad"
                    )
                self.watch.shadows.open = False
                outputs = self._take(returned)
                self._refuse_parted(registered)
                self.wanted = tuple(self._wanted()) if call.grad else ()
                if not self.criterion:
                    outputs = self._leave(made, outputs)
                    outputs = self._revive(made, histories, outputs)
                self.questions.late = True
                grads, seeds = self._gradients(outputs, [self.sources[k] for k in self.wanted])
                if self.criterion:  # whose backward may leave tensors too
                    outputs = self._leave(made, outputs)
                self.dressing = self.watch.shadows.dressing(outputs)
                return outputs, grads, seeds

            # In the backward too, which may run modules again.
            with self.watch.replacing(stand_ins, self._sources(made)), self.questions:
                outputs, grads, seeds = torch.func.functional_call(
                    call.pair, state, (*arguments, rest), tie_weights=True, strict=True
                )
        _refuse_changes(call, arguments, given, zip(made, marks, strict=True))
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
        handed = [t.detach() for t in outputs]
        self.devices = tuple(t.device for t in handed)
        self.strides = tuple(_strides(t) for t in (*handed, *grads))
        self._like_parameters(len(handed))
        # What a former call left is there until this one's takes its place: twice in the arithmetic.
        again = [handed[k] for k in sorted(self.leaving.used)]
        return [*handed, *again, *self.questions.flags, *(_detached(t) for t in kept), *grads], seeds

    def _sources(self, made: Tensors) -> Iterator[Source]:
        """Buffers and tensors in attributes, whose numbers a recording may read as they are now."""
        names, tensors = self.call.names, self.call.tensors
        for k in range(len(self.call.parameters), len(made) - len(self.call.inputs)):
            if k not in self.roots and not tensors[k].requires_grad and tensors[k].layout is torch.strided:
                yield Source(k, names[k], tensors[k], made[k])

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
            if self.call.grad and id(old) in others and LEFT.get(old, False):
                self.roots[k] = made[k].detach().requires_grad_(True)
                self.sources[k] = self.roots[k].clone()
                made[k] = self.sources[k].clone()

    def _leave(self, made: Tensors, outputs: Tensors) -> Tensors:
        """The outputs, and with them what stays behind in attributes and the like."""
        left = self.leaving.collect(made, outputs)
        self.differentiable += [t.requires_grad and not self.criterion for t in left]
        outputs = [*outputs, *left]
        self.cut = [t.requires_grad and not yes for t, yes in zip(outputs, self.differentiable, strict=True)]
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
        self.cut += [False] * len(self.alive)
        return outputs

    def _wanted(self) -> Iterator[int]:
        """Which tensors want a gradient; of those met in attributes only what was used."""
        others = {id(t) for t in self.call.others}
        for k, t in enumerate(self.call.tensors):
            if (id(t) not in others or id(t) in self.watch.used) and t.requires_grad:
                yield k

    def _take(self, returned: Any) -> Tensors:
        self.returned, outputs = take_apart(returned, self.call.survey)
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
            for kind in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(kind, enabled=False))
            self.watch.follow_backward()
            failed = self.watch.failed
            try:
                grads, seeds = self._backward(outputs, leaves)
            except (RuntimeError, CaptureError) as error:
                # Of a step's outputs, only the loss must have a gradient: it may be the only one that is asked for.
                if self.at_once or not (self.criterion or "inplace operation" in str(error)):
                    raise
                self.watch.failed = failed
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
                name = self.leaving.name_of(self.call.tensors[k])
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
                    self.lost[k], self.watch.failed = str(error), None
                first = False
        self.differentiable = [yes and k not in self.lost for k, yes in enumerate(had)]


@contextmanager
def _undisturbed(leaving: Leaving) -> Iterator[None]:
    """Put the recording out of the places where the forward left it; refuse where that loses something."""
    done = False
    try:
        yield
        done = True
    finally:
        lost = leaving.restore()
        if lost and done:
            raise CaptureError(
                f"the forward stores a tensor under {lost}, which a recorded step would not bring up to date; "
                "return it as an output, or register it as a buffer of fixed shape and copy into it"
            )


def take_grads(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor | None]:
    """What lies at tensors as ``.grad``, which is then gone."""
    with torch._C.DisableTorchFunction():  # the recording's own mode refuses this to the step's code
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


def compile_call(
    call: Call, options: Options, values: Collection[int] = (), answers: tuple[bool, ...] = ()
) -> Program:
    """Record and plan a call, with these answers to its first conditions.

    ``values`` are leaves of the arguments, by number, that the step may only hand on. Those that it does not read
    stay out of the key. Raises `CaptureError`, `BudgetError` or `UnsupportedOpError`, and what the code of the step
    raises.
    """
    try:
        with RECORDING, unlogged(), unhooked():
            made = _without(call, options, values, answers)
            if made is not None:
                return made
            try:
                return _compile(call, options, by_state, answers)
            except Drawn:
                if active_count() == 1:
                    raise
                return _compile(call, options, by_calls, answers)  # it may have been another thread that drew
    except FullframeError:
        raise
    except Exception as error:  # of the caller's own code: shapes that do not fit, say
        error.__traceback__ = trimmed(error.__traceback__)
        raise


def _without(call: Call, options: Options, values: Collection[int], answers: tuple[bool, ...]) -> Program | None:
    """The call recorded with as many of these leaves as it does not read out of its key; None where it reads all."""
    while values:
        asked: set[int] = set()
        try:
            made = _compile(call, options, by_state, answers, {k: Handed(k, asked) for k in values})
        except Exception:  # for what was asked; if it has another reason it comes again
            made = None
        if made is not None and made.lasting and not asked:
            return made
        values = set(values) - asked if asked else ()
    return None


def _compile(
    call: Call,
    options: Options,
    undrawn: Callable[[], AbstractContextManager[None]],
    answers: tuple[bool, ...],
    handed: Mapping[int, Handed] | None = None,
) -> Program:
    devices = sorted({str(t.device) for t in call.tensors if t.device.type != "cpu"})
    if len(devices) > 1:
        raise CaptureError(
            f"the step's tensors are on several devices ({', '.join(devices)}), and a tiled step runs on one; move "
            "module, loss and inputs to the same device"
        )
    call.look(EVERYTHING)
    refuse_dispatching(call.tensors[len(call.parameters) :])
    before = Survey(call.roots)
    numbers = [state_of(g) for g in call.survey.generators]
    recorder, graph = recorded_as(answers, lambda questions: _record(call, undrawn, handed, questions))
    watch, notes = recorder.watch, recorder.notes
    if [state_of(g) for g in call.survey.generators] != numbers:
        raise CaptureError(f"the module or the loss drew from a generator of its own; {FROZEN}")
    after = Survey(call.roots)
    if any(recorded(t) for t in after.tensors):
        raise CaptureError("the forward stores a tensor in an object that it can reach; return it as an output")
    lasting = after.key == before.key and _who(after) == _who(before)
    if recorder.questions.asked and not lasting:
        call.undo = recorder.leaving.rewind
    passed = tuple(sorted(handed or ()))
    survey, choices = notes.survey(call.roots, call.entries(passed))
    _refuse_identities(call, survey)
    outputs = len(recorder.differentiable)
    _expect(graph, outputs, recorder.strides)
    conditions = tuple(recorder.questions.asked)
    start = outputs + len(recorder.leaving.used) + len(conditions)
    first_grad = start + len(call.tensors)
    others = {id(t) for t in call.others}
    unused = frozenset(k for k, t in enumerate(call.tensors) if id(t) in others and id(t) not in watch.used)
    changed = changes(graph, start, first_grad)
    numbers = tuple(sorted(watch.numbers))
    terms = Terms(recorder.wanted, recorder.alive, numbers, unused, tuple(recorder.leaving.places), recorder.returned)
    dressing = recorder.dressing
    reads = Reads(tuple(choices), numbers, _looked(call, watch), passed)
    if lasting:
        needed = (
            {k for k, t in enumerate(call.tensors) if id(t) in watch.touched and id(t) in others}
            | changed.keys()
            | recorder.dressing.given.keys()
        )
        try:
            count = len(call.tensors)
            terms, order = narrowed(call, survey, reads, terms, needed)
        except LookupError:
            reads = replace(reads, choices=None)
        else:
            reads = replace(reads, numbers=terms.numbers)
            reorder(graph, start, order, count)
            dressing = dressing.renumbered({k: number for number, k in enumerate(order)})
            first_grad += len(order) - count
            changed = changes(graph, start, first_grad)
    refuse_shared(changed, call.tensors, call.names, terms.unused)
    late = followers(graph.ops, graph.late)
    for k, value in changed.items():
        if value in late and call.pair.criterion is None:
            raise CaptureError(
                f"the backward changes {call.names[k]}, which a tiled module hands on before it; use "
                "fullframe.tile(net, loss=criterion), or change it outside"
            )
    request = _request(graph, call, options, first_grad)
    graph, asked, asks = _asks(graph, call, recorder, first_grad, request)
    planned = plan(graph, _freed(request, graph, len(recorder.wanted)))
    return Program(
        graph, planned, terms.returned, outputs, start,
        terms.wanted, tuple(recorder.differentiable), lasting and call.survey.lasting,
        terms.places, tuple(recorder.cut), reads, recorder.devices, terms.unused, recorder.lost, terms.alive,
        asked, asks, "" if lasting and call.survey.lasting else _moved(call, before, reads),
        dressing, recorder.strides, conditions,
    )  # fmt: skip


def _expect(graph: Graph, outputs: int, strides: Sequence[Strides]) -> None:
    """Have what a run hands out made in the layout that it will have."""
    handed = graph.outputs[:outputs] + graph.outputs[len(graph.outputs) - (len(strides) - outputs) :]
    for value, expected in zip(handed, strides, strict=True):
        if value is not None and expected is not None and value not in graph.inputs:
            graph.strides.setdefault(value, expected)


def _asks(
    graph: Graph, call: Call, recorder: _Recorder, first_grad: int, request: Request
) -> tuple[Graph, tuple[int, ...], Asks | None]:
    """What is planned first, of which outputs it has the gradient, and of which it could have."""
    asked = tuple(k for k, yes in enumerate(recorder.differentiable) if yes)
    if not graph.late:
        return graph, asked, None
    graph.early = first_grad
    late = dict(zip(asked, (v for v in graph.inputs if v in graph.late), strict=True))
    asks = Asks(graph, late, request, call.device, frozenset(asked))
    if not recorder.criterion:
        return graph, asked, asks
    at_once = not late[asked[0]].shape
    first = asked[:1] if at_once else asked
    asks.guess = frozenset(first)
    return asked_of(graph, {late[k] for k in first}, call.device, at_once), first, asks


def _freed(request: Request, graph: Graph, wanted: int) -> Request:
    """A request for another version of its graph, whose gradients may be other values."""
    return replace(request, free=frozenset(v for v in graph.outputs[len(graph.outputs) - wanted :] if v is not None))


def _record(
    call: Call,
    undrawn: Callable[[], AbstractContextManager[None]],
    handed: Mapping[int, Handed] | None,
    questions: Questions,
) -> tuple[_Recorder, Graph]:
    watch, notes = Watch(call.pair), Notes(call.survey)
    questions.path = lambda: watch.current
    recorder = _Recorder(call, watch, notes, handed, questions)
    questions.rewind = recorder.leaving.rewind
    with (
        torch.inference_mode(False), _undisturbed(recorder.leaving), recordable(call.pair),
        _forgetful(call.survey.caches), unspoilt(recorded), notes.taken(),
    ):  # fmt: skip
        return recorder, capture(Recording(recorder, call.tensors, call.names, watch, call.device, undrawn))


def _refuse_changes(call: Call, arguments: Any, given: Any, marks: Iterable[tuple[torch.Tensor, Any]]) -> None:
    """Refuse what the forward changed of its arguments' containers, or set on a tensor of the call."""
    leaves, spec = pytree.tree_flatten(arguments)
    if spec != given[1] or any(a is not b for a, b in zip(leaves, given[0], strict=True)):
        raise CaptureError(
            "the forward changes a list or dictionary among its arguments, which a recorded step would leave as it "
            "is; return what it adds"
        )
    for (tensor, old), name in zip(marks, call.names, strict=True):
        now = vars(tensor)
        if now.keys() != old.keys() or any(now[k] is not old[k] for k in old):
            raise CaptureError(
                f"the forward sets an attribute of the tensor {name}, which a recorded step would not; keep it in "
                "the module"
            )


def _refuse_identities(call: Call, survey: Survey) -> None:
    """Refuse code that tells the call's tensors apart by identity: while it is recorded they have stand-ins."""
    known = {id(t): name for t, name in zip(call.tensors, call.names, strict=True)}
    own = {id(h.state) for h in survey.holders if isinstance(h, torch.optim.Optimizer)}
    tables = (c for c in (*survey.containers, *survey.sets) if isinstance(c, (dict, set, frozenset)))
    looked_up = (k for c in tables if id(c) not in own for k in c)
    found = next((known[id(k)] for k in looked_up if isinstance(k, torch.Tensor) and id(k) in known), None)
    found = found or next((known[n] for n in survey.parts if type(n) is int and n in known), None)
    if found is not None:
        raise CaptureError(
            f"the step can reach a set, a dictionary or a number, as of id(), that tells {found} from other tensors "
            "by its identity, and while it is recorded its tensors have stand-ins, which are other objects; tell "
            "them apart by their names"
        )


def _moved(call: Call, before: Survey, reads: Reads) -> str:
    """Where the recording has changed what it could read, or what nobody can look at without changing it."""
    found = difference(Survey(call.roots, named=ROOTS), before.parts)
    if found is None:
        passing = Survey(call.roots, reads.choice(), call.entries(reads.passed), ROOTS).passing
        return words(passing) if passing else ""
    return found[0]


def _who(survey: Survey) -> list[int]:
    """Which objects a survey met: two of one kind that trade places have the same key."""
    return [id(t) for t in (*survey.tensors, *survey.holders, *survey.cells)]


def _looked(call: Call, watch: Watch) -> bool:
    """Whether a recording depends on anything of the tensors that former calls left, be it their shape."""
    others = {id(t) for t in call.others}
    return any(id(t) in watch.touched or id(t) not in others for t in call.survey.left)


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


def refuse_shared(
    changed: Collection[int], tensors: Sequence[torch.Tensor], names: Sequence[str], unused: frozenset[int]
) -> None:
    """Refuse changes in place of memory that two of the call's tensors share, if both are used."""
    places: dict[int, list[int]] = {}
    for k, t in enumerate(tensors if changed else ()):
        if t.layout is torch.strided and k not in unused:
            places.setdefault(t.untyped_storage().data_ptr(), []).append(k)
    for k in changed:
        strided = tensors[k].layout is torch.strided
        for j in places.get(tensors[k].untyped_storage().data_ptr(), ()) if strided else ():
            if j != k and _overlap(tensors[k], tensors[j]):
                raise CaptureError(
                    f"the step changes {names[k]} in place, and {names[j]} shares its memory; a recorded "
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
    tile = None if forced is None else tuple(forced)
    if call.device.type == "cpu":
        ahead = AHEAD if options.workers > 1 else 1
        return Request(budget, options.workers, roots, fusable, tile, free, ahead=ahead)
    # A device's caches are small beside its memory, and it wants much to do at once: tiles as large as may be.
    host = free_bytes(torch.device("cpu"))
    # What a recorded run keeps besides: its inputs, and what it makes, to be copied out.
    lasting = len(call.parameters) + len(call.buffers)
    copies = sum(t.nbytes for t in call.tensors[lasting:]) + sum(v.nbytes for v in graph.outputs if v is not None)
    return Request(budget, 1, roots, fusable, tile, free, window=budget // WINDOWS, host=host, fixed=FIXED + copies)
