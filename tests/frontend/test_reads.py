"""Only what a step has read is part of its recording's key; and all of what it has read is."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import operator
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
import fullframe.tiled

TILE = 5
LOSSES: list[float] = []


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    LOSSES.clear()
    yield


def image() -> torch.Tensor:
    return torch.randn(1, 1, 8, 9, dtype=torch.float64)


class Net(nn.Module):
    """A convolution, and what ``what`` makes of the net and its output."""

    def __init__(self, what: Callable[[Any, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.conv, self.what = nn.Conv2d(1, 1, 3, padding=1).double(), what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.what(self, self.conv(x))


def follows(net: nn.Module, changes: list[Callable[[], Any]], loss: Any = None) -> None:
    """The tiled net gives plain PyTorch's numbers after each change."""
    tiled = fullframe.tile(net, loss=loss, tile=TILE)
    for change in (lambda: None, *changes, lambda: None):
        change()
        x = image()
        with torch.no_grad():
            expected = net(x) if loss is None else loss(net(x), x)
            torch.testing.assert_close(tiled(x) if loss is None else tiled(x, x), expected)


# What no step reads ------------------------------------------------------------------------------------


class Meter:
    def __init__(self) -> None:
        self.total, self.count, self.values, self.note = 0.0, 0, [], ""

    def add(self, value: float) -> None:
        self.total, self.count, self.note = self.total + value, self.count + 1, f"{value}"
        self.values.append(value)


@dataclasses.dataclass
class Progress:
    step: int = 0
    best: float = 1e9


class Trainer:
    """Keeps all that trainers keep, and changes it with every step."""

    seen = 0

    def __init__(self) -> None:
        self.net = nn.Conv2d(1, 1, 3, padding=1).double()
        self.scale = 2.0
        self.history: list[float] = []
        self.recent: deque[float] = deque(maxlen=3)
        self.metrics: dict[str, Any] = {}
        self.meter, self.progress, self.steps = Meter(), Progress(), 0
        self.log = logging.getLogger("trainer")
        self.space = SimpleNamespace(epoch=0)
        self.array = numpy.zeros(3)
        self.batches = iter(range(100))
        self.step = fullframe.tile(self.net, loss=self.loss, tile=TILE)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.scale * self.distance(output, target)

    def distance(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output, target)

    def fit(self) -> float:
        x = image()
        value = self.step(x, x)
        value.backward()
        torch.testing.assert_close(value.detach(), self.loss(self.net(x), x).detach())
        self.history.append(value.item())
        self.recent.append(value.item())
        self.metrics["loss"] = value.item()
        self.metrics[f"step {self.steps}"] = value.detach()
        self.meter.add(value.item())
        self.progress.step += 1
        self.progress.best = value.item()
        self.steps += 1
        self.log.extra = value.item()  # pyright: ignore[reportAttributeAccessIssue]
        self.space.epoch += 1
        self.array[0] += 1
        next(self.batches)
        Trainer.seen += 1
        LOSSES.append(value.item())
        return value.item()


def test_a_trainer_that_keeps_a_history(recordings):
    trainer = Trainer()
    for _ in range(4):
        trainer.fit()
    assert len(recordings) == 1
    trainer.scale = 3.0
    trainer.fit()
    assert len(recordings) == 2
    trainer.distance = F.l1_loss  # in place of the method
    trainer.fit()
    assert len(recordings) == 3


def test_a_module_that_is_its_own_trainer(recordings):
    class Lit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.meter, self.counts = nn.Conv2d(1, 1, 3).double(), Meter(), nn.Module()
            self.counts.register_buffer("seen", torch.zeros(()))
            self.outputs: list[Any] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, x: torch.Tensor, step: Any) -> None:
            LOSSES.append(step(x, x[..., 1:-1, 1:-1]).item())
            self.meter.add(LOSSES[-1])
            self.outputs.append(x)
            self.counts.seen = self.counts.seen + 1
            self.counts.last = LOSSES[-1]

    net = Lit()
    step = fullframe.tile(net, loss=F.mse_loss, tile=TILE)
    for _ in range(4):
        net.training_step(image(), step)
    assert len(recordings) == 1


