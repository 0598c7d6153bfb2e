"""``fullframe.tile``: the tiled module and the tiled step, and their place in autograd."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from fullframe.autograd import Kept, LostGraph, TiledFunction, fresh_leaf, revive, run_forward
from fullframe.budget import host_cores, parse_bytes
from fullframe.capture.ambient import refuse_modes, uncompiled
from fullframe.capture.conditions import Diverged
from fullframe.capture.subclasses import with_class
from fullframe.capture.threads import RECORDING, ForkSafeLock
from fullframe.capture.trace import nested, recording
from fullframe.compiler.agreement import all_have_recorded, share_parameters, telling, whole_call
from fullframe.compiler.measures import disk_rate
from fullframe.compiler.pipeline import compile_call
from fullframe.compiler.program import Options, Program
from fullframe.device import device_of
from fullframe.distributed.mesh import DeviceMesh, Domain
from fullframe.errors import LOG, CaptureError, fall_back
from fullframe.frontend.destinations import destinations, takes_out
from fullframe.frontend.inputs import Call, Pair, Tensors
from fullframe.frontend.recapture_reasons import Changes
from fullframe.runtime.execution_paths import Idle, Key, Programs, keep, keys, matching, warn_of_paths
from fullframe.runtime.explain import explain
from fullframe.runtime.forecast import seconds_of
from fullframe.runtime.replay_cuda import CudaReplays
from fullframe.schedule.budgets import PLENTY, Budgets, budgets
from fullframe.schedule.plan import Plan
from fullframe.schedule.planner import plan as planned_for
from fullframe.schedule.saved_plan import SavedPlan, load
from fullframe.storage.disk_rate import USUAL
from fullframe.storage.pool import Pool
from fullframe.storage.protocol import DISK
from fullframe.storage.unnamed_file import disk_folder
from fullframe.torch_compat import current_transform, forward_mode


class Tiled(nn.Module):
    """A module that runs tile by tile; made by `fullframe.tile`.

    Shares parameters, buffers and submodules with the module it wraps: ``state_dict``, ``to``,
    optimisers and hooks see the same objects under the same names, and attributes are read from and
    written to the wrapped module.
    """

    def __init__(self, module: nn.Module, criterion: Callable[..., Any] | None, options: Options,
                 pool: Pool | None = None):  # fmt: skip
        super().__init__()
        state: dict[str, Any] = {"pair": Pair(module, criterion), "options": options, "pool": pool or Pool()}
        self.__dict__["_fullframe"] = state | _empty()
        for name in SHARED:
            self.__dict__[name] = getattr(module, name)  # of a traced module not in its dictionary
        self.__dict__["training"] = getattr(module, "training", False)  # which a frozen one does not have

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        return self._fullframe["pair"].module

    def train(self, mode: bool = True) -> Tiled:
        """Set training mode, of the criterion too."""
        self.__dict__["training"] = mode
        self._fullframe["pair"].train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Tiled:
        self._fullframe["pair"]._apply(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        # Reached only where the usual ways find nothing: plain attributes of the wrapped module.
        inner = self.__dict__.get("_fullframe")
        if inner is None:
            raise AttributeError(name)
        return getattr(inner["pair"].module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A method put in another's place is this module's, whose own it may call; so is a method kept for later.
        replaces = callable(value) and callable(getattr(Tiled, name, None)) and not name.startswith("__")
        if name == "__class__":  # as code does that adds methods to a module, which is this one
            object.__setattr__(self, name, value)
        elif name in OWN or replaces or getattr(value, "__self__", None) is self:
            self.__dict__[name] = value
            if name == "training" and isinstance(value, bool):  # as code does that puts back what it found
                self.module.training = value
        else:
            setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ and name not in OWN:
            del self.__dict__[name]
        else:
            delattr(self.module, name)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        pool = Pool(state["_fullframe"]["pool"].told)
        state["_fullframe"] = state["_fullframe"] | _empty() | {"pool": pool}
        return state

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's."""
        return self.module.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.module._load_from_state_dict(*args, **kwargs)  # when the tiled module is part of another

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these inputs, before anything runs; printable, with the time that a step will take
        (`Plan.predicted_seconds`, which measures some of its ops). Raises what the call would refuse.

        Examples:
            >>> import torch, fullframe
            >>> plan = fullframe.tile(torch.nn.Conv2d(1, 2, 3), budget="1 GB").plan(torch.zeros(1, 1, 32, 32))
            >>> plan.projected_bytes < plan.budget
            True
        """
        with self._fullframe["lock"], RECORDING:
            call = self._call(args, kwargs)[0]
            return _timed(self._program(call).plan, call)

    def budgets(self, *args: Any, **kwargs: Any) -> Budgets:
        """What other budgets would buy for these inputs, from the fastest plan to the smallest, before anything runs.

        At most eight budgets at equal ratios, whatever the one that this module was given, and with its disk. Each is
        planned: for a network of thousands of ops the smaller ones take some ten seconds each. Printable as a table;
        an entry has ``budget`` and ``projected`` in bytes, ``arithmetic`` as a multiple of the fastest plan's, the
        bytes that a step has ``read`` from the disk and ``written`` there, and the ``seconds`` that it will take.
        Raises what the call would refuse for another reason than its budget.

        Examples:
            >>> import torch, fullframe
            >>> choices = fullframe.tile(torch.nn.Conv2d(1, 2, 3), budget="1 GB").budgets(torch.zeros(1, 1, 32, 32))
            >>> choices[0].arithmetic
            1.0
        """
        options = replace(self._fullframe["options"], budget=PLENTY, saved=None)
        with self._fullframe["lock"], RECORDING:
            call = self._call(args, kwargs)[0]
            program = compile_call(call, options)
        request, windows = program.request, device_of(call.device).windows
        assert request is not None

        def planned(budget: int) -> Plan:
            window = budget // windows if windows else 0
            return _timed(planned_for(program.graph, replace(request, budget=budget, window=window)), call)

        return budgets(planned)

    def _call(self, args: Any, kwargs: Any) -> tuple[Call, Tensors | None]:
        """The call as it is recorded, with ``out`` taken from its keywords if it is not the module's own; and the
        tensors with which it runs, where those are parts of others."""
        pair, domain = self._fullframe["pair"], self._fullframe["options"].domain
        out = None
        if "out" in kwargs and pair.criterion is None and not takes_out(pair.module):
            kwargs = dict(kwargs)
            out = kwargs.pop("out")
        if domain is None:
            return Call(pair, args, kwargs, out), None
        if not self._fullframe["shared"]:
            share_parameters(domain, pair, _settings(self._fullframe["options"]))
            self._fullframe["shared"] = True
        return whole_call(domain, pair, args, kwargs, out)

    def explain(self) -> str:
        """In words, how the last call ran and why: its capture, kernels, tiles, ops run whole, and where maps live.

        Examples:
            >>> import torch, fullframe
            >>> step = fullframe.tile(torch.nn.Conv2d(1, 2, 3), budget="1 GB")
            >>> print(step.explain())
            no call has run
            >>> _ = step(torch.zeros(1, 1, 32, 32))
            >>> print(step.explain().splitlines()[0])
            capture: made in this call (the first)
        """
        with self._fullframe["lock"]:
            last = self._fullframe["last"]
            return "no call has run" if last is None else explain(*last)

    @uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pair = self._fullframe["pair"]
        if recording():
            with nested(pair):
                return pair(args, kwargs)  # part of a larger module that is being recorded
        with self._fullframe["lock"]:
            return self._tiled(args, kwargs)

    def _tiled(self, args: Any, kwargs: Any) -> Any:
        with RECORDING:  # another thread's recording must not be met by the guard snapshot either
            call, own = self._call(args, kwargs)
            _refuse_transforms(call)
            refuse_modes()
            program = self._program(call)
        call.inputs = call.inputs if own is None else own
        domain = self._fullframe["options"].domain
        kept = Kept(self._fullframe["pool"], self._fullframe["replays"], self._fullframe["lock"], domain)
        program, made, shadows = self._run(kept, program, call)
        self._fullframe["last"] = program, call.device, self._fullframe["made"]
        if not program.reached:  # in plain PyTorch they have a graph all the same
            yes = program.differentiable
            made = [Idle.apply(t, fresh_leaf()) if y else t for t, y in zip(made, yes, strict=True)]
        made = [
            LostGraph.apply(t, program.lost[k], fresh_leaf()) if k in program.lost else t for k, t in enumerate(made)
        ]
        made = [with_class(*pair) for pair in zip(made, shadows, strict=True)] if shadows else made
        program.leave(call, made)
        revive(program, call, made)
        for k, sink in destinations(call.out, program.returned).items():
            made[k] = sink.thing
        return program.assemble(call, made)

    def _run(self, kept: Kept, program: Program, call: Call) -> tuple[Program, Tensors, Any]:
        """The program of the way that a call takes, the tensors that it hands out, and whose class those have."""
        drawn = torch.get_rng_state() if program.conditions else None
        attempt = 0
        while True:
            _refuse_retained(program, call)
            shadows = program.output_classes.shadows(call.tensors)  # before anything is changed: it may be refused
            wanted = [call.tensors[k] for k in program.reached]
            try:
                with torch.inference_mode(False):
                    if wanted:
                        return program, list(TiledFunction.apply(kept, program, call, *wanted)), shadows
                    return program, run_forward(kept, program, call)[0], shadows
            except Diverged as diverged:
                assert drawn is not None
                torch.set_rng_state(drawn)
                attempt += 1
                with RECORDING:
                    program = self._program(call, diverged, attempt)

    def _program(self, call: Call, diverged: Diverged | None = None, attempt: int = 0) -> Program:
        """The program of a call, or of the way it takes where conditions are not as they were assumed."""
        programs: Programs = self._fullframe["programs"]
        known = () if diverged is None else diverged.answers
        if call.undo is not None:
            call.undo()
            call.undo = None
        match = next(matching(call, programs, known), None)
        domain = self._fullframe["options"].domain
        if domain is not None and not all_have_recorded(domain, None if match is None else programs[match].plan):
            match = None
        if match is not None:
            key, found = match[:2], programs[match]
            self._fullframe["made"] = ""
        else:
            if not device_of(call.device).on_host:  # what is kept for other sizes is free for this one
                self._fullframe["replays"].release(self._fullframe["pool"])
                self._fullframe["pool"].clear()
            values: Values = self._fullframe["values"]
            tried = values.unread(call)
            paths = 0 if diverged is None else len(list(matching(call, programs)))
            with telling(domain):
                found = compile_call(call, self._fullframe["options"], tried, known)
            if diverged is not None:
                warn_of_paths(max(paths, attempt), diverged.where)
            key = found.reads, call.key(found.reads)
            values.note(call, found, tried)
            if not found.reads.passed and not (diverged is not None and found.moved):
                self._fullframe["changes"].note(call, found.reads, found.moved)
            self._captured(found, diverged)
        if found.lasting:
            keep(programs, key, found, KEPT)
        return found

    def _captured(self, program: Program, diverged: Diverged | None) -> None:
        """Tell that a call was recorded, and why, and which of its ops have no rule."""
        reason = self._fullframe["changes"].reason or "the first"
        made = reason if diverged is None else f"the data take another path at {diverged.where}"
        self._fullframe["made"] = made
        LOG.info("captured a call (%s): %d ops, %d bytes projected of a budget of %d", made,
                 len(program.graph.ops), program.plan.projected_bytes, program.plan.budget)  # fmt: skip
        for name in program.plan.whole:
            fall_back(f"{name} runs whole, not tile by tile: it has no rule")


class Values:
    """Texts and numbers in the arguments, and in which calls they were all that was new."""

    def __init__(self) -> None:
        self.calls: dict[Key, None] = {}  # keys of the calls recorded, without them
        self.read: dict[str, set[int]] = {}  # which of them steps read, by the structure of the arguments

    def unread(self, call: Call) -> set[int]:
        """Those that may not matter: in all else the call is as one that was recorded."""
        found = set(call.values) - self.read.get(str(call.spec), set())
        return found if found and any(k in self.calls for k in keys(call, self.calls)) else set()

    def note(self, call: Call, program: Program, tried: set[int]) -> None:
        """Remember a call that was just recorded, with some of them ``tried``."""
        if tried:
            self.read.setdefault(str(call.spec), set()).update(tried - set(program.reads.passed))
        if program.lasting and (values := call.values):
            reads = replace(program.reads, passed=values)
            call.take_snapshot(reads)
            self.calls[reads, call.key(reads)] = None
            while len(self.calls) > KEPT:
                del self.calls[next(iter(self.calls))]
            call.take_snapshot(program.reads)


def _refuse_transforms(call: Call) -> None:
    """Refuse torch.func's transforms and forward-mode gradients, which a recorded step would leave out."""
    transformed = current_transform() is not None
    if not transformed and forward_mode():
        transformed = any(forward_ad.unpack_dual(t).tangent is not None for t in call.tensors)
    if transformed:
        raise CaptureError(
            "torch.func's transforms (vmap, grad, vjp, jvp, jacrev) and forward-mode gradients do not reach into a "
            "tiled module or step; use the plain module there, or backward() for gradients"
        )


