"""``fullframe.check``: does this network, tiled, give the numbers of plain PyTorch?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fullframe.module import Tiled, tile
from fullframe.plan import Plan


@dataclass(frozen=True)
class Difference:
    """Largest difference of one tensor, and the scale it is measured against."""

    kind: str  # "output", "gradient" or "buffer"
    name: str
    largest: float
    scale: float

    @property
    def relative(self) -> float:
        """Largest difference over scale; NaN counts as infinite."""
        if self.largest == 0:
            return 0.0
        value = self.largest / self.scale if self.scale > 0 else float("inf")
        return value if value == value else float("inf")

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.largest:.2g}, that is {self.relative:.2g} of {self.scale:.2g}"


@dataclass(frozen=True)
class Check:
    """What `check` found; prints in words. ``differences``: one per output, gradient and buffer."""

    differences: tuple[Difference, ...]
    tolerance: float
    notes: tuple[str, ...] = ()
    plan: Plan | None = field(default=None, repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether every difference is within the tolerance."""
        return self.worst <= self.tolerance

    @property
    def worst(self) -> float:
        """The largest relative difference."""
        return max((d.relative for d in self.differences), default=0.0)

    def of(self, kind: str) -> list[Difference]:
        """Differences of one kind, largest first."""
        return sorted((d for d in self.differences if d.kind == kind), key=lambda d: -d.relative)

    def __str__(self) -> str:
        verdict = "the same" if self.passed else "NOT the same"
        lines = [f"tiled and plain PyTorch are {verdict} in float64 (tolerance {self.tolerance:.0e} of scale)"]
        for kind, counted in (
            ("output", "the output"),
            ("gradient", "the largest gradient"),
            ("buffer", "the buffer"),
        ):
            found = self.of(kind)
            if found:
                lines.append(f"  {len(found)} {kind}s, differences relative to {counted}; the worst is {found[0]}")
        if not self.passed:
            lines += [f"  beyond the tolerance: {d}" for d in self.differences if d.relative > self.tolerance]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def check(
    net: nn.Module, input: Any, target: Any = None, loss: Callable[..., Any] | None = None, *,
    tile: int | Sequence[int] | None = None, budget: int | str | None = None, tolerance: float = 1e-9,
) -> Check:  # fmt: skip
    """Run one small training step whole and in tiles, on float64 copies, and compare.

    Parameters
    ----------
    net: the network; it is copied, not changed. Its own train or eval mode is kept, but dropout is
        off, since its random numbers cannot be those of plain PyTorch.
    input: the network's one argument: a tensor, or tensors in tuples, lists or dicts. A small image
        is enough: 64 pixels a side where the network allows it.
    target, loss: as for ``fullframe.tile(net, loss=loss)``. Without a loss the outputs are compared,
        and the gradients of their sum with fixed random weights.
    tile, budget: as for `fullframe.tile`; neither: tiles of about a third of the image each way.
    tolerance: what counts as the same, relative to the largest gradient (for gradients) or to the
        tensor's own largest number (for outputs and buffers).

    Raises whatever `fullframe.tile` refuses.

    Example
    -------
    >>> import torch, fullframe
    >>> net = torch.nn.Conv2d(1, 2, 3, padding=1)
    >>> print(fullframe.check(net, torch.randn(1, 1, 20, 20)).passed)
    True
    """
    options: dict[str, Any] = {"tile": _third(input) if tile is None and budget is None else tile, "budget": budget}
    plain, tiled = _Side(net, loss, None), _Side(net, loss, options)
    for side in (plain, tiled):
        side.step(input, target)
    found = tuple(_compare(plain, tiled))
    notes = tuple(f"dropout is off in this check: {name}" for name in plain.dropouts)
    return Check(found, tolerance, notes, tiled.plan)


class _Side:
    """One of the two runs: copies of network and loss, and what the step left in them."""

    def __init__(self, net: nn.Module, loss: Callable[..., Any] | None, options: Any):
        self.net, self.loss = copy.deepcopy((net, loss))
        self.net.double()
        if isinstance(self.loss, nn.Module):
            self.loss.double()
        self.dropouts = [n for n, m in self.net.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        for name in self.dropouts:
            self.net.get_submodule(name).eval()
        self.run: Any = None
        if options is not None:
            self.run = tile(self.net, loss=self.loss, **options)
        self.outputs: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor] = []
        self.plan: Plan | None = None

    def step(self, input: Any, target: Any) -> None:
        input, target = pytree.tree_map(_double, (input, target))
        self.inputs = [t for t in pytree.tree_leaves(input) if isinstance(t, torch.Tensor)]
        arguments = (input,) if self.loss is None else (input, target)
        if isinstance(self.run, Tiled):
            self.plan = self.run.plan(*arguments)
            made = self.run(*arguments)
        else:
            made = self.net(input) if self.loss is None else self.loss(self.net(input), target)
        outputs = [t for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]
        self.outputs = [t.detach() for t in outputs]
        total = outputs[0] if self.loss is not None else _weighted(outputs)
        if total.requires_grad:
            total.backward()

    def named(self, what: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters or buffers of network and loss."""
        yield from getattr(self.net, what)()
        if isinstance(self.loss, nn.Module):
            yield from ((f"loss.{name}", t) for name, t in getattr(self.loss, what)())


def _double(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    wanted = leaf.requires_grad
    leaf = leaf.detach().clone()
    return leaf.double().requires_grad_(wanted) if leaf.is_floating_point() else leaf


def _third(input: Any) -> tuple[int, ...] | None:
    for leaf in pytree.tree_leaves(input):
        if isinstance(leaf, torch.Tensor) and leaf.dim() >= 3 and leaf.is_floating_point():
            return tuple(n // 3 + 1 for n in leaf.shape[2:])
    return None


def _weighted(outputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """A scalar that every output element reaches with a different weight."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for t in outputs:
        if t.requires_grad:
            weight = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            total = total + (t * weight.to(t)).sum() / max(1, t.numel()) ** 0.5
    return total


def _compare(plain: _Side, tiled: _Side) -> Iterator[Difference]:
    for k, (a, b) in enumerate(zip(plain.outputs, tiled.outputs, strict=True)):
        yield _difference("output", str(k), a, b)
    pairs = list(zip(plain.named("named_parameters"), tiled.named("named_parameters"), strict=True))
    grads = [(n, a.grad, b.grad) for (n, a), (_, b) in pairs]
    grads += [(f"input {k}", a.grad, b.grad) for k, (a, b) in enumerate(zip(plain.inputs, tiled.inputs, strict=True))]
    scale = max((_largest(a) for _, a, _ in grads if a is not None), default=0.0)
    for name, a, b in grads:
        if (a is None) != (b is None):
            yield Difference("gradient", f"{name} (missing on one side)", float("inf"), scale)
        elif a is not None and b is not None:
            yield _difference("gradient", name, a, b, scale)
    for (name, a), (_, b) in zip(plain.named("named_buffers"), tiled.named("named_buffers"), strict=True):
        yield _difference("buffer", name, a, b)


def _largest(t: torch.Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0


def _difference(kind: str, name: str, a: torch.Tensor, b: torch.Tensor, scale: float | None = None) -> Difference:
    if a.shape != b.shape or a.dtype != b.dtype:
        return Difference(
            kind, f"{name} ({a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)})", float("inf"), 1.0
        )
    if not a.is_floating_point():
        return Difference(kind, name, float((a != b).sum()), 1.0)
    agree = (a == b) | (a.isnan() & b.isnan())
    largest = _largest(torch.where(agree, 0.0, a - b))
    return Difference(kind, name, largest, _largest(a) if scale is None else scale)
