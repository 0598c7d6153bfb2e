"""The CosmicTagger network: a residual U-Net that three wire planes share and that joins them at its deepest level.

Parameter and buffer names are those of the public CosmicTagger, so its checkpoints load here.
Every layer is applied to plane 0, then 1, then 2: with batch norm, running statistics move three times per
forward. What it does badly: the planes exchange information at the deepest level only, and an image whose sides
are not multiples of 2**depth is refused rather than padded.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLANES = 3
CLASSES = 3  # background, cosmic, neutrino
SLOPE = 0.01  # of the leaky ReLU


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the network. The defaults are the full `uresnet`.

    Raises ValueError for a count below its minimum.
    """

    n_initial_filters: int = 16
    depth: int = 6
    """Number of times the image is halved."""
    blocks_per_layer: int = 2
    blocks_deepest_layer: int = 5
    blocks_final: int = 5
    filter_size_deepest: int = 5
    """Side of the square filters at the deepest level, odd."""
    bottleneck_deepest: int = 256
    residual: bool = True
    bias: bool = True
    normalization: Literal["batch", "none"] = "batch"
    connections: Literal["concat", "sum", "none"] = "concat"
    growth_rate: Literal["additive", "multiplicative"] = "additive"
    downsampling: Literal["max_pooling", "convolutional"] = "max_pooling"
    upsampling: Literal["interpolation", "convolutional"] = "interpolation"
    block_concat: bool = False
    """True: no plane sees another, even at the deepest level."""

    def __post_init__(self) -> None:
        least = {
            "n_initial_filters": 1,
            "depth": 1,
            "blocks_per_layer": 0,
            "blocks_deepest_layer": 0,
            "blocks_final": 0,
            "filter_size_deepest": 1,
            "bottleneck_deepest": 1,
        }
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        if self.filter_size_deepest % 2 == 0:
            raise ValueError(f"filter_size_deepest is {self.filter_size_deepest}; it must be odd")


_UNJOINED = NetworkConfig(residual=False, connections="sum")

VARIANTS: dict[str, NetworkConfig] = {
    "uresnet": NetworkConfig(),
    "a21": replace(_UNJOINED, n_initial_filters=8, blocks_final=0),
    "scc21": NetworkConfig(normalization="none"),
    "polaris": replace(_UNJOINED, blocks_deepest_layer=2, blocks_final=2, depth=7, bottleneck_deepest=96),
}


