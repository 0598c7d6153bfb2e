"""A tiled module's place in autograd: what a call saves and guards, and the gradients it hands back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from fullframe.bytecode.copies import laid_out
from fullframe.capture.ambient import PendingBackward, find_pending
from fullframe.capture.threads import ForkSafeLock
from fullframe.compiler.externals import sources_of
from fullframe.compiler.program import Program
from fullframe.device import device_of
from fullframe.distributed.exchange import agree
from fullframe.distributed.mesh import Domain
from fullframe.errors import CaptureError, RankError
from fullframe.frontend.aliasing import refuse_shared
from fullframe.frontend.inputs import Call, Tensors
from fullframe.ir import region as box
from fullframe.ir.graph import Value, followers
from fullframe.ops.primitives.rule import UnexpectedShapeError
from fullframe.runtime.execution_paths import assuming
from fullframe.runtime.executor import Run
from fullframe.runtime.replay_cuda import CudaReplays, Feed
from fullframe.storage.arena import strides_as
from fullframe.storage.external import Sink
from fullframe.storage.pool import Pool, Stores
from fullframe.torch_compat import is_batched

Grads = list["torch.Tensor | None"]


class Kept(NamedTuple):
    """What a tiled module keeps between calls besides its programs."""

    pool: Pool
    replays: CudaReplays
    lock: ForkSafeLock
    domain: Domain | None = None


Guard = list[tuple[str, torch.Tensor, int, torch.Tensor | None]]
SMALL = 1 << 20  # bytes: cheaper to copy than to refuse a change of


class Made(NamedTuple):
    """A run that has made a forward's outputs, to go on in a backward."""

    run: Run
    stores: Stores | None
    guard: Guard
    seed: torch.Tensor | None


class Load(NamedTuple):
    """What a forward leaves for its backward: a run to go on, or gradients that are made already."""

    program: Program
    made: Made | None
    grads: Grads


RerunInputs = list["torch.Tensor | None"]  # what it takes to make gradients once more; None: it is gone


def run_forward(
    kept: Kept, program: Program, call: Call, wanted: Sequence[int] = ()
) -> tuple[Tensors, RerunInputs, Made]:
    graph, plan, device = program.graph, program.plan, call.device
    refuse_shared(program.changed, call.tensors, call.names, program.unused)
    sinks = program.sinks(call)
    tensors, pool = call.tensors, kept.pool
    seed = None if graph.seed is None else torch.randint(2**62, (), dtype=torch.int64)
    if seed is not None and kept.domain is not None:
        seed.fill_(agree(kept.domain, int(seed))[0])
    feeds = _feeds(program, call, seed)
    stores: Stores | None = None
    run = kept.replays.replay(program, pool, device, feeds)
    if run is None:
        stores = pool.take(plan.bytes.stores, device, plan.bytes.spare)
        external = {**sources_of(call, graph), **{v: s for k, s in sinks.items() if (v := graph.outputs[k])}}
        run = Run(plan, stores, device, kept.domain, external)
        run.feed([f.value for f in feeds], [f.tensor for f in feeds])
        with stores.released_on_failure(), assuming(program, run), _naming_resized(program, call):
            run.advance(plan.early if graph.late else len(plan.stages))
    try:
        program.settle(run.values)
    except Exception:
        if stores is not None:
            pool.give(stores)
        raise
    outputs = _handed_out(program, run, sinks)
    guard = _guard(program, call, run, outputs) if graph.late else []
    _take_apart(program, run, [tensors[k] for k in program.changed])
    rerun_inputs = [_as_it_was(tensors[k], k in program.changed, k < len(call.parameters)) for k in wanted]
    for k, value in program.changed.items():
        with torch.inference_mode(tensors[k].is_inference()), torch.no_grad():
            tensors[k].copy_(run.part(value))
    if stores is not None and not graph.late:
        pool.give(stores)
    return outputs, rerun_inputs, Made(run, stores, guard, seed)


def _as_it_was(tensor: torch.Tensor, changed: bool, parameter: bool) -> torch.Tensor | None:
    """A tensor of the call for a second backward: a copy where the call or, as anyone may, a later one changes it, if
    it is small."""
    lost = changed or tensor.is_inference()
    if tensor.nbytes <= SMALL and (lost or not parameter):
        return tensor.detach().clone()
    return None if lost else tensor


@contextmanager
def _naming_resized(program: Program, call: Call) -> Iterator[None]:
    """Name the buffer to which an op has given another shape as it ran, which the recording could not see."""
    try:
        yield
    except UnexpectedShapeError as error:
        for k, value in program.changed.items():
            if value is error.value:
                raise CaptureError(
                    f"an op of the step changes {call.names[k]} from shape {tuple(value.shape)} to {error.shape} as "
                    "it runs, as observers of quantisation do in their first call; call the plain module once before "
                    "it is tiled"
                ) from None
        raise


