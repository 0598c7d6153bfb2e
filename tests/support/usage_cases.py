"""The table of small networks goes on: what people write around the layers, in every way torch spells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from loss_cases import CASES, LINE, PIXELS, PLANE, SOLID, case, layer, loss_case
from torch import nn
from torch.utils.checkpoint import checkpoint

EVEN = (2, 4, 8, 12)
BEFORE = set(CASES)

# Convolutions and pooling in every combination ----------------------------------------------------

for _mode in ("zeros", "reflect", "replicate", "circular"):
    for _s, _d, _g in ((1, 2, 1), (2, 1, 4), (2, 2, 2), (3, 1, 1)):
        layer(f"conv2d {_mode} s{_s} d{_d} g{_g}",
              lambda m=_mode, s=_s, d=_d, g=_g: nn.Conv2d(4, 4, 3, s, 2, d, g, padding_mode=m))  # fmt: skip
    layer(f"conv2d {_mode} wide", lambda m=_mode: nn.Conv2d(4, 3, 5, padding=4, padding_mode=m))
    layer(f"conv2d {_mode} same", lambda m=_mode: nn.Conv2d(4, 3, (2, 4), padding="same", padding_mode=m))
    layer(f"conv1d {_mode} s2 d2", lambda m=_mode: nn.Conv1d(4, 4, 3, 2, 3, 2, 2, padding_mode=m), shape=LINE)
    layer(f"conv3d {_mode} s2", lambda m=_mode: nn.Conv3d(4, 4, 3, 2, 2, groups=2, padding_mode=m), shape=SOLID)
layer("conv of the image's size", lambda: nn.Conv2d(4, 3, (9, 11)))
layer("conv beyond the image", lambda: nn.Conv2d(4, 3, 11, padding=5))
layer("conv of one pixel", lambda: nn.Conv2d(4, 3, 3, padding=1), shape=(2, 4, 1, 1))
layer("conv of one row", lambda: nn.Conv2d(4, 3, 3, 2, 1), shape=(2, 4, 1, 13))
layer("conv valid", lambda: nn.Conv2d(4, 3, 3, padding="valid"))
for _op in (0, 1):
    layer(f"transposed1d o{_op}", lambda o=_op: nn.ConvTranspose1d(4, 6, 3, 2, 1, o, 2), shape=LINE)
    layer(f"transposed3d o{_op}", lambda o=_op: nn.ConvTranspose3d(4, 6, 3, 2, 1, o, 2), shape=SOLID)
    layer(f"transposed2d k2 o{_op}", lambda o=_op: nn.ConvTranspose2d(4, 6, 2, 2, 0, o, bias=False))
layer("transposed2d d2", lambda: nn.ConvTranspose2d(4, 6, 3, 3, 2, 2, 2, dilation=2))
case("transposed2d output size", lambda x, u: u(x, output_size=(18, 21)), lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1))
for _text, _args in {
    "2/2 ceil": {"kernel_size": 2, "ceil_mode": True}, "3/2": {"kernel_size": 3, "stride": 2},
    "4/1": {"kernel_size": 4, "stride": 1}, "3/3 pad ceil": {"kernel_size": 3, "padding": 1, "ceil_mode": True},
}.items():  # fmt: skip
    layer(f"max pool {_text}", lambda a=_args: nn.MaxPool2d(**a))
    layer(f"avg pool {_text}", lambda a=_args: nn.AvgPool2d(**a))
    layer(f"max pool 1d {_text}", lambda a=_args: nn.MaxPool1d(**a), shape=LINE)
    layer(f"avg pool 1d {_text}", lambda a=_args: nn.AvgPool1d(**a), shape=LINE)
    layer(f"max pool 3d {_text}", lambda a=_args: nn.MaxPool3d(**a), shape=SOLID)
    layer(f"avg pool 3d {_text}", lambda a=_args: nn.AvgPool3d(**a, count_include_pad=False), shape=SOLID)
layer("lp pool module", nn.Softplus, lambda: nn.LPPool2d(2, 3, 2, ceil_mode=True))
layer("lp pool 3d", nn.Softplus, lambda: nn.LPPool3d(3, 2), shape=SOLID)
layer("adaptive avg 1d up", lambda: nn.AdaptiveAvgPool1d(31), shape=LINE)
layer("global avg 1d", lambda: nn.AdaptiveAvgPool1d(1), nn.Flatten, lambda: nn.Linear(4, 3), shape=LINE)
layer("global avg 3d", lambda: nn.AdaptiveAvgPool3d(1), nn.Flatten, lambda: nn.Linear(4, 3), shape=SOLID)
layer("global max 3d", lambda: nn.AdaptiveMaxPool3d(1), nn.Flatten, lambda: nn.Linear(4, 3), shape=SOLID)
layer("fractional pool", lambda: nn.FractionalMaxPool2d(2, output_ratio=0.6, _random_samples=torch.rand(2, 4, 2, dtype=torch.float64)),
      whole=("fractional",))  # fmt: skip
layer("pool mixed", lambda: nn.MaxPool2d(2), lambda: nn.Upsample(size=(9, 11)), lambda: nn.AvgPool2d(3, 1, 1))
layer("pixel shuffle 3", lambda: nn.Conv2d(4, 9, 1), lambda: nn.PixelShuffle(3))
layer("pad modules", lambda: nn.ReflectionPad2d((1, 2, 3, 0)), lambda: nn.ZeroPad2d(1), lambda: nn.ReplicationPad2d(2),
      lambda: nn.ConstantPad2d((1, 0, 2, 1), 0.7), lambda: nn.CircularPad2d((2, 1, 0, 3)))  # fmt: skip
layer(
    "pad modules 1d",
    lambda: nn.ReflectionPad1d(3),
    lambda: nn.CircularPad1d(2),
    lambda: nn.ReplicationPad1d((0, 4)),
    shape=LINE,
)
layer(
    "pad modules 3d",
    lambda: nn.ReflectionPad3d(1),
    lambda: nn.CircularPad3d(2),
    lambda: nn.ReplicationPad3d(2),
    shape=SOLID,
)
layer("crop by padding", lambda: nn.ZeroPad2d(-2), lambda: nn.Conv2d(4, 3, 3))
for _mode in ("nearest", "bilinear", "bicubic"):
    case(f"resize to another {_mode}", lambda x, c, m=_mode: x * F.interpolate(c(x), x.shape[-2:], mode=m).sigmoid(),
         lambda: nn.Conv2d(4, 4, 3, 2))  # fmt: skip
case("antialias bicubic", lambda x: F.interpolate(x, scale_factor=0.45, mode="bicubic", antialias=True))
case("area up", lambda x: F.interpolate(x, scale_factor=1.5, mode="area"))
case("interpolate 1d exact", lambda x: F.interpolate(x, scale_factor=0.7, mode="nearest-exact"), shape=LINE)
case("interpolate 3d exact", lambda x: F.interpolate(x, size=(3, 9, 11), mode="nearest-exact"), shape=SOLID)
layer(
    "upsampling modules",
    lambda: nn.UpsamplingBilinear2d(scale_factor=2),
    lambda: nn.UpsamplingNearest2d(size=(7, 30)),
)

# Norms, weights -----------------------------------------------------------------------------------

layer("sync batch norm eval", lambda: nn.SyncBatchNorm(4), train=False)
layer("batch norm momentum none", lambda: nn.BatchNorm2d(4, momentum=None), lambda: nn.Conv2d(4, 3, 1))
layer("local response norm 3d", lambda: nn.LocalResponseNorm(4, 0.1, 0.5, 2.0), shape=SOLID)
case("rms norm plane", lambda x, n: n(x), lambda: nn.RMSNorm((4, 9, 11)))
case(
    "rms norm plain",
    lambda x, n: n(x.movedim(1, -1)).movedim(-1, 1),
    lambda: nn.RMSNorm(4, elementwise_affine=False, eps=1e-3),
)
case("layer norm rows", lambda x, n: n(x), lambda: nn.LayerNorm(11))
case(
    "layer norm plain",
    lambda x, n: n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    lambda: nn.LayerNorm(4, elementwise_affine=False),
)
case(
    "layer norm no bias",
    lambda x, n: n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    lambda: nn.LayerNorm(4, bias=False),
)
case(
    "instance norm function",
    lambda x: F.instance_norm(x) + F.group_norm(x, 2) + F.batch_norm(x, None, None, training=True),
)
case("frozen batch norm", lambda x, n: n.eval()(x), lambda: nn.BatchNorm2d(4))
layer("weight norm old", lambda: nn.utils.weight_norm(nn.Conv2d(4, 3, 3)))
layer("spectral norm old", lambda: nn.utils.spectral_norm(nn.Conv2d(4, 3, 3)))
layer("weight norm of a transposed", lambda: nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(4, 3, 3, 2)))
layer("orthogonal", lambda: nn.utils.parametrizations.orthogonal(nn.Conv2d(4, 3, 1)), whole=("householder",))


class Tied(nn.Module):
    """An auto-encoder whose decoder uses the encoder's weights."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(4, 6, 3, 2, 1)
        self.up = nn.ConvTranspose2d(6, 4, 3, 2, 1)
        self.up.weight = self.down.weight

    def forward(self, x):
        return self.up(self.down(x).relu())


