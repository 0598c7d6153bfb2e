"""The network that a state dict belongs to, read from the names and shapes of its tensors."""

from dataclasses import replace

from torch import Tensor

from cosmictagger.data import DataError
from cosmictagger.model import PLANES, VARIANTS, NetworkConfig


def infer_config(state: dict[str, Tensor], connections: str | None = None) -> NetworkConfig:
    """The configuration of a network with tensors of these names and shapes.

    Shapes do not tell a network that adds its skips from one that drops them, since neither has parameters there; it
    is taken for the published one that is like it, or as `connections` says ("sum" or "none"). Raises DataError where
    that is not said, or the names are not of such a network.
    """
    try:
        config = _inferred(state)
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(f"not the tensors of a CosmicTagger network: {error}") from error
    if "net_core.connection.bottleneck.conv.weight" in state:
        if connections is not None:
            raise DataError(f"the network joins its skips by concat, not {connections}")
        return config
    if connections is not None:
        return replace(config, connections=connections)  # pyright: ignore[reportArgumentType] (one of two words)
    if config in VARIANTS.values():
        return config
    raise DataError("its shapes do not say whether skips are added or dropped; say --connections sum or none")


def _inferred(state: dict[str, Tensor]) -> NetworkConfig:
    """With connections `sum` where there are no parameters to see."""
    width = _shape(state, "initial_convolution.conv.weight")[0]
    deepest, depth = "net_core.", 0
    while any(key.startswith(f"{deepest}downsample.") for key in state):
        deepest, depth = f"{deepest}main_module.", depth + 1
    deepest += "main_module."
    last = deepest.removesuffix("main_module.main_module.")  # the innermost level
    pooled = "net_core.downsample.bottleneck.conv.weight" in state
    interpolated = "net_core.upsample.bottleneck.conv.weight" in state
    widest = _shape(state, f"{last}downsample.{'bottleneck.' if pooled else ''}conv.weight")[0]
    narrow, joined = _shape(state, f"{deepest}bottleneck.conv.weight")[:2]
    series = {name: _blocks(state, name) for name in ("net_core.down_blocks", f"{deepest}blocks", "final_layer")}
    inner = [key for key in state if key.startswith(f"{deepest}blocks.blocks.0.") and key.endswith("conv.weight")]
    doubled = depth > 1 and widest == width * 2**depth
    return NetworkConfig(
        n_initial_filters=width,
        depth=depth,
        blocks_per_layer=series["net_core.down_blocks"],
        blocks_deepest_layer=series[f"{deepest}blocks"],
        blocks_final=series["final_layer"],
        filter_size_deepest=_shape(state, inner[0])[-1] if inner else NetworkConfig.filter_size_deepest,
        bottleneck_deepest=narrow,
        residual=any(".convolution_1." in key for key in state),
        bias="initial_convolution.conv.bias" in state,
        normalization="batch" if "initial_convolution.norm.weight" in state else "none",
        connections="concat" if "net_core.connection.bottleneck.conv.weight" in state else "sum",
        growth_rate="multiplicative" if doubled else "additive",
        downsampling="max_pooling" if pooled else "convolutional",
        upsampling="interpolation" if interpolated else "convolutional",
        block_concat=joined != PLANES * widest,
    )


def _shape(state: dict[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in state:
        raise KeyError(f"{key} is missing")
    shape = tuple(state[key].shape)
    if len(shape) != 4:
        raise ValueError(f"{key} has {len(shape)} axes instead of four")
    return shape


def _blocks(state: dict[str, Tensor], series: str) -> int:
    prefix = f"{series}.blocks."
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})
