"""Code whose state a recording could miss: the same numbers as plain PyTorch at every call, or an error by name."""

from __future__ import annotations

import copy
import functools
import itertools
import queue
import random
import sys
import types
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fullframe
from fullframe.oracle import drawn

D = torch.float64


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Net(nn.Module):
    """A convolution, and then what a test wants of it."""

    def __init__(self, then, **attributes):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1).double()
        self.then = then
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x, *more):
        return self.then(self, self.conv(x), *more)


def image():
    return torch.randn(1, 1, 8, 9, dtype=D)


def same(a, b):
    if isinstance(b, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    else:
        assert a == b


def agree(make, change=lambda net, k: None, calls=3):
    """Calls of a tiled and a plain net of the same numbers; ``change`` is done to each before its call."""
    torch.manual_seed(1)
    ours = make()
    torch.manual_seed(1)
    plain = make()
    tiled = fullframe.tile(ours, tile=5)
    for k in range(calls):
        x = image()
        found = []
        for net, call in ((ours, tiled), (plain, plain)):
            change(net, k)
            found.append(call(x))
        same(*found)


def refused(make, words, *more):
    with pytest.raises(fullframe.CaptureError, match=words):
        fullframe.tile(make(), tile=5)(image(), *more)


def counted(net, y):
    net.held.append(net.held.pop(0))
    return y * net.held[0].t


def through(method):
    return lambda: Net(lambda net, y: y * net.draw(), draw=method())


def table():
    return Net(lambda net, y: y * net.look("g"), look={"g": 1.0}.get)


Pair = namedtuple("Pair", "a b")


class Swapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.q = nn.Conv2d(1, 1, 3).double(), nn.Conv2d(1, 1, 3).double()

    def forward(self, x):
        y = self.p(x)
        self.p, self.q = self.q, self.p
        return y


def one(n):
    return torch.full((1,), float(n), dtype=D)


SAME = {
    "modules that trade places": (Swapped, None),
    "objects in turn": (lambda: Net(counted, held=[SimpleNamespace(t=one(k + 1)) for k in range(3)]), None),
    "a bound method of a dictionary": (table, lambda net, k: net.look.__self__.update(g=k + 1.0)),
    "a bound method of an iterator": (through(lambda: itertools.count(1).__next__), None),
    "a queue": (through(lambda: filled().get_nowait), None),
    "a named tuple of tensors": (
        lambda: Net(lambda net, y: y * torch.stack(net.bank).sum(), bank=Pair(one(1), one(1))),
        lambda net, k: setattr(net, "bank", Pair(one(k), one(1))),
    ),
    "an array of objects": (
        lambda: Net(lambda net, y: y * net.held[0], held=np.array([1.0, None], dtype=object)),
        lambda net, k: net.held.__setitem__(0, k + 1.0),
    ),
    "isinstance of a parameter": (
        lambda: Net(lambda net, y: y * net.g if isinstance(net.g, nn.Parameter) else y, g=nn.Parameter(one(3))), None,
    ),
    "a constant filled through its data": (lambda: Net(twin(lambda k: k.data.fill_(2.0))), None),
    "a constant filled through a view": (lambda: Net(twin(lambda k: k.T[0].fill_(2.0))), None),
}  # fmt: skip


def filled():
    found = queue.SimpleQueue()
    for k in range(9):
        found.put(float(k + 1))
    return found


@pytest.mark.parametrize("name", SAME)
def test_the_same_at_every_call(name):
    make, change = SAME[name]
    agree(make, change or (lambda net, k: None))


def attribute(net, y):
    net.conv.weight.steps = getattr(net.conv.weight, "steps", 0) + 1
    return y * net.conv.weight.steps


def clearing(net, y):
    for p in net.parameters():
        p.grad = None
    return y


def swallowing(net, y):
    try:
        net.mean = y.mean().item()
    except Exception:
        net.mean = 0.0
    return y + net.mean


def twin(change):
    def then(net, y):
        k = torch.zeros(3, 3)
        change(k)
        return y * (1 + k.sum().item())

    return then


def seeded(net, y):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return y * torch.rand(1, 2, 1, 1, dtype=D)


REFUSED = {
    "an attribute set on a parameter": (attribute, "attribute of the tensor"),
    "a gradient read": (lambda net, y: y if net.conv.weight.grad is None else y + 1, r"\.grad"),
    "gradients cleared": (clearing, r"\.grad"),
    "a refusal that the forward catches": (swallowing, "depends on the data"),
    "a draw after a seed": (seeded, "random state"),
    "a generator of Python's": (lambda net, y: y * RANDOM.random(), "generator"),
}
RANDOM = random.Random(0)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    then, words = REFUSED[name]
    refused(lambda: Net(then), words)


@pytest.mark.parametrize("change", [lambda k: k.data.fill_(2.0), lambda k: k.T[0].fill_(2.0)], ids=["data", "view"])
def test_a_constant_filled_through_another_tensor(change):
    agree(lambda: Net(twin(change)))


@pytest.mark.parametrize("given", [[], {"n": 0}])
def test_arguments_that_the_forward_fills_are_refused(given):
    def then(net, y, more):
        more.append(y.mean()) if isinstance(more, list) else more.update(n=more["n"] + 1)
        return y

    refused(lambda: Net(then), "among its arguments", given)


def test_objects_among_the_arguments_count_on():
    def then(net, y, state):
        state.n += 1
        return y * state.n

    net = Net(then)
    tiled, x = fullframe.tile(net, tile=5), image()
    for _ in range(2):
        a, b = SimpleNamespace(n=0), SimpleNamespace(n=0)
        for _ in range(2):
            same(tiled(x, a), net(x, b))
        assert a.n == b.n == 2


def test_a_hook_on_all_modules_that_counts():
    counts = [0]

    def hook(module, _, made):
        counts[0] += isinstance(module, nn.Conv2d)
        return made * counts[0] if isinstance(module, nn.Conv2d) else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        net = Net(lambda net, y: y)
        tiled, x = fullframe.tile(net, tile=5), image()
        found = []
        for call in (tiled, net):
            counts[0] = 0
            found.append([call(x), call(x), call(x), counts[0]])
    finally:
        handle.remove()
    for a, b in zip(*found, strict=True):
        same(a, b)


def test_a_mode_that_is_put_back_by_hand():
    def run(net, x):
        modes = [(m, m.training) for m in net.modules()]
        net.eval()
        first = net(x)
        for module, mode in modes:
            module.training = mode
        return first, net(x)

    net = Net(lambda net, y: y * 2 if net.training else y)
    tiled, x = fullframe.tile(copy.deepcopy(net), tile=5), image()
    for a, b in zip(run(tiled, x), run(net, x), strict=True):
        same(a, b)


def test_inputs_that_begin_to_share_memory():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(1, 1, 3, padding=1)).double()
    step = fullframe.tile(net, loss=F.mse_loss)
    step(image(), image())
    x = image()
    with pytest.raises(fullframe.CaptureError, match="shares its memory"):
        step(x, x.detach())