layer("tied", Tied)

# Every activation of torch.nn ----------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[Any, ...]] = {"Threshold": (0.1, 2.0), "Softmax": (1,), "LogSoftmax": (1,), "Softmin": (1,), "GLU": (1,),
                                         "MultiheadAttention": (4, 2)}  # fmt: skip
SPECIAL = {"MultiheadAttention", "RReLU"}  # attention over pixels runs whole; the other draws random slopes
for _name in torch.nn.modules.activation.__all__:
    if f"activation {_name}" not in CASES and _name not in SPECIAL:
        layer(f"activation {_name}", lambda n=_name: getattr(nn, n)(*ARGUMENTS.get(n, ())))
    if _name not in SPECIAL:
        layer(f"activation {_name} line", lambda n=_name: getattr(nn, n)(*ARGUMENTS.get(n, ())),
              shape=LINE if _name != "Softmax2d" else PLANE)  # fmt: skip
layer("activation negative axes", lambda: nn.Softmax(-3), lambda: nn.GLU(-3))
layer("activation PReLU 3d", lambda: nn.PReLU(4), shape=SOLID)
layer(
    "activation softplus",
    lambda: nn.Softplus(2.0, 0.5),
    lambda: nn.ELU(0.3),
    lambda: nn.CELU(2.0),
    lambda: nn.Hardtanh(-0.3, 2),
)
for _name in (
    "Hardswish",
    "ELU",
    "LeakyReLU",
    "Mish",
    "SELU",
    "CELU",
    "Hardtanh",
    "Hardsigmoid",
    "ReLU6",
    "SiLU",
    "RReLU",
):
    layer(f"activation {_name} in place", lambda n=_name: getattr(nn, n)(inplace=True), lambda: nn.Conv2d(4, 3, 1))
layer("activation Threshold in place", lambda: nn.Threshold(0.0, 0.1, True), lambda: nn.Conv2d(4, 3, 1))
case("softmax over batch", lambda x: x.softmax(0))
case("softmax one dimension", lambda x: x.mean((0, 2, 3)).softmax(0))
case("gumbel softmax torch", lambda x: F.gumbel_softmax(x, dim=1))
case("gumbel softmax hard", lambda x: F.gumbel_softmax(x, hard=True, dim=1))
case("functional dropout", lambda x: F.dropout(x, 0.3) + F.dropout2d(x, 0.2) + F.alpha_dropout(x, 0.1, True))
case("dropout of features", lambda x: F.feature_alpha_dropout(x, 0.4, training=True))
case(
    "stochastic depth",
    lambda x, c: x + c(x) * (torch.rand((2, 1, 1, 1), dtype=x.dtype) + 0.8).floor() / 0.8,
    lambda: nn.Conv2d(4, 4, 1),
)
case("normal noise", lambda x: x + torch.normal(0.0, 0.1, x.shape, dtype=x.dtype))
case("random in place", lambda x: x + torch.empty_like(x).normal_(0, 0.1) + torch.empty_like(x).uniform_(-1, 1))
case("noise full", lambda x: x + torch.randn(x.shape, dtype=x.dtype) + torch.rand_like(x))
case("cutout", lambda x: x.masked_fill(torch.rand_like(x[:, :1]) < 0.2, 0))

# Layout -------------------------------------------------------------------------------------------