_Bytes = int | str | None
KEPT = 16  # recordings kept; the least recently used goes first
SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_load_state_dict_post_hooks")
OWN = frozenset(("training", "_compiled_call_impl", *nn.Module().__dict__)) - frozenset(SHARED)


def _timed(plan: Plan, call: Call) -> Plan:
    """A plan that says how long a step will take, where that is known."""
    known = device_of(call.device).on_host and plan.share is None
    return plan.timed_by(seconds_of) if known else plan


def _empty() -> dict[str, object]:
    return {
        "programs": {},
        "values": Values(),
        "changes": Changes(),
        "last": None,
        "made": "",
        "replays": CudaReplays(),
        "lock": ForkSafeLock(),
        "shared": False,
    }


def _refuse_retained(program: Program, call: Call) -> None:
    for k in program.alive:
        if call.tensors[k].retains_grad:
            raise CaptureError(
                f"the forward changes {call.names[k]} in place, of which retain_grad() asks for the gradient before "
                "that; give the module a clone"
            )


def tile(  # noqa: PLR0913
    module: nn.Module,
    *,
    loss: Callable[..., Any] | None = None,
    budget: int | str | None = None,
    tile: int | Sequence[int] | None = None,
    workers: int | None = None,
    disk: int | str | None = None,
    folder: str | os.PathLike[str] | None = None,
    mesh: DeviceMesh | None = None,
    plan: str | os.PathLike[str] | None = None,
) -> Tiled:
    """Run a module, or its training step, tile by tile within a memory budget.

    ``tile(module)`` has the module's call, output and gradients. ``tile(module, loss=criterion)`` is a step:
    ``step(input, target)`` equals ``criterion(module(input), target)``. Tensors that the forward or its hooks keep in
    attributes, lists or dictionaries lie there after every call; those of a step are detached. Inputs and targets may
    be read by regions from what has a shape, a dtype and slices (`numpy.memmap`, HDF5, Zarr, an object of one's own;
    ValueError if it returns another region), and outputs written there: ``tiled(x, out=thing)``, without gradients.

    Args:
        module: any convolutional network, shared with the caller, not copied.
        loss: a function or Module of (output, target) that returns a scalar, or several tensors in tuples, lists or
            dicts, each of which has its gradient. The first scalar is taken for the loss, and its gradients are made
            with the forward; the first backward that asks for others makes it again, and later steps are planned so.
        budget: bytes, or text such as "8 GB" or "7.5 GiB": all that the step keeps and uses beyond inputs, parameters
            and gradients. None: what is free under the container's limit.
        tile: forces the tile, in pixels of the input: one extent per spatial axis or one for all.
        workers: threads over tiles on the CPU; None: one per core.
        disk: bytes, or text, that maps may take on a disk, in a file without a name (None: none). Speeds are measured
            once a month, or told: FULLFRAME_DISK_RATE in MB/s, FULLFRAME_ARITHMETIC_RATE in million operations/s.
        folder: where that file lies; None: the system's temporary folder. It may not be in memory itself (tmpfs).
        mesh: a `DeviceMesh` of one dimension, ``domain`` (first spatial axis) or ``data`` (batch), whose processes
            make the step together, each with this budget: a call takes a part of inputs and targets and gives that of
            outputs; loss, gradients and buffers are those of the whole; parameters begin as the first rank's.
        plan: a file of `Plan.save`, which brings budget, disk and workers: the plan is that one, or it is an error.

    Raises:
        BudgetError: (at the first call) no plan fits the budget, with the disk there is; it names the smallest.
        OSError: the folder cannot be used; (at a call) the disk is full or fails, and nothing has changed.
        CaptureError: the step depends on data or randomness that a recording would freeze.
        UnsupportedOpError: an op must run whole and does not fit.
        RankError: (at a call) ranks differ, which is told by name, or another has failed; nothing is changed on any.

    Examples:
        >>> import torch, fullframe
        >>> net = torch.nn.Conv2d(1, 2, 3, padding=1)
        >>> step = fullframe.tile(net, loss=torch.nn.functional.cross_entropy, budget="1 GB")
        >>> step(torch.zeros(1, 1, 32, 32), torch.zeros(1, 32, 32, dtype=torch.long)).backward()
        >>> net.weight.grad.shape
        torch.Size([2, 1, 3, 3])
    """
    saved, budget, workers, disk = _saved(plan, budget, workers, disk, mesh)
    nbytes = None if budget is None else parse_bytes(budget)
    extents, threads = _extents(tile), _threads(workers)
    if loss is not None and not callable(loss):
        raise TypeError(f"loss={loss!r} must be a function or Module of (output, target)")
    on_disk, told, rate = _disk(budget, disk, folder)
    options = Options(nbytes, extents, threads, on_disk, _domain(mesh, disk), saved, saved.rate if saved else rate)
    return Tiled(module, loss, options, Pool(told))


