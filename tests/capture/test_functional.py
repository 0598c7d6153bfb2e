"""torch.func's transforms inside of a forward: numbers and gradients are those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import func, nn

import fullframe


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self, use: Callable[..., torch.Tensor]):
        super().__init__()
        self.conv, self.use = nn.Conv2d(2, 2, 3, padding=1).double(), use
        self.gain = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
        self.scale = [torch.full((2, 1, 1), 3.0, dtype=torch.float64)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self, x)


def energy(parameters: Any, net: Any, x: torch.Tensor) -> torch.Tensor:
    return func.functional_call(net.conv, parameters, (x,)).square().mean()


def adapted(net: Any, x: torch.Tensor) -> torch.Tensor:
    """A step of descent inside, as in meta-learning."""
    parameters = dict(net.conv.named_parameters())
    slope = func.grad(energy)(parameters, net, x)
    return func.functional_call(net.conv, {k: p - net.gain * slope[k] for k, p in parameters.items()}, (x,))


def of_each_image(net: Any, x: torch.Tensor) -> torch.Tensor:
    slope = func.grad(lambda p, one: energy(p, net, one[None]))
    found = func.vmap(slope, in_dims=(None, 0))(dict(net.conv.named_parameters()), x)
    return net.conv(x) * found["weight"].square().sum()


USES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "grad": lambda net, x: func.grad(lambda z: (z * net.conv(x) * net.scale[0]).sin().sum())(net.conv(x)),
    "constants": lambda net, x: (
        func.grad(lambda z: (z * torch.arange(2).tolist()[1] * net.scale[0].max().item()).sum())(net.conv(x))
        * func.vmap(lambda z: z * torch.arange(10)[3].item())(x)
    ),
    "vjp": lambda net, x: func.vjp(torch.tanh, net.conv(x))[1](x)[0],
    "jvp": lambda net, x: func.jvp(torch.tanh, (net.conv(x),), (x,))[1],
    "jacrev": lambda net, x: x * func.jacrev(lambda w: (w * x.mean()).sin().sum((1, 2, 3)))(net.conv.weight).sum(),
    "hessian": lambda net, x: net.conv(x) * func.hessian(lambda z: (z**3).sum())(net.conv(x).mean((0, 2, 3))).sum(),
    "twice": lambda net, x: func.grad(lambda z: func.grad(lambda w: (w**4).sum())(z).sum())(net.conv(x)),
    "adapted": adapted,
    "of each image": of_each_image,
}


@pytest.mark.parametrize("use", USES)
def test_transforms_inside_of_the_forward(use):
    image = torch.randn(2, 2, 11, 10, dtype=torch.float64)
    assert fullframe.check(Net(USES[use]), image, tile=5).passed


def test_a_transform_in_the_loss():
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return func.grad(lambda z: nn.functional.mse_loss(z, target))(output).square().sum()

    image = torch.randn(1, 2, 11, 10, dtype=torch.float64)
    assert fullframe.check(Net(lambda net, x: net.conv(x)), image, image, loss, tile=5).passed
