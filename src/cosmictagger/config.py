"""A training as a YAML file: every setting by its name, checked, and written down again as it came out.

    variant: a21
    network: {depth: 7}                           # what differs from the variant
    loss: focal
    optimizer: {name: AdamW, weight_decay: 0.01}  # or the name alone
    schedule: {name: StepLR, step_size: 500}
    events: training.h5
    out: run

Keys are the fields of `Recipe`, of `Running`, and where events come from and results go. Of YAML, numbers like 1e-3
are read as numbers, and a key that stands twice is refused.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml

from cosmictagger.data import DataError
from cosmictagger.evaluate import Running
from cosmictagger.model import VARIANTS, NetworkConfig
from cosmictagger.objective import LOSSES
from cosmictagger.optimizers import optimizer_names, schedule_names
from cosmictagger.recipe import Recipe

NAME = "config.yaml"
HEAD = "# The settings of this training, as `cosmictagger train --config` takes them.\n"
_NAMED = ("optimizer", "schedule")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


@dataclass(frozen=True)
class Files:
    """Where events come from and where results go."""

    events: Path
    out: Path
    validation: Path | None = None
    """Events that are not trained on; with them comes out/report.html."""


@dataclass(frozen=True)
class Run:
    """A training: what, how, on what."""

    files: Files
    recipe: Recipe
    running: Running = field(default_factory=Running)
    tensorboard: bool = False
    """Write the log for TensorBoard, too."""

    def text(self) -> str:
        """As YAML, complete: `read(path)` of it gives the same run."""
        recipe = asdict(self.recipe)
        out: dict[str, Any] = {
            key: None if value is None else str(value) for key, value in asdict(self.files).items()
        }
        out |= {key: recipe[key] for key in _kinds() if key in recipe}
        for key in _NAMED:
            given = recipe[f"{key}_arguments"]
            out[key] = {"name": recipe[key], **given} if given else recipe[key]
        out |= {f.name: getattr(self.running, f.name) for f in fields(Running) if f.name in _kinds()}
        out |= {"device": self.running.device.type, "tensorboard": self.tensorboard}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in out.items()}
        return HEAD + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def read(path: Path) -> dict[str, Any]:
    """The settings of a file, checked. Raises DataError that names file, line and key, and what is allowed."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            found = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise DataError(f"{_place(path, None if mark is None else mark.line)}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not YAML: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: must hold settings, as `key: value`")
    lines = _lines(node)
    for key, value in found.items():
        _check(key, value, lambda name: _place(path, lines.get(name)))
    try:
        made(found)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return found


def overridden(settings: Mapping[str, Any], options: Mapping[str, Any], texts: list[str]) -> dict[str, Any]:
    """Settings with those of a command line over them: options by their name, then `key=value` or `key.inner=value`,
    the value in YAML. Raises DataError for an unknown key or a value that it does not take."""
    out = dict(settings) | {key: value for key, value in options.items() if value is not None}
    for text in texts:
        key, sign, written = text.partition("=")
        outer, dot, inner = key.partition(".")
        if not sign:
            raise DataError(f"--set {text}: must be key=value")
        try:
            value = yaml.load(written, _Loader)
        except yaml.YAMLError as error:
            raise DataError(f"--set {text}: {written} is not YAML") from error
        if dot:
            held = out.get(outer, {})
            held = {"name": held} if isinstance(held, str) else dict(held or {})
            if outer in _NAMED and "name" not in held:
                held = {"name": getattr(Recipe, outer)} | held
            value = held | {inner: value}
        _check(outer, value, lambda _, text=text: f"--set {text}")
        out[outer] = value
    return out


