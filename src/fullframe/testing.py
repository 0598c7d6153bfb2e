"""The public test kit: is a tiled step the untiled step, and does a rule keep its contract?

`agree` runs a network both ways and returns the worst difference of loss, gradients and buffers.
`drawn` gives plain PyTorch the random numbers of a tiled step. `sufficient`, `tight` and `combines`
hold one op to its rule: what it reads is enough, no more than it needs, and partial results add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from random import Random

import torch
from torch import nn

import fullframe
from fullframe.check import twin
from fullframe.ir import region as box
from fullframe.ir.graph import Op, reduction_of
from fullframe.ir.region import Interval, Region
from fullframe.oracle import drawn
from fullframe.schedule.plan import Plan

Tensors = Sequence[torch.Tensor]
__all__ = ["Difference", "agree", "combines", "drawn", "regions", "sufficient", "tight"]


# A step both ways --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The worst difference found, relative to the largest number of its kind, and where.

    ``whole`` names the ops on tiled values that the plan runs whole.
    """

    worst: float
    where: str
    whole: tuple[str, ...]
    plan: Plan = field(repr=False, compare=False)


def agree(
    net: nn.Module, inputs: Tensors, loss: Callable[..., torch.Tensor], *, target: object = None,
    tile: int | tuple[int, ...] | None = None, budget: int | None = None,
) -> Difference:  # fmt: skip
    """Run a training step plainly and tiled, on copies of ``net``, and compare everything.

    ``inputs`` holds the image; its gradient is compared where it asks for one.
    """
    state = torch.get_rng_state()
    plain, leaves = twin(net), _leaves(inputs)
    with drawn():
        made = loss(plain(*leaves), target)
    expected = _results(plain, leaves, made)
    torch.set_rng_state(state)
    tiled, leaves = twin(net), _leaves(inputs)
    step = fullframe.tile(tiled, loss=loss, tile=tile, budget=budget, workers=1)
    plan = step.plan(*leaves, target)
    torch.set_rng_state(state)
    found = _results(tiled, leaves, step(*leaves, target))
    gaps = [gap for kind in expected for gap in _gaps(kind, expected[kind], found[kind])]
    worst, where = max(gaps, default=(0.0, "nothing"))
    return Difference(worst, where, plan.whole, plan)


Results = dict[str, "torch.Tensor | None"]


def _leaves(inputs: Tensors) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]


def _results(net: nn.Module, leaves: Tensors, made: torch.Tensor) -> dict[str, Results]:
    if made.requires_grad:
        made.backward()
    grads = {n: p.grad for n, p in net.named_parameters()} | {f"input{k}": t.grad for k, t in enumerate(leaves)}
    buffers: Results = {n: b.detach() for n, b in net.named_buffers()}
    return {"loss": {"": made.detach()}, "gradient of": grads, "buffer": buffers}


def _gaps(kind: str, expected: Results, found: Results) -> Iterator[tuple[float, str]]:
    largest = [float(t.abs().max()) for t in expected.values() if t is not None and t.numel()]
    scale = max(largest, default=0.0) or 1.0
    for name, old in expected.items():
        new, where = found[name], f"{kind} {name}".strip()
        if old is None or new is None:
            yield (0.0, where) if old is new else (float("inf"), f"{where}: one of them is None")
        elif (old.shape, old.dtype) != (new.shape, new.dtype):
            yield float("inf"), f"{where}: {old.dtype}{list(old.shape)}, {new.dtype}{list(new.shape)}"
        elif old.numel():
            yield float((old.double() - new.double()).abs().nan_to_num(float("inf")).max()) / scale, where


# The contract of a rule --------------------------------------------------------------------------


def sufficient(op: Op, tensors: Tensors, wanted: Region, *, tolerance: float = 1e-12) -> bool:
    """Whether a region made from its footprint alone, among NaN, is that part of the whole output.

    For a reduction the wanted region is one of the driver, and the partial result is compared with
    that of a tensor which is the driver there and absent elsewhere: see `combines`.
    """
    rule = op.rule
    region = rule.grow(op, wanted)
    assert box.contains(region, wanted), f"{op!r} grows {wanted} to {region}"
    made = rule.run(op, region, _cut(op, tensors, region))
    whole = rule.run(op, box.full(op.output.shape), _cut(op, tensors, box.full(op.output.shape)))
    assert tuple(made.shape) == box.shape_of(region), f"{op!r} makes {tuple(made.shape)} of {region}"
    return _same(made, whole[box.slices(region)], tolerance)


