"""What the caller holds and may change: memory shared with a recording, numbers read late, things kept outside."""

from __future__ import annotations

import copy
import functools
import gc
import random
import sys
import types
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import agree, close
from torch import nn
from torch.utils.checkpoint import checkpoint

import fullframe

TILE = 7


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def image(*shape):
    return torch.randn(shape or (2, 2, 19, 23), dtype=torch.float64)


def conv(a=2, b=3):
    return nn.Conv2d(a, b, 3, padding=1)


def twins(net, **options):
    net = net.double()
    twin = copy.deepcopy(net)
    return net, twin, fullframe.tile(twin, tile=TILE, **options)


def grads(net):
    return [p.grad for p in net.parameters()]


class Calling(nn.Module):
    """A convolution, then any function of (module, its output)."""

    def __init__(self, function, **buffers):
        super().__init__()
        self.conv, self.function = conv(), function
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        return self.function(self, self.conv(x))


# Outputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [lambda x: x.detach(), lambda x: x, lambda x: x.clone().detach()])
def test_a_loss_handed_out_twice_keeps_its_gradient(again):
    def loss(output, target):
        value = F.mse_loss(output, target)
        return value, {"mse": again(value)}

    net, twin, step = twins(conv(), loss=loss)
    x, y = image(), image(2, 3, 19, 23)
    plain, made = loss(net(x), y), step(x, y)
    assert made[0].requires_grad and made[1]["mse"].requires_grad == plain[1]["mse"].requires_grad
    plain[0].backward(), made[0].backward()
    assert close(grads(net), grads(twin))


def test_a_feature_and_its_detached_self():
    agree(Calling(lambda m, y: {"out": y.relu(), "feature": y.relu().detach()}), image(), tile=TILE)


def test_an_output_changed_in_place_that_backward_reads_is_refused():
    _, _, tiled = twins(Calling(lambda m, y: (y, F.max_pool2d(y.sin(), 2))))
    y, z = tiled(image())
    y.mul_(-1)
    with pytest.raises(RuntimeError, match="output 0 was changed in place"):
        (y.mean() + z.square().mean()).backward()


def test_an_output_changed_in_place_that_backward_does_not_read():
    net, twin, tiled = twins(nn.Sequential(conv(), nn.ReLU(), conv(3, 2)))
    x = image()
    for m in (net, tiled):
        m(x).mul_(2).square().mean().backward()
    assert close(grads(net), grads(twin))


@pytest.mark.parametrize("loss", [None, lambda y, t: y.square().mean()])
def test_gradients_of_gradients_are_refused(loss):
    _, _, tiled = twins(Calling(lambda m, y: y.square()), loss=loss)
    x = image().requires_grad_()
    value = tiled(x).sum() if loss is None else tiled(x, x.detach())
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(value, x, create_graph=True)


# What is read again in the backward -----------------------------------------------------------------


def decayed(m, y):
    z = y.sin() * m.ema.clone()
    with torch.no_grad():
        m.ema.mul_(0.9).add_(0.1 * y.detach().abs().mean((0, 2, 3), True))
    return z


def test_a_buffer_that_the_forward_reads_and_then_changes():
    agree(Calling(decayed, ema=torch.ones(1, 3, 1, 1)), image(), tile=TILE)


def test_statistics_changed_by_another_call_before_the_backward():
    net, twin, tiled = twins(nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 2)))
    x = image()
    net.eval()(x).square().mean().backward()
    value = tiled.eval()(x).square().mean()
    tiled.train()(2 * x)
    value.backward()
    assert close(grads(net), grads(twin))


def test_a_buffer_filled_anew_before_the_backward():
    net, twin, tiled = twins(Calling(lambda m, y: (y - m.mean).sin(), mean=torch.ones(1, 3, 1, 1)))
    x = image()
    for m, n in ((net, net), (tiled, twin)):
        value = m(x).square().mean()
        n.mean.fill_(5)
        value.backward()
    assert close(grads(net), grads(twin))


