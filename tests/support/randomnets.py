"""Random networks, reproducible by seed: what to build, on what, and how to tile it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import random_losses as losses
import torch
from random_shapes import Topologies
from torch import nn
from torch.utils import _pytree as pytree


@dataclass
class Case:
    """A network, its argument (float64), target and loss, and the way to run it tiled.

    ``tight`` is where the budget lies between the smallest (0) and plenty (1); ``strips`` the bytes
    of a window from which maps are cut where no ``tile`` is forced; ``unused`` numbers the outputs
    that a loss outside does not read; ``again`` says that a second step follows; ``draws`` that the
    network draws random numbers. ``used`` counts its parts.
    """

    net: nn.Module
    input: Any
    target: Any
    loss: Callable[..., Any] | None
    tile: tuple[int, ...] | None
    tight: float
    strips: int
    unused: tuple[int, ...]
    again: bool
    used: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = pytree.tree_map(lambda t: tuple(t.shape) if isinstance(t, torch.Tensor) else t, self.input)
        return f"{self.net}\ninput {shapes}, loss {self.loss}, tile {self.tile}, tight {self.tight:.2f}"


class Generator(Topologies):
    """Draws one case; ``d`` spatial axes, few channels, ``sizes`` (by ``d``) that rarely divide."""

    sizes: ClassVar = {1: (12, 40), 2: (9, 21), 3: (6, 9)}

    def case(self, seed: int) -> Case:
        p = self.p
        task = p.pick(["pixels", "regression", "module", "classes", "outputs", "super", "code"])
        p.used[f"task {task}"] += 1
        a = p.pick([1, 2, 3])
        low, high = self.sizes[self.d]
        size = [p.whole(low, high) for _ in range(self.d)]
        n = p.pick([1, 2, 3, 4]) if self.d < 3 else p.pick([1, 2])
        torch.manual_seed(seed)
        net = self.network(task, a, size)
        self._modes(net)
        net.double()
        input = self._image(n, a, size)
        if task == "module" and p.chance(25):
            input = {"image": input, "other": self._image(n, a, size)}
            net = TwoInputs(net, p.pick(["siamese", "sum", "cat"]))
            p.used["two inputs"] += 1
        target, loss = self._objective(task, net, input)
        unused = (p.whole(0, 2),) if loss is None and p.chance(20) else ()
        tile = tuple(p.whole(3, s + 2) for s in size) if p.chance(60) else None
        return Case(net, input, target, loss, tile, p.whole(0, 100) / 100, p.pick([1000, 2000, 8000, 3 << 20]),
                    unused, p.chance(12), dict(p.used))  # fmt: skip

    def _modes(self, net: nn.Module) -> None:
        """Evaluation mode here and there, frozen parameters, memory formats."""
        p = self.p
        if p.chance(12):
            net.eval()
        elif p.chance(20):
            p.used["some modules in eval"] += 1
            for module in net.modules():
                if p.chance(15):
                    module.eval()
        if p.chance(15):
            p.used["frozen"] += 1
            parameters = list(net.parameters())
            for k in range(len(parameters)):
                if p.chance(40):
                    parameters[k].requires_grad_(False)
            for module in net.modules():
                # PyTorch's group norm in channels_last ends the process where only one of the two wants a gradient.
                if isinstance(module, nn.GroupNorm) and module.weight is not None and module.bias is not None:
                    module.bias.requires_grad_(module.weight.requires_grad)
        if self.d > 1 and p.chance(15):
            p.used["channels last weights"] += 1
            net.to(memory_format=torch.channels_last if self.d == 2 else torch.channels_last_3d)

    def _image(self, n: int, a: int, size: list[int]) -> torch.Tensor:
        p = self.p
        how = p.pick(["plain", "plain", "channels last", "strided", "turned", "window"])
        p.used[f"input {how}"] += 1
        x = torch.randn(n, a, *size, dtype=torch.float64)
        if how == "channels last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        elif how == "strided":
            x = torch.randn(n, 2 * a, *size[:-1], 2 * size[-1], dtype=torch.float64)[:, ::2, ..., ::2]
        elif how == "turned":
            x = torch.randn(n, a, *size[::-1], dtype=torch.float64).permute(0, 1, *range(self.d + 1, 1, -1))
        elif how == "window":
            x = torch.randn(n + 1, a + 1, *(s + 3 for s in size), dtype=torch.float64)[
                (slice(1, None), slice(1, None), *(slice(2, -1) for _ in size))
            ]
        return x.requires_grad_(p.chance(50))

    def _objective(self, task: str, net: nn.Module, input: Any) -> tuple[Any, Callable[..., Any] | None]:
        """A loss, and a target that fits the outputs (their shapes are tried out)."""
        p = self.p
        outputs = outputs_of(net, input)
        generator = torch.Generator().manual_seed(p.whole(0, 1 << 30))
        if task == "module":
            return None, None
        scores = task in ("pixels", "classes") or (task == "outputs" and outputs[0].shape[1] == 3 and p.chance(60))

        def target_of(y: torch.Tensor) -> torch.Tensor:
            if scores:
                return losses.labels((y.shape[0], *y.shape[2:]), generator, p.chance(30))
            return torch.rand(y.shape, generator=generator, dtype=torch.float64)

        if task == "outputs":
            base = p.pick(losses.CLASSES[:-1] if scores else losses.MAPS)
            resized = p.pick([None, "output", "target"])
            loss: Callable[..., Any] = losses.Over(base, [p.pick([1.0, 0.5, 0.25]) for _ in outputs], resized)
            target: Any = target_of(outputs[0]) if resized else [target_of(y) for y in outputs]
        else:
            target = target_of(outputs[0])
            base = (
                p.pick(losses.VECTORS if outputs[0].dim() == 2 else losses.CLASSES) if scores else p.pick(losses.MAPS)
            )
            loss = losses.torch_modules(p) if scores and p.chance(15) else base
        p.used[f"loss {base.__name__}"] += 1
        return target, losses.Criterion(loss, p.chance(50)) if p.chance(15) else loss


class TwoInputs(nn.Module):
    """One network on two images, joined late; or on one made of both."""

    def __init__(self, net: nn.Module, how: str):
        super().__init__()
        self.net, self.how = net, how

    def forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        a, b = inputs["image"], inputs["other"]
        if self.how == "sum":
            return self.net(a - 0.5 * b)
        first, second = self.net(a), self.net(b)
        if not isinstance(first, torch.Tensor):
            return first, second
        return (first - second).abs() if self.how == "siamese" else torch.cat([first, second], 1)


def outputs_of(net: nn.Module, input: Any) -> list[torch.Tensor]:
    """The outputs on this input; the network's buffers are left as they were."""
    state = {k: v.clone() for k, v in net.named_buffers()}
    with torch.no_grad():
        made = net(input)
    for k, v in net.named_buffers():
        v.copy_(state[k])
    return [t for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]


def drawn_from(source: random.Random, seed: int = 0) -> Case | None:
    """A case from a source of random numbers; None where PyTorch cannot run the network on the image either."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Generator(source).case(seed)
        except (RuntimeError, ValueError):
            return None


def draw(seed: int) -> Case | None:
    """The case of a seed."""
    return drawn_from(random.Random(seed), seed)