def test_an_input_with_the_negative_bit():
    net = nn.Sequential(nn.Softplus(), nn.Softplus())
    x = torch.complex(image(), image()).conj().imag
    assert x.is_neg()
    same(fullframe.tile(net, tile=5)(x), net(x))


def test_memory_of_numpy_that_is_used_again():
    net = Net(lambda net, y, m: y * torch.from_numpy(m))
    tiled, x, given = fullframe.tile(net, tile=5), image(), np.ones(9)
    for number in (1, 2):
        given[:] = number
        same(tiled(x, given), net(x, given))
    same(tiled(x, np.ones(9)), net(x, np.ones(9)))


def test_constants_that_are_handed_out_are_the_callers():
    def then(net, y):
        net.kept = torch.tensor([1.0, 2.0], dtype=D)
        return y * net.kept.sum(), torch.tensor([1.0, 2.0])

    net = Net(then)
    tiled = fullframe.tile(net, tile=5)
    for _ in range(3):
        _, constant = tiled(image())
        assert constant.tolist() == net.kept.tolist() == [1.0, 2.0]
        constant.mul_(7)
        net.kept.mul_(7)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum().reshape(1)


def test_a_function_of_a_parameter_in_a_list():
    net = Net(lambda net, y: Product.apply(y, net.held[0]), p=nn.Parameter(one(2)))
    net.held = [net.p]
    plain = copy.deepcopy(net)
    x = image()
    fullframe.tile(net, tile=5)(x).sum().backward()
    plain(x).sum().backward()
    same(net.p.grad, plain.p.grad)
    same(net.conv.weight.grad, plain.conv.weight.grad)


@pytest.mark.parametrize("kind", ["ids", "set", "dictionary"])
def test_parameters_told_apart_by_identity_are_refused(kind):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double()
    norm = {"ids": {id(p) for p in net[1].parameters()}, "set": set(net[1].parameters()),
            "dictionary": dict.fromkeys(net[1].parameters(), 0.0)}[kind]  # fmt: skip

    def loss(y, _):
        decayed = (p for p in net.parameters() if (id(p) if kind == "ids" else p) not in norm)
        return y.square().mean() + sum(p.square().sum() for p in decayed)

    with pytest.raises(fullframe.CaptureError, match="by its identity"):
        fullframe.tile(net, loss=loss)(image(), image())


def test_an_optimiser_in_the_module_is_no_such_thing():
    net = Net(lambda net, y: y)
    net.optimizer = torch.optim.Adam(net.parameters())
    net(image()).sum().backward()
    net.optimizer.step()
    x = image()
    same(fullframe.tile(net, tile=5)(x), net(x))


def test_a_module_imported_from_beside(monkeypatch):
    package, settings = types.ModuleType("beside"), types.ModuleType("beside.settings")
    package.__path__, settings.gain, package.settings = [], 1.0, settings
    monkeypatch.setitem(sys.modules, "beside", package)
    monkeypatch.setitem(sys.modules, "beside.settings", settings)
    space = {"__package__": "beside", "__name__": "beside.use"}
    exec("def then(net, y):\n    from .settings import gain\n    return y * gain\n", space)
    agree(lambda: Net(space["then"]), lambda net, k: setattr(settings, "gain", k + 1.0))


