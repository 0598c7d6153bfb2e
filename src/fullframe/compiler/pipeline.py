"""From a call to a program: captured once, decomposed, and planned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from threading import active_count
from traceback import walk_tb
from typing import Any, Protocol

import torch

from fullframe import torch_compat
from fullframe.capture.ambient import trimmed, unhooked, unlogged
from fullframe.capture.batch_norm import recordable
from fullframe.capture.caches import unspoilt
from fullframe.capture.conditions import Conditions, location_of, recorded_as
from fullframe.capture.function_mode import CaptureMode, reads_data
from fullframe.capture.host_rng import FROZEN, Drawn, by_calls, by_state
from fullframe.capture.joint import JointFunction, Strides
from fullframe.capture.subclasses import refuse_dispatching
from fullframe.capture.threads import RECORDING
from fullframe.capture.trace import _STATE, Recording, own_generator
from fullframe.compiler.agreement import plan_for, split_of
from fullframe.compiler.backward_variants import restricted_to
from fullframe.compiler.externals import refuse_misuse, set_apart, sources_of
from fullframe.compiler.handed_on import same_step
from fullframe.compiler.program import BackwardVariants, Options, Program, changes, freed
from fullframe.compiler.requests import request_for
from fullframe.device import DEVICES, device_of
from fullframe.errors import CaptureError, FullframeError
from fullframe.frontend.aliasing import refuse_identities, refuse_shared
from fullframe.frontend.destinations import destinations, refuse_misfits
from fullframe.frontend.fields import state_of
from fullframe.frontend.guards import GuardSnapshot
from fullframe.frontend.inputs import Call
from fullframe.frontend.narrowing import Terms, narrowed, reorder
from fullframe.frontend.opaque_leaves import LeafRead, OpaqueLeaf
from fullframe.frontend.reads import EVERYTHING, ReadLog, Reads
from fullframe.frontend.recapture_reasons import ROOTS, difference, words
from fullframe.frontend.side_effects import SideEffectTracker, recorded
from fullframe.ir.graph import Graph, Value, followers
from fullframe.ops.decompose import decompose_graph
from fullframe.schedule.plan import Plan
from fullframe.schedule.request import Request
from fullframe.torch_compat import FakeTensorMode, TorchDispatchMode, dispatch_functionalize, fx_traceback, make_fx


@contextmanager
def _undisturbed(leaving: SideEffectTracker) -> Iterator[None]:
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


def compile_call(
    call: Call, options: Options, values: Collection[int] = (), answers: tuple[bool, ...] = ()
) -> Program:
    """Record and plan a call, with these answers to its first conditions.

    ``values`` are leaves of the arguments, by number, that the step may only hand on. Those that it does not read
    stay out of the key. Raises `CaptureError`, `BudgetError` or `UnsupportedOpError`, and what the code of the step
    raises.
    """
    torch_compat.recording_is_imported()  # before this recording imports it
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
        read: set[int] = set()
        try:
            made = _compile(call, options, by_state, answers, {k: OpaqueLeaf(k, read) for k in values})
        except Exception:  # for what was asked; if it has another reason it comes again
            made = None
        if made is not None and made.lasting and not read:
            return made
        values = set(values) - read if read else ()
    return None


def _compile(
    call: Call,
    options: Options,
    undrawn: Callable[[], AbstractContextManager[None]],
    answers: tuple[bool, ...],
    opaque: Mapping[int, OpaqueLeaf] | None = None,
) -> Program:
    _refuse_devices(call)
    call.take_snapshot(EVERYTHING)
    refuse_dispatching(call.tensors[len(call.parameters) :], call.parameters)
    before = GuardSnapshot(call.roots)
    joint, graph = _recorded(call, undrawn, answers, opaque)
    lasting = _same_after(call, before, joint)
    capture_mode, read_log = joint.capture_mode, joint.read_log
    passed = tuple(sorted(opaque or ()))
    snapshot, choices = read_log.snapshot(call.roots, call.entries(passed))
    refuse_identities(call, snapshot)
    _expect(graph, joint.strides)
    others = {id(t) for t in call.others}
    unused = frozenset(k for k, t in enumerate(call.tensors) if id(t) in others and id(t) not in capture_mode.used)
    changed = changes(graph)
    numbers = tuple(sorted(capture_mode.numbers))
    terms = Terms(joint.wanted, joint.alive, numbers, unused, tuple(joint.side_effects.effects), joint.returned)
    output_classes = joint.output_classes
    reads = Reads(tuple(choices), numbers, _looked(call, capture_mode), passed)
    if lasting:
        needed = (
            {k for k, t in enumerate(call.tensors) if id(t) in capture_mode.touched and id(t) in others}
            | changed.keys()
            | joint.output_classes.given.keys()
        )
        try:
            terms, order = narrowed(call, snapshot, reads, terms, needed)
        except LookupError:
            reads = replace(reads, choices=None)
        else:
            reads = replace(reads, numbers=terms.numbers)
            reorder(graph, order)
            output_classes = output_classes.renumbered({k: number for number, k in enumerate(order)})
            changed = changes(graph)
    refuse_shared(changed, call.tensors, call.names, terms.unused)
    _refuse_changed_late(call, graph, changed)
    sinks = destinations(call.out, terms.returned)
    refuse_misuse(call, changed, terms.effects, sinks)
    refuse_misfits(sinks, graph.handed_out)
    graph = set_apart(graph, sources_of(call, graph), sinks)
    request = request_for(graph, call, options, sinks)
    if options.domain is not None:
        request = replace(request, split=split_of(options.domain, graph, call, terms.wanted, joint.differentiable))
    graph, requested, variants = _variants(graph, call, joint, request)
    if variants is not None:
        variants.domain = options.domain
    request = freed(request, graph)
    planned = _planned(graph, request, options)
    return Program(
        graph, planned, terms.returned, terms.wanted, tuple(joint.differentiable), lasting and call.snapshot.lasting,
        terms.effects, tuple(joint.detached), reads, joint.devices, terms.unused, joint.lost, terms.alive,
        requested, variants, "" if lasting and call.snapshot.lasting else _moved(call, before, reads),
        output_classes, joint.strides, tuple(joint.conditions.noted), request,
    )  # fmt: skip


def _planned(graph: Graph, request: Request, options: Options) -> Plan:
    planned = plan_for(graph, request, options.domain)
    if options.saved is not None:
        options.saved.verify(planned)
    return planned


def _refuse_devices(call: Call) -> None:
    """Refuse tensors on a kind of device that nothing is known of, and on several devices."""
    first = len(call.tensors) - len(call.inputs)
    given = [(n, t) for k, (n, t) in enumerate(zip(call.names, call.tensors, strict=True), -first)
             if k not in call.sources]  # fmt: skip
    for name, tensor in given:
        if tensor.device.type not in DEVICES:
            raise CaptureError(
                f"{name} is on {tensor.device}, and a tiled step runs on {' or '.join(DEVICES)}; move module, loss "
                "and inputs there with .to(), or tile the part of the network that is there"
            )
    devices = sorted({str(t.device) for _, t in given if not device_of(t.device).on_host})
    if len(devices) > 1:
        raise CaptureError(
            f"the step's tensors are on several devices ({', '.join(devices)}), and a tiled step runs on one; move "
            "module, loss and inputs to the same device"
        )


def _recorded(
    call: Call,
    undrawn: Callable[[], AbstractContextManager[None]],
    answers: tuple[bool, ...],
    opaque: Mapping[int, OpaqueLeaf] | None,
) -> tuple[JointFunction, Graph]:
    """The recorded call; refused where it draws from a generator of its own, whose numbers would be frozen."""
    numbers = [state_of(g) for g in call.snapshot.generators]
    known = recorded_as(answers, lambda conditions: _record(call, undrawn, None, conditions)) if opaque else None
    found = recorded_as(answers, lambda conditions: _record(call, undrawn, opaque, conditions))
    if known is not None and not same_step(known, found):
        raise LeafRead("the class of a leaf of the arguments was read")
    if [state_of(g) for g in call.snapshot.generators] != numbers:
        raise CaptureError(f"the module or the loss drew from a generator of its own; {FROZEN}")
    return found


def _same_after(call: Call, before: GuardSnapshot, joint: JointFunction) -> bool:
    """Whether recording has left all that is in reach as it was; what conditions may have to undo is remembered."""
    after = GuardSnapshot(call.roots)
    if any(recorded(t) for t in after.tensors):
        raise CaptureError("the forward stores a tensor in an object that it can reach; return it as an output")
    lasting = after.key == before.key and _who(after) == _who(before)
    if joint.conditions.noted and not lasting:
        call.undo = joint.side_effects.rewind
    return lasting


def _refuse_changed_late(call: Call, graph: Graph, changed: Mapping[int, Value]) -> None:
    """Refuse a backward that changes what a tiled module has handed on before it."""
    late = followers(graph.ops, graph.late)
    for k, value in changed.items():
        if value in late and call.pair.criterion is None:
            raise CaptureError(
                f"the backward changes {call.names[k]}, which a tiled module hands on before it; use "
                "fullframe.tile(net, loss=criterion), or change it outside"
            )


def _expect(graph: Graph, strides: Sequence[Strides]) -> None:
    """Have what a run hands out made in the layout that it will have."""
    for value, expected in zip(graph.handed_out + graph.gradients, strides, strict=True):
        if value is not None and expected is not None and value not in graph.inputs:
            graph.strides.setdefault(value, expected)


def _variants(
    graph: Graph, call: Call, joint: JointFunction, request: Request
) -> tuple[Graph, tuple[int, ...], BackwardVariants | None]:
    """What is planned first, of which outputs it has the gradient, and of which it could have."""
    requested = tuple(k for k, yes in enumerate(joint.differentiable) if yes)
    if not graph.late:
        return graph, requested, None
    late = dict(zip(requested, (v for v in graph.inputs if v in graph.late), strict=True))
    variants = BackwardVariants(graph, late, request, call.device, frozenset(requested))
    if not joint.criterion:
        return graph, requested, variants
    at_once = not late[requested[0]].shape
    first = requested[:1] if at_once else requested
    variants.guess = frozenset(first)
    return restricted_to(graph, {late[k] for k in first}, call.device, at_once), first, variants


def _record(
    call: Call,
    undrawn: Callable[[], AbstractContextManager[None]],
    opaque: Mapping[int, OpaqueLeaf] | None,
    conditions: Conditions,
) -> tuple[JointFunction, Graph]:
    capture_mode, read_log = CaptureMode(call.pair), ReadLog(call.snapshot)
    conditions.path = lambda: capture_mode.current
    joint = JointFunction(call, capture_mode, read_log, opaque, conditions)
    conditions.rewind = joint.side_effects.rewind
    with (
        torch.inference_mode(False), _undisturbed(joint.side_effects), recordable(call.pair),
        _forgetful(call.snapshot.caches), unspoilt(recorded), read_log.taken(),
    ):  # fmt: skip
        return joint, capture(Recording(joint, call.tensors, call.names, capture_mode, call.device, undrawn))


def _moved(call: Call, before: GuardSnapshot, reads: Reads) -> str:
    """Where the recording has changed what it could read, or what nobody can look at without changing it."""
    found = difference(GuardSnapshot(call.roots, named=ROOTS), before.parts)
    if found is None:
        passing = GuardSnapshot(call.roots, reads.choice(), call.entries(reads.passed), ROOTS).passing
        return words(passing) if passing else ""
    return found[0]


def _who(snapshot: GuardSnapshot) -> list[int]:
    """Which objects a guard snapshot met: two of one kind that trade places have the same key."""
    return [id(t) for t in (*snapshot.tensors, *snapshot.holders, *snapshot.cells)]


def _looked(call: Call, capture_mode: CaptureMode) -> bool:
    """Whether a recording depends on anything of the tensors that former calls left, be it their shape."""
    others = {id(t) for t in call.others}
    return any(id(t) in capture_mode.touched or id(t) not in others for t in call.snapshot.side_effects)


class _Cache(Protocol):
    def cache_clear(self) -> None: ...


@contextmanager
def _forgetful(caches: Sequence[_Cache]) -> Iterator[None]:
    """Caches of functions must not hand numbers into a recording, nor tensors of the recording out of it."""
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


def capture(recording: Recording) -> Graph:
    """Record a function as a graph in normal form; raises `CaptureError` where it cannot be."""
    module = record(recording)
    return decompose_graph(module, recording.names, recording.device, recording.function.signature)


def record(recording: Recording) -> torch.fx.GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = _fakes(recording, mode)
    try:
        with (
            _active(), recording.capture_mode.paths(), fx_traceback.preserve_node_meta(), _uncompiled(), _own_norms(),
            torch.autograd.set_detect_anomaly(False),  # it looks for NaN, and here are no numbers
            torch.autograd.set_multithreading_enabled(False),  # a device's backward stays in this thread
            _Undrawn(mode), recording.undrawn(), _control_flow(recording.capture_mode),
        ):  # fmt: skip
            module = make_fx(dispatch_functionalize(recording.function))(*fakes)
    except NotImplementedError as error:
        if "Generator" not in str(error):  # which a recording of torch 2.11 cannot hold
            raise
        raise own_generator(recording.capture_mode.current, "the step") from error
    except AssertionError as error:
        if "effect" not in str(error):
            raise
        raise CaptureError(
            f"in {recording.capture_mode.current or 'the step'}, an op talks to other processes or has another "
            "effect beside its result, which cannot be recorded; wrap the tiled module in "
            "DistributedDataParallel, not the other way round"
        ) from error
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise CaptureError(
                f"in {recording.capture_mode.current or 'the step'}, torch.utils.checkpoint with use_reentrant=True "
                "cannot be recorded; use use_reentrant=False, or no checkpoint: a tiled step stores what fits its "
                "budget"
            ) from error
        if "selective activation checkpoint" in str(error):
            raise CaptureError(
                f"in {recording.capture_mode.current or 'the step'}, a selective checkpoint (context_fn=) meets a "
                "buffer that the step changes, which cannot be recorded; leave context_fn= out, or the checkpoint: a "
                "tiled step stores what fits its budget"
            ) from error
        if "already associated to a python object" in str(error):
            raise CaptureError(
                f"in {recording.capture_mode.current or 'the step'}, a tensor of a subclass is made by calling the "
                "class, which cannot be recorded; use tensor.as_subclass(...)"
            ) from error
        if not reads_data(error):
            raise
        raise _data_dependent(recording.capture_mode.current, error) from error
    finally:
        torch.clear_autocast_cache()
    if recording.capture_mode.failed is not None:  # and the step's own code went on as if nothing had been
        raise _data_dependent(
            recording.capture_mode.current, recording.capture_mode.failed
        ) from recording.capture_mode.failed
    return module


def _fakes(recording: Recording, mode: FakeTensorMode) -> list[torch.Tensor]:
    """What a recording computes with: for inputs that are read by regions fakes of their shape and dtype alone."""
    call = recording.function.call
    absent = {id(call.inputs[k]) for k in call.sources}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in absent:
            return mode.from_tensor(tensor.detach())
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=recording.device)

    return [fake(t) for t in recording.inputs]


@contextmanager
def _control_flow(capture_mode: CaptureMode) -> Iterator[None]:
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
            f"in {capture_mode.current or 'the step'}, torch's {found} makes the course of the computation depend on "
            "the data, so it cannot be recorded once for all inputs; use torch.where, or Python's own if and for "
            "over what is known"
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
    dynamo = torch_compat.dynamo()
    with dynamo.config.patch(error_on_nested_fx_trace=False) if dynamo else nullcontext():
        yield


@contextmanager
def _own_norms() -> Iterator[None]:
    """Inside, CUDA tensors are normed by torch's own ops and not by those of its library."""
    enabled = torch_compat.cudnn_enabled(False)
    try:
        yield
    finally:
        torch_compat.cudnn_enabled(enabled)


def _data_dependent(path: str, error: Exception) -> CaptureError:
    if isinstance(error, CaptureError):
        return error
    op = str(getattr(error, "func", "")) or "the numbers of a tensor"
    where = location_of(error)
    return CaptureError(
        f"in {path or 'the step'}, {f'at {where}, ' if where else ''}the course of the computation depends on the "
        f"data ({op}), so it cannot be "
        "recorded once for all inputs; compute that value outside the step and pass it in, or use a mask of fixed "
        "shape (torch.where) in place of an if or of a selection"
    )


@contextmanager
def _active() -> Iterator[None]:
    _STATE.active = True
    try:
        yield
    finally:
        _STATE.active = False
