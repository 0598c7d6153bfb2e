"""Random topologies: how layers are put together into a network."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from random_draws import LINEAR, Apply, Draws, fit, nd, resize
from random_norms import GATES, NORMS, activation, dropout
from random_parts import DOWN, LAYERS, UP, conv, conv1
from torch import nn


class Block(nn.Module):
    """Layers, and what to do with their input: nothing, a sum, a concatenation, a gate, or depth kept at random."""

    def __init__(self, layers: nn.Module, join: str, adapt: nn.Module | None, d: int):
        super().__init__()
        self.layers, self.join, self.adapt, self.d = layers, join, adapt, d

    def forward(self, x):
        y = self.layers(x)
        if self.join == "none":
            return y
        x = self.adapt(x) if self.adapt is not None else x
        x = fit(x, y.shape[2:])
        if self.join == "gate":
            return y * torch.sigmoid(x)
        if self.join == "drop" and self.training:
            keep = torch.empty(y.shape[0], *[1] * (self.d + 1), dtype=y.dtype).bernoulli_(0.6)
            return x + y * keep / 0.6
        return torch.cat([y, x], 1) if self.join == "concat" else y + x


class UNet(nn.Module):
    """Down, a level below, up again, joined with the skip (it may be gated by what comes up)."""

    def __init__(self, down: nn.Module, below: nn.Module, up: nn.Module, after: nn.Module, join: str):
        super().__init__()
        self.down, self.below, self.up, self.after, self.join = down, below, up, after, join

    def forward(self, x):
        y = fit(self.up(self.below(self.down(x))), x.shape[2:])
        if self.join == "gate":
            x = x * y.mean(1, keepdim=True).sigmoid()
        return self.after(x + y if self.join == "sum" else torch.cat([x, y], 1))


class Dense(nn.Module):
    """Every layer reads the concatenation of all before."""

    def __init__(self, layers: Sequence[nn.Module], last: nn.Module):
        super().__init__()
        self.layers, self.last = nn.ModuleList(layers), last

    def forward(self, x):
        found = [x]
        for layer in self.layers:
            found.append(fit(layer(torch.cat(found, 1)), x.shape[2:]))
        return self.last(torch.cat(found, 1))


class Nested(nn.Module):
    """UNet++: every node reads all nodes before it at its level and the one below; every top node is an output."""

    def __init__(
        self, nodes: dict[str, nn.Module], downs: Sequence[nn.Module], levels: int, mode: str, all_tops: bool
    ):
        super().__init__()
        self.nodes, self.downs = nn.ModuleDict(nodes), nn.ModuleList(downs)
        self.levels, self.mode, self.all_tops = levels, mode, all_tops

    def forward(self, x):
        made: dict[tuple[int, int], torch.Tensor] = {}
        for i in range(self.levels):
            made[i, 0] = self.nodes[f"{i}_0"](x if i == 0 else self.downs[i - 1](made[i - 1, 0]))
        for j in range(1, self.levels):
            for i in range(self.levels - j):
                here = [made[i, k] for k in range(j)]
                up = resize(made[i + 1, j - 1], here[0].shape[2:], self.mode)
                here = [fit(h, up.shape[2:]) for h in here]
                made[i, j] = self.nodes[f"{i}_{j}"](torch.cat([*here, up], 1))
        tops = [made[0, j] for j in range(1, self.levels)]
        return [fit(t, x.shape[2:]) for t in tops] if self.all_tops else fit(tops[-1], x.shape[2:])


class Pyramid(nn.Module):
    """Feature pyramid: maps of several resolutions, joined from the top down; all of them, or joined at the largest."""

    def __init__(self, downs: Sequence[nn.Module], sides: Sequence[nn.Module], head: nn.Module, mode: str, how: str):
        super().__init__()
        self.downs, self.sides, self.head = nn.ModuleList(downs), nn.ModuleList(sides), head
        self.mode, self.how = mode, how

    def forward(self, x):
        maps = [x]
        for down in self.downs:
            maps.append(down(maps[-1]))
        made = [self.sides[-1](maps[-1])]
        for side, m in zip(reversed(self.sides[:-1]), reversed(maps[:-1]), strict=True):
            s = side(m)
            made.append(s + resize(made[-1], s.shape[2:], self.mode))
        made = [self.head(m) for m in made[::-1]]  # one head, shared by all resolutions
        if self.how == "all":
            return made
        full = [resize(m, x.shape[2:], self.mode) for m in made]
        return torch.cat(full, 1) if self.how == "cat" else sum(full[1:], full[0])


class Exchange(nn.Module):
    """Two resolutions side by side that exchange what they know (as in HRNet)."""

    def __init__(self, fine: Sequence[nn.Module], coarse: Sequence[nn.Module], downs: Sequence[nn.Module], mode: str):
        super().__init__()
        self.fine, self.coarse, self.downs = nn.ModuleList(fine), nn.ModuleList(coarse), nn.ModuleList(downs)
        self.mode = mode

    def forward(self, x):
        a, b = x, self.downs[0](x)
        for fine, coarse, down in zip(self.fine, self.coarse, self.downs[1:], strict=True):
            a, b = fine(a), coarse(b)
            a, b = a + resize(b, a.shape[2:], self.mode), b + fit(down(a), b.shape[2:])
        return fit(a, x.shape[2:]) + resize(b, x.shape[2:], self.mode)


class Unpooled(nn.Module):
    """SegNet: pooling with indices, and unpooling by them on the way up."""

    def __init__(self, down: nn.Module, up: nn.Module, d: int, kernel: int):
        super().__init__()
        self.down, self.up, self.d, self.kernel = down, up, d, kernel

    def forward(self, x):
        pool, back = getattr(F, f"max_pool{self.d}d"), getattr(F, f"max_unpool{self.d}d")
        y, at = pool(x, self.kernel, return_indices=True)
        z = fit(self.down(y), y.shape[2:])
        return self.up(back(z, at, self.kernel, output_size=x.shape[2:]))


class Recurrent(nn.Module):
    """One block called several times, it may be at a smaller scale each time; and its maps added up."""

    def __init__(self, block: nn.Module, times: int, scale: bool):
        super().__init__()
        self.block, self.times, self.scale = block, times, scale

    def forward(self, x):
        total = y = self.block(x)
        for _ in range(self.times - 1):
            if self.scale:
                y = getattr(F, f"max_pool{x.dim() - 2}d")(y, 2, ceil_mode=True)
            y = fit(self.block(y), y.shape[2:])
            total = total + resize(y, total.shape[2:])
        return total


def tied(x: torch.Tensor, layer: nn.Module, act: nn.Module) -> torch.Tensor:
    """Down by a convolution and up by its transpose: one weight."""
    y = act(layer(x))
    back = getattr(F, f"conv_transpose{x.dim() - 2}d")
    return fit(back(y, layer.weight, stride=layer.stride, padding=layer.padding), x.shape[2:])


def encoded(x: torch.Tensor, down: nn.Module, code: nn.Module, decode: nn.Module, up: nn.Module) -> Any:
    """An autoencoder with a vector in the middle."""
    y = down(x)
    pooled = getattr(F, f"adaptive_avg_pool{x.dim() - 2}d")(y, 2).flatten(1)
    z = decode(code(pooled)).view(y.shape[0], -1, *[2] * (x.dim() - 2))
    return up(resize(z, x.shape[2:]))


class Heads(nn.Module):
    """A head for the main map and one for each of the maps before it (deep supervision)."""

    def __init__(self, stages: Sequence[nn.Module], heads: Sequence[nn.Module], form: str):
        super().__init__()
        self.stages, self.heads, self.form = nn.ModuleList(stages), nn.ModuleList(heads), form

    def forward(self, x):
        made = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            made.append(head(x))
        if self.form == "dict":
            return {f"stage{k}": m for k, m in enumerate(made)}
        return tuple(made) if self.form == "tuple" else made


class Headed(nn.Module):
    """Heads on the list of maps that a body returns; one shared head where there is only one."""

    def __init__(self, body: nn.Module, head: nn.Module):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x):
        return [self.head(m) for m in self.body(x)]


class Topologies:
    """Draws networks. ``p`` gives the choices; ``d`` is the number of spatial axes."""

    def __init__(self, source: random.Random):
        self.p = Draws(source)
        self.d = self.p.pick([2, 2, 2, 1, 3])

    def finish(self, c: int) -> list[nn.Module]:
        """A norm, an activation, dropout, a gate; each or none."""
        p, d = self.p, self.d
        layers = []
        if p.chance(50):
            layers.append(p.part(NORMS)(p, d, c))
        if p.chance(75):
            layers.append(activation(p, d, c))
        if p.chance(8):
            layers.append(dropout(p, d, c))
        if p.chance(15):
            layers.append(p.part(GATES)(p, d, c))
        return layers

    def block(self, a: int, b: int) -> nn.Module:
        p, d = self.p, self.d
        layers: list[nn.Module] = []
        c = a
        for _ in range(p.pick([1, 1, 1, 2])):
            first = self.finish(c) if p.chance(20) else []  # norm and activation first
            layer = p.part(LAYERS)(p, d, c, b) if p.chance(65) else conv(p, d, c, b)
            layers += [*first, layer, *([] if first else self.finish(b))]
            c = b
        join = p.pick(["none", "sum", "concat", "gate", "drop"])
        adapt = None if join in ("none", "concat") or a == b else conv1(p, d, a, b)
        made = Block(nn.Sequential(*layers), join, adapt, d)
        return nn.Sequential(made, conv1(p, d, a + b, b)) if join == "concat" else made

    def down(self, a: int, b: int) -> nn.Module:
        return nn.Sequential(self.p.part(DOWN)(self.p, self.d, a, b), *self.finish(b))

    def up(self, a: int, b: int) -> nn.Module:
        return self.p.part(UP)(self.p, self.d, a, b)

    def wide(self, c: int) -> int:
        return self.p.pick([c, c + 1, 2 * c])

    # Bodies: from c channels to c channels, the size kept

    def unet(self, c: int, depth: int = 0) -> nn.Module:
        p = self.p
        depth = depth or p.pick([1, 1, 1, 2])
        wide = self.wide(c)
        join = p.pick(["cat", "sum", "gate"])
        after = self.block(c if join == "sum" else 2 * c, c)
        below = self.unet(wide, depth - 1) if depth > 1 else self.block(wide, wide)
        return nn.Sequential(conv(p, self.d, c, c), UNet(self.down(c, wide), below, self.up(wide, c), after, join))

    def dense(self, c: int) -> nn.Module:
        p = self.p
        grow, count = p.pick([1, 2]), p.pick([2, 3, 4])
        layers = []
        for k in range(count):
            a = c + k * grow
            first = self.finish(a) if p.chance(50) else []
            layers.append(nn.Sequential(*first, conv(p, self.d, a, grow), *([] if first else self.finish(grow))))
        return Dense(layers, nn.Sequential(*self.finish(c + count * grow), conv1(p, self.d, c + count * grow, c)))

    def nested(self, c: int, all_tops: bool = False) -> nn.Module:
        levels = self.p.pick([2, 3])
        nodes = {f"{i}_0": nn.Sequential(conv(self.p, self.d, c, c), *self.finish(c)) for i in range(levels)}
        for j in range(1, levels):
            for i in range(levels - j):
                nodes[f"{i}_{j}"] = nn.Sequential(nd("Conv", self.d)((j + 1) * c, c, 3, padding=1), *self.finish(c))
        downs = [self.p.part(DOWN)(self.p, self.d, c, c) for _ in range(levels - 1)]
        return Nested(nodes, downs, levels, self.p.pick(["nearest", LINEAR[self.d]]), all_tops)

    def pyramid(self, c: int, how: str = "") -> nn.Module:
        p = self.p
        how = how or p.pick(["sum", "cat"])
        count = p.pick([1, 2])
        downs = [self.down(c, c) for _ in range(count)]
        sides = [conv1(p, self.d, c, c) for _ in range(count + 1)]
        head = nn.Sequential(nd("Conv", self.d)(c, c, 3, padding=1), *self.finish(c))
        body = Pyramid(downs, sides, head, p.pick(["nearest", LINEAR[self.d]]), how)
        return nn.Sequential(body, conv1(p, self.d, (count + 1) * c, c)) if how == "cat" else body

    def exchange(self, c: int) -> nn.Module:
        p, count = self.p, self.p.pick([1, 2])
        fine = [nn.Sequential(conv(p, self.d, c, c), *self.finish(c)) for _ in range(count)]
        coarse = [self.block(c, c) for _ in range(count)]
        downs = [p.part(DOWN)(p, self.d, c, c) for _ in range(count + 1)]
        return Exchange(fine, coarse, downs, p.pick(["nearest", LINEAR[self.d]]))

    def unpooled(self, c: int) -> nn.Module:
        return Unpooled(self.block(c, c), self.block(c, c), self.d, self.p.pick([2, 3] if self.d < 3 else [2]))

    def recurrent(self, c: int) -> nn.Module:
        return Recurrent(self.block(c, c), self.p.pick([2, 3]), self.p.chance(50))

    def tied(self, c: int) -> nn.Module:
        kernel, stride, padding = self.p.pick([(3, 2, 1), (2, 2, 0), (3, 1, 1)])
        layer = nd("Conv", self.d)(c, c + 1, kernel, stride, padding)
        return Apply(tied, layer, activation(self.p, self.d, c + 1))

    def chain(self, c: int) -> nn.Module:
        return nn.Sequential(*(self.block(c, c) for _ in range(self.p.pick([1, 1, 2]))))

    def body(self, c: int) -> nn.Module:
        kinds: dict[str, Callable[..., nn.Module]] = {
            "chain": self.chain, "U-Net": self.unet, "dense": self.dense, "nested U-Net": self.nested,
            "feature pyramid": self.pyramid, "exchange": self.exchange, "unpooling": self.unpooled,
            "recurrent": self.recurrent, "tied weights": self.tied,
        }  # fmt: skip
        first = self.p.part(kinds)(c)
        return (
            nn.Sequential(first, self.p.part({k: kinds[k] for k in ("chain", "dense")})(c))
            if self.p.chance(20)
            else first
        )

    # Networks

    def network(self, task: str, a: int, size: Sequence[int]) -> nn.Module:
        p, d = self.p, self.d
        c = p.pick([2, 3, 4])
        stem = nn.Sequential(nd("Conv", d)(a, c, p.pick([3, 1, 5]), padding="same"), *self.finish(c))
        outputs = 3 if task in ("pixels", "classes") else p.pick([1, 2, 3])
        if task == "classes":
            return self._classifier(nn.Sequential(stem, self._narrowing(c)), c, outputs)
        if task == "super":
            return nn.Sequential(stem, self.chain(c), self.up(c, c), *self.finish(c), conv1(p, d, c, outputs))
        if task == "code":
            code, b = p.pick([3, 5]), p.pick([2, 3])
            parts = [self.down(c, c), nn.Linear(c * 2**d, code), nn.Linear(code, b * 2**d), self.block(b, outputs)]
            return nn.Sequential(stem, Apply(encoded, *parts))
        if task == "outputs" or (task == "module" and p.chance(40)):
            return nn.Sequential(stem, self._several(c, outputs))
        return nn.Sequential(stem, self.body(c), conv1(p, d, c, outputs))

    def _narrowing(self, c: int) -> nn.Module:
        """The encoder of a classifier: maps that become smaller, or any body."""
        if self.p.chance(30):
            return self.body(c)
        return nn.Sequential(self.block(c, c), *(self.down(c, c) for _ in range(self.p.pick([1, 2]))), self.chain(c))

    def _classifier(self, body: nn.Module, c: int, outputs: int) -> nn.Module:
        p, d = self.p, self.d
        pool = p.pick(["AdaptiveAvgPool", "AdaptiveMaxPool"])
        size = p.pick([1, 1, 2])
        head = [nd(pool, d)(size), nn.Flatten(), *([nn.Dropout(0.3)] if p.chance(15) else [])]
        if p.chance(30):
            return nn.Sequential(body, *head, nn.Linear(c * size**d, 4), nn.ReLU(), nn.Linear(4, outputs))
        return nn.Sequential(body, *head, nn.Linear(c * size**d, outputs))

    def _several(self, c: int, outputs: int) -> nn.Module:
        """Several outputs, at several resolutions as it comes."""
        p, d = self.p, self.d
        kind = p.pick(["heads", "pyramid", "nested"])
        if kind == "pyramid":
            return Headed(self.pyramid(c, "all"), conv1(p, d, c, outputs))
        if kind == "nested":
            return Headed(self.nested(c, True), conv1(p, d, c, outputs))
        stages = [p.pick([self.block, self.down])(c, c) for _ in range(p.pick([2, 3]))]
        return Heads(stages, [conv1(p, d, c, outputs) for _ in stages], p.pick(["tuple", "list", "dict"]))