@pytest.mark.parametrize("what", ["input0", "2.weight"])
def test_an_input_or_a_weight_changed_before_the_backward_is_refused(what):
    _, twin, tiled = twins(nn.Sequential(conv(), nn.ReLU(), conv(3, 2)))
    x = image(2, 2, 300, 300)  # not small
    value = tiled(x).square().mean()
    with torch.no_grad():
        (x if what == "input0" else twin[2].weight).mul_(3)
    with pytest.raises(RuntimeError, match=f"{what} was changed in place"):
        value.backward()
    assert all(g is None for g in grads(twin))


# What the step changes --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [None, F.mse_loss])
def test_an_input_changed_in_place_is_changed(loss):
    net, twin, tiled = twins(nn.Sequential(nn.ReLU(inplace=True), conv()), loss=loss)
    x, y = image(), image(2, 3, 19, 23)
    a, b = x.clone(), x.clone()
    plain = net(a).square().mean() if loss is None else loss(net(a), y)
    made = tiled(b).square().mean() if loss is None else tiled(b, y)
    assert torch.equal(a, b) and not torch.equal(a, x)
    plain.backward(), made.backward()
    assert close(grads(net), grads(twin))


def test_a_target_changed_in_place_is_changed():
    def loss(output, target):
        target[target > 1] = 0
        return F.cross_entropy(output, target)

    _, _, step = twins(conv(), loss=loss)
    target = torch.randint(0, 3, (2, 19, 23))
    step(image(), target)
    assert int(target.max()) == 1


def clipped(m, y):
    with torch.no_grad():
        m.conv.weight.clamp_(-0.1, 0.1)
    return y


@pytest.mark.parametrize("how", [clipped, lambda m, y: (m.conv.weight.data.clamp_(-0.1, 0.1), y)[1]])
def test_a_weight_clipped_in_the_forward_is_clipped(how):
    net, twin, tiled = twins(Calling(how))
    x = image()
    with torch.no_grad():
        assert close([net(x), net.conv.weight], [tiled(x), twin.conv.weight])


def test_memory_shared_with_what_is_changed_is_refused():
    def forward(m, y):
        m.row.add_(y.detach().mean((0, 2, 3)))
        return y * m.all.sum(0).view(1, 3, 1, 1)

    _, twin, tiled = twins(Calling(forward, all=torch.zeros(4, 3)))
    twin.row = twin.all[1]
    before = twin.all.clone()
    with pytest.raises(fullframe.CaptureError, match="shares its memory"):
        tiled(image())
    assert torch.equal(twin.all, before)


def test_a_loss_scale_for_float16_gradients_is_refused():
    net = conv()
    step = fullframe.tile(net, loss=F.mse_loss, tile=TILE)
    with torch.autocast("cpu", torch.float16):
        loss = step(image().float(), image(2, 3, 19, 23).float())
    with pytest.raises(RuntimeError, match="loss scale"):
        (loss * 1024).backward()
    assert net.weight.grad is None


# What a forward reads elsewhere ---------------------------------------------------------------------

GAIN = 1.0
SETTINGS: Any = None
KEPT: dict[int, torch.Tensor] = {}


class Caller:
    """Reads a global in a method with a name of Python's own."""

    def __call__(self, m, y):
        return y * GAIN


class Holder:
    gain = 1.0


def changes_take_effect(function, change):
    net, _, tiled = twins(Calling(function))
    x = image()
    for k in (1.0, 2.0, 3.0):
        change(k)
        with torch.no_grad():
            assert close([net(x)], [tiled(x)]), k


def set_gain(k):
    global GAIN
    GAIN = k


def test_globals_read_by_methods_with_names_of_python():
    changes_take_effect(Caller(), set_gain)


def test_globals_by_string():
    changes_take_effect(lambda m, y: y * globals()["GAIN"], set_gain)


