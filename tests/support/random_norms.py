"""Random norms, activations, dropout and gates; each keeps the shape of its input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from random_draws import Apply, Draws, nd
from random_parts import conv1, last
from torch import nn

# Norms ---------------------------------------------------------------------------------------------


def batch(p: Draws, d: int, c: int) -> nn.Module:
    return nd("BatchNorm", d)(
        c, momentum=p.pick([0.1, 0.5, None]), affine=p.chance(80), track_running_stats=p.chance(85), eps=1e-3
    )


def synchronised(p: Draws, d: int, c: int) -> nn.Module:
    return nn.SyncBatchNorm(c, momentum=p.pick([0.1, None]), eps=1e-3)


def instance(p: Draws, d: int, c: int) -> nn.Module:
    return nd("InstanceNorm", d)(c, affine=p.chance(50), track_running_stats=p.chance(30), eps=1e-2)


def group(p: Draws, d: int, c: int) -> nn.Module:
    return nn.GroupNorm(p.pick([g for g in (1, 2, c) if c % g == 0]), c, affine=p.chance(80), eps=1e-2)


def layer(p: Draws, d: int, c: int) -> nn.Module:
    return Apply(last, nn.LayerNorm(c, elementwise_affine=p.chance(80), eps=1e-2))


def rms(p: Draws, d: int, c: int) -> nn.Module:
    return Apply(last, nn.RMSNorm(c, elementwise_affine=p.chance(80), eps=1e-2))


def by_hand(x: torch.Tensor) -> torch.Tensor:
    spread = x.var(1, keepdim=True, unbiased=False)
    return (x - x.mean(1, keepdim=True)) / (spread + 1e-2).sqrt()


def hand_made(p: Draws, d: int, c: int) -> nn.Module:
    return Apply(by_hand)


def response(p: Draws, d: int, c: int) -> nn.Module:
    return nn.LocalResponseNorm(p.pick([2, 3]), alpha=0.1)


def grn(x: torch.Tensor, scale: nn.Module) -> torch.Tensor:
    """Global response norm, of ConvNeXt V2."""
    g = (x.square().sum(tuple(range(2, x.dim())), keepdim=True) + 1e-3).sqrt()
    return x + scale(x * (g / (g.mean(1, keepdim=True) + 1e-3)))


def global_response(p: Draws, d: int, c: int) -> nn.Module:
    return Apply(grn, conv1(p, d, c, c))


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x + 0.1, dim=1)


def normalised(p: Draws, d: int, c: int) -> nn.Module:
    return Apply(unit)


NORMS = {
    "batch norm": batch, "batch norm ": batch, "instance norm": instance, "group norm": group,
    "layer norm over channels": layer, "RMS norm": rms, "norm by hand": hand_made, "synchronised batch norm": synchronised,
    "local response norm": response, "global response norm": global_response, "normalize": normalised,
}  # fmt: skip


# Activations ---------------------------------------------------------------------------------------

SIMPLE = [
    "ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Sigmoid", "Tanh", "Softplus", "Hardswish", "Hardtanh", "Mish", "SELU",
    "CELU", "ReLU6", "Softsign", "LogSigmoid", "Hardsigmoid", "PReLU", "Tanhshrink", "Hardshrink", "Softshrink", "RReLU",
]  # fmt: skip
INPLACE = ("ReLU", "LeakyReLU", "ELU", "SiLU", "Hardswish", "Mish", "SELU", "CELU", "ReLU6", "Hardsigmoid", "RReLU")


def activation(p: Draws, d: int, c: int) -> nn.Module:
    """One of torch.nn's; those that mix channels or want arguments among them."""
    special: dict[str, Any] = {
        "PReLU per channel": lambda: nn.PReLU(c),
        "Threshold": lambda: nn.Threshold(0.1, -0.5),
        "Softmax": lambda: nn.Softmax(1),
        "Softmin": lambda: nn.Softmin(1),
        "LogSoftmax": lambda: nn.LogSoftmax(1),
        "GELU tanh": lambda: nn.GELU("tanh"),
        "GLU": lambda: nn.Sequential(conv1(p, d, c, 2 * c), nn.GLU(1)),
        "Softplus sharp": lambda: nn.Softplus(3, 2),
        "LeakyReLU steep": lambda: nn.LeakyReLU(0.3),
    }
    name = p.pick(SIMPLE + list(special))
    p.used[name] += 1
    if name in special:
        return special[name]()
    return getattr(nn, name)(**({"inplace": True} if name in INPLACE and p.chance(30) else {}))


