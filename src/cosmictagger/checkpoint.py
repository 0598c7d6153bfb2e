"""Where a training goes on: a safetensors file of parameters, buffers and the optimiser's state, and JSON.

Neither can hold code, so a checkpoint may come from anybody.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from cosmictagger.data import DataError
from cosmictagger.model import UResNet
from cosmictagger.weights import misfit, not_finite, write_tensors

NAME = "checkpoint.safetensors"
_METADATA, _MODEL, _OPTIMIZER = "training", "model/", "optimizer/"


def save_checkpoint(path: Path, net: UResNet, optimizer: Optimizer, step: int) -> None:
    """Write the file; it appears whole. The learning rate is not in it: it follows from the recipe and the step."""
    content = {_MODEL + key: value for key, value in net.state_dict().items()}
    for index, held in optimizer.state_dict()["state"].items():
        content |= {f"{_OPTIMIZER}{index}/{name}": value for name, value in held.items()}
    write_tensors(path, content, {_METADATA: json.dumps({"step": step})})


def load_checkpoint(path: Path, net: UResNet, optimizer: Optimizer) -> int:
    """Put a checkpoint into a network and its optimiser; returns the step. Raises DataError if it cannot be used."""
    try:
        with safe_open(path, "pt") as file:
            step = json.loads((file.metadata() or {})[_METADATA])["step"]
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is not a checkpoint of a training") from error
    model = {key.removeprefix(_MODEL): value for key, value in content.items() if key.startswith(_MODEL)}
    problem = misfit(model, net.state_dict()) or _strange(content, list(net.parameters())) or not_finite(content)
    if type(step) is not int or step < 1:
        problem = f"its step is {step}"
    if problem:
        raise DataError(f"{path}: does not fit the training: {problem}")
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in content.items():
        if key.startswith(_OPTIMIZER):
            _, index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
    net.load_state_dict(model)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def _strange(content: dict[str, Tensor], parameters: list[torch.nn.Parameter]) -> str | None:
    """What of the optimiser's state is missing, or is not Adam's."""
    wanted = {}
    for index, p in enumerate(parameters):
        shapes = {"step": (), "exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}
        wanted |= {f"{_OPTIMIZER}{index}/{name}": shape for name, shape in shapes.items()}
    found = {key: tuple(value.shape) for key, value in content.items() if not key.startswith(_MODEL)}
    strange = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    return f"{strange[0]} is {found.get(strange[0], 'missing')}" if strange else None
