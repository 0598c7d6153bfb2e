"""``fullframe.check``: does this network, tiled, give the numbers of plain PyTorch?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import nn

from fullframe.frontend.guards import GuardSnapshot
from fullframe.oracle import drawn
from fullframe.schedule.plan import Plan
from fullframe.tiled import Tiled, tile
from fullframe.torch_compat import pytree


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
        if self.largest == 0:
            return f"{self.kind} {self.name}: none"
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
            ("output", "its largest number"),
            ("gradient", "the largest gradient"),
            ("buffer", "its largest number"),
        ):
            found = self.of(kind)
            if found:
                one = f"1 {kind} differs" if len(found) == 1 else f"{len(found)} {kind}s differ"
                lines.append(f"  {one} by at most {found[0].relative:.2g} of {counted}:")
                lines += [
                    f"    {d}{'' if d.relative <= self.tolerance else '  <- beyond the tolerance'}" for d in found
                ]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def check(
    net: nn.Module, input: Any, target: Any = None, loss: Callable[..., Any] | None = None, *,
    tile: int | Sequence[int] | None = None, budget: int | str | None = None, tolerance: float = 1e-9,
) -> Check:  # fmt: skip
    """Run one small training step whole and in tiles, on float64 copies, and compare.

    Args:
        net: the network; it is copied, not changed, and keeps its train or eval mode. Where it draws
            random numbers (dropout), both runs draw the tiled step's.
        input: the network's one argument: a tensor, or tensors in tuples, lists or dicts. A small image
            is enough: 64 pixels a side where the network allows it. Of an image of more than LARGE
            pixels the first corner is taken (see `corner`), and the same part of a target that covers it.
        target: as for ``fullframe.tile(net, loss=loss)``.
        loss: as for `fullframe.tile`. Without a loss the outputs are compared,
            and the gradients of their sum with fixed random weights.
        tile: as for `fullframe.tile`; without it and without a budget: about a third of the image each way.
        budget: as for `fullframe.tile`.
        tolerance: what counts as the same, relative to the largest gradient (for gradients) or to the
            tensor's own largest number (for outputs and buffers).

    Returns a `Check`, which prints in words. Raises whatever `fullframe.tile` refuses, and ValueError
    where the network does not run on the corner of a large image. Torch's random state is left as it was.

    Examples:
        >>> import torch, fullframe
        >>> net = torch.nn.Conv2d(1, 2, 3, padding=1)
        >>> print(fullframe.check(net, torch.randn(1, 1, 20, 20)).passed)
        True
    """
    input, target, cut = corner(input, target)
    options: dict[str, Any] = {"tile": _third(input) if tile is None and budget is None else tile, "budget": budget}
    plain, tiled = _Side(net, loss, None), _Side(net, loss, options)
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        try:
            plain.step(input, target)
        except (RuntimeError, ValueError) as error:
            if not cut:
                raise
            raise ValueError(
                f"the image is large, and the network does not run on {cut} ({error}); "
                "pass a small instance of your own"
            ) from error
        torch.set_rng_state(state)
        tiled.step(input, target)
    notes = [f"the image is large: this is {cut}"] if cut else []
    if tiled.plan is not None and tiled.plan.graph.seed is not None:
        notes.append("random numbers, as of dropout, are the tiled step's own in both")
    return Check(tuple(_compare(plain, tiled)), tolerance, tuple(notes), tiled.plan)


LARGE = 1 << 18  # pixels of an image that is checked as it is
SIDES = {1: 1 << 16, 2: 256, 3: 32}  # of the corner taken of a larger one


def corner(input: Any, target: Any) -> tuple[Any, Any, str]:
    """Input and target cut to the first pixels of a large image, and what that is in words.

    Tensors whose last axes are those of the image, all larger or smaller by one factor, are cut
    alike; others stay.
    """
    images = [t for t in pytree.tree_leaves(input) if isinstance(t, torch.Tensor) and 3 <= t.dim() <= 5]
    whole = max((tuple(t.shape[2:]) for t in images), key=prod, default=())
    if prod(whole) <= LARGE:
        return input, target, ""
    small = tuple(min(n, SIDES[len(whole)]) for n in whole)

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() < len(whole):
            return leaf
        own = leaf.shape[leaf.dim() - len(whole) :]
        factors = {Fraction(n, k) for n, k in zip(own, whole, strict=True)}
        if len(factors) > 1 or any(n * m % k for n, m, k in zip(own, small, whole, strict=True)):
            return leaf
        kept = [slice(n * m // k) for n, m, k in zip(own, small, whole, strict=True)]
        return leaf[(..., *kept)].detach().clone().requires_grad_(leaf.requires_grad)

    input, target = pytree.tree_map(cut, (input, target))
    return input, target, "its first " + " x ".join(map(str, small)) + " pixels"


def twin(thing: Any) -> Any:
    """A deep copy, also of modules that hold tensors made of others, which PyTorch does not copy."""
    made = [t for t in GuardSnapshot([thing]).tensors if not t.is_leaf]
    return copy.deepcopy(thing, {id(t): t.detach().clone() for t in made})


class _Side:
    """One of the two runs: copies of network and loss, and what the step left in them."""

    def __init__(self, net: nn.Module, loss: Callable[..., Any] | None, options: dict[str, Any] | None):
        self.net, self.loss = twin((net, loss))
        self.net.double()
        if isinstance(self.loss, nn.Module):
            self.loss.double()
        self.run: Tiled | None = None
        if options is not None:
            self.run = tile(self.net, loss=self.loss, **options)
        self.outputs: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor] = []
        self.plan: Plan | None = None

    def step(self, input: Any, target: Any) -> None:
        input, target = pytree.tree_map(_double, (input, target))
        self.inputs = [t for t in pytree.tree_leaves(input) if isinstance(t, torch.Tensor)]
        arguments = (input,) if self.loss is None else (input, target)
        if self.run is not None:
            self.plan = self.run.plan(*arguments)
            made = self.run(*arguments)
        else:
            with drawn():
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
    if leaf.is_complex():
        return leaf.to(torch.complex128).requires_grad_(wanted)
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
            t = torch.view_as_real(t) if t.is_complex() else t
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
    if not (a.is_floating_point() or a.is_complex()):
        return Difference(kind, name, float((a != b).sum()), 1.0)
    agree = (a == b) | (a.isnan() & b.isnan())
    largest = _largest(torch.where(agree, 0.0, a - b))
    return Difference(kind, name, largest, _largest(a) if scale is None else scale)
