"""What a tiled module or step returns, and the gradients that may be asked of each part of it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from networks import batch, close, grads, plain_net
from torch import nn
from torch.utils import _pytree as pytree

import fullframe
from fullframe.oracle import drawn

TILE = 7


@pytest.fixture(autouse=True)
def _settled():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Terms(NamedTuple):
    entropy: Any
    size: Any
    spread: Any = None


def entropy(output, target):
    return F.cross_entropy(output, target)


LOSSES = {
    "dict": lambda o, t: {"entropy": entropy(o, t), "size": o.square().mean()},
    "tuple": lambda o, t: (entropy(o, t), o.square().mean(), o.std()),
    "list": lambda o, t: [entropy(o, t), o.abs().mean()],
    "named tuple": lambda o, t: Terms(entropy(o, t), o.square().mean(), o.std()),
    "nested": lambda o, t: {"a": (entropy(o, t), [o.square().mean()]), "b": o.abs().mean()},
    "output": lambda o, t: (entropy(o, t), o),
    "output first": lambda o, t: (o, entropy(o, t)),
    "a name first": lambda o, t: {"name": "entropy", "loss": entropy(o, t), "size": o.square().mean()},
    "a constant first": lambda o, t: (t.double().mean(), entropy(o, t)),
    "of one number": lambda o, t: (entropy(o, t)[None], o.square().mean()),
    "map": lambda o, t: F.cross_entropy(o, t, reduction="none"),
    "maps": lambda o, t: (F.cross_entropy(o, t, reduction="none"), o),
    "the same twice": lambda o, t: [entropy(o, t)] * 2,
}


def parts(made):
    return [t for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]


def total(tensors):
    return sum(((k + 1) * t.square()).sum() for k, t in enumerate(tensors))


def add_up(made):
    total([t for t in parts(made) if t.requires_grad]).backward()


def only_the_last(made):
    total([[t for t in parts(made) if t.requires_grad][-1]]).backward()


def one_after_the_other(made):
    for t in [t for t in parts(made) if t.requires_grad]:
        total([t]).backward(retain_graph=True)


def sides(net=None, loss=None):
    net = plain_net() if net is None else net
    twin = copy.deepcopy(net)
    return net, twin, fullframe.tile(twin, loss=loss, tile=TILE)


@pytest.mark.parametrize("name", LOSSES)
def test_every_part_of_a_loss_has_its_gradient(name):
    loss = LOSSES[name]
    net, twin, step = sides(loss=loss)
    image, labels = batch()
    for use in (add_up, only_the_last, one_after_the_other):  # each is planned for what was asked before
        plain, made = loss(net(image), labels), step(image, labels)
        assert pytree.tree_structure(plain) == pytree.tree_structure(made)
        for a, b in zip(parts(plain), parts(made), strict=True):
            assert close(a, b) and a.requires_grad == b.requires_grad
        use(plain), use(made)
        assert close(grads(net), grads(twin))
        assert close(list(net.buffers()), list(twin.buffers()))
    assert len(step._fullframe["programs"]) == 1


def test_a_map_has_no_backward_of_its_own():
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        sides(loss=LOSSES["map"])[2](*batch()).backward()


def test_parts_may_be_looked_at():
    step = sides(loss=LOSSES["output"])[2]
    loss, output = step(*batch())
    assert isinstance(loss.item(), float) and not output.detach().requires_grad
    assert output.argmax(1).shape == batch()[1].shape


def test_a_part_that_nothing_is_asked_of_costs_nothing():
    """Nor does it poison: its own gradient is infinite, and zero times that is no number."""

    def loss(output, target):
        value = F.cross_entropy(output, target)
        features = F.conv2d(output, torch.ones(2, output.shape[1], 3, 3, dtype=output.dtype))
        return value, {"root": (output.detach().mean() * 0 + output * 0).abs().sqrt(), "features": features}

    image, labels = batch()
    net, twin, step = sides(loss=loss)
    for _ in range(2):
        loss(net(image), labels)[0].backward()
        step(image, labels)[0].backward()
    assert close(grads(net), grads(twin))
    programs = list(step._fullframe["programs"].values())
    assert [p.variants.programs for p in programs] == [{}] and not programs[0].graph.late
    alone = fullframe.tile(plain_net(), loss=F.cross_entropy, tile=TILE).plan(image, labels)
    mine = step.plan(image, labels)
    backward = [sum(op.target.startswith("tile.conv") for op in p.graph.ops) for p in (alone, mine)]
    assert backward[1] == backward[0] + 1  # the features' own, and none for their gradient


def test_later_steps_are_planned_for_what_was_asked():
    step = sides(loss=LOSSES["dict"])[2]
    for _ in range(3):
        add_up(step(*batch()))
    (program,) = step._fullframe["programs"].values()
    assert program.variants.guess == {0, 1}
    assert set(program.variants.programs) == {(frozenset((0, 1)), True), (frozenset((0, 1)), False)}


class Heads(nn.Module):
    """Two heads on a stem, with whatever a forward made twice could get wrong."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
        self.a, self.b = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 3, padding=1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        y = self.stem(x) * self.calls
        return self.a(y), {"b": self.b(y)}


