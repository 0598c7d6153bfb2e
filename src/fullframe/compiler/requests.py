"""What the planner is asked for a call: its graph's limits, as the call's options and the machine set them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fullframe import torch_compat
from fullframe.compiler.externals import sources_of
from fullframe.compiler.measures import arithmetic_rate
from fullframe.compiler.program import Options
from fullframe.device import CPU, Device, device_of
from fullframe.frontend.inputs import Call
from fullframe.ir.graph import Graph, Value
from fullframe.ops.primitives.elementwise import copied, fusable
from fullframe.schedule.cost import spent
from fullframe.schedule.planner import FIXED, IMPORTS
from fullframe.schedule.request import SPEED, Request

# stages that may be in flight: some sections of each of a few branches, and small ones between, as weights laid out
MAX_IN_FLIGHT = 16


def request_for(graph: Graph, call: Call, options: Options, written: Iterable[int] = ()) -> Request:
    """What a call's graph is planned for; outputs that are ``written`` elsewhere, by number, are not handed out."""
    external = frozenset((*sources_of(call, graph), *(v for k in written if (v := graph.handed_out[k]) is not None)))
    end = len(call.tensors)
    images = [
        (v, axes) for v, axes in zip(graph.inputs[end - len(call.inputs) : end], call.spatial, strict=True) if axes
    ]
    roots = tuple((v, (0, *axes)) for v, axes in images)
    tile = _forced(images, options)
    device = device_of(call.device)
    budget = options.budget if options.budget is not None else device.free_bytes(call.device)
    free = frozenset(v for v in graph.gradients if v is not None)
    speed = _speed(graph, device, options)
    if not device.windows:
        max_in_flight = MAX_IN_FLIGHT if options.workers > 1 or options.domain is not None else 1
        imports = (
            IMPORTS * (not torch_compat.recording_is_imported()) if options.saved is None else options.saved.imports
        )
        return Request(
            budget, options.workers, roots, fusable, tile, free, disk=options.disk, rate=options.rate, speed=speed,
            max_in_flight=max_in_flight, external=external, imports=imports, copied=copied
        )  # fmt: skip
    host = device_of(CPU).free_bytes(CPU) if options.saved is None else options.saved.host
    # What a recorded run keeps besides: its inputs, and what it makes, to be copied out.
    lasting = len(call.parameters) + len(call.buffers)
    handed = (*graph.inputs[lasting:end], *(v for v in graph.outputs if v is not None))
    copies = sum(v.nbytes for v in handed if v not in external)
    return Request(
        budget, 1, roots, fusable, tile, free, window=budget // device.windows, host=host, disk=options.disk,
        rate=options.rate, speed=speed, fixed=FIXED + IMPORTS + copies, external=external, copied=copied
    )  # fmt: skip


def _forced(
    images: list[tuple[Value, tuple[int, ...]]], options: Options
) -> tuple[tuple[Value, int, int], ...] | None:
    """The extents of a tile along the axes of the first image, where the caller gives them."""
    if options.tile is None:
        return None
    if not images:
        raise ValueError("tile= needs an image input with a batch, a channel and spatial axes")
    image, axes = images[0]
    extents = (options.tile,) * len(axes) if isinstance(options.tile, int) else tuple(options.tile)
    if len(extents) != len(axes):
        raise ValueError(f"tile={options.tile} has {len(extents)} extents; the input has {len(axes)} spatial axes")
    return ((image, 0, 1), *((image, a, n) for a, n in zip(axes, extents, strict=True)))


def _speed(graph: Graph, device: Device, options: Options) -> int:
    """Million operations a second that are made while a disk moves bytes; it matters where there is a disk alone."""
    if options.saved is not None:
        return options.saved.speed
    if device.speed is not None or not options.disk:
        return device.speed or SPEED
    dearest = max((op for op in graph.ops if op.rule.heavy and op.inputs), key=spent, default=None)
    return arithmetic_rate(torch.float32 if dearest is None else dearest.inputs[0].dtype)