def test_objects_in_the_batch(recordings):
    @dataclasses.dataclass
    class Sample:
        image: torch.Tensor
        name: str
        spacing: float

    net = Net(lambda net, y: y)
    net.forward = lambda sample: net.conv(sample.image) * sample.spacing  # type: ignore[method-assign]
    tiled = fullframe.tile(net)
    for k, spacing in enumerate((1.0, 1.0, 2.0)):
        sample = Sample(image(), f"{k}.png", spacing)
        torch.testing.assert_close(tiled(sample), net(sample))
    assert len(recordings) == 2


# What it reads, whatever the way -----------------------------------------------------------------------


class Config:
    def __init__(self) -> None:
        self.gain, self.other, self.table = 1.0, 5.0, {"gain": 1.0}

    @property
    def doubled(self) -> float:
        return 2 * self.gain

    @functools.cached_property
    def kept(self) -> float:
        return self.gain

    def method(self) -> float:
        return self.gain


@dataclasses.dataclass
class Options:
    gain: float = 1.0
    inner: Any = None


class Behind:
    """Finds everything in a dictionary of its own."""

    def __init__(self) -> None:
        self._values = {"gain": 1.0}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._values[name]


class Watched:
    """Reads its attributes in a way that a guard snapshot cannot follow."""

    def __init__(self) -> None:
        object.__setattr__(self, "gain", 1.0)

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, "gain") if name == "value" else object.__getattribute__(self, name)


def config(
    read: Callable[[Any], Any],
) -> tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any, float], None]]:
    return Config, read, lambda c, k: setattr(c, "gain", k)


def dropped(c: Config, k: float) -> None:
    c.gain = k
    vars(c).pop("kept", None)


NAME = "".join(("ga", "in"))
MAX_PATHS = {
    "attribute": config(lambda c: c.gain),
    "getattr": config(lambda c: getattr(c, NAME)),
    "hasattr": (Config, lambda c: 2.0 if hasattr(c, "extra" + NAME) else 1.0,
                lambda c, k: setattr(c, "extra" + NAME, k)),
    "default": (Config, lambda c: getattr(c, "later", 1.0), lambda c, k: setattr(c, "later", k)),
    "vars": config(lambda c: vars(c)[NAME]),
    "dict": config(lambda c: c.__dict__[NAME]),
    "attrgetter": config(operator.attrgetter(NAME)),
    "methodcaller": config(operator.methodcaller("method")),
    "format": config(lambda c: float("{x.gain}".format(x=c))),  # noqa: UP032
    "property": config(lambda c: c.doubled),
    "cached property": (Config, lambda c: c.kept, dropped),
    "method": config(lambda c: c.method()),
    "copy": config(lambda c: vars(copy.copy(c))[NAME]),
    "deepcopy": config(lambda c: copy.deepcopy(c).gain),
    "reduce": config(lambda c: c.__reduce_ex__(2)[2][NAME]),
    "map": config(lambda c: next(map(getattr, [c], [NAME]))),
    "raw": config(lambda c: object.__getattribute__(c, NAME)),
    "in a table": (Config, lambda c: c.table[NAME], lambda c, k: c.table.update(gain=k)),
    "asdict": (Options, lambda c: dataclasses.asdict(c)[NAME], lambda c, k: setattr(c, "gain", k)),
    "astuple": (Options, lambda c: dataclasses.astuple(c)[0], lambda c, k: setattr(c, "gain", k)),
    "equal": (Options, lambda c: 2.0 if c == Options(2.0) else 1.0, lambda c, k: setattr(c, "gain", k)),
    "repr": (Options, lambda c: float(len(repr(c))), lambda c, k: setattr(c, "gain", 10.0**k)),
    "nested": (lambda: Options(inner=Options()), lambda c: c.inner.gain, lambda c, k: setattr(c.inner, "gain", k)),
    "replaced": (lambda: Options(inner=Options()), lambda c: c.inner.gain,
                 lambda c, k: setattr(c, "inner", Options(k))),
    "behind": (Behind, lambda c: c.gain, lambda c, k: c._values.update(gain=k)),
    "own getattribute": (Watched, lambda c: c.value, lambda c, k: object.__setattr__(c, "gain", k)),
    "namespace": (lambda: SimpleNamespace(gain=1.0), lambda c: c.gain, lambda c, k: setattr(c, "gain", k)),
    "match": (Config, lambda c: _matched(c), lambda c, k: setattr(c, "gain", k)),
}  # fmt: skip


