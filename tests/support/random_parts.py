"""Random layers: every op a convolutional network is made of, drawn with random arguments.

A part takes ``a`` channels to ``b``. Three tables: what keeps the size of the map or nearly so
(`LAYERS`), what makes it smaller (`DOWN`) and what makes it larger (`UP`). Where two maps must
meet, `fit` crops or pads, so that no size has to divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from random_draws import LINEAR, MODES, Apply, Draws, fit, nd, resize
from torch import nn
from torch.nn.utils import parametrizations, parametrize


def conv1(p: Draws, d: int, a: int, b: int) -> nn.Module:
    """A convolution with a kernel of 1."""
    return nd("Conv", d)(a, b, 1, bias=p.chance(70))


# Layers that keep the size, or nearly so -----------------------------------------------------------


def conv(p: Draws, d: int, a: int, b: int) -> nn.Module:
    kernel = p.pick([3, 1, 2, 5, [p.whole(1, 4) for _ in range(d)]])
    dilation = p.pick([1, 1, 1, 2, 3]) if kernel in (2, 3) else 1
    groups = p.pick([g for g in (1, 1, 1, 2, a) if a % g == 0 and b % g == 0])
    mode = p.pick(MODES)
    if p.chance(40):
        padding: Any = "same"
    elif isinstance(kernel, list):
        padding = [p.whole(0, k - 1) for k in kernel]
    else:
        padding = p.pick([dilation * (kernel - 1) // 2, 0, dilation * (kernel - 1)]) if kernel < 5 else 2
    bias = p.chance(70)
    return nd("Conv", d)(
        a, b, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias, padding_mode=mode
    )


def transposed_keep(p: Draws, d: int, a: int, b: int) -> nn.Module:
    dilation = p.pick([1, 2])
    return nd("ConvTranspose", d)(a, b, 3, 1, dilation, dilation=dilation, bias=p.chance(50))


def separable(p: Draws, d: int, a: int, b: int) -> nn.Module:
    kernel = p.pick([3, 5, 7])
    return nn.Sequential(nd("Conv", d)(a, a, kernel, padding=kernel // 2, groups=a), conv1(p, d, a, b))


def asymmetric(p: Draws, d: int, a: int, b: int) -> nn.Module:
    layers = []
    for axis in range(d):
        kernel = [3 if k == axis else 1 for k in range(d)]
        layers.append(nd("Conv", d)(a if axis == 0 else b, b, kernel, padding="same"))
    return nn.Sequential(*layers)


def last(x: torch.Tensor, *parts: nn.Module) -> torch.Tensor:
    x = x.movedim(1, -1)
    for part in parts:
        x = part(x)
    return x.movedim(-1, 1)


def linear(p: Draws, d: int, a: int, b: int) -> nn.Module:
    return Apply(last, nn.Linear(a, b, bias=p.chance(60)))


def einsum(x: torch.Tensor, weight: nn.Linear, inner: bool) -> torch.Tensor:
    if inner:
        return torch.einsum("nc...,dc->n...d", x, weight.weight).movedim(-1, 1)
    return torch.einsum("nc...,dc->nd...", x, weight.weight)


def einsum_channels(p: Draws, d: int, a: int, b: int) -> nn.Module:
    return Apply(einsum, nn.Linear(a, b), inner=p.chance(40))


def convnext(p: Draws, d: int, a: int, b: int) -> nn.Module:
    kernel = p.pick([3, 5])
    parts = [nn.LayerNorm(a), nn.Linear(a, 2 * a), nn.GELU(), nn.Linear(2 * a, b)]
    return nn.Sequential(nd("Conv", d)(a, a, kernel, padding=kernel // 2, groups=a), Apply(last, *parts))


class Standardised(nn.Module):
    """A parametrization: a weight with mean 0 and deviation 1 per output channel."""

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        axes = tuple(range(1, w.dim()))
        return (w - w.mean(axes, keepdim=True)) / (w.std(axes, keepdim=True) + 1e-3)


def reparametrized(p: Draws, d: int, a: int, b: int) -> nn.Module:
    layer = nd("Conv", d)(a, b, 3, padding=1)
    kind = p.pick(["weight norm", "spectral norm", "standardised", "old weight norm", "old spectral norm"])
    if kind == "weight norm":
        return parametrizations.weight_norm(layer, dim=p.pick([0, 1]))
    if kind == "spectral norm":
        return parametrizations.spectral_norm(layer)
    if kind == "old weight norm":
        return nn.utils.weight_norm(layer)
    if kind == "old spectral norm":
        return nn.utils.spectral_norm(layer)
    parametrize.register_parametrization(layer, "weight", Standardised())
    return layer


def branches(x: torch.Tensor, *parts: nn.Module, join: str) -> torch.Tensor:
    """Several ways from one map, joined late."""
    made = [part(x) for part in parts]
    size = made[0].shape[2:]
    made = [fit(m, size) for m in made]
    if join == "cat":
        return torch.cat(made, 1)
    if join == "stack":
        return torch.stack(made, 2).amax(2)
    if join == "weights":
        w = torch.stack(made).mean(tuple(range(3, x.dim() + 1)), keepdim=True).softmax(0)
        return (torch.stack(made) * w).sum(0)
    if join == "max":
        return torch.stack(made, -1).max(-1).values
    return sum(made[1:], made[0])


def several(p: Draws, d: int, a: int, b: int) -> nn.Module:
    count = p.pick([2, 3])
    join = p.pick(["sum", "cat", "stack", "max", "weights"])
    if join == "cat":
        return nn.Sequential(
            Apply(branches, *(conv(p, d, a, 2) for _ in range(count)), join=join), conv1(p, d, 2 * count, b)
        )
    return Apply(branches, *(conv(p, d, a, b) for _ in range(count)), join=join)


def global_branch(x: torch.Tensor, part: nn.Module) -> torch.Tensor:
    return resize(part(x.mean(tuple(range(2, x.dim())), keepdim=True)), x.shape[2:])


def pyramid(p: Draws, d: int, a: int, b: int) -> nn.Module:
    """Dilated convolutions side by side with a global pool (ASPP)."""
    rates = [nd("Conv", d)(a, 2, 3, padding=r, dilation=r) for r in p.pick([(1, 2), (1, 3), (2, 4)])]
    pooled = Apply(global_branch, conv1(p, d, a, 2))
    return nn.Sequential(Apply(branches, *rates, pooled, join="cat"), conv1(p, d, 6, b))


def pooled_bins(x: torch.Tensor, *parts: nn.Module, sizes: Sequence[Any], mode: str) -> torch.Tensor:
    pool = getattr(F, f"adaptive_avg_pool{x.dim() - 2}d")
    return torch.cat(
        [x, *(resize(part(pool(x, s)), x.shape[2:], mode) for part, s in zip(parts, sizes, strict=True))], 1
    )


def bins(p: Draws, d: int, a: int, b: int) -> nn.Module:
    """Adaptive pools to a few sizes, resized and put beside the map (PSP)."""
    sizes = p.pick([(1, 2), (1, 3), (2, 5)])
    part = Apply(pooled_bins, *(conv1(p, d, a, 1) for _ in sizes), sizes=sizes, mode=p.pick(["nearest", LINEAR[d]]))
    return nn.Sequential(part, conv1(p, d, a + len(sizes), b))


def halves(x: torch.Tensor, part: nn.Module, how: str) -> torch.Tensor:
    """Only some of the channels go through a convolution (as in ShuffleNet, GhostNet, CSPNet)."""
    c = x.shape[1]
    if how == "split":
        first, second = x.split([c - c // 2, c // 2], 1)
    elif how == "chunk":
        first, second = x.chunk(2, 1)
    else:
        first, second = x[:, 0::2], x[:, 1::2]
    y = torch.cat([fit(part(first), x.shape[2:]), second], 1)
    return y.reshape(y.shape[0], 2, -1, *y.shape[2:]).transpose(1, 2).reshape(y.shape) if y.shape[1] % 2 == 0 else y


def partial(p: Draws, d: int, a: int, b: int) -> nn.Module:
    if a < 2:
        return conv(p, d, a, b)
    keep = a - a // 2
    return nn.Sequential(
        Apply(halves, conv(p, d, keep, keep), how=p.pick(["split", "chunk", "stride"])), conv1(p, d, a, b)
    )


def shifted(x: torch.Tensor, how: str, axis: int, by: int) -> torch.Tensor:
    if how == "roll":
        return torch.cat([x, x.roll(by, axis)], 1)
    if how == "flip":
        return torch.cat([x, x.flip(axis)], 1)
    if how == "crop":
        return torch.cat([x, F.pad(x, (1, 0))[..., :-1]], 1)
    if how == "difference":
        return torch.cat([x, F.pad(x.diff(dim=axis), (*(0, 0) * (x.dim() - 1 - axis), 0, 1))], 1)
    if how == "turn":
        return torch.cat([x, x.roll((by, -1), (axis, 1)).flip((1, axis))], 1)
    size = x.shape[axis]
    return torch.cat(
        [x, torch.cat([x.narrow(axis, by % size, size - by % size), x.narrow(axis, 0, by % size)], axis)], 1
    )


def shift(p: Draws, d: int, a: int, b: int) -> nn.Module:
    """A map beside its rolled, flipped or cropped self."""
    how = p.pick(["roll", "flip", "crop", "difference", "turn", "halves"])
    return nn.Sequential(
        Apply(shifted, how=how, axis=p.whole(2, d + 1), by=p.pick([1, -1, 2, 5])), conv1(p, d, 2 * a, b)
    )


def blocks_of(x: torch.Tensor, part: nn.Module, by: int, how: str) -> torch.Tensor:
    """Pixels into channels, a layer, and back again; padded to what divides."""
    size = x.shape[2:]
    full = [-(-n // by) * by for n in size]
    y = fit(x, full)
    d = len(size)
    if how == "module" and d == 2:
        return fit(F.pixel_shuffle(part(F.pixel_unshuffle(y, by)), by), size)
    n, c = y.shape[:2]
    split = [m for k in full for m in (k // by, by)]
    inner = [3 + 2 * k for k in range(d)]
    outer = [2 + 2 * k for k in range(d)]
    y = part(y.view(n, c, *split).permute(0, 1, *inner, *outer).reshape(n, c * by**d, *(k // by for k in full)))
    y = y.view(n, -1, *[by] * d, *(k // by for k in full))
    order = [k for pair in zip(range(2 + d, 2 + 2 * d), range(2, 2 + d), strict=True) for k in pair]
    return fit(y.permute(0, 1, *order).reshape(n, -1, *full), size)


def in_blocks(p: Draws, d: int, a: int, b: int) -> nn.Module:
    by = 2 if d == 3 else p.pick([2, 3])
    return Apply(blocks_of, conv1(p, d, a * by**d, b * by**d), by=by, how=p.pick(["module", "views"]))


def written(x: torch.Tensor, part: nn.Module) -> torch.Tensor:
    """Parts of a fresh map assigned one after the other."""
    y = part(x)
    z = torch.zeros_like(y)
    z[..., 1:] = y[..., 1:] * 2
    z[:, 0] += y[:, -1]
    z[..., 0] = 0.5
    return z


def assigned(p: Draws, d: int, a: int, b: int) -> nn.Module:
    return Apply(written, conv(p, d, a, b))


def turned(x: torch.Tensor, part: nn.Module) -> torch.Tensor:
    return part(x.transpose(2, 3).contiguous()).transpose(2, 3)


def transposed_axes(p: Draws, d: int, a: int, b: int) -> nn.Module:
    return Apply(turned, conv(p, d, a, b)) if d > 1 else conv(p, d, a, b)


def repeated(x: torch.Tensor, part: nn.Module) -> torch.Tensor:
    return fit(part(x.repeat_interleave(2, 2)), x.shape[2:]) + fit(
        part(x.repeat(1, 1, 2, *[1] * (x.dim() - 3))), x.shape[2:]
    )


def repeat(p: Draws, d: int, a: int, b: int) -> nn.Module:
    return Apply(repeated, conv1(p, d, a, b))


def coordinates(x: torch.Tensor, part: nn.Module) -> torch.Tensor:
    grids = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=x.dtype) for n in x.shape[2:]), indexing="ij")
    return part(torch.cat([x, *(g.expand(x.shape[0], 1, *g.shape) for g in grids)], 1))


def coord_conv(p: Draws, d: int, a: int, b: int) -> nn.Module:
    return Apply(coordinates, conv(p, d, a + d, b))


def padded(x: torch.Tensor, part: nn.Module, pads: Sequence[int], mode: str) -> torch.Tensor:
    return fit(part(F.pad(x, list(pads), mode=mode)), x.shape[2:])


def pad(p: Draws, d: int, a: int, b: int) -> nn.Module:
    mode = p.pick(["constant", "reflect", "replicate", "circular"])
    return Apply(
        padded, conv1(p, d, a, b), pads=[p.whole(-1 if mode == "constant" else 0, 3) for _ in range(2 * d)], mode=mode
    )


def smoothing_pool(p: Draws, d: int, a: int, b: int) -> nn.Module:
    pool = p.pick(
        [
            nd("AvgPool", d)(3, 1, 1),
            nd("MaxPool", d)(3, 1, 1),
            nd("AvgPool", d)(2, 1),
            nd("MaxPool", d)(2, 1, dilation=2),
        ]
    )
    return nn.Sequential(pool, conv1(p, d, a, b))


LAYERS = {
    "conv": conv, "transposed conv, stride 1": transposed_keep, "separable conv": separable,
    "asymmetric conv": asymmetric, "linear over channels": linear, "einsum": einsum_channels, "ConvNeXt": convnext,
    "weight norms": reparametrized, "branches": several, "dilated pyramid": pyramid, "pooled bins": bins,
    "part of the channels": partial, "shift": shift, "shuffle": in_blocks, "assign": assigned,
    "transposed axes": transposed_axes, "repeat": repeat, "coordinates": coord_conv, "pad": pad, "pool, stride 1": smoothing_pool,
}  # fmt: skip


# Down ----------------------------------------------------------------------------------------------


def strided(p: Draws, d: int, a: int, b: int) -> nn.Module:
    kernel, stride = p.pick([(3, 2), (2, 2), (3, 3), (5, 2), (1, 2), (4, 2)])
    groups = p.pick([g for g in (1, 1, a) if a % g == 0 and b % g == 0])
    return nd("Conv", d)(
        a, b, kernel, stride, kernel // 2, groups=groups, padding_mode=p.pick(MODES), bias=p.chance(60)
    )


def pooled(p: Draws, d: int, a: int, b: int) -> nn.Module:
    name = p.pick(["MaxPool", "AvgPool"])
    kernel, stride, padding = p.pick([(2, 2, 0), (3, 2, 1), (3, 2, 0), (2, 2, 1), (3, 3, 1), (4, 2, 1)])
    options: dict[str, Any] = {"ceil_mode": p.chance(50)}
    if name == "MaxPool":
        options["dilation"] = p.pick([1, 1, 2]) if kernel < 4 else 1
    else:
        options["count_include_pad"] = p.chance(50)
        if d > 1 and p.chance(20):
            options["divisor_override"] = 3
    part = nd(name, d)(kernel, stride, padding, **options)
    return nn.Sequential(Within(part) if options.get("dilation", 1) > padding > 0 else part, conv1(p, d, a, b))


class Within(nn.Module):
    """A pooling of which no window lies in the padding alone: PyTorch then names pixels that are not there, and its
    backward writes where they would be."""

    def __init__(self, pool: nn.Module):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        if 1 in x.shape[2:]:
            raise ValueError("a window without a pixel")
        return self.pool(x)


def adaptive(p: Draws, d: int, a: int, b: int) -> nn.Module:
    size = [p.whole(3, 6) for _ in range(d)]
    return nn.Sequential(nd(p.pick(["AdaptiveAvgPool", "AdaptiveMaxPool"]), d)(size), conv1(p, d, a, b))


def lp(p: Draws, d: int, a: int, b: int) -> nn.Module:
    # The gradient of an Lp pool of zeros is not defined: keep away from them.
    kernel, stride = p.pick([(2, 2), (3, 2)])
    return nn.Sequential(
        nn.Softplus(), nd("LPPool", d)(p.pick([2, 3]), kernel, stride, p.chance(40)), conv1(p, d, a, b)
    )


def every_other(x: torch.Tensor, how: str) -> torch.Tensor:
    if how == "stride":
        return x[(..., *[slice(None, None, 2)] * (x.dim() - 2))]
    even = fit(x, [n + n % 2 for n in x.shape[2:]])
    return torch.cat([even[..., 0::2], even[..., 1::2]], 1)[
        (..., *[slice(None, None, 2)] * (x.dim() - 3), slice(None))
    ]


def sliced(p: Draws, d: int, a: int, b: int) -> nn.Module:
    how = p.pick(["stride", "focus"])
    return nn.Sequential(Apply(every_other, how=how), conv(p, d, a if how == "stride" else 2 * a, b))


def interpolated_down(p: Draws, d: int, a: int, b: int) -> nn.Module:
    modes = ["nearest", "nearest-exact", LINEAR[d], "area", *(["bicubic"] if d == 2 else [])]
    mode = p.pick(modes)
    options = {"align_corners": p.chance(50)} if mode in (LINEAR[d], "bicubic") else {}
    if d == 2 and mode in ("bilinear", "bicubic") and p.chance(30):
        options["antialias"] = True
    if p.chance(50) and mode != "area":
        options["scale_factor"] = p.pick([0.5, 0.6, 0.4])
    else:
        options["size"] = [p.whole(3, 7) for _ in range(d)]
    return nn.Sequential(conv1(p, d, a, b), Apply(F.interpolate, mode=mode, **options))


def patches(p: Draws, d: int, a: int, b: int) -> nn.Module:
    """Merge each block of pixels into one (patch embedding)."""
    return nd("Conv", d)(a, b, 2, 2)


def blurred(x: torch.Tensor) -> torch.Tensor:
    d = x.dim() - 2
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype)
    k = kernel
    for _ in range(d - 1):
        k = k[..., None] * kernel
    k = (k / k.sum()).expand(x.shape[1], 1, *[3] * d)
    return getattr(F, f"conv{d}d")(F.pad(x, [1] * (2 * d), mode="replicate"), k, stride=2, groups=x.shape[1])


def blur(p: Draws, d: int, a: int, b: int) -> nn.Module:
    return nn.Sequential(Apply(blurred), conv1(p, d, a, b))


DOWN = {"strided conv": strided, "pool": pooled, "adaptive pool": adaptive, "Lp pool": lp, "slices": sliced,
        "interpolate down": interpolated_down, "patches": patches, "blur": blur}  # fmt: skip


# Up ------------------------------------------------------------------------------------------------


def transposed(p: Draws, d: int, a: int, b: int) -> nn.Module:
    kernel, stride, padding = p.pick([(2, 2, 0), (3, 2, 1), (3, 2, 0), (4, 2, 1), (3, 3, 0), (2, 3, 0)])
    groups = p.pick([g for g in (1, 1, 1, 2) if a % g == 0 and b % g == 0])
    dilation = p.pick([1, 1, 2]) if kernel == 3 else 1
    output = p.pick([0, 1]) if stride > 1 else 0
    return nd("ConvTranspose", d)(a, b, kernel, stride, padding, output, groups, bias=p.chance(50), dilation=dilation)


def interpolated(p: Draws, d: int, a: int, b: int) -> nn.Module:
    mode = p.pick(["nearest", LINEAR[d], "nearest-exact", *(["bicubic"] if d == 2 else [])])
    options: dict[str, Any] = {} if "nearest" in mode else {"align_corners": p.chance(50)}
    if p.chance(30):
        options["size"] = [p.whole(8, 17) for _ in range(d)]
    else:
        options["scale_factor"] = p.pick([2, 2.0, 1.7, 3, 1.5])
        if options["scale_factor"] == 1.7:
            options["recompute_scale_factor"] = p.chance(50)
    return nn.Sequential(Apply(F.interpolate, mode=mode, **options), conv1(p, d, a, b))


def interleaved(x: torch.Tensor) -> torch.Tensor:
    """Depth to space along the last axis, by views."""
    n, c = x.shape[:2]
    y = x.reshape(n, c // 2, 2, *x.shape[2:]).movedim(2, -1)
    return y.reshape(n, c // 2, *x.shape[2:-1], 2 * x.shape[-1])


def shuffled(p: Draws, d: int, a: int, b: int) -> nn.Module:
    if d == 2 and p.chance(60):
        by = p.pick([2, 3])
        return nn.Sequential(conv1(p, d, a, by * by * b), nn.PixelShuffle(by))
    return nn.Sequential(conv1(p, d, a, 2 * b), Apply(interleaved))


def doubled(p: Draws, d: int, a: int, b: int) -> nn.Module:
    """Nearest by repetition."""

    return nn.Sequential(Apply(_doubled), conv(p, d, a, b))


def _doubled(x: torch.Tensor) -> torch.Tensor:
    for axis in range(2, x.dim()):
        x = x.repeat_interleave(2, axis)
    return x


UP = {"transposed conv": transposed, "interpolate": interpolated, "depth to space": shuffled, "repeat up": doubled}