def made(settings: Mapping[str, Any]) -> tuple[Recipe, Running, bool]:
    """What, how, and whether for TensorBoard, of settings that have been checked.

    Raises ValueError for values that make no sense.
    """
    given = dict(settings)
    for key in _NAMED:
        if isinstance(given.get(key), Mapping):
            arguments = dict(given[key])
            given |= {key: arguments.pop("name"), f"{key}_arguments": arguments}
    network = replace(VARIANTS[given.get("variant", "uresnet")], **(given.get("network") or {}))
    recipe = {f.name: given[f.name] for f in fields(Recipe) if f.name in given and f.name != "network"}
    recipe |= {key: tuple(value) for key, value in recipe.items() if isinstance(value, list)}
    running = {f.name: given[f.name] for f in fields(Running) if f.name in given and f.name != "device"}
    device = given.get("device", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("no CUDA device was found; leave device out to compute on the CPU")
    return Recipe(network, **recipe), Running(**running, device=torch.device(device)), given.get("tensorboard", False)


def run_of(settings: Mapping[str, Any]) -> Run:
    """The training that settings describe. Raises DataError where events or out are missing, and as `made` does."""
    recipe, running, tensorboard = made(settings)
    for key in ("events", "out"):
        if settings.get(key) is None:
            raise DataError(f"{key} is missing: name it on the command line, or as {key} in the file of --config")
    validation = settings.get("validation")
    files = Files(Path(settings["events"]), Path(settings["out"]), None if validation is None else Path(validation))
    return Run(files, recipe, running, tensorboard)


class _Loader(yaml.SafeLoader):
    """SafeLoader, with numbers as in YAML 1.2, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        met = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in met:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            met.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _kinds() -> dict[str, Any]:
    """The type of each key; a tuple of values where only those are allowed."""
    recipe, running = get_type_hints(Recipe), get_type_hints(Running)
    out: dict[str, Any] = {
        "events": Path,
        "out": Path,
        "validation": Path | None,
        "variant": tuple(VARIANTS),
        "network": NetworkConfig,
    }
    out |= {key: kind for key, kind in recipe.items() if not key.endswith("_arguments") and key not in out}
    out |= {"loss": LOSSES, "optimizer": tuple(optimizer_names()), "schedule": tuple(schedule_names())}
    out |= {key: kind for key, kind in running.items() if key not in ("device", "world")}
    return out | {"precision": ("float32", "bfloat16"), "downsample": (0, 1), "device": ("cpu", "cuda"),
                  "tensorboard": bool}  # fmt: skip


def _check(key: Any, value: Any, where: Any) -> None:
    """Raise DataError unless `key` is known and takes `value`; `where(key)` begins what it says."""
    kinds = _kinds()
    _check_known(key, list(kinds), where(key), "key")
    kind = kinds[key]
    if kind is NetworkConfig:
        if not isinstance(value, dict):
            raise DataError(f"{where(key)}: {key} is {value!r}; it must be a section of the network's fields")
        hints = get_type_hints(NetworkConfig)
        for name, inner in value.items():
            _check_known(name, list(hints), where(f"{key}.{name}"), f"key in {key}")
            _check_value(f"{key}.{name}", hints[name], inner, where(f"{key}.{name}"))
    elif key in _NAMED and isinstance(value, dict):
        if "name" not in value:
            raise DataError(f"{where(key)}: {key} has no name: choose one of {', '.join(kind)}")
        _check_value(f"{key}.name", kind, value["name"], where(f"{key}.name"))
    else:
        _check_value(key, kind, value, where(key))


def _check_known(key: Any, known: list[str], where: str, what: str) -> None:
    if key not in known:
        near = difflib.get_close_matches(str(key), known, 1)
        meant = f", perhaps {near[0]}" if near else ""
        raise DataError(f"{where}: unknown {what} {key!r}{meant}: choose among {', '.join(known)}")


def _check_value(key: str, kind: Any, value: Any, where: str) -> None:
    kinds = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is Union else (kind,)
    if not any(_is(one, value) for one in kinds):
        words = " or ".join(_words(one) for one in kinds)
        raise DataError(f"{where}: {key} is {value!r}; it must be {words}")


def _is(kind: Any, value: Any) -> bool:
    allowed = kind if isinstance(kind, tuple) else get_args(kind) if get_origin(kind) is Literal else None
    if allowed is not None:
        return any(type(value) is type(one) and value == one for one in allowed)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and len(value) == len(get_args(kind)) and all(type(x) is int for x in value)
    if kind is float:
        return type(value) in (int, float)
    return isinstance(value, (str, Path)) if kind in (str, Path) else type(value) is kind


def _words(kind: Any) -> str:
    allowed = kind if isinstance(kind, tuple) else get_args(kind) if get_origin(kind) is Literal else None
    if allowed is not None:
        return f"one of {', '.join(map(str, allowed))}"
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))} whole numbers"
    return "null" if kind is NoneType else _WORDS[kind]


def _lines(node: Any, prefix: str = "") -> dict[str, int]:
    """The line of each key, from 0, those inside of others after a dot."""
    out = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        name = f"{prefix}{key.value}"
        out |= {name: key.start_mark.line} | _lines(value, f"{name}.")
    return out


def _place(path: Path, line: int | None) -> str:
    return str(path) if line is None else f"{path}, line {line + 1}"