def _matched(thing: Any) -> Any:
    match thing:
        case Config(gain=gain):
            return gain


@pytest.mark.parametrize("way", MAX_PATHS)
@pytest.mark.parametrize("bound", [False, True])
def test_what_was_read_counts_however_it_was_read(way, bound):
    make, read, change = MAX_PATHS[way]
    thing = make()
    net = Net(functools.partial(_scaled, thing=thing, read=read) if bound else lambda net, y: y * read(thing))
    net.thing = thing
    follows(net, [lambda: change(thing, 2.0), lambda: change(thing, 3.0)])


def _scaled(net: Any, y: torch.Tensor, thing: Any, read: Any) -> torch.Tensor:
    return y * read(thing)


class Level:
    gain = 1.0
    names = ("gain",)

    @classmethod
    def of_class(cls) -> float:
        return cls.gain

    @staticmethod
    def plain() -> float:
        return FACTOR

    def by_super(self) -> float:
        return 1.0


class Lower(Level):
    def by_super(self) -> float:
        return super().by_super() * super().gain

    def any_name(self) -> float:
        return getattr(type(self), self.names[0])


FACTOR = 1.0


@pytest.mark.parametrize(
    "read",
    [
        lambda o: o.gain,
        lambda o: type(o).gain,
        lambda o: Level.gain,
        lambda o: o.of_class(),
        lambda o: o.by_super(),
        lambda o: o.any_name(),
        lambda o: Lower().by_super(),
        lambda o: operator.attrgetter("gain")(o),
    ],
)
def test_attributes_of_classes_count(read, monkeypatch):
    thing = Lower()
    net = Net(lambda net, y: y * read(thing))
    monkeypatch.setattr(Level, "gain", 1.0)
    follows(net, [lambda: setattr(Level, "gain", 2.0), lambda: setattr(Level, "gain", 3.0)])


@pytest.mark.parametrize("read", [lambda o: o.plain(), lambda o: Level.plain(), lambda o: Lower().plain()])
def test_globals_of_methods_count(read, monkeypatch):
    thing = Lower()
    monkeypatch.setitem(globals(), "FACTOR", 1.0)
    follows(Net(lambda net, y: y * read(thing)), [lambda: globals().update(FACTOR=2.0)])


def test_a_method_replaced_counts(monkeypatch):
    monkeypatch.setattr(Config, "method", Config.method)
    thing = Config()
    follows(Net(lambda net, y: y * thing.method()), [lambda: setattr(Config, "method", lambda self: 4.0),
                                                     lambda: setattr(thing, "method", lambda: 5.0)])  # fmt: skip


def test_a_deque_that_the_loss_reads():
    class Weighted:
        def __init__(self) -> None:
            self.recent: deque[float] = deque([1.0], maxlen=2)

        def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return F.mse_loss(output, target) * sum(self.recent)

    loss = Weighted()
    follows(Net(lambda net, y: y), [lambda: loss.recent.append(2.0), lambda: loss.recent.append(3.0)], loss)


def counting(net: Any, y: torch.Tensor) -> torch.Tensor:
    net.calls += 1
    return y


def counted(net: Any, y: torch.Tensor) -> torch.Tensor:
    net.calls += 1
    return y * net.calls


def noting(net: Any, y: torch.Tensor) -> torch.Tensor:
    net.shapes.append(tuple(y.shape))
    logging.getLogger("forward").info("%s", y.shape)
    return y


def keeping(net: Any, y: torch.Tensor) -> torch.Tensor:
    net.size = tuple(y.shape)
    return y