def dropout(p: Draws, d: int, c: int) -> nn.Module:
    kinds: list[Any] = [nn.Dropout, nd("Dropout", d), nn.AlphaDropout, nn.FeatureAlphaDropout]
    kind = p.pick(kinds)
    p.used["dropout"] += 1
    return kind(p.pick([0.3, 0.5]), **({"inplace": True} if p.chance(20) else {}))


# Gates ---------------------------------------------------------------------------------------------


def spatial(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def excite(x: torch.Tensor, first: nn.Module, second: nn.Module, act: nn.Module) -> torch.Tensor:
    return x * act(second(F.silu(first(x.mean(spatial(x), keepdim=True)))))


def squeeze_excite(p: Draws, d: int, c: int) -> nn.Module:
    return Apply(excite, conv1(p, d, c, 2), conv1(p, d, 2, c), p.pick([nn.Sigmoid, nn.Hardsigmoid, nn.Tanh])())


def excite_linear(x: torch.Tensor, first: nn.Module, second: nn.Module, pool: nn.Module) -> torch.Tensor:
    return x * second(first(pool(x).flatten(1)).relu()).sigmoid()[(..., *[None] * (x.dim() - 2))]


def squeeze_linear(p: Draws, d: int, c: int) -> nn.Module:
    pool = nd(p.pick(["AdaptiveAvgPool", "AdaptiveMaxPool"]), d)(1)
    return Apply(excite_linear, nn.Linear(c, 2), nn.Linear(2, c), pool)


def along_channels(x: torch.Tensor, part: nn.Module) -> torch.Tensor:
    gate = part(x.mean(spatial(x))[:, None]).sigmoid()[:, 0]
    return x * gate[(..., *[None] * (x.dim() - 2))]


def eca(p: Draws, d: int, c: int) -> nn.Module:
    return Apply(along_channels, nn.Conv1d(1, 1, 3, padding=1))


def where(x: torch.Tensor, part: nn.Module) -> torch.Tensor:
    return x * part(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


def spatial_gate(p: Draws, d: int, c: int) -> nn.Module:
    return Apply(where, nd("Conv", d)(2, 1, 3, padding=1))


def both(x: torch.Tensor, part: nn.Module) -> torch.Tensor:
    return x * (part(x.mean(spatial(x), keepdim=True)) + part(x.amax(spatial(x), keepdim=True))).sigmoid()


def channel_gate(p: Draws, d: int, c: int) -> nn.Module:
    return Apply(both, conv1(p, d, c, c))


def crossed(x: torch.Tensor, part: nn.Module) -> torch.Tensor:
    y = x
    for axis in spatial(x):
        y = y * part(x.mean(axis, keepdim=True)).sigmoid()
    return y


def coordinate_gate(p: Draws, d: int, c: int) -> nn.Module:
    return Apply(crossed, conv1(p, d, c, c))


def context(x: torch.Tensor, key: nn.Module, value: nn.Module) -> torch.Tensor:
    """Attention of one query over all pixels (global context)."""
    w = key(x).flatten(2).softmax(-1)
    pooled = (x.flatten(2) @ w.transpose(1, 2)).view(*x.shape[:2], *[1] * (x.dim() - 2))
    return x + value(pooled)


def global_context(p: Draws, d: int, c: int) -> nn.Module:
    return Apply(context, conv1(p, d, c, 1), conv1(p, d, c, c))


def channels_attend(x: torch.Tensor, scale: nn.Module) -> torch.Tensor:
    f = F.normalize(x.flatten(2) + 0.1, dim=2)
    return x + scale(((f @ f.transpose(1, 2)).softmax(-1) @ x.flatten(2)).view_as(x))


def channel_attention(p: Draws, d: int, c: int) -> nn.Module:
    return Apply(channels_attend, conv1(p, d, c, c))


def standardised(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(spatial(x), keepdim=True)) / (x.std() + 0.1)


def standardise(p: Draws, d: int, c: int) -> nn.Module:
    return Apply(standardised)


GATES = {"squeeze and excite": squeeze_excite, "squeeze and excite, linear": squeeze_linear, "ECA": eca, "spatial gate": spatial_gate,
         "channel gate": channel_gate, "coordinate gate": coordinate_gate, "global context": global_context,
         "channel attention": channel_attention, "standardise": standardise}  # fmt: skip
