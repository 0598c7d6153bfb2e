"""A tiled module inside other people's machinery: checkpoints and hooks around it give what plain PyTorch gives."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import distributed, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fullframe

D = torch.float64


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def network():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 3, padding=1)
    ).double()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def state(net, *inputs):
    grads = {n: p.grad for n, p in net.named_parameters()} | {f"input{k}": x.grad for k, x in enumerate(inputs)}
    return grads | dict(net.named_buffers())


def both(use, make=network, calls=3, **options):
    """``use(module, x, k)`` makes call k of a plain and of a tiled module, which stay alike."""
    plain = make()
    net = copy.deepcopy(plain)
    tiled = fullframe.tile(net, tile=9, **options)
    for k in range(calls):
        x = torch.randn(2, 1, 12, 10, dtype=D)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain.zero_grad()
        net.zero_grad()
        close(use(tiled, b, k), use(plain, a, k))
        close(state(net, b), state(plain, a))


def backward(y):
    y.square().mean().backward()
    return y.detach()


AROUND = {
    "checkpoint": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "to its end": lambda m, x: checkpoint(m, x, use_reentrant=False, early_stop=False),
    "reentrant": lambda m, x: checkpoint(m, x, use_reentrant=True),
    "nested": lambda m, x: checkpoint(
        lambda x: checkpoint(m, x * 2, use_reentrant=False) + 1, x, use_reentrant=False
    ),
    "part": lambda m, x: checkpoint(lambda x: m(x.sin()).tanh(), x, use_reentrant=False),
    "twice": lambda m, x: checkpoint(lambda x: m(m(x)), x, use_reentrant=False),
    "sequential": lambda m, x: checkpoint_sequential([m, m, nn.Tanh()], 2, x, use_reentrant=False),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_checkpoint_around(around, recorded):
    """The first call recorded inside of it or outside; batch norm sees two batches where plain PyTorch's does."""
    inside = (0, 1) if not recorded else (1, 2)
    both(lambda m, x, k: backward(AROUND[around](m, x) if k in inside else m(x)), calls=4)


def test_a_checkpoint_around_keeps_no_memory():
    """What makes its forward again holds no run until its backward."""
    tiled = fullframe.tile(network(), tile=9)
    x = torch.randn(2, 1, 12, 10, dtype=D, requires_grad=True)
    y = checkpoint(tiled, x, use_reentrant=False)
    assert y.grad_fn.late is None
    y.sum().backward()


def test_a_checkpoint_around_a_step():
    mean = lambda y, t: (y - t).square().mean()  # noqa: E731
    plain = network()
    net = copy.deepcopy(plain)
    step = fullframe.tile(net, loss=mean, tile=9)
    for _ in range(3):
        x, t = torch.randn(2, 2, 1, 12, 10, dtype=D)
        a = checkpoint(lambda x, t: mean(plain(x), t), x, t, use_reentrant=False)
        b = checkpoint(step, x, t, use_reentrant=False)
        (3 * a).backward()
        (3 * b).backward()
        close(b, a)
        close(state(net), state(plain))


def test_a_checkpoint_around_draws_the_same_numbers_again():
    """Dropout's mask of the backward is that of the forward."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.5)).double()
    tiled = fullframe.tile(net, tile=9)
    x = torch.ones(1, 1, 12, 10, dtype=D, requires_grad=True)
    for _ in range(2):
        x.grad = None
        y = checkpoint(tiled, x, use_reentrant=False)
        y.sum().backward()
        close(x.grad != 0, y != 0)


HOOKS = {
    "double": lambda: saved_tensors_hooks(lambda t: t, lambda t: t),
    "numpy": lambda: saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy),
    "cpu": save_on_cpu,
    "float32": lambda: saved_tensors_hooks(
        lambda t: (t.float() if t.is_floating_point() else t).clone(), lambda t: t.double() if t.is_floating_point() else t
    ),
    "zeros": lambda: saved_tensors_hooks(lambda t: t, torch.zeros_like),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Anomaly")
@pytest.mark.parametrize("hooks", HOOKS)
def test_hooks_on_saved_tensors_do_not_reach_into_a_recording(hooks):
    """Recorded inside of such hooks, the module is right outside of them, and inside."""
    plain = network()
    net = copy.deepcopy(plain)
    tiled = fullframe.tile(net, tile=9)
    for k in range(3):
        x = torch.randn(2, 1, 12, 10, dtype=D)
        with HOOKS[hooks]() if k < 2 else nullcontext():
            b = tiled(x)
        backward(b)
        backward(plain(x))
        close(state(net), state(plain))


def test_hooks_that_raise_are_not_asked_while_recording():
    def no(*_):
        raise AssertionError("asked")

    tiled = fullframe.tile(network(), tile=9)
    x = torch.randn(2, 1, 12, 10, dtype=D)
    with saved_tensors_hooks(no, no):
        tiled.plan(x)
    with torch.no_grad(), saved_tensors_hooks(no, no):
        tiled(x)


def test_hooks_inside_the_forward_are_recorded():
    def inside(net, x):
        with saved_tensors_hooks(lambda t: t * 1, lambda t: t * 1):
            return net(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return checkpoint(inside, self.net, x, use_reentrant=False)

    both(lambda m, x, k: backward(m(x)), Net)


def test_a_dispatch_mode_around_is_refused():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {})) if kwargs is not None else func(*args)

    tiled = fullframe.tile(network(), tile=9)
    with Mode(), pytest.raises(fullframe.CaptureError, match="Mode, a TorchDispatchMode, sees every op"):
        tiled(torch.randn(2, 1, 12, 10, dtype=D))
    tiled(torch.randn(2, 1, 12, 10, dtype=D)).sum().backward()


def test_a_trace_is_refused_by_name():
    tiled, image = fullframe.tile(network(), tile=9), torch.randn(2, 1, 12, 10, dtype=D)
    with pytest.raises(fullframe.CaptureError, match=r"torch.jit.trace writes down .* as .module"):
        torch.jit.trace(tiled, image)
    assert torch.jit.trace(tiled.module, image)(image).shape == tiled(image).shape


@pytest.fixture
def group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_sharded_parameters(group):
    """FSDP changes the class of the module that it is given, and its parameters around every call."""
    from torch.distributed.fsdp import fully_shard

    image, found = torch.randn(2, 1, 12, 10, dtype=D), []
    plain = network()
    for net, model in ((plain, plain), (twin := copy.deepcopy(plain), fullframe.tile(twin, tile=5))):
        fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(image).square().mean().backward()
            optimizer.step()
        found.append([p.full_tensor() for p in net.parameters()])
    assert type(twin) is nn.Sequential and isinstance(model, fullframe.Tiled)
    close(*found)
    assert "that of a former call" in model.explain()


def test_sharded_parameters_inside_are_refused_by_name(group):
    from torch.distributed.fsdp import fully_shard

    net = network()
    fully_shard(net[3])
    with pytest.raises(
        fullframe.CaptureError, match=r"3\.weight is a DTensor, .* fully_shard\(fullframe.tile\(net\)\)"
    ):
        fullframe.tile(net, tile=5)(torch.randn(2, 1, 12, 10, dtype=D))
