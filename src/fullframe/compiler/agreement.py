"""What ranks agree on before a step: parameters, the shape of the whole images, the graph, and one plan.

Each rank records the step by itself, for images of the whole shape: a recording looks at shapes and not at numbers,
so it is given tensors whose memory nobody touches. That all have recorded the same is compared, and told by name
where they have not; the plan is made by the first rank and sent to the others, with values and ops by their numbers
in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from itertools import accumulate
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fullframe.bytecode.libtorch import bytecode_available
from fullframe.codegen.toolchain import cxx
from fullframe.compiler.kept_plans import digest_of, lines_of, packed, plan_of, unpacked
from fullframe.device import device_of
from fullframe.distributed.exchange import agree, together, told
from fullframe.distributed.mesh import Domain
from fullframe.errors import CaptureError, FullframeError, RankError
from fullframe.frontend.inputs import Call, Pair, Tensors
from fullframe.ir.graph import Graph
from fullframe.schedule.plan import Plan
from fullframe.schedule.request import Request
from fullframe.schedule.shares import localized
from fullframe.schedule.split import Split
from fullframe.storage.arena import strides_as
from fullframe.version import __version__

Bounds = tuple[int, ...]
AGREED: WeakKeyDictionary[Plan, str] = WeakKeyDictionary()
"""By the plan of a rank what all have recorded, in short."""


class Described(NamedTuple):
    """A tensor that a rank is given: what has to be the same on all, but for the extent of the divided axis."""

    axis: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    wants_gradient: bool
    order: tuple[int, ...]  # strides, if it had no gaps
    numbers: str  # of one that every rank has in full

    def alike(self, other: Described) -> bool:
        """Whether both may be shards of one tensor, or are the same tensor."""
        cut = [tuple(n for a, n in enumerate(d.shape) if a != d.axis) for d in (self, other)]
        same = self[2:4] == other[2:4] and self.axis == other.axis and self.numbers == other.numbers
        return same and cut[0] == cut[1] and len(self.shape) == len(other.shape)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}{list(self.shape)}{' that wants a gradient' if self.wants_gradient else ''}"


# Once ----------------------------------------------------------------------------------------------


def share_parameters(domain: Domain, pair: Pair, settings: dict[str, object]) -> None:
    """Compare versions, settings and networks, and give all ranks the first one's parameters and buffers.

    Raises `RankError` with the name of the first thing in which ranks differ.
    """
    named = {n.removeprefix("module."): t for n, t in (*pair.named_parameters(), *pair.named_buffers())}
    about = settings | {
        "torch": torch.__version__, "fullframe": __version__, "kernels": cxx.isa(),
        "bytecode": bytecode_available(),
    }  # fmt: skip
    tensors = {n: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for n, t in named.items()}
    found = agree(domain, (about, tensors), _refused(named))
    for kind, number in (("", 0), ("the network's ", 1)):
        first = found[0][number]
        for rank, other in enumerate(found):
            for name in dict.fromkeys((*first, *other[number])):
                mine, theirs = first.get(name, "nothing"), other[number].get(name, "nothing")
                if mine != theirs:
                    raise RankError(f"ranks differ: {kind}{name} is {mine} on rank 0 and {theirs} on rank {rank}")
    domain.broadcast(named.values())


def _refused(named: dict[str, torch.Tensor]) -> Exception | None:
    for name, tensor in named.items():
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            return CaptureError(
                f"{name} is a {type(tensor).__name__}, and a step over a mesh takes parameters that every rank has "
                "in full; leave out fully_shard or what else has divided them"
            )
    return None


# Each call -----------------------------------------------------------------------------------------


def whole_call(
    domain: Domain, pair: Pair, args: tuple[object, ...], kwargs: dict[str, object], out: object = None
) -> tuple[Call, Tensors]:
    """The call as one process would be given it, with tensors that have a shape and no numbers, and this rank's own
    tensors in their place, to be run with."""
    described: list[Described] = []
    call, failed = None, None
    try:
        call = Call(pair, args, kwargs, out)
        described = _described(domain, call)
    except Exception as error:
        failed = error
    found = agree(domain, described, failed)
    assert call is not None
    bounds = [_bounds(domain, k, [d[k] for d in found]) for k in range(len(described))] if _counts(found) else []
    made = []
    for d, b in zip(described, bounds, strict=True):
        shape = (
            d.shape
            if b is None or d.axis is None
            else tuple(b[-1] if a == d.axis else n for a, n in enumerate(d.shape))
        )
        stand_in = torch.empty_strided(shape, strides_as(shape, d.order) or (), dtype=d.dtype)
        made.append(stand_in.requires_grad_(d.wants_gradient))
    whole = Call(pair, *call.rebuild(made))
    whole.shards = tuple(
        None if b is None or d.axis is None else (d.axis, b) for d, b in zip(described, bounds, strict=True)
    )
    return whole, call.inputs


def _described(domain: Domain, call: Call) -> list[Described]:
    if call.sources or call.out is not None:
        name = next((s.name for s in call.sources.values()), "out=")
        raise CaptureError(
            f"mesh= and what is read or written by regions ({name}) together are not supported; give each rank its "
            "own rows as tensors"
        )
    images = [x for x, axes in zip(call.inputs, call.spatial, strict=True) if axes]
    if not images:
        raise CaptureError(
            "mesh= divides images among ranks, and no input is one: give a tensor of batch, channels and spatial axes"
        )
    return [_one(domain, k, x, images[0]) for k, x in enumerate(call.inputs)]


def _one(domain: Domain, k: int, x: torch.Tensor, image: torch.Tensor) -> Described:
    if type(x) is not torch.Tensor or x.layout is not torch.strided or not device_of(x.device).on_host:
        raise CaptureError(
            f"input {k} is a {type(x).__name__} of layout {x.layout} on {x.device}, and a step over a mesh takes "
            "plain tensors on the processor: give each rank its own rows (of a DTensor, to_local())"
        )
    axis = axis_of(domain.name, x, image)
    numbers = "" if axis is not None else digest_of(x)
    order = tuple(x.stride())
    return Described(axis, tuple(x.shape), x.dtype, x.requires_grad, order, numbers)


def axis_of(name: str, x: torch.Tensor, image: torch.Tensor) -> int | None:
    """The axis along which an input comes in shards, as the image beside it does; None: each rank has all of it.

    Maps without channels, of labels say, have one axis less. What has one pixel beside an image of many is no image.
    """
    if name == "data":
        return 0 if x.dim() > 0 else None
    if x.dim() == image.dim():
        return 2 if any(n > 1 for n in x.shape[2:]) or all(n == 1 for n in image.shape[2:]) else None
    maps = x.dim() == image.dim() - 1 and (x.dim() > 2 or not x.is_floating_point())
    return 1 if maps else None


def _counts(found: Sequence[list[Described]]) -> bool:
    for rank, described in enumerate(found):
        if len(described) != len(found[0]):
            raise RankError(
                f"ranks differ: rank 0 is given {len(found[0])} tensors, and rank {rank} {len(described)}"
            )
    return True


def _bounds(domain: Domain, k: int, shards: Sequence[Described]) -> Bounds | None:
    """Where the shard of each rank begins, and the end; None for a tensor that each has in full."""
    for rank, other in enumerate(shards):
        if not shards[0].alike(other):
            axis = shards[0].axis
            numbers = ", of other numbers" if axis is None and shards[0].shape == other.shape else ""
            way = f"shards may differ along axis {axis} alone"
            if axis is None:
                way = f"each rank has to have all of it, since it is not divided along the {domain.name}"
            raise RankError(
                f"ranks differ: input {k} is {shards[0]} on rank 0 and {other} on rank {rank}{numbers}; {way}"
            )
    axis = shards[0].axis
    return None if axis is None else tuple(accumulate((s.shape[axis] for s in shards), initial=0))


def all_have_recorded(domain: Domain, known: Plan | None) -> bool:
    """Whether all ranks know the same recording of a call, ``known`` on this one; else all record it."""
    found = agree(domain, None if known is None else AGREED.get(known))
    return found[0] is not None and all(other == found[0] for other in found)


@contextmanager
def telling(domain: Domain | None) -> Iterator[None]:
    """Tell the other ranks, which wait until all have recorded a call, of what fails inside."""
    try:
        yield
    except Exception as error:
        if domain is not None and not told(error):
            agree(domain, None, error)
        raise


# Each recording ------------------------------------------------------------------------------------


def split_of(
    domain: Domain, graph: Graph, call: Call, wanted: Sequence[int], differentiable: Sequence[bool]
) -> Split:
    """How the images of a recorded call are divided. ``wanted`` are the tensors of which it makes gradients.

    Raises `RankError` where a tensor that the step finds in an attribute has other numbers on another rank.
    """
    _refuse_other_numbers(domain, call)
    first = len(call.tensors) - len(call.inputs)
    shards = [(graph.inputs[first + k], *s) for k, s in enumerate(call.shards) if s is not None]
    image = next(k for k, axes in enumerate(call.spatial) if axes)
    value, axis, bounds = next(s for s in shards if s[0] is graph.inputs[first + image])
    numbers = [k for k, yes in enumerate(differentiable) if yes]
    late = dict(zip((v for v in graph.inputs if v in graph.late), numbers, strict=False))
    gradients = tuple(graph.inputs[k] for k in wanted)
    return Split(domain.name, (value, axis), bounds, tuple(shards), gradients, late)


def _refuse_other_numbers(domain: Domain, call: Call) -> None:
    """Parameters and buffers are the first rank's; what lies elsewhere is only compared, when a call is recorded."""
    found = agree(domain, [(str(t.dtype), tuple(t.shape), digest_of(t)) for t in call.others])
    for rank, other in enumerate(found):
        for mine, theirs in zip([*found[0], None], [*other, None], strict=False):
            if mine != theirs:
                shape = list((mine or theirs or ("", ()))[1])
                raise RankError(
                    f"ranks differ: a tensor of shape {shape} in an attribute or a closure has other numbers "
                    f"on rank {rank} than on rank 0; register it as a buffer, which all ranks get from the first"
                )