def _saved(
    path: str | os.PathLike[str] | None, budget: _Bytes, workers: int | None, disk: _Bytes, mesh: DeviceMesh | None
) -> tuple[SavedPlan | None, _Bytes, int | None, _Bytes]:
    """A plan that was saved, and budget, workers and disk: its own, or those that are given where there is none."""
    if path is None:
        return None, budget, workers, disk
    others = {"budget": budget, "workers": workers, "disk": disk, "mesh": mesh}
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ValueError(f"plan= brings its own budget, disk and workers; leave out {given[0]}=")
    found = load(path)
    return found, found.budget, found.workers, found.disk or None


def _domain(mesh: DeviceMesh | None, disk: int | str | None) -> Domain | None:
    if mesh is not None and disk is not None:
        raise ValueError("mesh= and disk= together are not supported: maps of a rank lie in memory; leave one out")
    return None if mesh is None else Domain(mesh)


def _settings(options: Options) -> dict[str, object]:
    """What ranks have to be told alike."""
    return {"budget=": options.budget, "tile=": options.tile, "workers=": options.workers}


def _threads(workers: int | None) -> int:
    if workers is not None and not _whole(workers):
        raise TypeError(f"workers={workers!r} must be a whole number of threads")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be positive; leave it out for one per core")
    return workers or host_cores()