case("concat hstack", lambda x: torch.hstack([x, x.sin()]) + torch.concat([x.cos(), x], 1))
case("vstack dstack", lambda x: torch.vstack([x, x.sin()]) + torch.cat([x, x]))
case(
    "tensor split", lambda x: torch.cat(x.tensor_split(3, 3)[::-1], 3) + torch.cat(x.tensor_split((2, 5), 2)[::-1], 2)
)
case("unbind space", lambda x: torch.stack([t.sin() for t in x.unbind(3)], 3) + torch.stack(x.unbind(0), 0))
case("slices with steps", lambda x: x[:, ::2, 1::2, 2:10:3] * x[:, 1::2, :-1:2, -8::3])
case("index one", lambda x: x[:, 1] * x[:, -1] + x[:, 2, :, :] - x[:, [3]][:, 0])
case("index rows", lambda x: x[:, :, 3] + x[:, :, -1].sin())
case("index ellipsis none", lambda x: x[..., None, 2:] * x[:, :, :, None, 1:10])
case("take rows", lambda x: x[:, :, [0, 2, 5, 8]] + x[:, :, torch.tensor([1, 1, 3, 8])])
case("index reversed", lambda x: x[:, torch.arange(3, -1, -1)])
case("flips", lambda x: torch.fliplr(x) + torch.flipud(x) + x.flip(-1) * x.flip([2, 3]))
case("rolls", lambda x: x.roll(1) + torch.roll(x, (1, -2), (2, 3)) * torch.roll(x, 13, 3))
case(
    "moveaxis swapaxes",
    lambda x: torch.moveaxis(x, (2, 3), (0, 1)).sin().moveaxis((0, 1), (2, 3)) + x.swapaxes(2, 3).swapdims(3, 2),
)
case("mT and adjoint", lambda x: x.mT.cos().mT + x.adjoint().mT + x.mH.sin().mT)
case("unflatten", lambda x: x.unflatten(1, (2, 2)).sum(2) + nn.Unflatten(1, (2, 2))(x).amax(1))
case(
    "flatten", lambda x: x.flatten(0, 1).unflatten(0, (2, 4)) + x.flatten(2).view(2, 4, 9, 11) + x.ravel().view_as(x)
)
case("view of shapes", lambda x: x.view(x.size(0), -1).view(x.shape[0], x.shape[1], *x.size()[2:]))
case("view minus one", lambda x: x.reshape(-1, 9, 11).mean(0, keepdim=True)[None].expand(x.shape[0], -1, -1, -1))
case("squeeze", lambda x: x[:, :1].squeeze(1).unsqueeze(-1).squeeze() + x.mean(1, True).squeeze((1,)))
case("tile", lambda x: x.tile((1, 1, 2, 1)) + torch.tile(x, (2, 1)))
case("repeat both", lambda x: x.repeat(2, 1, 3, 1) + x.repeat(2, 1, 3, 1).sin())
case("expand as", lambda x: x.mean((2, 3), keepdim=True).expand_as(x) * x + x.amax(1, True).expand(x.shape))
case(
    "broadcast to",
    lambda x: torch.broadcast_to(x.mean((0, 2, 3), keepdim=True), x.shape) + torch.broadcast_tensors(x, x[:1])[1],
)
case(
    "interleave",
    lambda x: (
        torch.stack([x, x.sin()], 2).flatten(1, 2) + torch.stack([x, x], -1).flatten(-2)[..., :11].repeat(1, 2, 1, 1)
    ),
)
case("patches", lambda x: x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(2, 4, 6, 16).mean(-1), shape=EVEN)
case("patches overlapping", lambda x: x.unfold(2, 3, 2).unfold(3, 4, 1).amax((-1, -2)))
case("fold of unfold", lambda x: F.fold(F.unfold(x, 3, 1, 1, 2).sin(), (9, 11), 3, 1, 1, 2))
case("unfold dilated", lambda x: F.unfold(x, (2, 3), dilation=2, padding=(1, 0), stride=(1, 2)))
case("involution", lambda x, c: (F.unfold(x, 3, padding=1).view(2, 4, 9, 9, 11) * c(x).view(2, 1, 9, 9, 11)).sum(2),
     lambda: nn.Conv2d(4, 9, 1))  # fmt: skip
case("haar", lambda x: torch.cat([x[..., ::2, :] + x[..., 1::2, :], x[..., ::2, :] - x[..., 1::2, :]], 1), shape=EVEN)
case("checkerboard", lambda x: x * ((torch.arange(9)[:, None] + torch.arange(11)) % 2).to(x.dtype))
case(
    "diagonal",
    lambda x: x.diagonal(dim1=2, dim2=3) + torch.diag_embed(x.mean((2, 3))).sum(-1)[..., None],
    whole=("diagonal",),
)
case("triu tril", lambda x: x.triu(1) + x.tril(-2))
case("as strided", lambda x: torch.as_strided(x.contiguous(), (2, 4, 9, 10), (396, 99, 11, 1)), whole=("as_strided",))
case(
    "contiguous channels last",
    lambda x, c: c(x.to(memory_format=torch.channels_last)).contiguous(),
    lambda: nn.Conv2d(4, 4, 3),
)

# In place ------------------------------------------------------------------------------------------


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y += x
    y.mul_(2).add_(x, alpha=0.5).sub_(1).div_(3)
    y[:, 1:3].clamp_(-1, 1)
    y[:, 0] = y[:, 1].clone() * y[:, 2].clone()
    y[..., 2:5] = y[..., 2:5].clone() * 3
    y[:, :, ::2].neg_()
    y.sigmoid_()
    return y


case("in place", in_place)
case("in place residual", lambda x, c: c(x).add_(x).relu_(), lambda: nn.Conv2d(4, 4, 3, padding=1))
case(
    "in place views",
    lambda x: (lambda y: (y.view(2, -1)[:, :50].zero_(), y.permute(0, 2, 3, 1)[..., 0].fill_(2.0), y)[2])(x.clone()),
)
case("masked assign", lambda x: (lambda y: (y.__setitem__(y > 1, 0.5), y)[1])(x.clone()))
case("masked assign map", lambda x: (lambda y: (y.masked_fill_(x < -1, 0.0), y)[1])(x.clone()))
case("copy into", lambda x: torch.zeros(2, 8, 9, 11, dtype=x.dtype).index_copy(1, torch.tensor([1, 3, 5, 7]), x))
case("out buffer", lambda x: (lambda y: (y[:, :4].copy_(x), y[:, 4:].copy_(x.sin()), y)[2])(x.new_empty(2, 8, 9, 11)))
case(
    "data in place",
    lambda x: (lambda y: (y.fill_diagonal_(0.0), y)[1])(x.mean((0, 1)))[None, None] * x,
    whole=("fill_diagonal", "as_strided"),
)

