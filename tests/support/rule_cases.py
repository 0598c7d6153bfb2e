"""A table of small networks that use every op the engine has a rule for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.check import twin
from fullframe.ir.graph import Graph
from fullframe.ops import decompose
from fullframe.runtime import fused as fused
from fullframe.testing import Difference, agree

CASES: dict[str, Case] = {}
USED: set[str] = set()  # the recorded calls met so far
PLANE, LINE, SOLID = (2, 4, 9, 11), (2, 4, 23), (1, 4, 5, 6, 7)
TILES = {3: (5, 2), 4: ((3, 5), (2, 6)), 5: (3,)}


@dataclass(frozen=True)
class Case:
    """A function of the image (with modules of its own), its input's shape and its loss."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = PLANE
    loss: Callable[..., torch.Tensor] | None = None
    target: Callable[..., Any] | None = None
    tiles: tuple[Any, ...] = ()
    train: bool = True
    whole: tuple[str, ...] = field(default=())


class Apply(nn.Module):
    """A function with the modules it uses; a 1x1 convolution before it, so that values are made."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module, channels: int, rank: int, first: bool = True):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.first = conv(channels, channels, 3, padding=1) if first else nn.Identity()
        self.parts = nn.ModuleList(parts)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.first(x), *self.parts)


def weighted(outputs: Any, weights: Any) -> torch.Tensor:
    """A loss whose gradient differs at every element, of any number of outputs."""
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return sum((o * w).sum() + 0.5 * (o * o * w).mean() for o, w in zip(outputs, weights, strict=True))


def case(name: str, function: Callable[..., Any], *parts: Callable[[], nn.Module], shape: tuple[int, ...] = PLANE,
         first: bool = True, **rest: Any) -> None:  # fmt: skip
    """Register a function of the image and of modules made by ``parts``."""
    assert name not in CASES, name
    tiles = rest.pop("tiles", TILES[len(shape)])

    def make() -> nn.Module:
        return Apply(function, *(p() for p in parts), channels=shape[1], rank=len(shape) - 2, first=first)

    CASES[name] = Case(make, shape, tiles=tiles, **rest)


def layer(name: str, *parts: Callable[[], nn.Module], **rest: Any) -> None:
    """Register a chain of modules."""

    def chain(x: torch.Tensor, *modules: nn.Module) -> torch.Tensor:
        for module in modules:
            x = module(x)
        return x

    case(name, chain, *parts, **rest)


class _Noted(dict):
    """Decompositions, noting which calls were looked up."""

    def get(self, name: str, default: Any = None) -> Any:
        USED.add(name)
        return super().get(name, default)


def _plain_kernels(groups: Any, **_: Any) -> Any:
    """Fusion groups run by PyTorch: hundreds of networks would each wait for a compiler."""
    return _build_many(groups, compile=False)


_build_many = fused.build_many


_GRAPHS: dict[str, Graph] = {}


def difference(name: str, tile: Any) -> Difference:
    """The worst difference of a case, and its plan; the network, image and target follow from its name."""
    with _noted():
        net, x, loss, target = _made(CASES[name], name)
        found = agree(net, [x], loss, target=target, tile=tile)
    _GRAPHS.setdefault(name, found.plan.graph)
    return found


def graph_of(name: str) -> Graph:
    """The graph of a case, recorded once."""
    if name not in _GRAPHS:
        with _noted():
            net, x, loss, target = _made(CASES[name], name)
            _GRAPHS[name] = fullframe.tile(net, loss=loss, tile=CASES[name].tiles[0]).plan(x, target).graph
    return _GRAPHS[name]


@contextmanager
def _noted() -> Iterator[None]:
    with (
        mock.patch.object(fused, "build_many", _plain_kernels),
        mock.patch.object(decompose, "DECOMPOSITIONS", _Noted(decompose.DECOMPOSITIONS)),
    ):
        yield


def _made(it: Case, name: str) -> tuple[nn.Module, torch.Tensor, Callable[..., torch.Tensor], Any]:
    """Network, image, loss and target."""
    torch.manual_seed(sum(map(ord, name)))
    net = it.make().double().train(it.train)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    x = torch.randn(it.shape, dtype=torch.float64, requires_grad=True)
    if it.loss is not None:
        assert it.target is not None
        return net, x, it.loss, it.target()
    with torch.no_grad():
        outputs = twin(net)(x)
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    target = [torch.randn(o.shape, dtype=torch.float64) for o in outputs]
    return net, x, weighted, target


# Convolutions ------------------------------------------------------------------------------------

for _k, _s, _p, _d, _g in (
    (3, 1, 1, 1, 1),
    (3, 2, 1, 1, 1),
    (3, 1, 2, 2, 2),
    (5, 3, 0, 1, 1),
    (2, 2, 0, 1, 4),
    (3, 2, 0, 2, 1),
    (1, 3, 1, 1, 1),
    (4, 1, 1, 1, 1),
    (1, 1, 0, 1, 1),
    (2, 3, 1, 1, 1),
):
    layer(
        f"conv2d k{_k} s{_s} p{_p} d{_d} g{_g}", lambda k=_k, s=_s, p=_p, d=_d, g=_g: nn.Conv2d(4, 8, k, s, p, d, g)
    )
for _k, _s, _p, _o, _d, _g in (
    (2, 2, 0, 0, 1, 1),
    (3, 2, 1, 1, 1, 1),
    (3, 2, 1, 0, 1, 2),
    (3, 1, 1, 0, 1, 1),
    (4, 2, 1, 0, 1, 1),
    (3, 2, 0, 1, 2, 4),
    (2, 3, 0, 2, 1, 1),
    (3, 3, 2, 0, 1, 1),
    (1, 2, 0, 1, 1, 1),
):
    layer(f"transposed2d k{_k} s{_s} p{_p} o{_o} d{_d} g{_g}",
          lambda k=_k, s=_s, p=_p, o=_o, d=_d, g=_g: nn.ConvTranspose2d(4, 8, k, s, p, o, g, dilation=d))  # fmt: skip
layer("conv uneven", lambda: nn.Conv2d(4, 3, (3, 2), (1, 2), (2, 0), (2, 1)))
layer("conv same", lambda: nn.Conv2d(4, 3, (4, 2), padding="same", dilation=(1, 3)))
layer("conv no bias", lambda: nn.Conv2d(4, 3, 3, bias=False))
layer("conv1d", lambda: nn.Conv1d(4, 6, 5, 2, 2), lambda: nn.ConvTranspose1d(6, 3, 3, 2, 1, 1), shape=LINE)
layer("conv3d", lambda: nn.Conv3d(4, 6, 3, 2, 1), lambda: nn.ConvTranspose3d(6, 3, 2, 2), shape=SOLID)
layer("depthwise", lambda: nn.Conv2d(4, 4, 7, padding=3, groups=4), lambda: nn.Conv2d(4, 8, 1))
for _mode in ("reflect", "replicate", "circular"):
    layer(f"conv {_mode}", lambda m=_mode: nn.Conv2d(4, 3, 3, padding=(2, 1), padding_mode=m))
    layer(f"conv {_mode} stride", lambda m=_mode: nn.Conv2d(4, 3, 5, stride=2, padding=2, padding_mode=m))
    layer(f"conv1d {_mode}", lambda m=_mode: nn.Conv1d(4, 3, 3, padding=2, padding_mode=m), shape=LINE)
    layer(f"conv3d {_mode}", lambda m=_mode: nn.Conv3d(4, 3, 3, padding=1, padding_mode=m), shape=SOLID)
    case(f"pad {_mode}", lambda x, m=_mode: F.pad(x, (3, 1, 0, 4), mode=m))
case("pad constant", lambda x: F.pad(x, (3, -1, -2, 4), value=1.5))
case("pad channels", lambda x: F.pad(x, (0, 0, 1, 0, 2, 1)))
case("pad replicate negative", lambda x: F.pad(x, (2, -1, -1, 2), mode="replicate"))
case("unbatched", lambda x, c: c(x[0])[None], lambda: nn.Conv2d(4, 3, 3, padding=1))

# Pooling -----------------------------------------------------------------------------------------

for _text, _args in {
    "2/2": {"kernel_size": 2},
    "3/2 pad": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3/2 ceil": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    "3/1": {"kernel_size": 3, "stride": 1, "padding": 1},
    "2/3": {"kernel_size": 2, "stride": 3},
    "5/3 pad ceil": {"kernel_size": 5, "stride": 3, "padding": 2, "ceil_mode": True},
}.items():
    layer(f"max pool {_text}", lambda a=_args: nn.MaxPool2d(**a))
    layer(f"avg pool {_text}", lambda a=_args: nn.AvgPool2d(**a))
    layer(f"avg pool {_text} uncounted", lambda a=_args: nn.AvgPool2d(**a, count_include_pad=False))
layer("max pool dilated", lambda: nn.MaxPool2d(3, 2, 1, dilation=2))
layer("max pool 7/2 pad", lambda: nn.MaxPool2d(7, 2, 3))
layer("avg pool divisor", lambda: nn.AvgPool2d(3, 2, 1, divisor_override=5))
layer("avg pool 2x3", lambda: nn.AvgPool2d((2, 3), (2, 1), (1, 0)))
layer("pool1d", lambda: nn.MaxPool1d(3, 2, 1), lambda: nn.AvgPool1d(2, 1, 1), shape=LINE)
layer(
    "pool1d ceil", lambda: nn.MaxPool1d(2, 2, ceil_mode=True), lambda: nn.AvgPool1d(3, 2, ceil_mode=True), shape=LINE
)
layer("pool3d", lambda: nn.MaxPool3d(3, 2, 1), lambda: nn.AvgPool3d(2, 1, 1), shape=SOLID)
for _size in (1, 3, (2, 5), (None, 4), (9, 11)):
    layer(f"adaptive avg {_size}", lambda s=_size: nn.AdaptiveAvgPool2d(s))
    layer(f"adaptive max {_size}", lambda s=_size: nn.AdaptiveMaxPool2d(s))
layer("adaptive 1d", lambda: nn.AdaptiveAvgPool1d(5), shape=LINE)
layer("adaptive max 1d", lambda: nn.AdaptiveMaxPool1d(5), shape=LINE)
layer("adaptive 3d", lambda: nn.AdaptiveAvgPool3d((2, 3, 4)), shape=SOLID)
layer("adaptive max 3d", lambda: nn.AdaptiveMaxPool3d((2, 3, 4)), shape=SOLID)
layer("adaptive avg up", lambda: nn.AdaptiveAvgPool2d((13, 7)))
case("lp pool", lambda x: F.lp_pool2d(x.sigmoid(), 2.0, 3, 2))
case("lp pool 3", lambda x: F.lp_pool2d(x.abs() + 0.1, 3.0, 2))
case("lp pool 1d", lambda x: F.lp_pool1d(x.sigmoid(), 2.0, 3, 2, ceil_mode=True), shape=LINE)
layer("global avg linear", lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, lambda: nn.Linear(4, 5))
layer("global max linear", lambda: nn.AdaptiveMaxPool2d(1), nn.Flatten, lambda: nn.Linear(4, 5))
case("mean linear", lambda x, m: m(x.mean((2, 3))), lambda: nn.Linear(4, 5))
case("amax linear", lambda x, m: m(x.amax((2, 3))), lambda: nn.Linear(4, 5))
case("flatten linear", lambda x, m: m(F.max_pool2d(x, 2).flatten(1)), lambda: nn.Linear(80, 5))
case("gem pool", lambda x: x.clamp(min=1e-2).pow(3).mean((-2, -1)).pow(1 / 3))


def unpool(x: torch.Tensor, **args: Any) -> torch.Tensor:
    y, where = F.max_pool2d(x, return_indices=True, **args)
    return F.max_unpool2d(y.sin(), where, output_size=x.shape[-2:], **args)


case("unpool 2/2", lambda x: unpool(x, kernel_size=2))
case("unpool even", lambda x: unpool(x, kernel_size=2), shape=(2, 4, 8, 12))
case("unpool 3/3", lambda x: unpool(x, kernel_size=3, stride=3))


def unpool_line(x: torch.Tensor) -> torch.Tensor:
    y, where = F.max_pool1d(x, 2, return_indices=True)
    return F.max_unpool1d(y, where, 2, output_size=x.shape[-1:])


def unpool_solid(x: torch.Tensor) -> torch.Tensor:
    y, where = F.max_pool3d(x, 2, return_indices=True)
    return F.max_unpool3d(y, where, 2, output_size=x.shape[-3:])


case("unpool 1d", unpool_line, shape=LINE)
case("unpool 3d", unpool_solid, shape=SOLID)

# Interpolation -----------------------------------------------------------------------------------

for _mode in ("nearest", "nearest-exact", "bilinear", "bicubic"):
    for _how in (
        {"scale_factor": 2},
        {"scale_factor": (1.5, 0.6)},
        {"size": (13, 7)},
        {"size": (4, 5)},
        {"size": (27, 44)},
        {"size": (1, 11)},
    ):
        for _align in (False, True) if _mode[:2] == "bi" else (None,):
            case(
                f"{_mode} {_how} {_align}",
                lambda x, m=_mode, h=_how, a=_align: F.interpolate(x, mode=m, align_corners=a, **h),
            )
case("bilinear recompute", lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True))
for _align in (False, True):
    case(
        f"linear {_align}",
        lambda x, a=_align: F.interpolate(x, scale_factor=1.7, mode="linear", align_corners=a),
        shape=LINE,
    )
    case(
        f"trilinear {_align}",
        lambda x, a=_align: F.interpolate(x, size=(7, 9, 3), mode="trilinear", align_corners=a),
        shape=SOLID,
    )
case("nearest 1d", lambda x: F.interpolate(x, size=50), shape=LINE)
case("nearest 3d", lambda x: F.interpolate(x, scale_factor=2), shape=SOLID)
layer("upsample module", lambda: nn.Upsample(scale_factor=2, mode="bilinear"))
case("area", lambda x: F.interpolate(x, size=(4, 5), mode="area"))
case("antialias", lambda x: F.interpolate(x, size=(4, 5), mode="bilinear", antialias=True))
layer("pixel shuffle", lambda: nn.PixelShuffle(2))
layer("pixel unshuffle", lambda: nn.PixelUnshuffle(3), shape=(2, 4, 9, 12))
layer(
    "shuffles",
    lambda: nn.PixelShuffle(2),
    lambda: nn.Conv2d(1, 2, 3),
    lambda: nn.PixelUnshuffle(2),
    shape=(2, 4, 9, 12),
)
layer("channel shuffle", lambda: nn.ChannelShuffle(2))
case("channel shuffle by view", lambda x: x.view(2, 2, 2, 9, 11).transpose(1, 2).reshape(2, 4, 9, 11))
case(
    "space to depth",
    lambda x: x.reshape(2, 4, 4, 2, 6, 2).permute(0, 3, 5, 1, 2, 4).reshape(2, 16, 4, 6),
    shape=(2, 4, 8, 12),
)

# Norms -------------------------------------------------------------------------------------------

for _train in (True, False):
    layer(f"batch norm {_train}", lambda: nn.BatchNorm2d(4), train=_train)
    layer(
        f"batch norm plain {_train}", lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False), train=_train
    )
    layer(f"instance norm {_train}", lambda: nn.InstanceNorm2d(4), train=_train)
    layer(
        f"instance norm affine {_train}",
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        train=_train,
    )
layer("sync batch norm", lambda: nn.SyncBatchNorm(4))
layer("batch norm 1d", lambda: nn.BatchNorm1d(4), shape=LINE)
layer("batch norm 3d", lambda: nn.BatchNorm3d(4), shape=SOLID)
layer("instance norm 1d", lambda: nn.InstanceNorm1d(4, affine=True), shape=LINE)
layer("instance norm 3d", lambda: nn.InstanceNorm3d(4), shape=SOLID)
layer("group norm", lambda: nn.GroupNorm(2, 4))
layer("group norm 1", lambda: nn.GroupNorm(1, 4))
layer("group norm plain", lambda: nn.GroupNorm(4, 4, affine=False))
layer("group norm 1d", lambda: nn.GroupNorm(2, 4), shape=LINE)
layer("local response norm", lambda: nn.LocalResponseNorm(3))
layer("local response norm 1d", lambda: nn.LocalResponseNorm(2), shape=LINE)


def channels_last(x: torch.Tensor, *parts: nn.Module) -> torch.Tensor:
    y = x.permute(0, 2, 3, 1)
    for part in parts:
        y = part(y)
    return y.permute(0, 3, 1, 2)


case("layer norm channels", channels_last, lambda: nn.LayerNorm(4))
case("rms norm channels", channels_last, lambda: nn.RMSNorm(4))
case(
    "convnext block",
    lambda x, d, *ps: x + channels_last(d(x), *ps),
    lambda: nn.Conv2d(4, 4, 7, padding=3, groups=4),
    lambda: nn.LayerNorm(4),
    lambda: nn.Linear(4, 16),
    nn.GELU,
    lambda: nn.Linear(16, 4),
)
case("layer norm image", lambda x, n: n(x), lambda: nn.LayerNorm((4, 9, 11)))
case(
    "layer norm by hand",
    lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt(),
)
case("grn", lambda x: x * (g := x.norm(p=2, dim=(2, 3), keepdim=True)) / (g.mean(1, keepdim=True) + 1e-6) + x)
case("l2 normalise", lambda x: F.normalize(x, dim=1))
case(
    "weight standard",
    lambda x, c: F.conv2d(
        x, (c.weight - c.weight.mean((1, 2, 3), keepdim=True)) / c.weight.std((1, 2, 3), keepdim=True)
    ),
    lambda: nn.Conv2d(4, 3, 3),
)
layer("weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 3)))
layer("spectral norm", lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 3, 3)))
layer("spectral norm eval", lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 3, 3)), train=False)
case("weight sharing", lambda x, c: c(c(x).relu()), lambda: nn.Conv2d(4, 4, 3, padding=1))

# Activations -------------------------------------------------------------------------------------

for _name in [
    "ELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardtanh",
    "Hardswish",
    "LeakyReLU",
    "LogSigmoid",
    "PReLU",
    "ReLU",
    "ReLU6",
    "SELU",
    "CELU",
    "GELU",
    "Sigmoid",
    "SiLU",
    "Mish",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Softmax2d",
]:
    layer(f"activation {_name}", getattr(nn, _name))
layer("activation Threshold", lambda: nn.Threshold(0.1, -2.0))
layer("activation PReLU channels", lambda: nn.PReLU(4))
layer("activation RReLU eval", nn.RReLU, train=False)
layer("activation Softmin", lambda: nn.Softmin(1))
layer("activation Softmax", lambda: nn.Softmax(1))
layer("activation LogSoftmax", lambda: nn.LogSoftmax(1))
layer("activation GELU tanh", lambda: nn.GELU("tanh"))
layer("activation GLU", lambda: nn.GLU(1))
layer("activation GLU space", lambda: nn.GLU(3), shape=(2, 4, 9, 12))
layer("activation inplace", lambda: nn.ReLU(inplace=True), lambda: nn.Conv2d(4, 4, 3), lambda: nn.SiLU(inplace=True))
case("softmax space", lambda x: x.flatten(2).softmax(-1).view_as(x))
case("softmax rows", lambda x: x.softmax(-1) + x.log_softmax(2))
case(
    "spatial softargmax",
    lambda x: (x.flatten(2).softmax(-1).view_as(x) * torch.linspace(-1, 1, 11, dtype=x.dtype)).sum((2, 3)),
)
case("maxout", lambda x: x.view(2, 2, 2, 9, 11).max(2).values)

# Layout ------------------------------------------------------------------------------------------

case("cat", lambda x: torch.cat([x, x.relu(), x[:, :1]], 1))
case("cat space", lambda x: torch.cat([x, x.sin(), x[:, :, :2]], 2))
case("cat batch", lambda x: torch.cat([x, x[:1]], 0))
case("stack", lambda x: torch.stack([x, x.sin()], 1).sum(1) + torch.stack([x, x.cos()], -1).amax(-1))
case("split", lambda x: (lambda a, b, c: (a * b, c))(*x.split([1, 1, 2], 1)))
case("chunk", lambda x: torch.mul(*x.chunk(2, 1)))
case("chunk space", lambda x: (lambda a, b, c: (a, b * 2, c))(*x.chunk(3, 2)))
case("crop", lambda x: x[:, :, 2:-1, 1:8])
case("crop strided", lambda x: x[:, 1:, 1::3, ::2])
case(
    "focus",
    lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1),
    shape=(2, 4, 8, 12),
)
case("flip", lambda x: x.flip(2) * x + x.flip((1, 3)))
case("roll", lambda x: x.roll(3, 2) + x.roll((-2, 1), (3, 1)))
case("transpose", lambda x: x.transpose(2, 3).sin())
case("unbind", lambda x: sum(k * t for k, t in enumerate(x.unbind(1), 1)))
case("narrow", lambda x: x.narrow(3, 2, 5) * x.narrow(3, 6, 5))
case("repeat", lambda x: x.repeat(1, 2, 1, 1))
case("repeat space", lambda x: x.repeat(1, 1, 2, 2))
case("repeat interleave", lambda x: x.repeat_interleave(2, dim=1))
case("repeat interleave space", lambda x: x.repeat_interleave(2, dim=2))
case("expand", lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1) * 2)
case("tv", lambda x: ((x[..., 1:] - x[..., :-1]).abs().mean(), (x[..., 1:, :] - x[..., :-1, :]).pow(2).mean()))
case("slice assign", lambda x: _assign(x))
case("strided assign", lambda x: _assign_strided(x))
case("unfold", lambda x: F.unfold(x, 3, padding=1).view(2, 4, 9, 9, 11).sum(2))
case("tensor unfold", lambda x: x.unfold(2, 3, 2).sum(-1))
case("rot90", lambda x: x.rot90(1, (2, 3)))
case("movedim", lambda x: x.movedim(1, -1).sin().movedim(-1, 1))
case("swap and matmul", lambda x: x.transpose(1, 3).contiguous().transpose(1, 3))
case("windows", lambda x: x.view(2, 4, 2, 4, 3, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 4).softmax(-1)
     .view(2, 2, 3, 4, 4, 4).permute(0, 5, 1, 3, 2, 4).reshape(2, 4, 8, 12), shape=(2, 4, 8, 12))  # fmt: skip


def _assign(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[:, :, 1:-2, 2:] = x[:, :, 1:-2, 2:] * 3
    y[:, 0] += x[:, 1]
    y[:, :, 4] = 2
    return y


def _assign_strided(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, :, ::2, 1::3] = 5 * x[:, :, ::2, 1::3].sin()
    return y


# Gates and attention over channels ---------------------------------------------------------------

case("squeeze excite", lambda x, a, b: x * b(a(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None],
     lambda: nn.Linear(4, 2), lambda: nn.Linear(2, 4))  # fmt: skip
case("squeeze excite conv", lambda x, a, b: x * b(a(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid(),
     lambda: nn.Conv2d(4, 2, 1), lambda: nn.Conv2d(2, 4, 1))  # fmt: skip
case(
    "eca",
    lambda x, c: x * c(x.mean((2, 3))[:, None]).sigmoid().transpose(1, 2)[..., None],
    lambda: nn.Conv1d(1, 1, 3, padding=1),
)
case(
    "cbam channel",
    lambda x, a: x * (a(F.adaptive_avg_pool2d(x, 1)) + a(F.adaptive_max_pool2d(x, 1))).sigmoid(),
    lambda: nn.Conv2d(4, 4, 1),
)
case("cbam space", lambda x, c: x * c(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)).sigmoid(),
     lambda: nn.Conv2d(2, 1, 7, padding=3))  # fmt: skip
case(
    "coordinate attention",
    lambda x, c: x * c(x.mean(3, keepdim=True)).sigmoid() * c(x.mean(2, keepdim=True)).sigmoid(),
    lambda: nn.Conv2d(4, 4, 1),
)
case(
    "channel attention",
    lambda x: (torch.softmax(x.flatten(2) @ x.flatten(2).transpose(1, 2), -1) @ x.flatten(2)).view_as(x),
)
case(
    "linear attention",
    lambda x: (
        lambda q, k, v: (
            (q.softmax(1).transpose(1, 2) @ (k.softmax(-1) @ v.transpose(1, 2))).transpose(1, 2).reshape(x.shape)
        )
    )(x.flatten(2), x.flatten(2).sin(), x.flatten(2).cos()),
)
case(
    "gc block",
    lambda x, c: x + (x.flatten(2) @ c(x).flatten(2).softmax(-1).transpose(1, 2))[..., None],
    lambda: nn.Conv2d(4, 1, 1),
)
case("einsum channels", lambda x, l: torch.einsum("nchw,dc->ndhw", x, l.weight), lambda: nn.Linear(4, 3))
case("einsum nhwc", lambda x, l: torch.einsum("nchw,dc->nhwd", x, l.weight), lambda: nn.Linear(4, 3))
case("einsum gram", lambda x: torch.einsum("nchw,ndhw->ncd", x, x.sin()))
case("gram", lambda x: (lambda f: f @ f.transpose(1, 2))(x.flatten(2)))
case("linear channels", channels_last, lambda: nn.Linear(4, 6), nn.ReLU, lambda: nn.Linear(6, 3, bias=False))
case(
    "linear tokens",
    lambda x, l: l(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(2, 5, 9, 11),
    lambda: nn.Linear(4, 5),
)
case("linear columns", lambda x, l: l(x), lambda: nn.Linear(11, 6))
case(
    "tokens mixer",
    lambda x, n, l: (lambda t: l(n(t)).transpose(1, 2).reshape(2, 5, 9, 11))(x.permute(0, 2, 3, 1).reshape(2, -1, 4)),
    lambda: nn.LayerNorm(4),
    lambda: nn.Linear(4, 5),
)
case("bilinear pairing", lambda x: torch.einsum("nchw,nchw->nhw", x, x.sin())[:, None])
case("matmul 1x1", lambda x, l: torch.matmul(l.weight, x.flatten(2)).view(2, 3, 9, 11), lambda: nn.Linear(4, 3))

# Arithmetic and reductions -----------------------------------------------------------------------

case("cumsum", lambda x: x.cumsum(1))
case("cumsum space", lambda x: x.cumsum(3) + x.cumsum(2))
case("max dim", lambda x: x.max(1).values + x.min(1).values)
case("max dim keep", lambda x: x * (x.max(2, keepdim=True)[0] - x.amin(3, keepdim=True)))
case("max all", lambda x: x / (x.max() - x.min()))
case("argmax mask", lambda x: x * (x.argmax(1, keepdim=True) > 1))
case("argmax space", lambda x: x.mean((2, 3)) + x.flatten(2).argmax(-1))
case("median sort", lambda x: x.sort(1).values[:, 1:3])
case("topk", lambda x: x.topk(2, dim=1).values)
case("one hot", lambda x: F.one_hot(x.argmax(1), 4).movedim(-1, 1) * x)
case("one hot scatter", lambda x: torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0) * x)
case("gather", lambda x: x.gather(1, x.argmin(1, keepdim=True)))
case("where", lambda x: torch.where(x > 0, x, x.exp() - 1).masked_fill(x > 1, 0.5))
case(
    "norms", lambda x: (x.norm(), x.norm(p=1, dim=1), torch.linalg.vector_norm(x, 3, (2, 3)), x.norm(float("inf"), 1))
)
case("var std", lambda x: (x.var(), x.std((2, 3)), x.var(1, unbiased=False), *torch.std_mean(x, dim=(0, 2, 3))))
case("prod", lambda x: x.sigmoid().prod(1))
case("prod space", lambda x: (1 + 0.1 * x.sigmoid()).prod(3))
case("logsumexp", lambda x: (x.logsumexp(1), x.logsumexp((2, 3))))
case("clamp", lambda x: x.clamp(-0.5, 0.7) + x.clamp(min=x.mean()))
case("pow", lambda x: x.abs().pow(1.5) + 2.0**x)
case("erf", lambda x: x.erf() + x.atan() + torch.atan2(x, x.cos() + 2))
case("global standardise", lambda x: (x - x.mean()) / x.std())
case(
    "min max",
    lambda x: (x - x.amin((2, 3), keepdim=True)) / (x.amax((2, 3), keepdim=True) - x.amin((2, 3), keepdim=True)),
)
case("coord conv", lambda x, c: c(torch.cat([x, torch.linspace(-1, 1, 9, dtype=x.dtype)[:, None].expand(2, 1, 9, 11),
     torch.arange(11, dtype=x.dtype).expand(2, 1, 9, 11)], 1)), lambda: nn.Conv2d(6, 3, 3))  # fmt: skip
case("ramps", lambda x: x * torch.arange(2, 13, dtype=x.dtype) + torch.arange(0, 9, 1, dtype=x.dtype)[:, None])
case("steps", lambda x: x * torch.arange(1.0, 12.0, 1.0, dtype=x.dtype) + torch.arange(0, 22, 2, dtype=x.dtype))
case(
    "meshgrid",
    lambda x: (
        x * torch.meshgrid(torch.arange(9), torch.arange(11), indexing="ij")[0]
        + torch.eye(9, 11)
        + torch.ones(9, 11).tril()
    ),
)
case("position", lambda x: x + torch.sin(torch.arange(4 * 9 * 11, dtype=x.dtype)).view(4, 9, 11))
case("bool any", lambda x: x * (x > 2).any(1, keepdim=True) + x * (x > 0).all(2, keepdim=True))
case("count", lambda x: x / (x > 0).sum((2, 3), keepdim=True))
case("complex shapes", lambda x: x if x.shape[-1] % 2 == 0 else F.pad(x, (0, 1))[..., : x.shape[-1] // 2])
case("cast", lambda x: x.float().mul(2).double())
case("cross product", lambda x: x[:, 0] * x[:, 1] - x[:, 2] * x[:, 3])
case("diff", lambda x: x.diff(dim=2))
case(
    "baddbmm",
    lambda x: torch.baddbmm(
        x.mean((2, 3))[:, :, None].expand(2, 4, 4), x.flatten(2), x.flatten(2).mT, beta=0.5, alpha=2
    ),
)
case("addcmul", lambda x: torch.addcmul(x, x.sin(), x.cos(), value=0.5).lerp(x, 0.3))
case("tensordot", lambda x, l: torch.tensordot(x, l.weight, dims=([1], [1])), lambda: nn.Linear(4, 3))
case("index", lambda x: x[:, [0, 2]])
case("index select", lambda x: x.index_select(1, torch.tensor([3, 1])))
case("fft", lambda x: torch.fft.rfft2(x).abs(), whole=("fft",))