class Block(nn.Module):
    """Convolution, batch norm if any, leaky ReLU if `active`. The side shrinks by `stride`."""

    def __init__(
        self,
        cin: int,
        cout: int,
        config: NetworkConfig,
        *,
        kernel: int = 3,
        stride: int = 1,
        active: bool = True,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(cin, cout, kernel, stride=stride, padding=padding, bias=config.bias)
        if config.normalization == "batch":
            self.norm = nn.BatchNorm2d(cout)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        return _norm_and_activate(self, self.conv(x))


class UpBlock(nn.Module):
    """Transposed convolution 2x2 that doubles the sides, batch norm if any, leaky ReLU."""

    active = True

    def __init__(self, cin: int, cout: int, config: NetworkConfig) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(cin, cout, 2, stride=2, bias=config.bias)
        if config.normalization == "batch":
            self.norm = nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        return _norm_and_activate(self, self.conv(x))


def _norm_and_activate(block: "Block | UpBlock", x: Tensor) -> Tensor:
    if hasattr(block, "norm"):
        x = block.norm(x)
    return F.leaky_relu(x, SLOPE) if block.active else x


class ResidualBlock(nn.Module):
    """Two blocks, the second without activation, plus the input; then leaky ReLU."""

    def __init__(self, width: int, config: NetworkConfig, kernel: int) -> None:
        super().__init__()
        self.convolution_1 = Block(width, width, config, kernel=kernel)
        self.convolution_2 = Block(width, width, config, kernel=kernel, active=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.convolution_2(self.convolution_1(x)) + x, SLOPE)


class Series(nn.Module):
    """`count` blocks of one width, residual or not."""

    def __init__(self, width: int, count: int, config: NetworkConfig, *, kernel: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(width, config, kernel) if config.residual else Block(width, width, config, kernel=kernel)
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class PoolDown(nn.Module):
    """Max pooling 2x2, then a 1x1 block to the new width."""

    def __init__(self, cin: int, cout: int, config: NetworkConfig) -> None:
        super().__init__()
        self.bottleneck = Block(cin, cout, config, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(F.max_pool2d(x, 2))


class InterpolateUp(nn.Module):
    """Bilinear interpolation to twice the sides, then a 1x1 block to the new width."""

    def __init__(self, cin: int, cout: int, config: NetworkConfig) -> None:
        super().__init__()
        self.bottleneck = Block(cin, cout, config, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))


class ConcatJoin(nn.Module):
    """(upsampled, skip) stacked along channels, then a 1x1 block back to one width."""

    def __init__(self, width: int, config: NetworkConfig) -> None:
        super().__init__()
        self.bottleneck = Block(2 * width, width, config, kernel=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.bottleneck(torch.cat((x, skip), dim=1))


class SumJoin(nn.Module):
    """Upsampled plus skip."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + skip


class NoJoin(nn.Module):
    """The skip is dropped."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x


class Deepest(nn.Module):
    """1x1 block to the bottleneck, a series, 1x1 block back; on the planes together unless `block_concat`."""

    def __init__(self, width: int, config: NetworkConfig) -> None:
        super().__init__()
        self.together = not config.block_concat
        joined = width * PLANES if self.together else width
        narrow = config.bottleneck_deepest
        self.bottleneck = Block(joined, narrow, config, kernel=1)
        self.blocks = Series(narrow, config.blocks_deepest_layer, config, kernel=config.filter_size_deepest)
        self.unbottleneck = Block(narrow, joined, config, kernel=1)

    def forward(self, planes: list[Tensor]) -> list[Tensor]:
        if self.together:
            return list(torch.chunk(self._through(torch.cat(planes, dim=1)), PLANES, dim=1))
        planes = [self.bottleneck(x) for x in planes]
        planes = [self.blocks(x) for x in planes]
        return [self.unbottleneck(x) for x in planes]

    def _through(self, x: Tensor) -> Tensor:
        return self.unbottleneck(self.blocks(self.bottleneck(x)))


class DeepestLevel(nn.Module):
    """Holds the deepest blocks one name further down, where public checkpoints have them."""

    def __init__(self, width: int, config: NetworkConfig) -> None:
        super().__init__()
        self.main_module = Deepest(width, config)

    def forward(self, planes: list[Tensor]) -> list[Tensor]:
        return self.main_module(planes)


class Level(nn.Module):
    """One halving: down series, downsample, the level below, upsample, join with the skip, up series."""

    def __init__(self, width: int, depth: int, config: NetworkConfig) -> None:
        super().__init__()
        wider = width * 2 if config.growth_rate == "multiplicative" else width + config.n_initial_filters
        self.down_blocks = Series(width, config.blocks_per_layer, config)
        if config.downsampling == "max_pooling":
            self.downsample = PoolDown(width, wider, config)
        else:
            self.downsample = Block(width, wider, config, kernel=2, stride=2)
        self.main_module = Level(wider, depth - 1, config) if depth > 1 else DeepestLevel(wider, config)
        if config.upsampling == "interpolation":
            self.upsample = InterpolateUp(wider, width, config)
        else:
            self.upsample = UpBlock(wider, width, config)
        if config.connections == "concat":
            self.connection = ConcatJoin(width, config)
        else:
            self.connection = SumJoin() if config.connections == "sum" else NoJoin()
        self.up_blocks = Series(width, config.blocks_per_layer, config)

    def forward(self, planes: list[Tensor]) -> list[Tensor]:
        skips = planes  # the level's input, before its down series: what the reference network joins
        planes = [self.down_blocks(x) for x in planes]
        planes = [self.downsample(x) for x in planes]
        planes = self.main_module(planes)
        planes = [self.upsample(x) for x in planes]
        planes = [self.connection(x, skip) for x, skip in zip(planes, skips, strict=True)]
        return [self.up_blocks(x) for x in planes]


class UResNet(nn.Module):
    """Tags every pixel of three wire planes.

    Input: float (batch, 3 planes, rows, columns). Output: a tuple of three float tensors
    (batch, 3 classes, rows, columns), the logits of each plane; a tuple, not one stacked tensor, so that a
    plane's map can be freed before the next plane's is made.
    Raises ValueError for an input of another shape, or sides that `depth` halvings do not divide.
    """

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or NetworkConfig()
        width = config.n_initial_filters
        self.initial_convolution = Block(1, width, config, kernel=5)
        self.net_core = Level(width, config.depth, config)
        self.final_layer = Series(width, config.blocks_final, config)
        self.bottleneck = nn.Conv2d(width, CLASSES, 1, bias=config.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        check_image_shape(tuple(image.shape), self.config)
        planes = list(torch.chunk(image, PLANES, dim=1))
        planes = [self.initial_convolution(x) for x in planes]
        planes = self.net_core(planes)
        planes = [self.final_layer(x) for x in planes]
        return tuple(self.bottleneck(x) for x in planes)


def expect_background(net: UResNet, share: float) -> None:
    """Let the untrained network believe by `share`, between 1/3 and 1, that a pixel is background.

    Nearly every pixel is; a network that starts by thinking otherwise spends its first steps on learning just that
    (prior initialisation: Lin et al. 2017, arXiv:1708.02002, section 4.1). Raises ValueError for another share, or
    for a network without bias.
    """
    if not 1 / CLASSES <= share < 1:
        raise ValueError(f"background is {share}; it must be at least 1/3 and below 1")
    if net.bottleneck.bias is None:
        raise ValueError("a network without bias cannot expect background")
    with torch.no_grad():
        net.bottleneck.bias[0] = math.log(share * (CLASSES - 1) / (1 - share))


def check_image_shape(shape: tuple[int, ...], config: NetworkConfig) -> None:
    """Raise ValueError unless a network of `config` takes an image of `shape` (batch, planes, rows, columns)."""
    if len(shape) != 4 or shape[1] != PLANES:
        raise ValueError(f"the image must be (batch, {PLANES} planes, rows, columns), not {shape}")
    multiple = 2**config.depth
    if shape[2] % multiple or shape[3] % multiple or not shape[2] * shape[3]:
        raise ValueError(
            f"image of {shape[2]} x {shape[3]} pixels does not suit a network of depth {config.depth}: "
            f"rows and columns must be multiples of {multiple}"
        )


def count_parameters(net: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)