# Arithmetic over channels and space ----------------------------------------------------------------

case(
    "shape arithmetic",
    lambda x: x[:, :, : x.shape[2] // 2 * 2, : x.size(-1) - 1].reshape(x.shape[0], -1, x.shape[2] // 2, 2, 10).sum(3),
)
case("branches on shape", lambda x: F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)) if x.shape[2] % 4 else x)
case("loop over scales", lambda x: sum(F.interpolate(F.avg_pool2d(x, 2**k), x.shape[2:]) for k in range(1, 4)))
case("list of maps", lambda x, a, b: (lambda m: torch.cat([F.interpolate(t, (5, 6)) for t in m], 1))([a(x), b(x), x]),
     lambda: nn.Conv2d(4, 2, 3), lambda: nn.Conv2d(4, 2, 3, 2))  # fmt: skip
case("where both", lambda x: torch.where(x > 0.2, x.sin(), torch.where(x < -0.2, x.cos(), 0.0)))
case("clip", lambda x: x.clip(-0.4, 0.6) + torch.clamp(x, max=0.1) + torch.clamp(x, min=x.mean(1, True)))
case(
    "max min",
    lambda x: torch.maximum(x, x.sin()) + torch.minimum(x, x.mean()) + torch.max(x, x.cos()) + torch.fmax(x, -x),
)
case(
    "amax amin aminmax",
    lambda x: x * (x.amax((1, 2, 3), True) - x.amin((2, 3), True)) + x.aminmax(dim=1, keepdim=True)[0],
)
case("argmin space", lambda x: x * (x.flatten(1).argmin(1).view(2, 1, 1, 1) > 50) + x.argmax(2, keepdim=True))
case("cumulative", lambda x: x.cumsum(2).cumsum(3) + x.cumprod(1) + x.logcumsumexp(1))
case("cumulative max", lambda x: x.cummax(1).values + x.cummin(3).values)
case(
    "topk channels", lambda x: x.topk(2, 1).values.sum(1, True) * x + x.topk(3, 1, largest=False).values.mean(1, True)
)
case("topk rows", lambda x: x.topk(4, 3).values)
case("kth and median", lambda x: (x.median(1).values + x.kthvalue(2, 1).values, x.median(3).values))
case("sort space", lambda x: x.sort(3, descending=True).values + x.argsort(1))
case("quantile", lambda x: x.quantile(0.3, 1))
case("mode of dtype", lambda x: (x > 0).float().mean(1, True).to(x.dtype) * x + (x * 10).long() % 3)
case("bit tricks", lambda x: x * (((x * 8).int() & 1) ^ 1) + ((x > 0) & ~(x > 1) | (x < -1)) * x)
case(
    "powers",
    lambda x: x**2 - x**3 + x.square() - (x * x + 1).sqrt() + (x.abs() + 0.1) ** -0.5 + torch.float_power(x, 2),
)
case(
    "divisions",
    lambda x: (
        x / (1 + x.abs())
        + (x.detach() // 0.3)
        + x % 0.7
        + torch.div(x, 0.4, rounding_mode="trunc")
        + torch.fmod(x, 0.5)
    ),
)
case("special functions", lambda x: torch.special.expit(x) + torch.erfc(x) + torch.special.log_ndtr(x) + torch.special.ndtr(x)
     + torch.sinc(x) + torch.logaddexp(x, x.sin()) + torch.hypot(x, x.cos()) + torch.special.erfcx(x) + torch.i0(x))  # fmt: skip
case("special gradients", lambda x: torch.lgamma(x.abs() + 1) + torch.digamma(x.abs() + 1) + torch.xlogy(x.abs(), x.abs() + 1)
     + torch.special.xlog1py(x, x.abs()) + torch.special.entr(x.sigmoid()) + torch.logit(x.sigmoid()))  # fmt: skip
case("trigonometry", lambda x: torch.asin(x.tanh() * 0.9) + torch.acosh(x.abs() + 1.1) + torch.tan(x * 0.3) + torch.asinh(x)
     + torch.atanh(x.tanh() * 0.9) + torch.deg2rad(x) + torch.rad2deg(x) + x.sinh() + x.cosh() + torch.acos(0.9 * x.tanh()))  # fmt: skip
case(
    "rounding",
    lambda x: (
        x + x.round() + x.floor() + x.ceil() + x.trunc() + x.frac() + x.sign() + x.sgn() + torch.round(x, decimals=1)
    ),
)
case("logic", lambda x: x * torch.logical_xor(x > 0, x > 1) * x.isfinite() + x.nan_to_num() * torch.signbit(x) + torch.copysign(x, x.sin())
     + torch.heaviside(x.detach(), x.detach().cos()) + torch.ldexp(x, torch.tensor(2)))  # fmt: skip
case(
    "addcdiv",
    lambda x: (
        torch.addcdiv(x, x.sin(), x.abs() + 1, value=0.3) + torch.lerp(x, x.cos(), x.sigmoid()) + torch.rsub(x, 2)
    ),
)
case("comparisons", lambda x: x * torch.isclose(x, x.round(), atol=0.2) + torch.gt(x, 0) * x + x.ne(0) * x + torch.isin((x * 2).long(), torch.tensor([0, 1])) * x,
     whole=("isin",))  # fmt: skip
case(
    "spread and mean",
    lambda x: x * torch.std_mean(x, 1, keepdim=True)[0] + torch.std_mean(x, (2, 3), keepdim=True, correction=0)[1],
)
case("statistics", lambda x: x.std(1, keepdim=True) + x.var((2, 3), keepdim=True, correction=0) + x.mean(0, True) + torch.var_mean(x, 1, keepdim=True)[1]
     + x.nanmean(1, True) + x.nansum((2, 3), True))  # fmt: skip
case("norm kinds", lambda x: x.norm(dim=1, keepdim=True) + torch.linalg.norm(x, dim=(2, 3), keepdim=True) + F.normalize(x, p=1, dim=(2, 3))
     + torch.linalg.vector_norm(x, 4, 1, True) + x.norm(p="fro", dim=(2, 3), keepdim=True))  # fmt: skip
case(
    "determinants",
    lambda x: x * torch.linalg.det(x[:, :3, :3, :3]).mean() + torch.linalg.slogdet(x[0, :, :3, :3])[1].sum(),
    whole=("det",),
)
case(
    "distances",
    lambda x: (
        F.pairwise_distance(x.flatten(2), x.flatten(2).sin())
        + F.cosine_similarity(x, x.sin(), dim=1).flatten(1).mean(1, True)
    ),
)
case("renorm", lambda x: x / torch.clamp(x.norm(dim=1, keepdim=True), min=1.0))
case("count nonzero", lambda x: x * (torch.count_nonzero(x > 0, dim=1)[:, None] + (x > 0).sum((2, 3), True)))
case(
    "histogram soft",
    lambda x: torch.exp(-((x[..., None] - torch.linspace(-1, 1, 5, dtype=x.dtype)) ** 2)).sum((2, 3)),
)
case(
    "embedding of labels",
    lambda x, e: e(x[:, 0].gt(0).long() + x[:, 1].gt(0).long()).movedim(-1, 1) * x,
    lambda: nn.Embedding(3, 4),
)
case("one hot multiply", lambda x: x * F.one_hot(x.argmax(1), 4).permute(0, 3, 1, 2))
case(
    "bucketize",
    lambda x: x * torch.bucketize(x.detach(), torch.tensor([-1.0, 0.0, 0.5], dtype=x.dtype)),
    whole=("bucketize",),
)
case("lookup", lambda x: torch.tensor([0.1, 0.5, 2.0, -1.0], dtype=x.dtype)[x.argmax(1)][:, None] * x)
case(
    "scatter mean",
    lambda x: torch.zeros(2, 3, 9, 11, dtype=x.dtype).scatter_add(1, x.argmax(1, keepdim=True) % 3, x[:, :1]),
)
case(
    "scatter reduce",
    lambda x: torch.zeros_like(x).scatter_reduce(1, x.argsort(1), x, "sum"),
    whole=("scatter_reduce",),
)
case("take along", lambda x: torch.take_along_dim(x, x.argsort(1), 1) + x.gather(3, x.argsort(3)))
case(
    "nonlinear mix",
    lambda x: (
        (x.exp() / (1 + x.exp())).log1p().expm1()
        + x.exp2().log2()
        + (x.abs() + 1).log10()
        + torch.rsqrt(x * x + 1)
        + (x * x + 2).reciprocal()
    ),
)
case(
    "complex numbers",
    lambda x: torch.complex(x, x.sin()).abs() + torch.view_as_complex(torch.stack([x, x], -1)).real,
    whole=("complex",),
)
case(
    "complex multiply",
    lambda x: (lambda z: (z * z.conj()).real + z.imag + z.angle())(torch.complex(x, x.cos())),
    whole=("complex",),
)
case(
    "fft layer",
    lambda x, w: torch.fft.irfft2(torch.fft.rfft2(x) * w.weight[0, 0], s=(9, 11)),
    lambda: nn.Conv2d(1, 1, 1),
    whole=("fft",),
)
case("grid sample", lambda x: F.grid_sample(x, F.affine_grid(torch.tensor([[[0.9, 0.1, 0], [0, 1.1, 0.1]]] * 2, dtype=x.dtype), x.shape, align_corners=False),
     align_corners=False), whole=("grid_sampler",))  # fmt: skip
case("attention over pixels", lambda x, a: (lambda t: a(t, t, t)[0])(x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x),
     lambda: nn.MultiheadAttention(4, 2, batch_first=True), whole=("attention",))  # fmt: skip
case("scaled dot product", lambda x: (lambda t: F.scaled_dot_product_attention(t, t.sin(), t.cos()))(x.flatten(2).transpose(1, 2)[:, None]),
     whole=("attention",))  # fmt: skip
case("axial attention", lambda x: (lambda t: F.scaled_dot_product_attention(t, t.sin(), t.cos()))(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
     whole=("attention",))  # fmt: skip
case("einsum batch", lambda x, l: torch.einsum("bchw,kc->bkhw", x, l.weight) + torch.einsum("bchw,bkhw->bck", x, x[:, :3]).mean((1, 2)).view(2, 1, 1, 1),
     lambda: nn.Linear(4, 3))  # fmt: skip
case("einsum ellipsis", lambda x, l: torch.einsum("bc...,dc->bd...", x, l.weight), lambda: nn.Linear(4, 3))
case(
    "einsum three",
    lambda x, l: torch.einsum("bchw,kc,bk->bkhw", x, l.weight, x.mean((2, 3))[:, :3]),
    lambda: nn.Linear(4, 3),
)
case("einsum trace", lambda x: torch.einsum("bchw->bc", x)[..., None, None] * x)
case(
    "bilinear module",
    lambda x, b: b(x.movedim(1, -1), x.sin().movedim(1, -1)).movedim(-1, 1),
    lambda: nn.Bilinear(4, 4, 3),
    whole=("trilinear",),
)
case("dynamic filter", lambda x, l: F.conv2d(x.reshape(1, 8, 9, 11), l(x.mean((2, 3))).view(8, 1, 3, 3), padding=1, groups=8).view(2, 4, 9, 11),
     lambda: nn.Linear(4, 36))  # fmt: skip
case("conv bank", lambda x, a, b: sum(w[:, k : k + 1] * c(x) for w in [a(x).softmax(1)] for k, c in enumerate([b, a])), lambda: nn.Conv2d(4, 4, 3, padding=1),
     lambda: nn.Conv2d(4, 4, 5, padding=2))  # fmt: skip
case("blur pool", lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), torch.tensor([1.0, 2, 1], dtype=x.dtype).outer(torch.tensor([1.0, 2, 1], dtype=x.dtype))
     .div(16).expand(4, 1, 3, 3), stride=2, groups=4))  # fmt: skip