@pytest.mark.parametrize("training", [True, False])
def test_two_heads_are_differentiated_one_after_the_other(training):
    net, twin, tiled = sides(Heads().double().train(training))
    image = batch()[0]
    torch.manual_seed(0)
    with drawn():
        plain = net(image)
    torch.manual_seed(0)
    for module, made in ((net, plain), (twin, None)):
        made = tiled(image) if made is None else made
        first, rest = made
        first.square().sum().backward(retain_graph=True)
        rest["b"].abs().sum().backward(retain_graph=True)
        (first.sum() * rest["b"].mean()).backward()
        assert module.calls == 1
    assert close(grads(net), grads(twin)) and close(list(net.buffers()), list(twin.buffers()))


def test_gradients_of_several_outputs_by_hand():
    net, twin, tiled = sides(Heads().double().eval())
    image = batch()[0].requires_grad_()
    found = []
    for module, model in ((net, net), (twin, tiled)):
        first, rest = model(image)
        leaves = [image, *module.stem.parameters()]
        for t in (first, rest["b"], first):
            found.append(torch.autograd.grad(t.square().sum(), leaves, retain_graph=True))
    for a, b in zip(found[:3], found[3:], strict=True):
        assert close(list(a), list(b))


def test_a_second_backward_without_keeping_the_graph_is_an_error():
    for made in (sides(Heads().double().eval())[2](batch()[0])[0], sides(loss=LOSSES["dict"])[2](*batch())["size"]):
        made.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            made.sum().backward()


def test_a_second_backward_sees_what_has_changed():
    image = batch()[0].requires_grad_()
    net, twin, tiled = sides(Heads().double().eval())
    for module, model in ((net, net), (twin, tiled)):
        first, rest = model(image)
        first.sum().backward(retain_graph=True)
        with torch.no_grad():
            module.b.weight.mul_(2)
        with pytest.raises(RuntimeError, match="inplace operation"):
            rest["b"].sum().backward()


def test_a_second_backward_of_what_is_gone_is_refused_by_name():
    class Worn(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.queue = nn.Conv2d(1, 2, 3, padding=1), nn.Buffer(torch.ones(1 << 17, dtype=torch.float64))

        def forward(self, x):
            self.queue.mul_(0.5)
            return self.conv(x) * (self.queue * 1).mean() + self.queue.square().mean()

    output = fullframe.tile(Worn().double(), tile=TILE)(batch()[0])
    output.sum().backward(retain_graph=True)
    fullframe.autograd.SMALL, small = 1000, fullframe.autograd.SMALL
    try:
        output = fullframe.tile(Worn().double(), tile=TILE)(batch()[0])
        output.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="queue is not what it was"):
            output.sum().backward()
    finally:
        fullframe.autograd.SMALL = small


def test_heads_that_a_loss_leaves_out_do_not_poison_it():
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            return y, (y - y.detach()).abs().sqrt()  # of a gradient that is infinite

    net, twin, tiled = sides(Poisoned().double())
    for module in (net, tiled):
        module(batch()[0])[0].square().sum().backward()
    assert close(grads(net), grads(twin)) and twin.conv.weight.grad.isfinite().all()


def test_a_part_without_a_backward_raises_only_when_asked():
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("one way only")

    def loss(output, target):
        return F.cross_entropy(output, target), OneWay.apply(output).mean()

    net, twin, step = sides(loss=loss)
    image, labels = batch()
    loss(net(image), labels)[0].backward()
    value, other = step(image, labels)
    assert other.requires_grad
    value.backward(retain_graph=True)
    assert close(grads(net), grads(twin))
    with pytest.raises(RuntimeError, match="one way only"):
        other.backward()


def test_nothing_is_kept_once_outputs_are_gone():
    step = sides(loss=LOSSES["output"])[2]
    gc.collect()
    gc.disable()
    try:
        image, labels = batch()
        image = image.clone()
        seen = weakref.ref(image)
        made = step(image, labels)
        made[0].backward()
        del image
        assert seen() is None  # as in PyTorch, what the backward has used is let go
    finally:
        gc.enable()


# Kinds of outputs --------------------------------------------------------------------------------


@dataclass
class Made:
    logits: Any
    count: int = 3
    rest: Any = None


