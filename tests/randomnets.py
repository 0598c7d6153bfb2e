"""Random networks, reproducible by seed: what to build, on what, and how to tile it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = [
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish, nn.Hardtanh,
    nn.Mish, nn.SELU, nn.CELU, nn.ReLU6, nn.Softsign, nn.LogSigmoid, nn.Hardsigmoid, nn.PReLU, nn.Tanhshrink,
]  # fmt: skip


def nd(name: str, d: int) -> Any:
    return getattr(nn, f"{name}{d}d")


@dataclass
class Case:
    """A network, its input (float64), target, loss, and the tile and budget to run it with."""

    seed: int
    net: nn.Module
    image: torch.Tensor
    target: Any
    loss: Callable[..., Any] | None
    tile: tuple[int, ...] | None
    tight: float  # where between the smallest budget (0) and plenty (1); used when there is no tile


class Block(nn.Module):
    """Layers, and what to do with their input: nothing, a sum, a concatenation, or a gate."""

    def __init__(self, layers: list[nn.Module], join: str, adapt: nn.Module | None = None):
        super().__init__()
        self.layers, self.join, self.adapt = nn.Sequential(*layers), join, adapt

    def forward(self, x):
        y = self.layers(x)
        if self.join == "none":
            return y
        x = self.adapt(x) if self.adapt is not None else x
        if x.shape[2:] != y.shape[2:]:
            x = fit(x, y.shape[2:])
        if self.join == "gate":
            return y * torch.sigmoid(x)
        return y + x if self.join == "sum" else torch.cat([y, x], 1)


def fit(x: torch.Tensor, size: Any) -> torch.Tensor:
    """Crop or pad the far side of each axis."""
    pads: list[int] = []
    for have, want in zip(reversed(x.shape[2:]), reversed(size), strict=True):
        pads += [0, want - have]
    return F.pad(x, pads)


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, c: int, d: int):
        super().__init__()
        self.net = nn.Sequential(nd("AdaptiveAvgPool", d)(1), nd("Conv", d)(c, c, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.net(x)


class ChannelNorm(nn.Module):
    """Layer norm over channels, at each pixel."""

    def __init__(self, c: int):
        super().__init__()
        self.norm = nn.LayerNorm(c)

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class UNet(nn.Module):
    """Down, a level below (or nothing), up again, joined with the skip."""

    def __init__(self, down: nn.Module, below: nn.Module, up: nn.Module, after: nn.Module, concat: bool):
        super().__init__()
        self.down, self.below, self.up, self.after, self.concat = down, below, up, after, concat

    def forward(self, x):
        y = fit(self.up(self.below(self.down(x))), x.shape[2:])
        return self.after(torch.cat([x, y], 1) if self.concat else x + y)


class Generator:
    """Draws one network; ``d`` spatial axes, few channels, sizes that rarely divide."""

    def __init__(self, seed: int):
        self.r = random.Random(seed)
        self.d = self.r.choice([1, 2, 2, 2, 2, 3])

    def chance(self, p: float) -> bool:
        return self.r.random() < p

    def conv(self, a: int, b: int, stride: int = 1) -> nn.Module:
        groups = self.r.choice([g for g in (1, 1, 1, a) if a % g == 0 and b % g == 0])
        kernel = self.r.choice([1, 2, 3, 3, 3, 5]) if stride == 1 else self.r.choice([2, 3, 3])
        dilation = self.r.choice([1, 1, 1, 2]) if kernel > 1 and stride == 1 else 1
        padding: Any = "same" if stride == 1 and self.chance(0.5) else dilation * (kernel - 1) // 2
        return nd("Conv", self.d)(a, b, kernel, stride, padding, dilation, groups, bias=self.chance(0.7))

    def norm(self, c: int) -> list[nn.Module]:
        kind = self.r.choice(["batch", "batch", "batch", "group", "instance", "channel", "none", "none"])
        if kind == "batch":
            momentum = self.r.choice([0.1, 0.1, 0.5, None])
            return [nd("BatchNorm", self.d)(c, momentum=momentum, affine=self.chance(0.8))]
        if kind == "group":
            return [nn.GroupNorm(self.r.choice([g for g in (1, 2, c) if c % g == 0]), c, affine=self.chance(0.8))]
        if kind == "instance":
            return [nd("InstanceNorm", self.d)(c, affine=self.chance(0.5), track_running_stats=self.chance(0.3))]
        return [ChannelNorm(c)] if kind == "channel" else []

    def act(self) -> list[nn.Module]:
        return [self.r.choice(ACTIVATIONS)()] if self.chance(0.8) else []

    def block(self, a: int, b: int) -> nn.Module:
        layers: list[nn.Module] = []
        c = a
        for _ in range(self.r.choice([1, 1, 2])):
            layers += [self.conv(c, b), *self.norm(b), *self.act()]
            c = b
        if self.chance(0.15):
            layers.append(Gate(b, self.d))
        join = self.r.choice(["none", "none", "sum", "gate", "concat"])
        adapt = None if join in ("none", "concat") or a == b else nd("Conv", self.d)(a, b, 1)
        made = Block(layers, join, adapt)
        if join == "concat":
            return nn.Sequential(made, nd("Conv", self.d)(a + b, b, 1))
        return made

    def down(self, a: int, b: int) -> nn.Module:
        kind = self.r.choice(["stride", "max", "max", "max3", "ceil", "avg", "avg3", "adaptive", "lp"])
        d = self.d
        pools = {
            "max": lambda: nd("MaxPool", d)(2),
            "max3": lambda: nd("MaxPool", d)(3, 2, 1),
            "ceil": lambda: nd("MaxPool", d)(2, ceil_mode=True),
            "avg": lambda: nd("AvgPool", d)(2, ceil_mode=self.chance(0.3)),
            "avg3": lambda: nd("AvgPool", d)(3, 2, 1, count_include_pad=self.chance(0.5)),
            "adaptive": lambda: nd("AdaptiveAvgPool", d)(self.r.choice([5, 6, 7])),
            "lp": lambda: nd("LPPool", d)(2, 2),
        }
        if kind == "stride":
            return nn.Sequential(self.conv(a, b, 2), *self.norm(b), *self.act())
        # The gradient of an Lp pool of zeros is not defined: keep away from them.
        first = [nn.Softplus()] if kind == "lp" else []
        return nn.Sequential(*first, pools[kind](), self.conv(a, b), *self.act())

    def up(self, a: int, b: int) -> nn.Module:
        d = self.d
        kind = self.r.choice(["t2", "t3", "nearest", "linear", "aligned", "cubic", "exact", "shuffle"])
        linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[d]
        if kind == "t2":
            return nd("ConvTranspose", d)(a, b, 2, 2)
        if kind == "t3":
            out = self.r.choice([0, 1])
            return nd("ConvTranspose", d)(a, b, 3, 2, self.r.choice([0, 1]), out, bias=self.chance(0.5))
        if kind == "shuffle" and d == 2:
            return nn.Sequential(nn.Conv2d(a, 4 * b, 1), nn.PixelShuffle(2))
        mode = {"linear": linear, "aligned": linear, "exact": "nearest-exact", "cubic": "bicubic"}.get(
            kind, "nearest"
        )
        mode = "nearest" if mode == "bicubic" and d != 2 else mode
        options: dict[str, Any] = {} if "nearest" in mode else {"align_corners": kind == "aligned"}
        scale = self.r.choice([2, 2, 2, 1.7])
        return nn.Sequential(nn.Upsample(scale_factor=scale, mode=mode, **options), nd("Conv", d)(a, b, 1))

    def level(self, c: int, depth: int) -> nn.Module:
        """A net from c to c channels that keeps its size, with ``depth`` levels below."""
        if depth == 0:
            return self.block(c, c)
        wide = self.r.choice([c, c + 1, 2 * c])
        concat = self.chance(0.6)
        after = self.conv_keep(2 * c if concat else c, c)
        return nn.Sequential(
            self.block(c, c),
            UNet(self.down(c, wide), self.level(wide, depth - 1), self.up(wide, c), after, concat),
        )

    def conv_keep(self, a: int, b: int) -> nn.Module:
        return nd("Conv", self.d)(a, b, self.r.choice([1, 3]), padding="same")

    def network(self) -> nn.Module:
        c = self.r.choice([2, 3, 4])
        body = [
            self.conv_keep(self.channels, c),
            *self.norm(c),
            *self.act(),
            self.level(c, self.r.choice([0, 1, 1, 2])),
        ]
        if self.task == "classes":
            return nn.Sequential(*body, self.r.choice([nd("AdaptiveAvgPool", self.d), nd("AdaptiveMaxPool", self.d)])(1),
                                 nn.Flatten(), nn.Linear(c, 3))  # fmt: skip
        return nn.Sequential(*body, nd("Conv", self.d)(c, 3 if self.task == "pixels" else 1, 1))

    def case(self, seed: int) -> Case:
        self.task = self.r.choice(["pixels", "pixels", "regression", "regression", "classes", "module"])
        self.channels = self.r.choice([1, 2, 3])
        low, high = {1: (13, 60), 2: (11, 34), 3: (7, 12)}[self.d]
        size = [self.r.randint(low, high) for _ in range(self.d)]
        n = self.r.choice([1, 2, 2, 3, 4]) if self.d < 3 else self.r.choice([1, 2])
        torch.manual_seed(seed)
        net = self.network().double()
        image = torch.randn(n, self.channels, *size, dtype=torch.float64).requires_grad_(self.chance(0.5))
        with torch.no_grad():
            shape = _shape_of(net, image)
        target, loss = self.objective(shape)
        tile = tuple(self.r.randint(3, s + 2) for s in size) if self.chance(0.75) else None
        if self.chance(0.1):
            net.eval()
        return Case(seed, net, image, target, loss, tile, self.r.random())

    def objective(self, shape: torch.Size) -> tuple[Any, Callable[..., Any] | None]:
        if self.task == "module":
            return None, None
        if self.task == "regression":
            kinds = [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, bce, total_variation, no_reduction_mean]
            return torch.rand(shape, dtype=torch.float64), self.r.choice(kinds)
        target = torch.randint(0, 3, (shape[0], *shape[2:]))
        target.view(-1)[0] = 0
        kinds = [F.cross_entropy, weighted, smooth, dice, focal, with_terms]
        return target, self.r.choice(kinds if self.task == "pixels" else kinds[:3])


def _shape_of(net: nn.Module, image: torch.Tensor) -> torch.Size:
    state = {k: v.clone() for k, v in net.state_dict().items()}
    shape = net(image).shape
    net.load_state_dict(state)
    return shape


def bce(y, t):
    return F.binary_cross_entropy_with_logits(y, t)


def total_variation(y, t):
    return F.mse_loss(y, t) + (y[..., 1:] - y[..., :-1]).abs().mean()


def no_reduction_mean(y, t):
    each = F.mse_loss(y, t, reduction="none")
    return (each * t).sum() / t.sum()


def weighted(y, t):
    return F.cross_entropy(y, t, weight=y.new_tensor([1.0, 2.0, 5.0]), ignore_index=2)


def smooth(y, t):
    return F.cross_entropy(y, t, label_smoothing=0.1)


def onehot(y, t):
    return F.one_hot(t, 3).movedim(-1, 1).to(y.dtype)


def dice(y, t):
    p, q = y.softmax(1), onehot(y, t)
    axes = (0, *range(2, y.dim()))
    return 1 - (2 * (p * q).sum(axes) / ((p + q).sum(axes) + 1e-3)).mean()


def focal(y, t):
    p = y.softmax(1)
    with torch.no_grad():
        w = (onehot(y, t) * (1 - p) ** 2).mean(1)
        w = w / w.sum()
    return (F.cross_entropy(y, t, reduction="none") * w).sum()


def with_terms(y, t):
    a, b = F.cross_entropy(y, t), dice(y, t)
    return a + b, {"cross entropy": a, "dice": b}


def draw(seed: int) -> Case | None:
    """The case of a seed; None where the drawn network does not run on the drawn image in PyTorch either."""
    torch.manual_seed(seed)
    try:
        return Generator(seed).case(seed)
    except (RuntimeError, ValueError):
        return None