case(
    "sobel",
    lambda x: (
        F.conv2d(
            x,
            torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=x.dtype).view(1, 1, 3, 3).repeat(4, 1, 1, 1),
            groups=4,
        )
        .square()
        .sum(1)
    ),
)
case(
    "autocast off",
    lambda x, c: c(x) + torch.autocast("cpu", enabled=False).__class__.__name__.__len__(),
    lambda: nn.Conv2d(4, 4, 3),
)
case(
    "narrow convolution",
    lambda x, c: (
        c(w := torch.cat([x, 2 * x, x.abs(), x.square()], 1))
        + 1e-7 * F.conv2d(w.detach().float(), c.weight.detach().float(), padding=1).to(x.dtype)
    ),
    lambda: nn.Conv2d(16, 16, 3, padding=1),
)
case(
    "narrow dtypes",
    lambda x, c: c(x).half().mul(2).to(x.dtype) + c(x).bfloat16().float().double() * 0,
    lambda: nn.Conv2d(4, 4, 3),
)
case(
    "detached branch",
    lambda x, c: c(x) * c(x.detach()).sigmoid().detach() + c(x).mean().detach(),
    lambda: nn.Conv2d(4, 4, 3),
)
case("straight through", lambda x: x + (x.round() - x).detach())
case("checkpointed", lambda x, c: checkpoint(lambda t: c(t).relu(), x, use_reentrant=False) + checkpoint(c, x, use_reentrant=False),
     lambda: nn.Conv2d(4, 4, 3))  # fmt: skip
