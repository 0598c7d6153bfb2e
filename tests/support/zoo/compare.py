"""A network's training step, plain and tiled, and how far apart they are."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

import fullframe
from fullframe.oracle import drawn
from zoo.entry import Entry, build, image_of
from zoo.losses import LOSSES, Reported, target_of, tensors

Named = dict[str, "torch.Tensor | None"]


@dataclass(frozen=True)
class Case:
    """A network with criterion, image and target, all in float32 (integers apart) but the target, float64."""

    net: nn.Module
    criterion: nn.Module
    image: torch.Tensor
    target: Any

    def to(self, dtype: torch.dtype) -> Case:
        """A copy in another dtype."""
        net, criterion = copy.deepcopy((self.net, self.criterion))
        target = pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, self.target)
        return Case(net.to(dtype), criterion.to(dtype), self.image.to(dtype), target)


@dataclass(frozen=True)
class Result:
    """What a step leaves: loss, outputs, gradients (of the image too, as "image") and buffers."""

    loss: torch.Tensor
    outputs: Named
    grads: Named
    buffers: Named


def case_of(entry: Entry, training: bool, draw: int = 0) -> Case:
    """The entry's network in a mode, with all that its step needs; ``draw`` picks weights and image."""
    net, image, loss = build(entry, draw), image_of(entry.shape, draw), LOSSES[entry.loss]
    if not training:
        settle(net, image)
    net.train(training)
    with torch.no_grad():
        output = copy.deepcopy(net)(image)
    return Case(net, Reported(loss.make()), image, target_of(loss, output, image.dim()))