def test_globals_and_settings_by_a_variable(monkeypatch):
    name = "".join(("GA", "IN"))
    changes_take_effect(lambda m, y: y * globals()[name], set_gain)
    settings = types.ModuleType("settings")
    monkeypatch.setitem(globals(), "SETTINGS", settings)
    changes_take_effect(lambda m, y: y * getattr(SETTINGS, name), lambda k: setattr(settings, name, k))
    changes_take_effect(lambda m, y: y * vars(SETTINGS)[name], lambda k: setattr(settings, name, k))


def test_a_module_for_a_configuration():
    config = types.ModuleType("config")
    changes_take_effect(lambda m, y: y * config.gain, lambda k: setattr(config, "gain", k))


def test_classes_of_a_notebook(monkeypatch):
    notebook = types.ModuleType("__main__")  # without a file
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    exec("class Scale:\n def __call__(self, m, y): return y * GAIN", notebook.__dict__)
    changes_take_effect(notebook.__dict__["Scale"](), lambda k: setattr(notebook, "GAIN", k))


def test_objects_behind_weak_references():
    holder = Holder()
    proxy = weakref.proxy(holder)
    for held in (weakref.ref(holder), lambda: proxy):
        changes_take_effect(lambda m, y, h=held: y * h().gain, lambda k: setattr(holder, "gain", k))


def test_attributes_of_tensors_and_numbers_with_attributes():
    class Number(float):
        pass

    number = Number(2)
    changes_take_effect(lambda m, y: y * number.gain, lambda k: setattr(number, "gain", k))
    net, twin, tiled = twins(Calling(lambda m, y: y * getattr(m.conv.weight, "gain", 1.0)))
    x = image()
    for k in (1.0, 2.0):
        net.conv.weight.gain = twin.conv.weight.gain = k
        assert close([net(x)], [tiled(x)])


def test_an_iterator_is_followed():
    def forward(numbers):
        return Calling(lambda m, y: y * next(numbers)).double()

    net, other = forward(iter([1.0, 2.0, 3.0])), forward(iter([1.0, 2.0, 3.0]))
    other.load_state_dict(net.state_dict())
    tiled, x = fullframe.tile(other, tile=TILE), image()
    for _ in range(3):
        assert close([net(x)], [tiled(x)])


def test_a_private_generator_is_refused():
    numbers = random.Random(0)
    with pytest.raises(fullframe.CaptureError, match="generator of its own"):
        twins(Calling(lambda m, y: y * numbers.random()))[2](image())


def test_hooks_on_all_modules():
    hooks = []

    def change(k):
        if k > 1:
            hook = nn.modules.module.register_module_forward_hook(
                lambda m, i, o: o * 2 if isinstance(m, nn.Conv2d) else None
            )
            hooks.append(hook)

    try:
        changes_take_effect(lambda m, y: y, change)
    finally:
        for hook in hooks:
            hook.remove()


@functools.lru_cache
def blur(size, dtype):
    return torch.ones(3, 1, size, size, dtype=dtype) / size**2


def test_a_function_that_keeps_its_result():
    blur.cache_clear()
    net, _, tiled = twins(Calling(lambda m, y: F.conv2d(y, blur(3, y.dtype), groups=3)))
    x = image()
    assert close([tiled(x)], [net(x)]) and close([tiled(x)], [net(x)])


def test_a_tensor_left_in_a_global():
    def window(y):
        if 3 not in KEPT:
            KEPT[3] = torch.ones(3, 1, 3, 3, dtype=y.dtype) / 9
        return KEPT[3]

    net, _, tiled = twins(Calling(lambda m, y: F.conv2d(y, window(y), groups=3)))
    KEPT.clear()
    x = image()
    made = tiled(x)
    assert KEPT[3].unique().tolist() == [KEPT[3][0, 0, 0, 0].item()]
    for _ in range(2):  # with what the first call has filled
        assert close([net(x)], [made])
        made = tiled(x)