case("vmap", lambda x: torch.vmap(lambda t: t * t.mean())(x))
case(
    "vmap conv",
    lambda x, c: torch.vmap(lambda t: torch.func.functional_call(c, dict(c.named_parameters()), (t,)))(x),
    lambda: nn.Conv2d(4, 3, 3),
)


class Squash(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return g * (1 + 0.1 * x)


case("own backward", lambda x, c: Squash.apply(c(x)), lambda: nn.Conv2d(4, 4, 3))
case("gradient inside", lambda x, c: x + torch.autograd.grad(c(x).square().sum(), x, create_graph=True)[0] if torch.is_grad_enabled() and x.requires_grad
     else x + torch.func.grad(lambda t: c(t).square().sum())(x), lambda: nn.Conv2d(4, 2, 1))  # fmt: skip
case(
    "gradient reversal",
    lambda x: (lambda y: (y.register_hook(lambda g: -0.3 * g), y)[1])(x * 1.0) if x.requires_grad else x * 1.0,
)

# Overloads of ATen that the layers above do not lead to ------------------------------------------------

at = torch.ops.aten
case(
    "call old convolution",
    lambda x, c: at._convolution(
        x, c.weight, c.bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, False, False, False, False
    ),
    lambda: nn.Conv2d(4, 3, 3),
)
FEW = torch.tensor([0, 2])
case("call complex views", lambda x: at._conj_physical(torch.complex(x, x.sin())).imag + torch._neg_view(x))
case("call reshape alias", lambda x: at._reshape_alias(x.contiguous(), (2, 36, 11), (396, 11, 1)))
case("call unsafe index", lambda x: at._unsafe_index(x, [None, FEW]) + x[:, FEW])
case("call unsafe split", lambda x: at.unsafe_split.Tensor(x, 2, 1)[1] + at.unsafe_split_with_sizes(x, [1, 3], 1)[0])
case(
    "call addbmm",
    lambda x: torch.addbmm(x.mean((0, 1))[:, :9], x.flatten(0, 1), x.flatten(0, 1).mT, beta=0.5, alpha=2),
)
case("call addmv", lambda x: torch.addmv(x.mean((0, 1, 3)), x.mean((0, 1)), x.mean((0, 1, 2))))
case("call addr", lambda x: torch.addr(x.mean((0, 1)), x.mean((0, 1, 3)), x.mean((0, 1, 2))))
case(
    "call all any",
    lambda x: (
        x * (x > -99).all()
        + x * (x > 99).any()
        + x * torch.any(x > 2, (2, 3), True)
        + x * torch.all(x > -2, (1, 2), True)
    ),
)
case(
    "call bernoulli",
    lambda x: x * torch.empty_like(x).bernoulli_(x.detach().sigmoid()) + torch.bernoulli(x.detach().sigmoid()),
)
case(
    "call distributions",
    lambda x: (
        x
        + 0.01 * torch.empty_like(x).cauchy_()
        + torch.empty_like(x).geometric_(0.3)
        + torch.empty_like(x).log_normal_(0, 0.1)
    ),
)
case(
    "call normal",
    lambda x: (
        x
        + torch.normal(x.detach(), x.detach().abs() + 0.1)
        + torch.normal(x.detach(), 0.3)
        + torch.normal(0.1, x.detach().abs())
    ),
)
case(
    "call randint",
    lambda x: (
        x
        + torch.randint(5, x.shape)
        + torch.randint(2, 7, (11,))
        + torch.randint_like(x, 5)
        + torch.randint_like(x, 2, 7)
    ),
)
case("call randperm", lambda x: x[:, torch.randperm(4)])
case("call count", lambda x: x + torch.count_nonzero(x > 0, dim=(2, 3))[..., None, None])
case("call constants", lambda x: x.new_full((11,), 3.0) * x + torch.full_like(x, 2.0) + torch.eye(9, dtype=x.dtype)[:, :1]
     + torch.empty_strided((2, 4, 9, 11), (396, 99, 11, 1), dtype=x.dtype).copy_(x) + at.lift_fresh(x))  # fmt: skip
case("call index fill", lambda x: x.index_fill(1, FEW, 0.5) + x.index_fill(2, FEW, torch.tensor(0.3, dtype=x.dtype)))
case("call mode nanmedian", lambda x: (x.round().mode(1).values, x.nanmedian(1).values))
case("call native batch norm", lambda x: at.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0])
case("call native dropout", lambda x: at.native_dropout(x, 0.3, True)[0])
case("call norm", lambda x: x * at.norm.Scalar(x, 3) + x / at.norm.ScalarOpt_dtype(x, 2, dtype=torch.float64)
     + at.norm.ScalarOpt_dim_dtype(x, 2, [1], True, dtype=torch.float64))  # fmt: skip