def plan_for(graph: Graph, request: Request, domain: Domain | None) -> Plan:
    """The plan of a graph; of several ranks one plan, with the share of this one."""
    if domain is None:
        return plan_of(graph, request)
    assert request.split is not None
    lines = lines_of(graph)
    digest = sha256("\n".join(lines).encode()).hexdigest()
    found = agree(domain, (digest, request.budget))
    if any(other != digest for other, _ in found):
        _refuse_different(domain, lines)
    split, request = request.split, replace(request, budget=min(budget for _, budget in found))
    made: Plan | FullframeError | bytes | None = None
    failed = None
    if domain.rank == 0:
        try:
            made = packed(plan_of(graph, request), graph)
        except FullframeError as error:
            made = error
        except Exception as error:
            failed = error
    sent = agree(domain, made, failed)[0]
    if isinstance(sent, FullframeError):
        raise together(sent)
    assert sent is not None
    local = localized(unpacked(sent, graph), split, domain.rank)
    AGREED[local] = digest
    return local


def _refuse_different(domain: Domain, lines: list[str]) -> None:
    found = agree(domain, lines)
    for rank, other in enumerate(found):
        pairs = zip([*found[0], "nothing"], [*other, "nothing"], strict=False)
        here = next(((a, b) for a, b in pairs if a != b), None)
        if here is not None:
            raise RankError(
                f"ranks have recorded different steps: on rank 0\n  {here[0]}\nand on rank {rank}\n  {here[1]}"
            )