# What a second look found ---------------------------------------------------------------------------


class Gained(torch.Tensor):
    gain = 1.0


def test_attributes_of_tensors_of_another_class():
    class Weight(nn.Parameter):
        pass

    net, twin, tiled = twins(conv())
    for m in (net, twin):
        m.weight = Weight(m.weight.detach())
        m.forward = types.MethodType(lambda m, x: nn.Conv2d.forward(m, x) * m.weight.gain, m)
    x = image()
    for k in (1.0, 2.0):
        net.weight.gain = twin.weight.gain = k
        assert close([net(x)], [tiled(x)])


def test_numbers_given_to_data():
    def forward(m, y):
        m.conv.weight.data = torch.renorm(m.conv.weight.data, 2, 0, 0.2)
        return m.conv(y[:, :2])

    net, twin, tiled = twins(Calling(forward))
    x = image()
    for _ in range(2):
        assert close([net(x), net.conv.weight], [tiled(x), twin.conv.weight])


def test_a_buffer_that_changes_its_dtype_is_refused():
    def forward(m, y):
        m.count = m.count + 0.5
        return y * m.count

    _, _, tiled = twins(Calling(forward, count=torch.zeros((), dtype=torch.int64)))
    with pytest.raises(fullframe.CaptureError, match="count changes from"):
        tiled(image())


def test_private_slots():
    class Slotted:
        __slots__ = ("__gain",)

        def set(self, k):
            self.__gain = k

        def get(self):
            return self.__gain

    holder = Slotted()
    changes_take_effect(lambda m, y: y * holder.get(), holder.set)


def test_parameters_that_share_one_memory_are_guarded_each():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Sigmoid(), nn.Conv2d(3, 1, 1, bias=False)).double()
    flat = torch.randn(57).double()
    net[0].weight.data, net[2].weight.data = flat[:54].view(3, 2, 3, 3), flat[54:].view(1, 3, 1, 1)
    value = fullframe.tile(net, tile=TILE)(image().requires_grad_()).sum()
    with torch.no_grad():
        net[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"0\.weight was changed in place"):
        value.backward()


def test_an_alias_of_a_buffer_that_nobody_reads():
    net = nn.Sequential(conv(), nn.BatchNorm2d(3))
    net.best = net.state_dict()
    net.laplace = torch.eye(3).to_sparse()
    agree(net, image(), tile=TILE)


def test_inference_tensors_changed_in_place():
    net, _, tiled = twins(nn.Sequential(nn.ReLU(inplace=True), conv()))
    with torch.inference_mode():
        a = image()
        b = a.clone()
        assert close([net(a)], [tiled(b)]) and torch.equal(a, b)


def recordings(tiled, calls):
    seen = set()
    for call in calls:
        call()
        seen |= {id(p) for p in tiled._fullframe["programs"].values()}
    return len(seen)


def test_what_a_bar_or_a_counter_in_a_loop_does_not_change_is_recorded_once():
    bar = pytest.importorskip("tqdm").tqdm(range(3), disable=True)

    def loss(output, target):
        value = F.mse_loss(output, target)
        return value, {"GAIN": value * 1}

    net = conv().double()
    net.bar = bar
    tiled = fullframe.tile(net, loss=loss, tile=TILE)
    x, y = image(), image(2, 3, 19, 23)
    assert recordings(tiled, [lambda k=k: (set_gain(k), tiled(x, y)) for k in (1.0, 2.0, 3.0)]) == 1
    set_gain(1.0)


def test_plans_are_forgotten():
    tiled = fullframe.tile(conv().double(), tile=TILE)
    plan = weakref.ref(tiled.plan(image()))
    tiled(image())
    del tiled
    gc.collect()
    assert plan() is None


