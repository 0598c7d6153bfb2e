"""``out=``: where outputs of a call go that are written region by region and not handed out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fullframe.device import device_of
from fullframe.errors import CaptureError
from fullframe.frontend.outputs import Tree
from fullframe.frontend.sources import Result
from fullframe.ir.graph import Value
from fullframe.storage.external import Sink, kind_of
from fullframe.storage.mapped_file import spans
from fullframe.torch_compat import pytree


def takes_out(module: nn.Module) -> bool:
    """Whether ``out`` is a parameter of the module's own forward, by name."""
    try:
        return "out" in inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # of a scripted module, say
        return False


def outline(out: Any) -> Any:
    """What of the destinations belongs to a recording's key: of which outputs they are."""
    if out is None:
        return None
    leaves, spec = pytree.tree_flatten(out)
    return str(spec), tuple(x is not None for x in leaves)


def destinations(out: Any, returned: Tree) -> dict[int, Sink]:
    """The destination of each output, by the number of its tensor. None, and None in the place of one, is no
    destination: that output is handed out."""
    if out is None:
        return {}
    leaves, spec = pytree.tree_flatten(out)
    if spec != returned.spec:
        raise ValueError(
            f"out= has the structure {_shown(spec)}, and what the call returns {_shown(returned.spec)}; they must be "
            "the same, with None for what is to be returned as a tensor"
        )
    found: dict[int, Sink] = {}
    for thing, part in zip(leaves, returned.parts, strict=True):
        if thing is None:
            continue
        name = f"out{len(found)}" if len(leaves) > 1 else "out"
        if not isinstance(part, Result) or part.number in found:
            raise ValueError(f"{name}, a {kind_of(thing)}, stands for an output that is no tensor of its own")
        found[part.number] = Sink(thing, name)
    return found


def refuse_misfits(sinks: dict[int, Sink], outputs: Sequence[Value | None]) -> None:
    """Refuse a destination of another shape or dtype than its output."""
    for number, sink in sinks.items():
        value = outputs[number]
        assert value is not None
        if (sink.shape, sink.dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"{sink.name}, a {kind_of(sink.thing)}, has shape {sink.shape} and dtype {sink.thing.dtype}, and the "
                f"output that goes there {value.shape} and {value.dtype}; they must be the same. Convert the numbers "
                "in the module's last op"
            )


def refuse_overlaps(sinks: Sequence[Sink], read: Sequence[tuple[str, Any]]) -> None:
    """Refuse a destination that shares memory, a file or an object with what is ``read``, by name, or with another:
    regions that are written would be read again by others."""
    others = list(read)
    for sink in sinks:
        for name, thing in others:
            if _same(sink.thing, thing):
                raise CaptureError(
                    f"{sink.name} shares its numbers with {name}, which would change while regions of it are still "
                    "read; give an object of its own"
                )
        others.append((sink.name, sink.thing))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    for place, low, high in _spans(a):
        for other, begin, end in _spans(b):
            if place == other and low < end and begin < high:
                return True
    if type(a) is not type(b) or isinstance(a, torch.Tensor) or any(_spans(a)):
        return False
    # Two names of one data set are equal; of Zarr's arrays only if both were opened in the same mode.
    place = str(getattr(a, "store_path", ""))
    return (a == b) is True or (bool(place) and place == str(getattr(b, "store_path", "")))


def _spans(thing: Any) -> Iterator[tuple[str, int, int]]:
    if not isinstance(thing, torch.Tensor):
        yield from spans(thing)
    elif thing.layout is torch.strided and thing.numel():
        start = thing.untyped_storage().data_ptr()
        place = "" if device_of(thing.device).on_host else str(thing.device)
        yield place, start, start + thing.untyped_storage().nbytes()


def _shown(spec: Any) -> str:
    return str(pytree.tree_unflatten(["*"] * spec.num_leaves, spec))