def settle(net: nn.Module, image: torch.Tensor) -> None:
    """Give the norms the statistics of this image for their running ones, as whoever evaluates a network has them.

    Statistics that are not those of what comes in let activations grow from norm to norm, until a deep network
    makes large numbers of the last bit of its image.
    """
    norms = [m for m in net.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    momenta = [m.momentum for m in norms]
    if not norms:
        return
    for m in norms:
        m.momentum = 1.0
    with torch.no_grad():
        net.train()(image)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


def one_rounding(case: Case) -> Case:
    """The case with each weight moved by up to one rounding of float64."""
    case, generator = case.to(torch.float64), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in case.net.parameters():
            p.mul_(1 + (torch.rand(p.shape, generator=generator, dtype=torch.float64) - 0.5) * 2**-51)
    return case


def plain(case: Case, *, half: bool = False) -> Result:
    """The step in plain PyTorch, with the engine's own random numbers where the network draws any.

    ``half``: the forward in bfloat16 autocast, and the backward outside it, as PyTorch asks for.
    """
    case = case.to(case.image.dtype)
    image = case.image.clone().requires_grad_()
    torch.manual_seed(5)
    with drawn(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        made, outputs = case.criterion(case.net(image), case.target)
    return _result(case.net, image, made, outputs)


def otherwise(case: Case, *, half: bool = False) -> Result:
    """Plain PyTorch in another arrangement, as good: channels last.

    Signals, and networks that refuse that layout, run without the library of convolutions instead.
    """
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(case.image.dim())
    if layout is not None:
        net = copy.deepcopy(case.net).to(memory_format=layout)
        try:
            return plain(replace(case, net=net, image=case.image.contiguous(memory_format=layout)), half=half)
        except RuntimeError:  # a view that this layout does not have
            pass
    with torch.backends.mkldnn.flags(enabled=False):
        return plain(case, half=half)


def tiled(case: Case, tile: int, *, module: bool = False, half: bool = False) -> tuple[Result, fullframe.Plan]:
    """The step in tiles; with ``module`` only the network is tiled and the loss is plain."""
    case = case.to(case.image.dtype)
    image = case.image.clone().requires_grad_()
    run = fullframe.tile(case.net, loss=None if module else case.criterion, tile=tile, workers=1)
    arguments = (image,) if module else (image, case.target)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        plan = run.plan(*arguments)
        torch.manual_seed(5)
        made, outputs = case.criterion(run(image), case.target) if module else run(*arguments)
    return _result(case.net, image, made, outputs), plan


def _result(net: nn.Module, image: torch.Tensor, loss: torch.Tensor, outputs: list[torch.Tensor]) -> Result:
    loss.backward()
    grads: Named = {n: p.grad for n, p in net.named_parameters()} | {"image": image.grad}
    buffers: Named = {n: b.detach() for n, b in net.named_buffers()}
    return Result(loss.detach(), {str(k): t.detach() for k, t in enumerate(tensors(outputs))}, grads, buffers)


def gaps(found: Result, truth: Result) -> Iterator[tuple[float, str]]:
    """Every difference relative to its scale, and its name.

    The scale of a parameter's gradient is the largest gradient of the network; loss, outputs, buffers
    and the image's gradient have scales of their own.
    """
    scale = max((float(g.abs().max()) for n, g in truth.grads.items() if g is not None and n != "image"), default=0.0)
    yield _gap(found.loss, truth.loss, None), "loss"
    for kind, made, old in (
        ("output", found.outputs, truth.outputs),
        ("gradient of", found.grads, truth.grads),
        ("buffer", found.buffers, truth.buffers),
    ):
        assert list(made) == list(old), f"{kind}: {list(made)} against {list(old)}"
        for name, b in old.items():
            own = kind != "gradient of" or name == "image"
            yield _gap(made[name], b, None if own else scale), f"{kind} {name}"


def _gap(a: torch.Tensor | None, b: torch.Tensor | None, scale: float | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not b.numel() or torch.equal(a, b):
        return 0.0
    scale = float(b.double().abs().max()) if scale is None else scale
    return float((a.double() - b.double()).abs().nan_to_num(float("inf")).max()) / (scale or 1.0)


def l2(found: Result, truth: Result) -> float:
    """Relative L2 error over all gradients together."""
    pairs = [(found.grads[n], g) for n, g in truth.grads.items() if g is not None]
    apart = sum(float((a.double() - g.double()).square().sum()) for a, g in pairs if a is not None)
    return (apart / sum(float(g.double().square().sum()) for _, g in pairs)) ** 0.5


# Rounding --------------------------------------------------------------------------------------------

DRAWS = 3, 9, 36  # of weights and image: more where one of the first is beyond the bound, and where half of them are
TIMES = 1.5  # plain PyTorch's error: the bound
NOTHING = 1e-12  # an error that none is


class PlainError(Exception):
    """Plain PyTorch does not do this."""


@dataclass(frozen=True)
class Draw:
    """Relative L2 errors over all gradients against float64: tiled, plain, and plain in another arrangement."""

    ours: float
    plain: float
    other: float

    @property
    def ratio(self) -> float:
        return self.ours / self.plain

    @property
    def control(self) -> float:
        return self.other / self.plain


def draws(entry: Entry, half: bool) -> list[Draw]:
    """Draws of weights and image: more where a single one is beyond the bound, and most where the median is.

    Were half of all draws beyond it, one in eight times the first three would all be within.
    """
    few, many, most = DRAWS
    found = [_draw(entry, half, k) for k in range(few)]
    if max(d.ratio for d in found) > TIMES:
        found += [_draw(entry, half, k) for k in range(few, many)]
    if middle([d.ratio for d in found]) > TIMES:
        found += [_draw(entry, half, k) for k in range(len(found), most)]
    return found


def _draw(entry: Entry, half: bool, k: int) -> Draw:
    case = case_of(entry, True, k)
    truth = plain(case.to(torch.float64))
    case = case.to(torch.float32)
    try:
        theirs, other = plain(case, half=half), otherwise(case, half=half)
    except Exception as error:
        raise PlainError(f"{type(error).__name__}: {error}") from error
    ours = tiled(case, entry.tiles[1], half=half)[0]
    return Draw(*(max(l2(result, truth), NOTHING) for result in (ours, theirs, other)))


def middle(numbers: list[float]) -> float:
    """The median: a single number on the other side of a bend does not move it."""
    return statistics.median(numbers)