case("call prod", lambda x: x * (1 + 0.01 * x).prod())
case(
    "call searchsorted",
    lambda x: (
        x * torch.searchsorted(torch.tensor([-1.0, 0.0, 0.5], dtype=x.dtype), x.detach().contiguous(), right=True)
    ),
)
case("call sort stable", lambda x: x.sort(dim=1, stable=True).values)
case("call retyped", lambda x: x * (x.detach().view(torch.int64) >> 62))

# Losses ---------------------------------------------------------------------------------------------


def like(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.rand(*(shape or PLANE), dtype=torch.float64)


def one_hot(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.one_hot(t, 4).movedim(-1, 1).to(x.dtype)


def jaccard(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p, y = x.softmax(1), one_hot(x, t)
    both = (p * y).sum((2, 3))
    return 1 - ((both + 1) / ((p + y).sum((2, 3)) - both + 1)).mean()


def focal_tversky(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p, y = x.softmax(1).flatten(2), one_hot(x, t).flatten(2)
    tp, fp, fn = (p * y).sum(-1), (p * (1 - y)).sum(-1), ((1 - p) * y).sum(-1)
    return (1 - (tp + 1) / (tp + 0.7 * fp + 0.3 * fn + 1)).pow(4 / 3).sum(1).mean()


def generalised_jaccard(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p, y = x.softmax(1), one_hot(x, t)
    w = 1 / y.sum((0, 2, 3)).square().clamp(min=1)
    both, all_ = (w * (p * y).sum((0, 2, 3))).sum(), (w * (p + y).sum((0, 2, 3))).sum()
    return 1 - both / (all_ - both)


def focal_bce(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    p, bce = x.sigmoid(), F.binary_cross_entropy_with_logits(x, y, reduction="none")
    near = p * y + (1 - p) * (1 - y)
    return ((0.25 * y + 0.75 * (1 - y)) * bce * (1 - near) ** 2).mean()


def focal_alpha(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    alpha = torch.tensor([0.3, 1.0, 2.0, 0.7], dtype=x.dtype)
    logp = F.log_softmax(x, 1).gather(1, t[:, None])[:, 0]
    return -(alpha[t] * (1 - logp.exp()) ** 1.5 * logp).sum() / alpha[t].sum()


def lovasz(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    total = x.new_zeros(())
    p = x.softmax(1)
    for k in range(4):
        truth = (t == k).to(x.dtype).flatten()
        errors, order = (truth - p[:, k].flatten()).abs().sort(0, descending=True)
        truth = truth[order]
        both = truth.sum() - truth.cumsum(0)
        either = truth.sum() + (1 - truth).cumsum(0)
        steps = 1 - both / either
        steps = torch.cat([steps[:1], steps[1:] - steps[:-1]])
        total = total + (errors.relu() * steps).sum()
    return total / 4


def lovasz_hinge(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    signs = 2.0 * (t > 1).to(x.dtype) - 1
    errors, order = (1 - x[:, 0] * signs).flatten(1).sort(1, descending=True)
    truth = (t > 1).to(x.dtype).flatten(1).gather(1, order)
    steps = 1 - (truth.sum(1, True) - truth.cumsum(1)) / (truth.sum(1, True) + (1 - truth).cumsum(1))
    return (errors.relu() * F.pad(steps[:, 1:] - steps[:, :-1], (1, 0))).sum(1).mean()


def ohem(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, t, reduction="none").flatten().topk(40).values.mean()


def ms_ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    total = x.new_ones(())
    kernel = torch.full((4, 1, 3, 3), 1 / 9, dtype=x.dtype)
    for k in range(2):
        ax, ay = F.conv2d(x, kernel, groups=4), F.conv2d(y, kernel, groups=4)
        vx, vy = F.conv2d(x * x, kernel, groups=4) - ax * ax, F.conv2d(y * y, kernel, groups=4) - ay * ay
        cov = F.conv2d(x * y, kernel, groups=4) - ax * ay
        light, contrast = (2 * ax * ay + 0.01) / (ax * ax + ay * ay + 0.01), (2 * cov + 0.03) / (vx + vy + 0.03)
        total = total * (light * contrast if k else contrast).mean().abs() ** 0.5
        x, y = (
            F.avg_pool2d(x, 2, padding=(x.shape[2] % 2, x.shape[3] % 2)),
            F.avg_pool2d(y, 2, padding=(y.shape[2] % 2, y.shape[3] % 2)),
        )
    return 1 - total


def sobel_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    k = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=x.dtype)
    kernel = torch.stack([k, k.T])[:, None].repeat(4, 1, 1, 1)
    edges = [F.conv2d(F.pad(t, (1, 1, 1, 1), mode="replicate"), kernel, groups=4) for t in (x, y)]
    return F.l1_loss(*edges) + (edges[0].unflatten(1, (4, 2)).square().sum(2) + 1e-6).sqrt().mean()


def laplacian_pyramid(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    total = x.new_zeros(())
    for _ in range(2):
        small = [F.avg_pool2d(t, 2) for t in (x, y)]
        fine = [t - F.interpolate(s, t.shape[2:], mode="bilinear") for t, s in zip((x, y), small, strict=True)]
        total = total + F.l1_loss(*fine)
        x, y = small
    return total + F.l1_loss(x, y)


def total_variation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    rows, columns = x[:, :, 1:, :-1] - x[:, :, :-1, :-1], x[:, :, :-1, 1:] - x[:, :, :-1, :-1]
    return (rows * rows + columns * columns + 1e-8).sqrt().sum() + (x - y).abs().mean()


def charbonnier(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((x - y) ** 2 + 1e-6).sqrt().mean()


def gram_style(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    grams = [torch.einsum("nchw,ndhw->ncd", t, t) / t[0].numel() for t in (x, y)]
    return F.mse_loss(*grams)


def perceptual(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    kernel = torch.arange(4 * 4 * 9, dtype=x.dtype).sin().view(4, 4, 3, 3)
    with torch.no_grad():
        wanted = F.conv2d(y, kernel).relu()
    return F.mse_loss(F.conv2d(x, kernel).relu(), wanted)


def several_terms(x: torch.Tensor, y: torch.Tensor) -> Any:
    a, b = F.mse_loss(x, y), F.l1_loss(x, y)
    return a + 0.1 * b


def boundary(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p, y = x.softmax(1), one_hot(x, t)
    edges = [F.max_pool2d(1 - q, 3, 1, 1) - (1 - q) for q in (p, y)]
    wide = [F.max_pool2d(e, 5, 1, 2) for e in edges]
    precision, recall = (
        (edges[0] * wide[1]).sum((2, 3)) / (edges[0].sum((2, 3)) + 1e-3),
        (wide[0] * edges[1]).sum((2, 3)) / (edges[1].sum((2, 3)) + 1e-3),
    )
    return 1 - (2 * precision * recall / (precision + recall + 1e-3)).mean()


def soft_skeleton(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p, y = x.softmax(1)[:, 1:], one_hot(x, t)[:, 1:]

    def thin(q: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(q)
        for _ in range(2):
            low = -F.max_pool2d(-q, 3, 1, 1)
            total = total + (q - F.max_pool2d(low, 3, 1, 1)).relu() * (1 - total)
            q = low
        return total

    a, b = thin(p), thin(y)
    return 1 - ((a * y).sum() + 1) / (a.sum() + 1) * ((b * p).sum() + 1) / (b.sum() + 1)


def normalised_by_valid(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    valid = (t != 2).to(x.dtype)
    return (F.cross_entropy(x, t, reduction="none") * valid).sum() / valid.sum().clamp(min=1)


def batch_balanced(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Each class weighs the same in each image."""
    y = one_hot(x, t)
    counts = y.sum((2, 3), keepdim=True)
    weights = (y / counts.clamp(min=1)).sum(1)
    return (F.cross_entropy(x, t, reduction="none") * weights).sum() / 2


def kl_students(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.kl_div((x / 2).log_softmax(1), (y / 2).softmax(1), reduction="batchmean") + F.kl_div(
        x.log_softmax(1), y.log_softmax(1), log_target=True
    )


for _loss in (jaccard, focal_tversky, generalised_jaccard, focal_alpha, lovasz_hinge, boundary, soft_skeleton, normalised_by_valid,
              batch_balanced, ohem, lovasz):  # fmt: skip
    loss_case(_loss.__name__, _loss, PIXELS)
for _loss in (focal_bce, ms_ssim, sobel_loss, laplacian_pyramid, total_variation, charbonnier, gram_style, perceptual, several_terms,
              kl_students):  # fmt: skip
    loss_case(_loss.__name__, _loss, like())
loss_case(
    "modules",
    lambda x, t: (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4], dtype=x.dtype), label_smoothing=0.1)(x, t)
        + nn.NLLLoss()(x.log_softmax(1), t)
    ),
    PIXELS,
)
loss_case("modules of maps", lambda x, y: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0, dtype=x.dtype))(x, y) + nn.HuberLoss(delta=0.3)(x, y) + nn.SmoothL1Loss(beta=0.5)(x, y)
          + nn.MSELoss()(x, y) + nn.L1Loss()(x, y) + nn.KLDivLoss(reduction="batchmean")(x.log_softmax(1), y) + nn.PoissonNLLLoss()(x, y) + nn.SoftMarginLoss()(x, y.sign()), like())  # fmt: skip
loss_case("margin", lambda x, y: F.margin_ranking_loss(x[:, :2], x[:, 2:], y[:, :2].round() * 2 - 1) + F.hinge_embedding_loss(x, y.round() * 2 - 1)
          + F.triplet_margin_loss(x[:, 0], x[:, 1], x[:, 2]) + F.cosine_embedding_loss(x.mean((2, 3)), y.mean((2, 3)), torch.ones(2)), like())  # fmt: skip
loss_case("multilabel", lambda x, y: F.multilabel_soft_margin_loss(x.mean((2, 3)), y[:, :, 0, 0].round()), like())
loss_case(
    "cross entropy 3d smooth",
    lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1, ignore_index=3),
    lambda: torch.randint(0, 4, (1, 5, 6, 7)),
    SOLID,
)
loss_case(
    "cross entropy unbatched axes",
    lambda x, t: F.cross_entropy(x.flatten(2), t.flatten(1)) + F.cross_entropy(x.mean((2, 3)), t[:, 0, 0]),
    PIXELS,
)
loss_case(
    "probability with weights",
    lambda x, y: F.cross_entropy(
        x, y.softmax(1), weight=torch.tensor([1.0, 2, 3, 4], dtype=x.dtype), label_smoothing=0.2
    ),
    like(),
)
loss_case("dice 3d", lambda x, t: 1 - (2 * (x.softmax(1) * F.one_hot(t, 4).movedim(-1, 1)).sum((2, 3, 4)) / (x.softmax(1) + F.one_hot(t, 4).movedim(-1, 1)).sum((2, 3, 4))).mean(),
          lambda: torch.randint(0, 4, (1, 5, 6, 7)), SOLID)  # fmt: skip
loss_case(
    "line",
    lambda x, y: F.mse_loss(x, y) + (x.diff() - y.diff()).abs().mean() + F.cosine_similarity(x, y, dim=2).mean(),
    like(*LINE),
    LINE,
)
loss_case(
    "correlation",
    lambda x, y: 1 - ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()).norm() * (y - y.mean()).norm()),
    like(),
)
loss_case(
    "local correlation",
    lambda x, y: (
        -(F.avg_pool2d(x * y, 3, 1, 1) - F.avg_pool2d(x, 3, 1, 1) * F.avg_pool2d(y, 3, 1, 1)).square().mean()
    ),
    like(),
)
loss_case(
    "mutual",
    lambda x, y: (lambda p: -(p * (p + 1e-6).log()).sum())(
        torch.einsum("nchw,ndhw->cd", x.softmax(1), y.softmax(1)) / 198
    ),
    like(),
)
loss_case("wasserstein", lambda x, y: (x.softmax(1).cumsum(1) - y.softmax(1).cumsum(1)).abs().mean(), like())
loss_case(
    "spectral",
    lambda x, y: (torch.fft.rfft2(x).abs() - torch.fft.rfft2(y).abs()).abs().mean(),
    like(),
    whole=("fft",),
)
loss_case("ctc like", lambda x, y: F.smooth_l1_loss(x.mean(2).cumsum(-1), y.mean(2).cumsum(-1)), like())

for _name in set(CASES) - BEFORE:  # one tile each: the cases of the other tables have two
    CASES[_name] = replace(CASES[_name], tiles=CASES[_name].tiles[:1])

__all__ = ["CASES", "PLANE"]