@dataclass(frozen=True)
class Frozen:
    logits: Any
    name: str = "frozen"


class ModelOutput(OrderedDict):
    """As published models return it: fields that are items, too."""

    logits: Any

    def __init__(self, **fields):
        super().__init__()
        for name, value in fields.items():
            self[name] = value
            super().__setattr__(name, value)

    def __setattr__(self, name, value):
        raise AttributeError("set by making it")


class Attributed(dict):
    __getattr__ = dict.__getitem__


class Listed(list):
    pass


class Tupled(tuple):
    unit = "pixels"


class Slotted:
    __slots__ = ("__hidden", "logits")

    def __init__(self, logits):
        self.logits, self.__hidden = logits, logits.mean()

    def hidden(self):
        return self.__hidden


KINDS = {
    "dataclass": lambda y: Made(y, rest=[Frozen(y * 2), {"again": y}]),
    "frozen": Frozen,
    "items and fields": lambda y: ModelOutput(logits=y, hidden=(y * 2, y.mean())),
    "dictionary": lambda y: Attributed(logits=y, rest=Attributed(logits=y * 2)),
    "list": lambda y: Listed([y, y * 2]),
    "tuple": lambda y: Tupled((y, Tupled((y * 2,)))),
    "slots": Slotted,
    "distribution": lambda y: torch.distributions.Normal(y, 1.5, validate_args=False),
    "the same twice": lambda y: Listed([y, y] + [Made(y)] * 2),
    "with a circle": lambda y: circle(Made(y)),
}


def circle(made):
    made.rest = made
    return made


class Returning(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.conv, self.what = nn.Conv2d(1, 2, 3, padding=1), what

    def forward(self, x):
        return self.what(self.conv(x))


def contents(thing, met=()):
    """Everything in an output, with the kinds of what it lies in."""
    if isinstance(thing, torch.Tensor) or any(thing is m for m in met):
        return [thing] if isinstance(thing, torch.Tensor) else []
    inside = dict(thing) if isinstance(thing, dict) else list(thing) if isinstance(thing, (list, tuple)) else {}
    values = list(inside.values()) if isinstance(inside, dict) else inside
    values += [*vars(thing).values()] if hasattr(thing, "__dict__") and not isinstance(thing, type) else []
    values += [getattr(thing, n) for n in ("logits", "_Slotted__hidden") if isinstance(thing, Slotted)]
    return [type(thing), *(x for v in values for x in contents(v, (*met, thing)))]


@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_of_the_kind_that_the_forward_makes(name):
    net, twin, tiled = sides(Returning(KINDS[name]).double())
    image = batch()[0]
    for _ in range(2):
        plain, made = contents(net(image)), contents(tiled(image))
        assert len(plain) == len(made)
        for a, b in zip(plain, made, strict=True):
            assert close(a, b) if isinstance(a, torch.Tensor) else a is b
        first = next(k for k, a in enumerate(plain) if isinstance(a, torch.Tensor))
        assert [a is plain[first] for a in plain] == [b is made[first] for b in made]
        for found in (plain, made):
            total([t for t in found if isinstance(t, torch.Tensor) and t.requires_grad]).backward()
        assert close(grads(net), grads(twin))
    assert len(tiled._fullframe["programs"]) == 1


def test_each_call_returns_an_object_of_its_own():
    tiled = sides(Returning(Made).double())[2]
    first, second = tiled(batch()[0]), tiled(batch()[0] * 2)
    assert first is not second and not torch.equal(first.logits, second.logits)


def test_an_object_of_the_module_is_returned_itself():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.made = nn.Conv2d(1, 2, 3, padding=1), Made(None)

        def forward(self, x):
            self.made.logits = self.conv(x)
            return self.made

    net, twin, tiled = sides(Keeping().double())
    for k in range(1, 4):
        assert tiled(batch()[0] * k) is twin.made and close(twin.made.logits, net(batch()[0] * k).logits)


def test_losses_in_an_object():
    net, twin, step = sides(loss=lambda o, t: Made(F.cross_entropy(o, t), rest=o.square().mean()))
    image, labels = batch()
    made = step(image, labels)
    (made.logits + made.rest).backward()
    output = net(image)
    (F.cross_entropy(output, labels) + output.square().mean()).backward()
    assert close(grads(net), grads(twin)) and made.count == 3


@pytest.mark.parametrize("what", [lambda y: {1, 2}, lambda y: lambda: y, lambda y: Made(iter([y]))])
def test_what_may_hide_tensors_is_refused(what):
    with pytest.raises(fullframe.CaptureError, match="may hide tensors; return tensors in tuples"):
        sides(Returning(what).double())[2](batch()[0])