@pytest.mark.parametrize("what", [counting, counted, noting, keeping])
def test_what_a_forward_changes_of_python_is_changed_by_every_call(what):
    nets = [Net(what), Net(what)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        net.calls, net.shapes, net.size = 0, [], None
    tiled = fullframe.tile(nets[1], tile=TILE)
    for size in (8, 8, 7, 8, 7, 8):
        x = image()[..., :size]
        torch.testing.assert_close(tiled(x), nets[0](x))
        assert [vars(n)[k] for n in nets[:1] for k in ("calls", "shapes", "size")] == [
            vars(n)[k] for n in nets[1:] for k in ("calls", "shapes", "size")
        ]


def test_classes_are_as_they_were():
    before = dict(vars(Config)), dict(vars(Net)), dict(vars(nn.Conv2d)), nn.Module.__setattr__
    thing = Config()
    fullframe.tile(Net(lambda net, y: y * thing.gain), tile=TILE)(image())
    with pytest.raises(fullframe.CaptureError):
        fullframe.tile(Net(lambda net, y: y * y.sum().item()), tile=TILE)(image())
    assert before == (dict(vars(Config)), dict(vars(Net)), dict(vars(nn.Conv2d)), nn.Module.__setattr__)
    assert Config.__getattribute__ is object.__getattribute__


# Texts and numbers in the batch --------------------------------------------------------------------------


class Batched(nn.Module):
    """Takes a batch as data loaders give it."""

    def __init__(self, read: Callable[[Any], Any]):
        super().__init__()
        self.conv, self.read = nn.Conv2d(1, 1, 3, padding=1).double(), read

    def forward(self, batch: Any) -> Any:
        return self.read(batch)(self.conv) if callable(self.read(batch)) else self.conv(self.read(batch))


def sample(k: int) -> dict[str, Any]:
    return {"image": image(), "name": f"{k}.png", "spacing": 1.0 + k, "index": k, "files": [f"{k}a", f"{k}b"],
            "place": Path(f"/{k}"), "array": numpy.full(2, k)}  # fmt: skip


UNREAD = {
    "by name": lambda b: b["image"],
    "popped": lambda b: dict(b).pop("image"),
    "unpacked": lambda b: next(iter(b.values())),
    "by keyword": lambda b: (lambda image, **others: image)(**b),
    "first tensor": lambda b: next(v for k, v in b.items() if k == "image"),
    "copied": lambda b: {k: v for k, v in b.items() if v is not None}["image"],
}


@pytest.mark.parametrize("read", UNREAD)
def test_texts_and_numbers_that_are_handed_on(read, recordings):
    net = Batched(UNREAD[read])
    tiled = fullframe.tile(net, tile=TILE)
    for k in range(5):
        batch = sample(k)
        torch.testing.assert_close(tiled(batch), net(batch))
        assert len(recordings) <= 2


HANDED_OUT = {
    "one": lambda b, y: (y, b["name"]),
    "all": lambda b, y: {**b, "image": y},
    "as they lie": lambda b, y: [y, b["files"], b["array"]],
    "in an object": lambda b, y: Options(gain=y, inner=(b["spacing"], b["place"])),
}


@pytest.mark.parametrize("what", HANDED_OUT)
def test_texts_and_numbers_that_are_handed_out(what, recordings):
    net = Batched(lambda b: lambda c: HANDED_OUT[what](b, c(b["image"])))
    tiled = fullframe.tile(net, tile=TILE)
    for k in range(5):
        batch = sample(k)
        found, expected = (vars(r) if isinstance(r, Options) else r for r in (tiled(batch), net(batch)))
        leaves, spec = torch.utils._pytree.tree_flatten(found)
        others, same = torch.utils._pytree.tree_flatten(expected)
        assert spec == same
        for a, b in zip(leaves, others, strict=True):
            torch.testing.assert_close(a, b) if isinstance(b, (torch.Tensor, numpy.ndarray)) else a == b
        assert [x for x in leaves if isinstance(x, (str, Path))] == [x for x in others if isinstance(x, (str, Path))]
    assert len(recordings) <= 2


def test_tuples_and_targets_with_names(recordings):
    net = Batched(lambda b: b[0])

    def loss(output: torch.Tensor, target: Any) -> torch.Tensor:
        mask, _, weight = target
        return weight * F.mse_loss(output, mask)

    step = fullframe.tile(net, loss=loss, tile=TILE)
    for k, weight in enumerate((1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 2.0)):
        x, y = (image(), f"{k}"), (image(), f"{k}.png", weight)
        torch.testing.assert_close(step(x, y), loss(net(x), y))
    assert len(recordings) == 4  # for the first, for any names, and for two other weights


READ = {
    "number": lambda b: lambda c: c(b["image"]) * b["spacing"],
    "index": lambda b: lambda c: c(b["image"])[..., b["index"] :],
    "text": lambda b: lambda c: c(b["image"]) * (2 if b["name"].startswith("1") else 1),
    "length": lambda b: lambda c: c(b["image"]) * len(b["files"][0]),
    "instance": lambda b: lambda c: c(b["image"]) * sum(v for v in b.values() if isinstance(v, float)),
    "compared": lambda b: lambda c: c(b["image"]) * (2 if b["name"] == "2.png" else 1),
    "listed": lambda b: lambda c: c(b["image"]) * (2 if "2a" in b["files"] else 1),
    "made a tensor": lambda b: lambda c: c(b["image"]) * torch.tensor(b["spacing"]),
    "tried": lambda b: lambda c: c(b["image"]) * _joined(b["files"]),
    "formatted": lambda b: lambda c: c(b["image"]) * len(f"{10 ** b['index']}"),
    "array": lambda b: lambda c: c(b["image"]) * float(b["array"].sum()),
    "from array": lambda b: lambda c: c(b["image"]) * torch.from_numpy(b["array"])[0],
    "hashed": lambda b: lambda c: c(b["image"]) * {"1.png": 3.0}.get(b["name"], 1.0),
    "place": lambda b: lambda c: c(b["image"]) * len(os.path.join("/", b["place"], "x" if b["index"] else "")),
}


def _joined(texts: list[str]) -> int:
    return len("".join(texts)) + int(texts[0][0])


@pytest.mark.parametrize("read", READ)
def test_texts_and_numbers_that_are_read(read):
    net = Batched(READ[read])
    tiled = fullframe.tile(net, tile=TILE)
    for k in (0, 1, 1, 2, 3):
        batch = sample(k)
        torch.testing.assert_close(tiled(batch), net(batch))


class Label(str):
    """A text of a class of its own."""


def test_the_class_of_a_text_is_read():
    net = Batched(lambda b: lambda c: (c(b[0]) * (2 if type(b[1]) is Label else 1), type(b[1])))
    tiled = fullframe.tile(net, tile=TILE)
    for text in ("a", "b", Label("a"), Label("b"), "c"):
        (found, kind), (expected, other) = tiled((x := image(), text)), net((x, text))
        torch.testing.assert_close(found, expected)
        assert kind is other


def test_a_text_that_is_kept_is_kept(recordings):
    net = Batched(lambda b: lambda c: (setattr(net, "last", b["name"]), c(b["image"]))[1])
    net.last = ""
    tiled = fullframe.tile(net, tile=TILE)
    for k in range(3):
        tiled(sample(k))
        assert net.last == f"{k}.png"


class Labelled(torch.Tensor):
    """A tensor that carries what it was read from, as medical images do."""


def labelled(k: int) -> torch.Tensor:
    made = image().as_subclass(Labelled)
    made.meta, made.gain = {"file": f"{k}.nii", "affine": torch.eye(4) * k}, 1.0 + k  # type: ignore[attr-defined]
    return made


def test_what_tensors_carry(recordings):
    net = Net(lambda net, y: y)
    tiled = fullframe.tile(net, tile=TILE)
    for k in range(4):
        x = labelled(k)
        torch.testing.assert_close(tiled(x).as_subclass(torch.Tensor), net(x.as_subclass(torch.Tensor)))
    assert len(recordings) == 1


@pytest.mark.parametrize("read", [lambda x: x.gain, lambda x: getattr(x, NAME), lambda x: vars(x)[NAME],
                                  lambda x: operator.attrgetter(NAME)(x)])  # fmt: skip
def test_what_tensors_carry_and_a_step_reads(read):
    net = nn.Conv2d(1, 1, 3).double()
    whole = Batched(lambda x: lambda c: net(x) * read(x))
    tiled = fullframe.tile(whole, tile=TILE)
    for k in range(3):
        x = labelled(k)
        torch.testing.assert_close(
            tiled(x).as_subclass(torch.Tensor), net(x.as_subclass(torch.Tensor)) * (1.0 + k), check_device=False
        )


# Where something that is read keeps changing -------------------------------------------------------------


def table(net: Any) -> None:
    net.options["gain"] = net.options.get("gain", 0) + 1


def deep(net: Any) -> None:
    net.inner = Options(inner=Options(getattr(net, "turn", 0)))
    net.turn = getattr(net, "turn", 0) + 1


KEEPS = {
    "attribute": (lambda net: setattr(net, "gain", net.gain + 1), lambda net, y: y * net.gain, r"^gain is read"),
    "table": (table, lambda net, y: y * net.options["gain"], r"^options\['gain'\] is read"),
    "deep": (deep, lambda net, y: y * net.inner.inner.gain, r"^Options\.gain is read"),
    "list": (lambda net: net.items.append(1), lambda net, y: y * len(net.items), r"^items is read"),
    "flag": (lambda net: net.count.add_(1), lambda net, y: y * int(net.count), r"^the tensor count, whose numbers"),
    "counter": (lambda net: None, counted, r"^calls, which the step itself changes, is read"),
    "iterator": (lambda net: None, lambda net, y: y * next(net.numbers), r"^numbers, which the step itself changes"),
    "submodule": (lambda net: setattr(net.conv, "gain", net.gain * 2) or setattr(net, "gain", net.gain * 2),
                  lambda net, y: y * net.conv.gain, r"^conv\.gain is read"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEEPS)
def test_one_warning_says_what_keeps_changing(name):
    change, what, message = KEEPS[name]
    net = Net(what)
    net.gain, net.options, net.items, net.calls, net.numbers = 1.0, {"gain": 1, "x": 0}, [1], 0, iter(range(9))
    net.inner, net.conv.gain = Options(inner=Options()), 1.0  # type: ignore[assignment]
    net.register_buffer("count", torch.zeros((), dtype=torch.int64))
    tiled = fullframe.tile(net, tile=TILE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(5):
            before = len(caught)
            change(net)
            tiled(image())
            assert len(caught) == before + (k == 2)
    assert re.search(message, str(caught[0].message)), str(caught[0].message)


def test_the_trainer_is_named():
    trainer = Trainer()
    with pytest.warns(UserWarning, match=r"^Trainer\.scale is read by the step"):
        for scale in (1.0, 2.0, 3.0):
            trainer.scale = scale
            trainer.fit()


def test_modes_and_sizes_that_alternate_are_no_cause_for_a_warning():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Dropout(0.1)).double()
    tiled = fullframe.tile(net, tile=TILE)
    step = fullframe.tile(net[0], loss=F.mse_loss, tile=TILE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (9, 8, 7, 6):
            x = torch.randn(2, 1, size, 9, dtype=torch.float64)
            step(x, x.clone())
            for mode in (True, False):
                tiled.train(mode)
                with torch.set_grad_enabled(mode):
                    tiled(image()[..., :size])


def test_an_object_of_the_module_that_is_returned(recordings):
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.meter, self.config, self.conv = Meter(), Config(), nn.Conv2d(1, 1, 3).double()

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(x) * self.config.gain, self.config

    net = Scales()
    tiled = fullframe.tile(net, tile=TILE)
    for _ in range(3):
        net.meter.values.append(Meter())
        assert tiled(image())[1] is net.config
    assert len(recordings) == 1


SCRIPT = """
class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.k = nn.Conv2d(1, 1, 3, padding=1).double(), 2.0

    def forward(self, x):
        return self.conv(x) * self.k * SCALE
"""


def test_a_global_with_the_name_of_an_attribute_is_another_thing(recordings):
    space: dict[str, Any] = {"nn": nn, "SCALE": 3.0, "__name__": "script"}
    exec(SCRIPT, space)
    net = space["Named"]()
    tiled = fullframe.tile(net, tile=TILE)
    for space["k"] in range(4):  # the loop of a script, at its top level
        tiled(image())
    assert len(recordings) == 1
    space["SCALE"] = 5.0
    x = image()
    assert torch.allclose(tiled(x), net.conv(x) * 10, rtol=0, atol=1e-12)