def _disk(
    budget: int | str | None, disk: int | str | None, folder: str | os.PathLike[str] | None
) -> tuple[int, dict[str, dict[str, object]], int]:
    """Bytes on disk that maps may take, what the store is told of their folder, and how fast it is."""
    if disk is None:
        if folder is not None:
            raise ValueError(f"folder={str(folder)!r} is where maps lie on disk, of which there are none; give disk=")
        return 0, {}, USUAL
    if budget is None:
        raise ValueError(f"disk={disk!r} is for maps that do not fit a budget, and there is none; give budget=")
    found = disk_folder(folder)
    return parse_bytes(disk, "disk"), {DISK: {"folder": found}}, disk_rate(found)


def _extents(tile: Any) -> int | tuple[int, ...] | None:
    if tile is None:
        return None
    several = isinstance(tile, Iterable) and not isinstance(tile, (str, bytes))
    extents: tuple[Any, ...] = tuple(tile) if several else (tile,)
    if not all(_whole(n) for n in extents):
        raise TypeError(f"tile={tile!r} must be a whole number of pixels of the input, or one for each spatial axis")
    if any(n < 1 for n in extents):
        raise ValueError(f"tile={tile} must be positive, in pixels of the input")
    whole = tuple(int(n) for n in extents)
    return whole if several else whole[0]


def _whole(number: object) -> bool:
    """Whether this is a whole number, of NumPy's say, and no switch."""
    return hasattr(type(number), "__index__") and not isinstance(number, (bool, torch.Tensor))