def revive(program: Program, call: Call, made: Sequence[torch.Tensor]) -> None:
    """Give what the forward changed the graph of its new contents; the old one is reached through the step."""
    buffers = range(len(call.parameters), len(call.parameters) + len(call.buffers))
    for k, number in program.alive.items():
        tensor = call.tensors[k]
        # A view has the graph of what it looks into; in that of a buffer are only former calls' values of it.
        whole = tensor._base if k in buffers and tensor._is_view() else tensor
        with torch.enable_grad():
            if whole is not None and whole.grad_fn is not None and not whole._is_view():
                whole.detach_()
            tensor.copy_(made[number])


def _take_apart(program: Program, run: Run, changed: Tensors) -> None:
    """Copies of what is still wanted and lies in memory that is about to change: two buffers may trade places."""
    written = {_memory(t) for t in changed}
    for value in (*program.changed.values(), *program.graph.gradients):
        if value in run.values and _memory(run.values[value]) in written:
            run.values[value] = run.values[value].clone()


def _feeds(program: Program, call: Call, seed: torch.Tensor | None) -> list[Feed]:
    """What a run reads: those of the call's tensors that it needs, and the seed of its draws."""
    graph, lasting = program.graph, len(call.parameters) + len(call.buffers)
    pairs = enumerate(zip(graph.inputs, call.tensors, strict=False))
    here = call.device
    feeds = [Feed(v, t, k < lasting and t.device == here) for k, (v, t) in pairs if v in program.read]
    if graph.seed is not None and seed is not None:
        feeds.append(Feed(graph.seed, seed, False))
    return feeds


def _handed_out(program: Program, run: Run, sinks: Mapping[int, Sink]) -> Tensors:
    """The outputs; one that is there twice, as ``loss`` and ``loss.detach()`` are, in memory of its own each time.

    In the place of one that goes elsewhere is nothing, once it is there: if no tile has put it there, it is untiled.
    """
    for k, sink in sinks.items():
        value = program.graph.outputs[k]
        if value in run.values:
            sink.put(box.full(sink.shape), run.values.pop(value))
    kept = [k for k in range(program.graph.signature.handed_out) if k not in sinks]
    values = [program.graph.outputs[k] for k in kept]
    found = [(v, run.result(v)) for v in values]
    for v, t in found:
        if v is not None and t is not None and run.values[v] is t:
            run.values[v] = t.detach()  # what autograd will hang on the output must not lead back to the run
    made = [t.clone() if v in values[:k] else t for k, (v, t) in enumerate(found) if t is not None]
    for n, (k, t) in enumerate(zip(kept, made, strict=True)):
        device, value = program.devices[k], program.graph.outputs[k]
        t = t if device_of(t.device) is device_of(device) else t.to(device)
        made[n] = laid_out(t, _strides(program, value, t, program.strides[k]))
    for k in sorted(sinks):
        made.insert(k, torch.empty(0))
    return made


