"""Where a training goes on: a safetensors file of parameters, buffers and the optimiser's state, and JSON.

Neither can hold code, so a checkpoint may come from anybody.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from cosmictagger.data import DataError
from cosmictagger.model import UResNet
from cosmictagger.optimizers import first_step, load_optimizer_state, optimizer_state
from cosmictagger.weights import misfit, not_finite, write_tensors

NAME = "checkpoint.safetensors"
_METADATA, _MODEL, _OPTIMIZER = "training", "model/", "optimizer/"


def save_checkpoint(path: Path, net: UResNet, optimizer: Optimizer, step: int, schedule: dict[str, Any]) -> None:
    """Write the file; it appears whole. Of the learning rate it holds `schedule`, what its scheduler goes on from.

    Raises ValueError where the optimiser keeps something that cannot be written down.
    """
    tensors, rest = optimizer_state(optimizer)
    content = {_MODEL + key: value for key, value in net.state_dict().items()}
    content |= {_OPTIMIZER + key: value for key, value in tensors.items()}
    about = {"step": step} | ({"optimizer": rest} if rest else {}) | ({"schedule": schedule} if schedule else {})
    write_tensors(path, content, {_METADATA: json.dumps(about)})


def load_checkpoint(path: Path, net: UResNet, optimizer: Optimizer) -> tuple[int, dict[str, Any]]:
    """Put a checkpoint into a network and its new optimiser; returns the step and what the schedule goes on from.

    Raises DataError if it cannot be used; network and optimiser are of no use then.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[_METADATA])
            step, rest, schedule = about["step"], about.get("optimizer", {}), about.get("schedule", {})
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is not a checkpoint of a training") from error
    model = {key.removeprefix(_MODEL): value for key, value in content.items() if key.startswith(_MODEL)}
    others = {key: value for key, value in content.items() if not key.startswith(_MODEL)}
    problem = misfit(model, net.state_dict()) or _strange(others, rest, optimizer) or not_finite(content)
    if type(step) is not int or step < 1:
        problem = f"its step is {step}"
    if problem:
        raise DataError(f"{path}: does not fit the training: {problem}")
    net.load_state_dict(model)
    load_optimizer_state(optimizer, {key.removeprefix(_OPTIMIZER): value for key, value in others.items()}, rest)
    return step, schedule


def _strange(found: dict[str, Tensor], rest: dict[str, Any], optimizer: Optimizer) -> str | None:
    """What of the optimiser's state is missing, or is not what it keeps after a step, which it takes for that."""
    first_step(optimizer)
    tensors, others = optimizer_state(optimizer)
    wanted = {_OPTIMIZER + key: tuple(value.shape) for key, value in tensors.items()}
    shapes = {key: tuple(value.shape) for key, value in found.items()}
    strange = sorted(key for key in wanted.keys() | shapes.keys() if wanted.get(key) != shapes.get(key))
    if strange:
        return f"{strange[0]} is {shapes.get(strange[0], 'missing')}"
    more = sorted(others.keys() ^ rest.keys())
    return f"what it says of {_OPTIMIZER}{more[0]} is not what the optimiser keeps" if more else None