def test_a_module_of_a_package_beside_a_name_by_string(monkeypatch):
    package, settings = types.ModuleType("beside"), types.ModuleType("beside.settings")
    settings.gain, package.settings = 1.0, settings
    monkeypatch.setitem(globals(), "BESIDE", package)
    agree(lambda: Net(by_name), lambda net, k: setattr(settings, "gain", k + 1.0))


def test_a_setting_in_a_package_that_is_kept():
    package, settings = types.ModuleType("beside"), types.ModuleType("beside.settings")
    settings.gain, package.settings = 1.0, settings
    agree(
        lambda: Net(lambda net, y: y * net.kept.settings.gain, kept=package),
        lambda net, k: setattr(settings, "gain", k + 1.0),
    )


def by_name(net, y):
    return getattr(y, "mul")(BESIDE.settings.gain)  # noqa: B009  # the name by string is what is tested


BESIDE = None


@pytest.mark.parametrize("as_module", [False, True])
def test_dropout_in_a_checkpoint_has_one_mask(as_module):
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 1, 8, 9, dtype=D))
            self.after = nn.Dropout(0.5)

        def forward(self, x):
            y = F.dropout(x * self.weight, 0.3)
            y = checkpoint(lambda z: F.dropout(z * self.weight, 0.5).sin(), y, use_reentrant=False)
            return self.after(y) + checkpoint(functools.partial(F.dropout, p=0.2), y, use_reentrant=False)

    ours, plain = Dropped(), Dropped()
    tiled = fullframe.tile(ours, tile=5) if as_module else fullframe.tile(ours, loss=lambda y, _: y.square().sum())
    for seed in range(3):
        x = image()
        torch.manual_seed(seed)
        a = tiled(x).square().sum() if as_module else tiled(x, x)
        a.backward()
        torch.manual_seed(seed)
        with drawn():
            b = plain(x).square().sum()
            b.backward()
        same(a, b)
        same(ours.weight.grad, plain.weight.grad)


class Listed(nn.Module):
    """Buffers and parameters in lists and tuples that the forward makes anew."""

    def __init__(self, kind):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1).double()
        self.kind = kind
        for k in (1, 2):
            value = torch.full((1, 2, 1, 1), float(k), dtype=D)
            if kind == "buffers":
                self.register_buffer(f"m{k}", value)
            else:
                setattr(self, f"m{k}", nn.Parameter(value))
        self.order = [self.m1, self.m2]
        self.pair = self.m1, self.m2

    def forward(self, x):
        y = self.conv(x) * self.order[0] + self.pair[1]
        self.order = self.order[::-1]
        self.pair = self.pair[1], self.pair[0]
        self.used = [self.m2]
        return y


@pytest.mark.parametrize("kind", ["buffers", "parameters"])
def test_lists_of_parameters_and_buffers_in_another_order(kind):
    agree(lambda: Listed(kind), calls=4)
    net = Listed(kind)
    tiled = fullframe.tile(net, loss=lambda y, _: y.square().mean() + sum(p.sum() for p in net.used), tile=5)
    plain = copy.deepcopy(net)
    for _ in range(3):
        x = image()
        a = tiled(x, x)
        b = plain(x).square().mean() + sum(p.sum() for p in plain.used)
        same(a, b)
        a.backward()
        b.backward()
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            same(p.grad, q.grad)
    assert net.used[0] is net.m2


def test_parameters_that_trade_places_are_refused():
    def then(net, y):
        net.p, net.q = net.q, net.p
        return y * net.p

    refused(lambda: Net(then, p=nn.Parameter(one(1)), q=nn.Parameter(one(2))), "another parameter")


@pytest.mark.parametrize("way", ["none", "deleted"])
def test_a_buffer_that_goes_is_refused(way):
    def then(net, y):
        if way == "none":
            net.extra = None
        else:
            del net.extra
        return y

    def make():
        net = Net(then)
        net.register_buffer("extra", one(1))
        return net

    refused(make, "takes extra away")


def test_a_lazy_module_says_what_to_do():
    with pytest.raises(ValueError, match="call the plain module once"):
        fullframe.tile(nn.LazyConv2d(2, 3))(image())


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore")
def test_the_weight_of_an_older_norm_is_that_of_the_last_call(norm):
    torch.manual_seed(3)
    net = nn.Sequential(norm(nn.Conv2d(1, 2, 3).double()))
    torch.manual_seed(3)
    plain = nn.Sequential(norm(nn.Conv2d(1, 2, 3).double()))
    tiled = fullframe.tile(net, tile=5)
    for _ in range(3):
        x = image()
        for own, call in ((net, tiled), (plain, plain)):
            for p in own.parameters():
                p.grad = None
            (call(x).square().mean() + 0.1 * own[0].weight.square().sum()).backward()
            with torch.no_grad():
                for p in own.parameters():
                    p -= 0.1 * p.grad
        same(net[0].weight.detach(), plain[0].weight.detach())
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            same(p.grad, q.grad)