def _strides(
    program: Program, value: Value | None, made: torch.Tensor, strides: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """Strides of an output or gradient; those of a rank's part of it lie in the same order."""
    share = program.plan.share
    if share is None or value is None or value not in share.parts or made.shape == value.shape:
        return strides
    return strides_as(made.shape, strides)


def _guard(program: Program, call: Call, run: Run, outputs: Tensors) -> Guard:
    """What the backward of a module will read again and anyone may change: name, tensor and its version, and whose
    memory it is, for that may get other ``data``.

    What the call itself changes, and anything small that is no parameter, is copied instead. Values that look into
    the memory of an input (a buffer seen as a row) count as it does.
    """
    given: dict[int, list[int]] = {}
    for k, t in enumerate(call.tensors):
        given.setdefault(_memory(t), []).append(k)
    made = {_memory(t): k for k, t in enumerate(outputs)}
    guard: Guard = []

    def guarded(name: str, tensor: torch.Tensor, owner: torch.Tensor | None = None) -> None:
        if not tensor.is_inference():
            guard.append((name, tensor.detach(), tensor._version, owner))  # an alias with the same version: no cycle

    for value in program.read_late & run.values.keys():
        tensor = run.values[value]
        place = _memory(tensor)
        owners = given.get(place, [])
        small = tensor.nbytes <= SMALL and all(k >= len(call.parameters) for k in owners)
        if owners and (small or any(k in program.changed for k in owners)):
            run.values[value] = tensor.clone()
        elif place in made:
            guarded(f"output {made[place]}", outputs[made[place]])
        for k in owners if run.values[value] is tensor else ():
            guarded(call.names[k], call.tensors[k], call.tensors[k])
    return guard


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided and tensor.numel() else -1


class TiledFunction(torch.autograd.Function):
    """Hands the gradients that a plan made to autograd.

    A step has its gradients when its forward ends: they are saved as autograd saves tensors, so
    they go when they are used, unless ``retain_graph`` asks to keep them. A module's plan stops
    when its outputs are ready and goes on when their gradients arrive.
    """

    @staticmethod
    def forward(ctx: Any, kept: Kept, whole: Program, call: Call, *wanted: torch.Tensor) -> Any:
        program = whole.expected()
        outputs, rerun_inputs, made = run_forward(kept, program, call, whole.rerun_inputs)
        ctx.set_materialize_grads(False)
        ctx.kept, ctx.whole, ctx.program, ctx.device = kept, whole, program, call.device
        ctx.external = sources_of(call, program.graph)
        ctx.seed, ctx.names = made.seed, [call.names[k] for k in whole.rerun_inputs]
        ctx.late, ctx.spent, ctx.begun = None, False, False
        grads = [] if program.graph.late else _gradients(program, made.run)
        if whole.variants is None:
            ctx.save_for_backward(*grads)
        else:
            pending = PendingBackward(Load(program, made if program.graph.late else None, grads))
            # Gradients that are made already are let go with the number that is saved.
            ctx.late = pending.own() if program.graph.late else None
            ctx.save_for_backward(pending.token(), *rerun_inputs)
        quiet = [t for t, yes in zip(outputs, program.differentiable, strict=True) if not yes]
        ctx.mark_non_differentiable(*quiet)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        with ctx.kept.lock:
            return _backward(ctx, *upstream)


def _backward(ctx: Any, *upstream: Any) -> Any:
    if all(g is None for g in upstream):  # of what an earlier call left in a buffer, and nothing has used
        return (None,) * len(ctx.needs_input_grad)
    if any(g is not None and is_batched(g) for g in upstream):
        raise RuntimeError(
            "is_grads_batched=True asks for several gradients at once, which a tiled module does not have; ask "
            "for them one after the other"
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True asks for gradients of gradients, which a tiled module or step does not have; use "
            "the plain module for that term, or compute it inside the forward, where it is recorded"
        )
    whole: Program = ctx.whole
    used = {k: g for k, g in enumerate(upstream) if g is not None}
    if ctx.kept.domain is not None and whole.variants is not None:
        _refuse_differing(ctx.kept.domain, used)
    if whole.variants is None:
        grads = _scaled(whole, ctx.saved_tensors, used)
    else:
        grads = _requested(ctx, used)
        if not ctx.begun and not used.keys() <= set(ctx.program.requested):
            whole.variants.guess = whole.variants.guess.union(used)  # as the next forward will be planned
        ctx.begun = True
    assert grads is not None
    return None, None, None, *(g for g, v in zip(grads, whole.gradients, strict=True) if v is not None)


def _refuse_differing(domain: Domain, used: Iterable[int]) -> None:
    """Refuse gradients of other outputs on some ranks than on others."""
    for rank, other in enumerate(found := agree(domain, sorted(used))):
        if other != found[0]:
            raise RankError(
                f"ranks differ: the backward asks for gradients of outputs {found[0]} on rank 0 and of {other} on "
                f"rank {rank}; all have to call backward of the same"
            )


def _requested(ctx: Any, used: dict[int, torch.Tensor]) -> Grads:
    """The gradients of these outputs: what the forward has prepared, or a run of its own."""
    own: PendingBackward | None = None if ctx.spent else ctx.late
    if own is not None and own.load is not None:
        _unchanged(own.load.made.guard)  # before autograd says less of it
    saved = ctx.saved_tensors
    pending = None if ctx.spent else find_pending(saved[0], own)
    load: Load | None = None if pending is None else pending.load
    grads: Grads | None = None
    if pending is not None and load is not None and used.keys() <= set(load.program.requested):
        if load.made is None:
            grads = _scaled(load.program, load.grads, used)
        else:
            ctx.spent, pending.load, ctx.late = ctx.late is not None, None, None
            grads = _finished(load.program, load.made, ctx.kept.pool, used)
    return _rerun(ctx, used, saved[1:]) if grads is None else grads


def _scaled(program: Program, grads: Sequence[torch.Tensor | None], used: dict[int, torch.Tensor]) -> Grads | None:
    """Gradients that were made with the forward; None where they were made too early."""
    (scale,) = used.values()
    # On a device the product costs less than to wait for the scale.
    if (not device_of(scale.device).on_host and not program.narrow) or not bool(scale == 1):
        if program.narrow:
            if program.variants is not None:
                return None
            raise RuntimeError(
                "a loss scale must reach float16 gradients before they are made, and those of a tiled step "
                "were made with the loss. Use bfloat16 without a scale, or fullframe.tile(net) without loss="
            )
        return [None if g is None else g * scale.to(g.dtype) for g in grads]
    return list(grads)


def _finished(program: Program, made: Made, pool: Pool, used: dict[int, torch.Tensor]) -> Grads | None:
    """Gradients by the run that made the outputs; None where zeros in the place of others spoil them."""
    _unchanged(made.guard)
    with nullcontext() if made.stores is None else made.stores.released_on_failure():
        grads = _advanced(program, made.run, used)
    if made.stores is not None:
        pool.give(made.stores)
    unused = [v for v, k in zip(_late(program), program.requested, strict=True) if k not in used]
    if not unused:
        return grads
    grads = _without(program, grads, set(_late(program)) - set(unused), unused)
    # Zero times infinity is no number.
    finite = all(g is None or bool(g.isfinite().all()) for g in grads)
    domain = made.run.domain
    return grads if finite and (domain is None or all(agree(domain, finite))) else None


def _rerun(ctx: Any, used: dict[int, torch.Tensor], saved: Sequence[torch.Tensor | None]) -> Grads:
    """Gradients of these outputs by a run of its own: the forward's part is made once more."""
    whole: Program = ctx.whole
    assert whole.variants is not None
    program = whole.rerun(frozenset(used))
    for name, tensor in zip(ctx.names, saved, strict=True):
        if tensor is None:
            raise RuntimeError(
                f"this backward makes the forward's part once more, and {name} is not what it was: the forward has "
                "changed it, or it was made in inference mode. Add up the losses and call backward once"
            )
    plan, pool = program.plan, ctx.kept.pool
    stores = pool.take(plan.bytes.stores, ctx.device, plan.bytes.spare)
    run = Run(plan, stores, ctx.device, ctx.kept.domain, ctx.external)
    fed = {whole.variants.graph.inputs[k]: t for k, t in zip(whole.rerun_inputs, saved, strict=True) if t is not None}
    if program.graph.seed is not None:
        fed[program.graph.seed] = ctx.seed
    read = [v for v in fed if v in program.read]
    run.feed(read, [fed[v] for v in read])
    with stores.released_on_failure():
        grads = _advanced(program, run, used)
    pool.give(stores)
    return grads


def _late(program: Program) -> list[Value]:
    return [v for v in program.graph.inputs if v in program.graph.late]


def _advanced(program: Program, run: Run, used: dict[int, torch.Tensor]) -> Grads:
    """The gradients, once those of the outputs are there."""
    late = _late(program)
    given = (used.get(k) for k in program.requested)
    run.feed(late, [_or_zeros(g, v, run) for g, v in zip(given, late, strict=True)])
    run.advance(len(program.plan.stages))
    return _gradients(program, run)


class LostGraph(torch.autograd.Function):
    """An output whose backward fails in plain PyTorch, for something it needs was changed in place: it fails too."""

    @staticmethod
    def forward(ctx: Any, made: torch.Tensor, why: str, fresh_leaf: torch.Tensor) -> torch.Tensor:
        ctx.why = why
        return made.detach()

    @staticmethod
    def backward(ctx: Any, *_upstream: Any) -> Any:
        raise RuntimeError(ctx.why)


def fresh_leaf() -> torch.Tensor:
    return torch.empty(0, requires_grad=True)


def _unchanged(guard: Guard) -> None:
    for name, tensor, version, owner in guard:
        if tensor._version != version or (owner is not None and _memory(owner) != _memory(tensor)):
            raise RuntimeError(
                f"{name} was changed in place, or given other data, between the forward and the backward of a tiled "
                "module, which reads it again in its backward; change it afterwards, or change a clone"
            )


def _or_zeros(given: torch.Tensor | None, value: Value, run: Run) -> torch.Tensor:
    return torch.zeros(run.shape(value), dtype=value.dtype, device=run.device) if given is None else given


def _without(program: Program, grads: Grads, used: Iterable[Value], unused: Iterable[Value]) -> Grads:
    """None for what only outputs that the loss left out depend on, as in PyTorch."""
    ops = program.graph.ops
    reached, left_out = followers(ops, used), followers(ops, unused)
    pairs = zip(program.graph.gradients, grads, strict=True)
    return [None if v in left_out and v not in reached else g for v, g in pairs]


def _gradients(program: Program, run: Run) -> Grads:
    found = zip(program.graph.gradients, program.strides[program.graph.signature.handed_out :], strict=True)
    made = ((v, run.result(v), s) for v, s in found)
    return [t if t is None else laid_out(t, _strides(program, v, t, s)) for v, t, s in made]
