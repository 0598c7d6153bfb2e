"""Released weights: a safetensors file that carries the shape of its network; public checkpoints are read too."""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosmictagger.atomic import replacing
from cosmictagger.data import DataError
from cosmictagger.model import VARIANTS, NetworkConfig, UResNet
from cosmictagger.shapes import infer_config

METADATA = "cosmictagger"
"""The one entry of a file's metadata: several would be written in an order that differs from file to file, and equal
trainings leave files that are equal byte for byte."""


@dataclass(frozen=True)
class Origin:
    """How weights came about; they are of use only where the same is done with them."""

    downsample: int = 0
    precision: str = "float32"
    data: str = ""
    """Fingerprint of the events that they were trained on."""


def save_weights(net: UResNet, path: Path, origin: Origin | None = None) -> None:
    """Write parameters and buffers, with the network's configuration, and what is known of their origin, in the
    file's metadata."""
    about = {"network": asdict(net.config)} | ({} if origin is None else {"origin": asdict(origin)})
    write_tensors(path, net.state_dict(), {METADATA: json.dumps(about)})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; it appears whole. Raises OSError where the disk is full."""
    content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as part:
        try:
            save_file(content, part, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error


def load_origin(path: Path) -> Origin | None:
    """What a weights file says of its origin; None where it says nothing. Raises DataError if that makes no sense."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA, "{}")
    except (SafetensorError, OSError):
        return None
    try:
        about = json.loads(text)
        return Origin(**about["origin"]) if "origin" in about else None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: its description of the training cannot be used: {error}") from error


def not_finite(state: dict[str, Tensor]) -> str | None:
    """The first tensor with a NaN or infinite value, in words; None where all is well."""
    bad = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    return f"{bad[0]} has values that are NaN or infinite" if bad else None


def load_weights(path: Path, variant: str | None = None, *, connections: str | None = None) -> UResNet:
    """The network of a weights file, in evaluation mode.

    A safetensors file written here says what network it is for; for any other, and for a checkpoint of the public
    CosmicTagger, it is read from the tensors' shapes, unless `variant` names it. What shapes do not tell,
    `connections` says, as in `infer_config`. Raises DataError if the file cannot be used.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    state, config = _read(path)
    config = named_variant(variant) if variant is not None else config
    if config is None:
        try:
            config = infer_config(state, connections)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    net = UResNet(config)
    problem = misfit(state, net.state_dict())
    if problem:
        raise DataError(f"{path}: does not fit the network: {problem}")
    problem = not_finite(state)
    if problem:
        raise DataError(f"{path}: cannot be used: {problem}")
    net.load_state_dict(state)
    return net.eval()


def named_variant(name: str) -> NetworkConfig:
    """Raises DataError for a name that is not in VARIANTS."""
    if name not in VARIANTS:
        raise DataError(f"unknown variant {name!r}: choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def _read(path: Path) -> tuple[dict[str, Tensor], NetworkConfig | None]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return state, _config(path, metadata[METADATA]) if METADATA in metadata else None
    except SafetensorError:
        return _read_public(path), None


def _config(path: Path, text: str) -> NetworkConfig:
    known = {f.name for f in fields(NetworkConfig)}
    try:
        return NetworkConfig(**{k: v for k, v in json.loads(text)["network"].items() if k in known})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: its description of the network cannot be used: {error}") from error


# All that a checkpoint may be made of beside tensors and Python's own containers and numbers: the public trainer
# keeps NumPy's numbers in its optimiser and scheduler, by the name that their module has in NumPy 2, or had before.
_scalar = np.float64(0).__reduce__()[0]
ALLOWED = [
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("?", "i4", "i8", "u4", "u8", "f4", "f8")),
]


def _read_public(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True)  # tensors and numbers, no pickled code
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        more = "" if found is None else f": it holds {found[1]}, which might be code; save its state_dict alone"
        raise DataError(f"{path}: neither safetensors nor a checkpoint of tensors{more}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    # a training framework may have put a prefix before every name
    marker = "initial_convolution.conv.weight"
    prefixes = [key.removesuffix(marker) for key in state if isinstance(key, str) and key.endswith(marker)]
    if not prefixes:
        raise DataError(f"{path}: holds no CosmicTagger network")
    prefix = prefixes[0]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def misfit(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str | None:
    """What is missing, or of another shape, or too much; None where all fits."""
    for key, value in wanted.items():
        if key not in found:
            return f"{key} is missing"
        if found[key].shape != value.shape:
            return f"{key} is {tuple(found[key].shape)} instead of {tuple(value.shape)}"
    extra = [key for key in found if key not in wanted]
    return f"{extra[0]} is not part of it" if extra else None
