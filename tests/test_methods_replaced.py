"""Methods put in the place of a tiled module's or its network's, modules made by torch's compilers, calls of itself."""

from __future__ import annotations

import copy
import functools
import io
import types

import pytest
import torch
from torch import nn
from torch._higher_order_ops import while_loop

import fullframe

D = torch.float64


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def network():
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.Conv2d(2, 1, 3)).double()


def image():
    return torch.randn(2, 1, 12, 10, dtype=D)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def alike(plain, tiled, calls=2):
    """Outputs, gradients and buffers of a plain and a tiled module, call by call."""
    for _ in range(calls):
        x = image()
        plain.zero_grad()
        tiled.zero_grad()
        a, b = plain(x), tiled(x)
        close(b, a)
        a.square().mean().backward()
        b.square().mean().backward()
        close([p.grad for p in tiled.parameters()], [p.grad for p in plain.parameters()])
        close(dict(tiled.named_buffers()), dict(plain.named_buffers()))


def doubled(forward):
    @functools.wraps(forward)
    def new(*args, **kwargs):
        return forward(*args, **kwargs) * 2

    return new


def assigned(m):
    m.forward = doubled(m.forward)


def twice(m):
    assigned(m)
    assigned(m)


def as_method(m):
    """As a wrapper for mixed precision does it."""
    m._original_forward = m.forward
    m.forward = types.MethodType(doubled(m.forward.__func__), m)
    m.forward = types.MethodType(doubled(m.forward.__func__), m)


def hooked(m):
    """As a hook for devices does it."""
    m._hook, m._old_forward = object(), m.forward
    m.forward = functools.update_wrapper(functools.partial(lambda m, x: m._old_forward(x) + 1, m), m._old_forward)


def hooked_and_back(m):
    hooked(m)
    m.forward = m._old_forward
    del m._hook, m._old_forward


def unwrapped(m):
    """As the wrapper for mixed precision is taken off again."""
    as_method(m)
    forward, original = m.forward, m.__dict__.pop("_original_forward")
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
        if forward == original:
            break
    m.forward = types.MethodType(forward, m)


def deleted(m):
    assigned(m)
    del m.forward


def called(m):
    m.predict = lambda x: m(x)
    m.helper = m.__call__


MAX_PATHS = [assigned, twice, as_method, hooked, hooked_and_back, unwrapped, deleted, called]


@pytest.mark.parametrize("way, copied", [*((way, False) for way in MAX_PATHS), (assigned, True), (as_method, True)])
def test_a_method_in_the_place_of_the_tiled_modules(way, copied):
    """It is called, it may call what it replaces, and the network itself is as it was."""
    net = network()
    plain, before = copy.deepcopy(net), copy.deepcopy(net)
    tiled = fullframe.tile(net, tile=7)
    way(plain)
    way(tiled)
    assert "forward" not in vars(net)
    if copied:
        tiled, plain = copy.deepcopy(tiled), copy.deepcopy(plain)
        net = tiled.module
    alike(plain, tiled)
    before.load_state_dict(net.state_dict())
    x = image()
    close(net(x), before(x))


@pytest.mark.parametrize("way", MAX_PATHS)
@pytest.mark.parametrize("when", ["before", "recorded"])
def test_a_method_in_the_place_of_the_networks(way, when):
    net = network()
    plain = copy.deepcopy(net)
    if when == "before":
        way(net)
    tiled = fullframe.tile(net, tile=7)
    if when == "recorded":
        alike(plain, tiled, 1)
        way(net)
    way(plain)
    alike(plain, tiled)


def test_methods_other_than_forward():
    """A method of every module is replaced on the tiled one; one of the network's own on the network."""

    class Net(nn.Sequential):
        def encode(self, x):
            return self[0](x)

    tiled = fullframe.tile(Net(nn.Conv2d(1, 2, 3)), tile=7)
    seen = []

    def noted(old):
        return lambda *args, **kwargs: (seen.append(old.__name__), old(*args, **kwargs))[1]

    for name in ("state_dict", "train", "zero_grad", "encode"):
        setattr(tiled, name, noted(getattr(tiled, name)))
    tiled.state_dict(), tiled.train(), tiled.zero_grad(), tiled.encode(torch.ones(1, 1, 4, 4))
    assert seen == ["state_dict", "train", "zero_grad", "encode"]
    assert "encode" in vars(tiled.module) and "train" not in vars(tiled.module)
    del tiled.train, tiled.encode
    tiled.train()
    assert len(seen) == 4