def test_outputs_are_forgotten_without_a_collection():
    tiled = fullframe.tile(nn.Sequential(conv(), nn.Sigmoid()).double(), tile=TILE)
    gc.collect()
    gc.disable()
    try:
        output = weakref.ref(tiled(image()))
        assert output() is None
    finally:
        gc.enable()


class Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):
        ctx.count = count
        return x * 1

    @staticmethod
    def backward(ctx, g):
        ctx.count.add_(g.abs().sum())
        return g, None


def test_a_buffer_changed_by_the_backward():
    net = Calling(lambda m, y: Counting.apply(y, m.count), count=torch.zeros(1))
    agree(net, image(), image(2, 3, 19, 23), F.mse_loss, tile=TILE)
    with pytest.raises(fullframe.CaptureError, match="the backward changes count"):
        twins(net)[2](image())


def test_a_checkpoint_around_a_batch_norm():
    net = nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 2))
    net.forward = types.MethodType(lambda m, x: checkpoint(nn.Sequential.forward, m, x, use_reentrant=False), net)
    twin = copy.deepcopy(net.double())
    twin.forward = types.MethodType(net.forward.__func__, twin)
    tiled = fullframe.tile(twin, loss=F.mse_loss, tile=TILE)
    x, y = image(), image()
    F.mse_loss(net(x), y).backward()
    tiled(x, y).backward()
    assert close(grads(net), grads(twin)) and close(list(net.buffers()), list(twin.buffers()))


def test_inputs_of_another_class_of_tensors():
    net, twin, tiled = twins(nn.Sequential(conv(), nn.BatchNorm2d(3), conv(3, 1)))
    x = image()
    net(x).square().mean().backward()
    tiled(x.as_subclass(Gained)).square().mean().backward()
    assert close(grads(net), grads(twin))


class Trading(nn.Module):
    """Buffers that take each other's numbers, in any order of registration."""

    def __init__(self, order):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3).double()
        for name in order:
            self.register_buffer(name, torch.tensor([1.0, 2.0, 3.0].pop(), dtype=torch.float64))
        for k, name in enumerate(sorted(order)):
            getattr(self, name).fill_(k + 1.0)

    def forward(self, x):
        y = self.conv(x)
        with torch.no_grad():
            self.c.copy_(self.b)
            self.b.copy_(self.a)
            self.a.copy_(y.mean())
        return y * self.b


@pytest.mark.parametrize("order", ["abc", "cba", "bac"])
@pytest.mark.parametrize("as_module", [False, True])
def test_buffers_that_hand_on_their_numbers(order, as_module):
    torch.manual_seed(0)
    ours = Trading(order)
    plain = copy.deepcopy(ours)
    x = torch.randn(1, 1, 12, 10, dtype=torch.float64)
    tiled = fullframe.tile(ours, tile=5) if as_module else fullframe.tile(ours, loss=lambda y, _: y.square().mean())
    for _ in range(3):
        a = tiled(x).square().mean() if as_module else tiled(x, x)
        b = plain(x).square().mean()
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
        for p, q in zip((*ours.buffers(), *ours.parameters()), (*plain.buffers(), *plain.parameters()), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-13, atol=0)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-13)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, numbers):
        ctx.save_for_backward(numbers)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0], None


@pytest.mark.parametrize("as_module", [False, True])
def test_a_gradient_that_is_a_buffer_which_then_changes(as_module):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("numbers", torch.ones(3))

        def forward(self, x):
            y = _Given.apply(self.weight, self.numbers.clone())
            self.numbers.add_(1)
            return x * y.sum()

    ours, plain = Net(), Net()
    x = torch.randn(1, 1, 6, 6)
    step = fullframe.tile(ours) if as_module else fullframe.tile(ours, loss=lambda y, _: y.mean())
    for _ in range(2):
        (step(x).mean() if as_module else step(x, x)).backward()
        plain(x).mean().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    torch.testing.assert_close(ours.numbers, plain.numbers)
