"""Functions of autograd's whose backward calls backward itself, as blocks that can be reversed do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fullframe

D = torch.float64


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def by_backward(y, x, g):
    torch.autograd.backward(y, g)
    return x.grad


def by_method(y, x, g):
    y.backward(g)
    return x.grad


def twice(y, x, g):
    y.backward(g / 2, retain_graph=True)
    y.backward(g / 2)
    return x.grad


def by_grad(y, x, g):
    return torch.autograd.grad(y, x, g)[0]  # the weights get nothing, in plain PyTorch too


class Residual(torch.autograd.Function):
    """x + f(x), whose f runs again in the backward."""

    @staticmethod
    def forward(ctx, x, f, how):
        ctx.f, ctx.how = f, how
        with torch.no_grad():
            y = x + f(x)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            found = ctx.how(ctx.f(x), x, g)
        return found + g, None, None


class Reversible(torch.autograd.Function):
    """Two streams, whose inputs are made from the outputs again."""

    @staticmethod
    def forward(ctx, x, f, g):
        ctx.f, ctx.g = f, g
        a, b = x.chunk(2, dim=1)
        with torch.no_grad():
            c = a + f(b)
            d = b + g(c)
        y = torch.cat((c, d), dim=1)
        ctx.save_for_backward(y.detach())
        return y

    @staticmethod
    def backward(ctx, up):
        (y,) = ctx.saved_tensors
        c, d = y.chunk(2, dim=1)
        dc, dd = up.chunk(2, dim=1)
        with torch.enable_grad():
            c = c.detach().requires_grad_()
            gc = ctx.g(c)
            gc.backward(dd)
        with torch.no_grad():
            b, dc = d - gc, dc + c.grad
        with torch.enable_grad():
            b = b.detach().requires_grad_()
            ctx.f(b).backward(dc)
        return torch.cat((dc, dd + b.grad), dim=1), None, None


def conv(*channels):
    return nn.Conv2d(*channels, 3, padding=1)


class Blocks(nn.Module):
    """Blocks of functions ``f`` between two convolutions."""

    def __init__(self, block, *f):
        super().__init__()
        self.first, self.last, self.block = conv(1, 2), conv(2, 1), block
        self.f = nn.ModuleList(f)

    def forward(self, x):
        x = self.first(x)
        for f in self.f:
            x = self.block(x, f)
        return self.last(x)


def residual(how=by_backward):
    return lambda x, f: Residual.apply(x, f, how)


def normed():
    return nn.Sequential(conv(2, 2), nn.BatchNorm2d(2), nn.Tanh())


def shared():
    f = nn.Sequential(conv(2, 2), nn.Tanh())
    return Blocks(residual(), f, f, nn.Sequential(f, conv(2, 2)))


def used_outside():
    """Its weights have a gradient of the step's own backward, too."""
    f = conv(2, 2)
    return Blocks(lambda x, f: Residual.apply(f(x), f, by_backward), f, f)


class Gain(nn.Module):
    """Multiplies by a tensor that is no parameter."""

    def __init__(self):
        super().__init__()
        self.gain = torch.full((1, 2, 1, 1), 0.5, dtype=D, requires_grad=True)

    def forward(self, x):
        return x * self.gain


class Late(torch.autograd.Function):
    """Meets in the backward alone what has a gradient."""

    @staticmethod
    def forward(ctx, x, f):
        ctx.f = f
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            ctx.f(ctx.saved_tensors[0].detach()).backward(g)
        return g, None


NETS = {
    "backward": lambda: Blocks(residual(), conv(2, 2), conv(2, 2)),
    "method": lambda: Blocks(residual(by_method), conv(2, 2)),
    "twice": lambda: Blocks(residual(twice), conv(2, 2)),
    "grad": lambda: Blocks(residual(by_grad), conv(2, 2)),
    "norm": lambda: Blocks(residual(), normed(), normed()),
    "shared": shared,
    "outside": used_outside,
    "attribute": lambda: Blocks(residual(), Gain(), conv(2, 2)),
    "late": lambda: Blocks(lambda x, f: Late.apply(x, f), Gain(), conv(2, 2)),
    "reversible": lambda: Blocks(
        lambda x, f: Reversible.apply(x, f[0], f[1]),
        nn.ModuleList((conv(1, 1), nn.Sequential(conv(1, 1), nn.Tanh()))),
    ),
}


def inner():
    """A block with a block inside."""
    f = conv(2, 2)

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = f, conv(2, 2)

        def forward(self, x):
            return self.g(Residual.apply(x, self.f, by_backward)).tanh()

    return Inner()


NETS["nested"] = lambda: Blocks(residual(), inner())


def grads(net, *inputs):
    found = {n: p.grad for n, p in net.named_parameters()} | {f"input{k}": x.grad for k, x in enumerate(inputs)}
    found |= {f"{n}.gain": m.gain.grad for n, m in net.named_modules() if isinstance(m, Gain)}
    return found | {n: b.clone() for n, b in net.named_buffers()}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("step", [False, True])
def test_gradients_of_a_backward_inside_of_the_backward(name, step):
    plain = NETS[name]().double()
    net = copy.deepcopy(plain)
    loss = lambda y, t: (y - t).square().mean()  # noqa: E731
    tiled = fullframe.tile(net, tile=7, loss=loss if step else None)
    for k in range(2):  # gradients add up from call to call
        x, t = torch.randn(2, 1, 1, 12, 10, dtype=D)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        (loss(plain(a), t) * (k + 1)).backward()
        ((tiled(b, t) if step else loss(tiled(b), t)) * (k + 1)).backward()
        torch.testing.assert_close(grads(net, b), grads(plain, a), rtol=1e-10, atol=1e-12)


def test_a_backward_called_by_the_forward_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(1, 1)

        def forward(self, x):
            y = self.conv(x)
            y.mean().backward(retain_graph=True)
            return y

    tiled = fullframe.tile(Net(), tile=7)
    with pytest.raises(fullframe.CaptureError, match=r"calls backward\(\) itself"):
        tiled(torch.randn(1, 1, 12, 10))


class Weighted(nn.Module):
    """A score and maps weighted by its gradient, as Grad-CAM makes them; the score's graph is freed by that."""

    def __init__(self):
        super().__init__()
        self.maps, self.head = nn.Conv2d(1, 4, 3, dtype=D), nn.Linear(4, 3, dtype=D)

    def forward(self, x):
        maps = self.maps(x)
        score = self.head(maps.mean((2, 3)))[:, 1].sum()
        (gradient,) = torch.autograd.grad(score, maps)
        return score, (maps * gradient.mean((2, 3), keepdim=True)).sum(1).relu()


def test_an_output_whose_graph_is_spent_fails_in_its_own_backward_alone():
    plain, image = Weighted(), torch.randn(1, 1, 12, 14, dtype=D)
    net = copy.deepcopy(plain)
    expected, found = plain(image), fullframe.tile(net, tile=6)(image)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)
    for score, maps in (expected, found):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            score.backward(retain_graph=True)
        maps.sum().backward()
    torch.testing.assert_close(net.maps.weight.grad, plain.maps.weight.grad, rtol=1e-12, atol=1e-14)
    assert net.head.weight.grad is None and plain.head.weight.grad is None
