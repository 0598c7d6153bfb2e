"""A network's training step, plain and tiled, and how far apart they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import fullframe
from fullframe.testing import drawn
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


def case_of(entry: Entry, training: bool) -> Case:
    """The entry's network in a mode, with all that its step needs."""
    net, image, loss = build(entry).train(training), image_of(entry.shape), LOSSES[entry.loss]
    with torch.no_grad():
        output = copy.deepcopy(net)(image)
    return Case(net, Reported(loss.make()), image, target_of(loss, output, image.dim()))


def plain(case: Case) -> Result:
    """The step in plain PyTorch, with the engine's own random numbers where the network draws any."""
    case = case.to(case.image.dtype)
    image = case.image.clone().requires_grad_()
    torch.manual_seed(5)
    with drawn():
        made, outputs = case.criterion(case.net(image), case.target)
    return _result(case.net, image, made, outputs)


def tiled(case: Case, tile: int, *, module: bool = False) -> tuple[Result, fullframe.Plan]:
    """The step in tiles; with ``module`` only the network is tiled and the loss is plain."""
    case = case.to(case.image.dtype)
    image = case.image.clone().requires_grad_()
    run = fullframe.tile(case.net, loss=None if module else case.criterion, tile=tile, workers=1)
    arguments = (image,) if module else (image, case.target)
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
