"""One call taken apart: the tensors it reads in a fixed order, and the key of its recording."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fullframe import torch_compat
from fullframe.device import DEVICES
from fullframe.frontend.destinations import outline
from fullframe.frontend.fields import digest
from fullframe.frontend.guards import GuardSnapshot
from fullframe.frontend.opaque_leaves import value
from fullframe.frontend.reads import EVERYTHING, Reads
from fullframe.frontend.replaced import functions_version
from fullframe.storage.external import Source, is_source, kind_of
from fullframe.torch_compat import is_lazy, pytree

Tensors = list[torch.Tensor]


class Pair(nn.Module):
    """Module and criterion under one root, so that both have their parameters replaced."""

    def __init__(self, module: nn.Module, criterion: Callable[..., Any] | None):
        super().__init__()
        self.module = module
        self.criterion = criterion

    def forward(self, args: Any, kwargs: Any, then: Callable[[Any], Any] | None = None) -> Any:
        """The call's result, or what ``then`` makes of it while the parameters are still replaced."""
        made = (
            self.module(*args, **kwargs) if self.criterion is None else self.criterion(self.module(args[0]), args[1])
        )
        return made if then is None else then(made)


def _everywhere() -> list[Any]:
    """Hooks of all modules, and modes that see every call: other than none, seldom."""
    hooks = [list(table.values()) for table in torch_compat.global_hooks().values() if table]
    # Weights that `parametrize.cached` keeps are left behind by one call and read by the next.
    return [*hooks, *torch_compat.function_modes(), *torch_compat.cached_weights()]


