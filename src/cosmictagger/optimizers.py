"""The optimisers of torch.optim and the schedules of torch.optim.lr_scheduler, by name with their arguments.

What they keep between two steps is tensors and a few numbers; both can be written without code, as safetensors and as
JSON. Whatever keeps something else is refused by name.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

OWN_SCHEDULES = ("constant", "linear", "cosine")
"""Those of a recipe's own, which fall to zero at the last step or at the end of the time."""
_GIVEN = {
    "params": "the network",
    "lr": "learning_rate",
    "optimizer": "the optimizer",
    "last_epoch": "the checkpoint",
}
_MISLEADING = {"maximize": "it would make the loss larger"}
_NOT_HERE = {
    "LBFGS": "it evaluates a step several times, which a training does not",
    "SparseAdam": "it takes sparse gradients, which a network of convolutions has not",
    "LambdaLR": "a function cannot be written down",
    "MultiplicativeLR": "a function cannot be written down",
    "SequentialLR": "it is made of other schedules; warmup comes before every schedule",
    "ChainedScheduler": "it is made of other schedules; warmup comes before every schedule",
}
_PAIRS = "pairs"


def optimizer_names() -> list[str]:
    """Those of torch.optim that can train a network here."""
    return _names(torch.optim, Optimizer)


def schedule_names() -> list[str]:
    """A recipe's own, and those of torch.optim.lr_scheduler that can be written down."""
    return [*OWN_SCHEDULES, *_names(lr_scheduler, LRScheduler)]


def check_optimizer(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown optimiser, or an argument that it does not take."""
    _check("optimizer", name, arguments, optimizer_names())


def check_schedule(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown schedule, or an argument that it does not take, or one that is missing."""
    _check("schedule", name, arguments, schedule_names())
    if name == "ReduceLROnPlateau" and arguments.get("mode", "max") != "max":
        raise ValueError("schedule ReduceLROnPlateau: it follows the mean IoU of validations, so mode must be max")


def build_optimizer(
    name: str, arguments: Mapping[str, Any], parameters: Iterable[torch.nn.Parameter], rate: float
) -> Optimizer:
    """The optimiser.

    Raises ValueError where it does not take these values or these parameters, cannot take a step, or keeps what
    cannot be written down.
    """
    check_optimizer(name, arguments)
    parameters = list(parameters)
    alone = torch.nn.Parameter(torch.zeros_like(parameters[0], requires_grad=False))
    try:
        made, tried = (getattr(torch.optim, name)(x, lr=rate, **arguments) for x in (parameters, [alone]))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"optimizer {name}: {error}") from error
    first_step(tried)
    optimizer_state(tried)
    return made


def build_schedule(name: str, arguments: Mapping[str, Any], optimizer: Optimizer) -> LRScheduler:
    """The schedule; raises ValueError where it does not take these values, or keeps what cannot be written down."""
    check_schedule(name, arguments)
    more = {"mode": "max"} if name == "ReduceLROnPlateau" else {}
    try:
        made = getattr(lr_scheduler, name)(optimizer, **(more | dict(arguments)))
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, KeyError) as error:
        raise ValueError(f"schedule {name}: {error}") from error
    plain(made.state_dict(), f"schedule {name}")
    return made


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an optimiser keeps of each parameter, by `<number>/<name>`: tensors, and all else in JSON's types.

    Raises ValueError for what is neither.
    """
    tensors, rest = {}, {}
    for index, held in optimizer.state_dict()["state"].items():
        for name, value in held.items():
            key = f"{index}/{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            else:
                rest[key] = plain(value, f"optimizer {type(optimizer).__name__}: {name}")
    return tensors, rest


def load_optimizer_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state` has given; the settings of the optimiser stay."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *((key, restored(value, None)) for key, value in rest.items())]:
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def first_step(optimizer: Optimizer) -> None:
    """A step with gradients of zero, after which the optimiser keeps all that it ever keeps. Parameters may change.

    Raises ValueError where it cannot take a step.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"optimizer {type(optimizer).__name__}: {error}") from error
    optimizer.zero_grad(set_to_none=True)


def plain(value: Any, where: str) -> Any:
    """The same in JSON's types; keys of a dict may be numbers. Raises ValueError for a value that has none."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item, where) for item in value]
    if isinstance(value, dict):
        return {_PAIRS: [[plain(key, where), plain(item, f"{where}: {key}")] for key, item in value.items()]}
    raise ValueError(f"{where} is of type {type(value).__name__}, which a checkpoint cannot hold")


def restored(value: Any, like: Any) -> Any:
    """What `plain` was given, of the same types as in `like`."""
    if isinstance(value, list):
        inside = like if isinstance(like, (list, tuple)) and len(like) == len(value) else [None] * len(value)
        items = [restored(item, other) for item, other in zip(value, inside, strict=True)]
        return tuple(items) if isinstance(like, tuple) else items
    if isinstance(value, dict):
        inside = like if isinstance(like, dict) else {}
        found = {key: restored(item, inside.get(key)) for key, item in value[_PAIRS]}
        return type(like)(found) if isinstance(like, dict) else found
    return value


def _names(module: Any, base: type) -> list[str]:
    found = inspect.getmembers(module, lambda x: inspect.isclass(x) and issubclass(x, base) and x is not base)
    return [name for name, _ in found if not name.startswith("_") and name not in _NOT_HERE]


def _check(what: str, name: str, arguments: Mapping[str, Any], names: list[str]) -> None:
    if name in _NOT_HERE:
        raise ValueError(f"{what} {name} cannot be used: {_NOT_HERE[name]}; choose one of {', '.join(names)}")
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(names)}")
    if name in OWN_SCHEDULES:
        takes: dict[str, inspect.Parameter] = {}
    else:
        takes = dict(inspect.signature(getattr(lr_scheduler if what == "schedule" else torch.optim, name)).parameters)
    allowed = [key for key in takes if key not in _GIVEN and key not in _MISLEADING]
    for key in arguments:
        if key in _GIVEN and key in takes:
            raise ValueError(f"{what} {name}: {key} is not among its arguments here; {_GIVEN[key]} says it")
        if key in _MISLEADING and key in takes:
            raise ValueError(f"{what} {name}: {key} cannot be used: {_MISLEADING[key]}")
        if key not in allowed:
            raise ValueError(f"{what} {name} has no argument {key!r}: choose among {', '.join(allowed) or 'none'}")
    plain(dict(arguments), f"{what} {name}")
    missing = [k for k in allowed if takes[k].default is inspect.Parameter.empty and k not in arguments]
    if missing:
        raise ValueError(f"{what} {name} needs the argument {missing[0]}")
