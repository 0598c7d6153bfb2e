"""From a call to a program: the step recorded once, and planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from fullframe.capture.conditions import Condition, settle
from fullframe.capture.joint import Strides
from fullframe.capture.subclasses import OutputClasses
from fullframe.compiler.agreement import plan_for
from fullframe.compiler.backward_variants import backward_of, restricted_to, sources
from fullframe.distributed.mesh import Domain
from fullframe.frontend.destinations import destinations, refuse_misfits, refuse_overlaps
from fullframe.frontend.inputs import Call
from fullframe.frontend.outputs import Tree, unflatten
from fullframe.frontend.reads import EVERYTHING, Reads
from fullframe.frontend.sources import SideEffect, WriteBack
from fullframe.ir.graph import Graph, Value
from fullframe.schedule.plan import Plan
from fullframe.schedule.request import Request
from fullframe.schedule.saved_plan import SavedPlan
from fullframe.storage.disk_rate import USUAL
from fullframe.storage.external import Sink


@dataclass(frozen=True)
class Options:
    """Budget in bytes (None: what is free when first planned), forced tile, worker threads, bytes of a disk, the
    ranks that make the step together, a plan that was saved, which brings numbers of its own, and how many million
    bytes a second the disk moves."""

    budget: int | None
    tile: int | tuple[int, ...] | None
    workers: int
    disk: int = 0
    domain: Domain | None = None
    saved: SavedPlan | None = None
    rate: int = USUAL


@dataclass(eq=False)
class BackwardVariants:
    """Of which outputs a backward may ask the gradient: what that needs, and what has been planned for it.

    ``graph`` is given the gradient of each, ``late`` by the output's number. A step's first scalar is taken for its
    loss until a backward asks for others, too: ``guess`` is what the next forward is planned for.
    """

    graph: Graph
    late: dict[int, Value]
    request: Request
    device: torch.device
    guess: frozenset[int]
    domain: Domain | None = None
    programs: dict[tuple[frozenset[int], bool], Program] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Program:
    """A captured and planned call.

    The graph's signature says which of its outputs are what; the gradients are those of the tensors at ``wanted``.
    ``returned`` says how to make the call's own output of its tensors, ``side_effects`` where
    the forward leaves tensors, and ``detached`` which of those handed out have lost a graph. ``lasting`` is False
    where the forward changes what it reads (a counter) or reads what nobody can look at (an iterator), so that the
    next call must be recorded anew. ``reads`` is what belongs to its key, and the terms of all numbers and places
    here. ``devices`` are where the outputs belong, ``unused`` the numbers of tensors that were met and not read.
    ``lost`` are outputs that no gradient can be asked of, and why. ``alive`` are tensors of the call, by number, that
    have a graph when it ends, and the outputs that bring it. ``requested`` are the outputs whose gradients the graph
    is given, in the order of ``late``, or the one whose gradient it takes to be one. ``variants`` are the others of
    which they may be asked; None where there is only that one. ``moved`` is a place, in words, that the forward
    itself changes. ``output_classes`` says of which classes the outputs are. ``strides`` are those of the outputs,
    and then of the gradients, in plain PyTorch. ``conditions`` are what the recording has assumed to hold or not.
    ``request`` is what the plan was asked for.
    """

    graph: Graph
    plan: Plan
    returned: Tree
    wanted: tuple[int, ...]
    differentiable: tuple[bool, ...]
    lasting: bool
    side_effects: tuple[SideEffect, ...] = ()
    detached: tuple[bool, ...] = ()
    reads: Reads = EVERYTHING
    devices: tuple[torch.device, ...] = ()
    unused: frozenset[int] = frozenset()
    lost: dict[int, str] = field(default_factory=dict)
    alive: dict[int, int] = field(default_factory=dict)
    requested: tuple[int, ...] = ()
    variants: BackwardVariants | None = None
    moved: str = ""
    output_classes: OutputClasses = field(default_factory=OutputClasses)
    strides: tuple[Strides, ...] = ()
    conditions: tuple[Condition, ...] = ()
    request: Request | None = None

    def expected(self) -> Program:
        """As it is planned for the outputs whose gradients were asked for lately."""
        return self if self.variants is None else self._version(self.variants.guess, False)

    def rerun(self, used: frozenset[int]) -> Program:
        """What makes only the gradients, from those of these outputs."""
        return self._version(used, True)

    def _version(self, used: frozenset[int], alone: bool) -> Program:
        variants = self.variants
        assert variants is not None
        if used == frozenset(self.requested) and not alone:
            return self
        if (used, alone) not in variants.programs:
            graph = restricted_to(variants.graph, {variants.late[k] for k in used}, variants.device)
            graph = backward_of(graph) if alone else graph
            planned = plan_for(graph, freed(variants.request, graph), variants.domain)
            found = replace(self, graph=graph, plan=planned, requested=tuple(sorted(used)), variants=None)
            variants.programs[used, alone] = found
        return variants.programs[used, alone]

    @property
    def answers(self) -> tuple[bool, ...]:
        """The answers that were assumed."""
        return tuple(a.answer for a in self.conditions if a.answer is not None)

    def settle(self, values: Mapping[Value, torch.Tensor]) -> bool:
        """Look at what the recording has assumed (`conditions.settle`)."""
        return settle(self.conditions, [None if v is None else values.get(v) for v in self.graph.flags])

    @property
    def gradients(self) -> list[Value | None]:
        """Of each of ``wanted``, whichever output it is asked of."""
        return (self.graph if self.variants is None else self.variants.graph).gradients

    @property
    def reached(self) -> list[int]:
        """Those of ``wanted`` that have a gradient; the others take no part in autograd, nor do their hooks."""
        return [k for k, v in zip(self.wanted, self.gradients, strict=True) if v is not None]

    @cached_property
    def rerun_inputs(self) -> list[int]:
        """The call's tensors that gradients follow from: what it takes to make them once more."""
        if self.variants is None:
            return []
        graph = self.variants.graph
        found = sources(graph, (v for v in self.gradients if v is not None)) - graph.late - {graph.seed}
        return [k for k, v in enumerate(graph.inputs) if v in found]

    @cached_property
    def changed(self) -> dict[int, Value]:
        """Of each tensor that the step changes in place, by its number, the new contents."""
        return changes(self.graph)

    @cached_property
    def made(self) -> frozenset[Value]:
        """The values that a run is there for: outputs, new contents, gradients."""
        found = (*self.graph.outputs[: self.graph.signature.first_content], *self.graph.gradients)
        return frozenset((*(v for v in found if v is not None), *self.changed.values()))

    @cached_property
    def read(self) -> frozenset[Value]:
        """The values that a run needs. It is given no others, or it would keep what former calls left behind; what
        lives in objects of the caller's it fetches."""
        return (self.made | {v for op in self.graph.ops for v in op.inputs}) - self.plan.external

    @cached_property
    def read_late(self) -> frozenset[Value]:
        """What is read once the gradients of the outputs are there: by the steps that then run, or handed on."""
        if not self.graph.late:
            return frozenset()
        late = (op for stage in self.plan.stages[self.plan.early :] for op in stage.section.ops)
        grads = (v for v in self.graph.gradients if v is not None)
        return frozenset((*(v for op in late for v in op.inputs), *grads))

    @cached_property
    def ruled(self) -> bool:
        """Whether every op is the engine's own or has a rule."""
        return all(op.rule.kind != "whole" or op.target.startswith("tile.") for op in self.graph.ops)

    @cached_property
    def narrow(self) -> bool:
        """Whether anything is computed in float16, whose gradients may need a loss scale."""
        return any(op.output.dtype == torch.float16 for op in self.graph.ops)

    def sinks(self, call: Call) -> dict[int, Sink]:
        """Where outputs go, by their numbers; refused where they cannot, before anything runs."""
        found = destinations(call.out, self.returned)
        refuse_misfits(found, self.graph.outputs)
        if found:
            others = zip(call.names, call.tensors, strict=True)
            refuse_overlaps(list(found.values()), [*((s.name, s.thing) for s in call.sources.values()), *others])
        return found

    def assemble(self, call: Call, outputs: Sequence[torch.Tensor]) -> object:
        """The call's own output from its tensors."""
        return unflatten(self.returned, outputs, call.snapshot, call.leaves)

    def leave(self, call: Call, outputs: Sequence[torch.Tensor]) -> None:
        """Put the call's tensors where its forward leaves them."""
        WriteBack(call.snapshot, outputs, self.detached, call.tensors).put(self.side_effects)


def changes(graph: Graph) -> dict[int, Value]:
    """New contents, by the number of the input, where the output for it is not that input itself."""
    return {k: v for k, v in enumerate(graph.contents) if v is not None and v is not graph.inputs[k]}


def freed(request: Request, graph: Graph) -> Request:
    """A request for another version of its graph, whose gradients may be other values."""
    return replace(request, free=frozenset(v for v in graph.gradients if v is not None))