def _cut(op: Op, tensors: Tensors, region: Region) -> list[torch.Tensor]:
    """The windows a region reads, as views into tensors that are NaN all around."""
    windows = []
    for tensor, read in zip(tensors, op.rule.footprint(op, region), strict=True):
        assert box.contains(box.full(tuple(tensor.shape)), read), f"{op!r} reads {read} of {tuple(tensor.shape)}"
        hidden = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else torch.zeros_like(tensor)
        hidden[box.slices(read)] = tensor[box.slices(read)]
        windows.append(hidden[box.slices(read)])
    return windows


def _largest(t: torch.Tensor) -> float:
    """The largest finite number of a tensor, 0 where it has none; a Boolean has no size to be wrong by."""
    if t.dtype == torch.bool:
        return 0.0
    finite = t[t.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _same(a: torch.Tensor, b: torch.Tensor, tolerance: float, scale: float = 0.0) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.dtype.is_floating_point or a.dtype.is_complex) or tolerance == 0:
        return torch.equal(a, b)
    scale = max(scale, _largest(b))
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * (scale or 1.0), equal_nan=True)


def tight(op: Op, tensors: Tensors, wanted: Region) -> list[tuple[int, int, str]]:
    """The faces (input, axis, end) of the footprint whose elements do not reach the output.

    They are set to NaN, and where that changes nothing (a comparison) to other numbers.
    """
    rule = op.rule
    region = rule.grow(op, wanted)
    windows = _cut(op, tensors, region)
    before = rule.run(op, region, [w.clone() for w in windows])
    idle = []
    for k, window in enumerate(windows):
        if 0 in window.shape or before.numel() == 0:
            continue
        probes = (float("nan"), 1e3, -1e3) if window.is_floating_point() or window.is_complex() else (0, 1)
        for axis, n in enumerate(window.shape):
            for end, at in (("low", 0), ("high", n - 1)):
                if not any(_reaches(op, region, windows, before, (k, axis, at, p)) for p in probes):
                    idle.append((k, axis, end))
    return idle


def _reaches(
    op: Op, region: Region, windows: Tensors, before: torch.Tensor, probe: tuple[int, int, int, float]
) -> bool:
    """Whether the output changes with one face of one window set to a number."""
    k, axis, at, number = probe
    probed = [w.clone() for w in windows]
    probed[k].select(axis, at).fill_(number)
    after = op.rule.run(op, region, probed)
    same = after == before
    if before.is_floating_point() or before.is_complex():
        same |= after.isnan() & before.isnan()
    return not bool(same.all())


def combines(op: Op, tensors: Tensors, random: Random, *, tolerance: float = 1e-12) -> bool:
    """Whether partial results over a random disjoint cover of the driver add up to the whole.

    ``tolerance`` is relative to the largest of the results and of the partial ones: what these are rounded to stays
    where they cancel.
    """
    rule = reduction_of(op)
    driver = box.full(tuple(tensors[rule.driver].shape))
    whole = rule.finish(op, rule.run(op, driver, list(tensors)))
    total = rule.start(op, op.output.shape, tensors[rule.driver].device)
    parts = [_parts(op, driver, axis, random) for axis in range(len(driver))]
    largest = 0.0
    for cell in product(*parts):
        partial = rule.run(op, cell, _cut(op, tensors, cell))
        largest = max(largest, _largest(partial))
        rule.combine(op, total[box.slices(rule.out_region(op, cell))], partial)
    return _same(rule.finish(op, total), whole, tolerance, largest)


def _parts(op: Op, driver: Region, axis: int, random: Random) -> list[Interval]:
    """An axis of the driver cut at random places, unless the rule takes it in full."""
    extent = driver[axis][1]
    half = tuple((0, (high + 1) // 2) if a == axis else (low, high) for a, (low, high) in enumerate(driver))
    if extent < 2 or op.rule.grow(op, half) != half:
        return [(0, extent)]
    return list(pairwise(sorted({0, extent, random.randint(1, extent - 1), random.randint(1, extent - 1)})))


def regions(shape: Sequence[int], random: Random, count: int = 4) -> Iterator[Region]:
    """Boxes of a value: all of it, the pixels of two corners, and some at random; none is empty."""
    yield box.full(tuple(shape))
    yield tuple((0, 1) for _ in shape)
    yield tuple((n - 1, n) for n in shape)
    for _ in range(count):
        lows = [random.randrange(n) for n in shape]
        yield tuple((low, random.randint(low + 1, n)) for low, n in zip(lows, shape, strict=True))