class Call:
    """A call of a tiled module.

    ``tensors`` holds everything with numbers: parameters, buffers, ``others`` (tensors met in
    attributes, closures and the like), inputs. They are read where they live at each call, and what the
    step changes in place is changed there. ``sources``, by the number of the input, are objects that are
    read region by region; among the inputs each has a stand-in of its shape and dtype without numbers, a
    meta tensor. ``out`` says where outputs go that are not handed out (`frontend.destinations`).
    """

    def __init__(self, pair: Pair, args: Any, kwargs: Any, out: Any = None):
        if out is not None and torch.is_grad_enabled():
            raise ValueError(
                "out= is for calls without gradients, which an object that outputs are written to cannot have; call "
                "under torch.no_grad() or torch.inference_mode()"
            )
        self.pair, self.out = pair, out
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.sources = self._take_sources()
        if self.sources:
            args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        self.args, self.kwargs = args, kwargs
        self._given = args[:1] if pair.criterion is not None else (args, kwargs)  # what the module is given
        self.inputs: Tensors = [x for x in self.leaves if isinstance(x, torch.Tensor)]
        if pair.criterion is not None and (len(args) != 2 or kwargs):
            given = f"{len(args)} arguments" + (f" and {sorted(kwargs)} by name" if kwargs else "")
            raise TypeError(f"a tiled step takes an input and a target, step(input, target); got {given}")
        for k, x in enumerate(self.inputs):
            if 0 in x.shape:
                raise ValueError(f"input {k} has shape {tuple(x.shape)}, without elements; leave that batch out")
        modules = list(pair.named_modules())
        self.parameters: dict[str, torch.Tensor] = _registered(modules, "_parameters")
        self.buffers: dict[str, torch.Tensor] = _registered(modules, "_buffers")
        for name, t in (*self.parameters.items(), *self.buffers.items()):
            if is_lazy(t):
                raise ValueError(
                    f"{name.removeprefix('module.')} has no shape yet; call the plain module once, on a small input, "
                    "before it is tiled"
                )
        self.roots = [pair, args, kwargs, _everywhere()]
        self.grad = torch.is_grad_enabled()
        self._snapshot: GuardSnapshot | None = None
        self._others: Tensors = []
        # Of each input the axis along which ranks have shards of it, and where they begin; None: each has all of it.
        self.shards: tuple[tuple[int, tuple[int, ...]] | None, ...] = ()
        self.undo: Callable[[], None] | None = None  # puts back what the recording of this call did in Python

    def _take_sources(self) -> dict[int, Source]:
        """The inputs that are read region by region, each with a stand-in put in its place among the leaves."""
        numbers = [k for k, x in enumerate(self.leaves) if isinstance(x, torch.Tensor) or is_source(x)]
        tensors = [self.leaves[k] for k in numbers if isinstance(self.leaves[k], torch.Tensor)]
        if len(tensors) == len(numbers):
            return {}
        tensors = tensors or [*self.pair.parameters(), *self.pair.buffers()]
        device = max(tensors, key=lambda t: t.dim()).device if tensors else torch.device("cpu")
        found: dict[int, Source] = {}
        for number, k in enumerate(numbers):
            thing = self.leaves[k]
            if isinstance(thing, torch.Tensor):
                continue
            if getattr(thing, "requires_grad", False):
                raise ValueError(
                    f"input {number}, a {kind_of(thing)}, asks for a gradient, which what is read region by region "
                    "cannot have; give a tensor"
                )
            found[number] = Source(thing, f"input{number}", device)
            self.leaves[k] = torch.empty(found[number].shape, dtype=found[number].dtype, device="meta")
        return found

    def take_snapshot(self, reads: Reads, snapshot: GuardSnapshot | None = None) -> None:
        """See what is in reach, as far as a recording has read it; the ``snapshot`` may have been made already."""
        snapshot = (
            GuardSnapshot(self.roots, reads.choice(), self.entries(reads.passed)) if snapshot is None else snapshot
        )
        known = {id(t) for t in (*self.parameters.values(), *self.buffers.values(), *self.inputs)}
        self._snapshot, self._others = snapshot, [t for t in snapshot.tensors if id(t) not in known]

    @property
    def snapshot(self) -> GuardSnapshot:
        """What is in reach: all of it, unless the call was told to `take_snapshot` otherwise."""
        if self._snapshot is None:
            self.take_snapshot(EVERYTHING)
        assert self._snapshot is not None
        return self._snapshot

    @property
    def others(self) -> Tensors:
        """Tensors in reach that are neither parameters, buffers nor inputs."""
        return self._others if self.snapshot else []

    def entries(self, leaves: Sequence[int]) -> frozenset[tuple[int, Any]]:
        """Leaves of the arguments, by number, as entries of containers, by id and key or position."""
        return frozenset(e for k, e in enumerate(_entries((self.args, self.kwargs))) if k in leaves)

    @property
    def tensors(self) -> Tensors:
        return [*self.parameters.values(), *self.buffers.values(), *self.others, *self.inputs]

    @property
    def names(self) -> list[str]:
        names = [n.removeprefix("module.") for n in (*self.parameters, *self.buffers)]
        names += [f"attribute{k}" for k in range(len(self.others))]
        return names + [f"input{k}" for k in range(len(self.inputs))]

    @property
    def spatial(self) -> list[tuple[int, ...]]:
        """For each input the spatial axes that tiles follow, none where it is no image.

        Images are floating point tensors (batch, channels, spatial axes), and such of whole numbers
        (bytes, say) that the module is given; one of three axes may be a map of labels, whose second
        axis is spatial too. Targets of whole numbers follow the output that they are compared with.
        """
        count = sum(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(self._given))
        found = []
        for k, x in enumerate(self.inputs):
            numbers = x.is_floating_point() or x.is_complex()
            image = x.dim() >= 3 and (numbers or k < count)
            first = 2 if numbers or x.dim() > 3 else 1
            found.append(tuple(range(first, x.dim())) if image else ())
        return found

    @property
    def device(self) -> torch.device:
        """Where the images are, or are to be read to."""
        for source in self.sources.values():
            return source.device
        found = self.inputs or self.tensors
        return max(found, key=lambda t: t.dim()).device if found else torch.device("cpu")

    def key(self, reads: Reads = EVERYTHING) -> Any:
        """What a recording has read, after the call was looked at by the same ``reads``."""
        autocast = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in DEVICES)
        modes = (
            self.grad, autocast, torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
            functions_version(),
        )  # fmt: skip
        tensors = self.tensors if reads.numbers else []
        numbers = tuple(_numbers(tensors[k]) if k < len(tensors) else None for k in reads.numbers)
        details = tuple(self.snapshot.details) if reads.details else None
        return (
            self.snapshot.key,
            str(self.spec),
            modes,
            tuple(read() for read in torch_compat.SWITCHES),
            numbers,
            details,
            frozenset(self.sources),
            outline(self.out),
        )

    @property
    def values(self) -> tuple[int, ...]:
        """Numbers of the leaves, other than tensors, that a step may only hand on."""
        if all(isinstance(x, torch.Tensor) for x in self.leaves):
            return ()
        entries = _entries((self.args, self.kwargs))
        return tuple(
            k for k, (x, e) in enumerate(zip(self.leaves, entries, strict=True)) if e is not None and value(x)
        )

    def rebuild(self, inputs: Sequence[torch.Tensor], opaque: Mapping[int, Any] | None = None) -> tuple[Any, Any]:
        """Arguments and keyword arguments with other tensors in place of the inputs, and some leaves ``opaque``."""
        found, opaque = iter(inputs), opaque or {}
        leaves = [next(found) if isinstance(x, torch.Tensor) else opaque.get(k, x) for k, x in enumerate(self.leaves)]
        return pytree.tree_unflatten(leaves, self.spec)


def _registered(modules: Sequence[tuple[str, nn.Module]], table: str) -> dict[str, torch.Tensor]:
    """Parameters or buffers by name, each once, as `named_parameters` and `named_buffers` have them of these modules.

    Those would walk over all modules each, which is much of a short step.
    """
    found: dict[str, torch.Tensor] = {}
    met: set[int] = set()
    for prefix, module in modules:
        for name, tensor in getattr(module, table).items():
            if tensor is not None and id(tensor) not in met:
                met.add(id(tensor))
                found[f"{prefix}.{name}" if prefix else name] = tensor
    return found


def _entries(thing: Any, place: Any = None) -> Iterator[Any]:
    """Each leaf, in the order of pytree's, as an entry of a container; None for what is in no plain one."""
    if type(thing) in (dict, OrderedDict):
        for key, value in thing.items():
            yield from _entries(value, (id(thing), key))
    elif type(thing) in (list, tuple):
        for k, value in enumerate(thing):
            yield from _entries(value, (id(thing), k))
    else:
        leaves = pytree.tree_leaves(thing)
        yield from [place] if len(leaves) == 1 and leaves[0] is thing else [None] * len(leaves)


def _numbers(tensor: torch.Tensor) -> bytes:
    """The numbers of a tensor, in short."""
    return digest(bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()))