class Quiet(nn.Module):
    """A network with a method that can be pickled in the place of its forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3).double()

    def forward(self, x):
        return self.conv(x)

    def louder(self, x):
        return self.conv(x) * 2


def test_a_pickled_module_has_its_method():
    tiled, plain = fullframe.tile(Quiet(), tile=7), Quiet()
    tiled.forward = functools.partial(torch.mul, other=3)
    tiled.kept = tiled.state_dict
    file = io.BytesIO()
    torch.save(tiled, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)
    close(found(torch.ones(2)), 3 * torch.ones(2))
    assert found.kept.__self__ is found
    del found.forward
    plain.load_state_dict(found.state_dict())
    alike(plain, found)
    found.module.forward = plain.forward = None
    for m in (found.module, plain):
        m.forward = m.louder
    alike(plain, found)


def test_a_method_in_the_place_of_a_part_that_is_tiled():
    plain = nn.Sequential(nn.Conv2d(1, 1, 3), network()).double()
    net = copy.deepcopy(plain)
    net[1] = fullframe.tile(net[1], tile=7)
    assigned(net[1])
    assigned(plain[1])
    alike(plain, fullframe.tile(net, tile=7))


# A call of itself ----------------------------------------------------------------------------------


def by_loss(net):
    def loss(y, t):
        return (y - t).square().mean() + step(y, t)

    step = fullframe.tile(net, tile=7, loss=loss)
    return lambda x: step(x, x)


def by_hook(net):
    tiled = fullframe.tile(net, tile=7)
    net.register_forward_hook(lambda m, args, y: tiled(y))
    return tiled


def by_hook_of_a_part(net):
    tiled = fullframe.tile(net, tile=7)
    net[0].register_forward_pre_hook(lambda m, args: tiled(args[0]))
    return tiled


def by_forward(net):
    tiled = fullframe.tile(net, tile=7)
    old = tiled.forward
    net.forward = lambda x: old(x) * 2
    return tiled


def from_the_network(net):
    by_forward(net)
    return net


@pytest.mark.parametrize("way", [by_loss, by_hook, by_hook_of_a_part, by_forward, from_the_network])
def test_a_module_that_calls_itself_is_refused(way):
    call = way(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)))
    for _ in range(2):
        with pytest.raises(fullframe.CaptureError, match="the tiled Sequential calls itself, 8 times over"):
            call(torch.randn(1, 1, 12, 10))


def test_a_module_that_calls_itself_and_ends():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1).double(), nn.Tanh())
    plain, tiled = copy.deepcopy(net), fullframe.tile(net, tile=7)

    def again(call):
        def hook(m, args, y):
            return call(y) if args[0].mean() is not None and len(args[0]) == 3 else y

        return hook

    net.register_forward_hook(again(lambda y: tiled(y[:2])))
    plain.register_forward_hook(again(lambda y: plain(y[:2])))
    x = torch.randn(3, 1, 12, 10, dtype=D)
    close(tiled(x), plain(x))


# Modules made by torch's compilers -----------------------------------------------------------------


def traced(net):
    return torch.jit.trace(net, torch.ones(2, 1, 12, 10, dtype=D))


def frozen(net):
    return torch.jit.freeze(torch.jit.script(net.eval()))


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")
@pytest.mark.parametrize("make", [traced, torch.jit.script, frozen, lambda net: traced(net.eval())])
def test_traced_scripted_and_frozen_modules(make):
    net = network()
    plain, made = make(copy.deepcopy(net)), make(net)
    tiled = fullframe.tile(made, tile=7)
    assert list(tiled.state_dict()) == list(plain.state_dict())
    x = image()
    for _ in range(2):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain(a).square().mean().backward()
        tiled(b).square().mean().backward()
        close(b.grad, a.grad)
        close([p.grad for p in tiled.parameters()], [p.grad for p in plain.parameters()])
        close(dict(tiled.named_buffers()), dict(plain.named_buffers()))
    assert not tiled.plan(x).whole


# Control flow of torch's ---------------------------------------------------------------------------


class Chooses(nn.Module):
    def __init__(self, then):
        super().__init__()
        self.conv, self.then = nn.Conv2d(1, 1, 3, padding=1), then

    def forward(self, x):
        return self.then(self.conv(x))


COURSES = {
    "cond": lambda y: torch.cond(y.sum() > 0, lambda y: y * 2, lambda y: y * 3, (y,)),
    "while_loop": lambda y: while_loop(lambda y: y.sum() > 0, lambda y: (y - 1,), (y,))[0],
}


@pytest.mark.parametrize("name", COURSES)
def test_a_course_that_torch_chooses_by_the_data_is_refused(name):
    tiled = fullframe.tile(Chooses(COURSES[name]), tile=7)
    with pytest.raises(fullframe.CaptureError, match=rf"torch's {name} makes the course"):
        tiled(torch.randn(1, 1, 12, 10))


def test_a_course_that_is_known():
    plain = Chooses(lambda y: torch.cond(y.shape[0] > 1, lambda y: y * 2, lambda y: y * 3, (y,)))
    net = copy.deepcopy(plain)
    x = torch.randn(2, 1, 12, 10)
    torch.testing.assert_close(fullframe.tile(net, tile=7)(x), plain(x))
