"""What decomposition spares a step: sums that are zero, maps that another one stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fullframe
from fullframe.ops.decompositions.norms import centres, inverse_stds
from fullframe.schedule.dependencies import is_expensive
from fullframe.schedule.plan import Plan


def plan_of(net: nn.Module) -> Plan:
    step = fullframe.tile(net, loss=lambda y, t: (y - t).square().mean(), tile=7)
    x = torch.randn(2, 3, 20, 17, dtype=torch.float64)
    return step.plan(x, net(x).detach())


def targets(plan: Plan) -> list[str]:
    return [op.target for op in plan.graph.ops]


def small(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm, nn.LeakyReLU(0.1), nn.Conv2d(4, 2, 1)).double()


def test_the_bias_before_a_batch_norm_needs_no_sum():
    with_bias, without = small(nn.BatchNorm2d(4)), small(nn.BatchNorm2d(4))
    without[0].bias = None
    assert targets(plan_of(with_bias)).count("tile.sum") == targets(plan_of(without)).count("tile.sum")
    assert fullframe.check(with_bias, torch.randn(2, 3, 20, 17), None, lambda y, _: y.square().mean()).passed


def test_the_bias_before_a_norm_in_evaluation_mode_needs_one():
    net = small(nn.BatchNorm2d(4))
    net[1].eval()
    found = fullframe.check(net, torch.randn(2, 3, 20, 17), None, lambda y, _: y.square().mean())
    (bias,) = [d for d in found.of("gradient") if d.name == "0.bias"]
    assert found.passed and bias.scale > 0


class AboutAnother(torch.autograd.Function):
    """Batch norm whose backward is told of another mean."""

    @staticmethod
    def forward(ctx, x, w):
        y, mean, invstd = torch.native_batch_norm(x, w, None, None, None, True, 0.1, 1e-5)
        ctx.save_for_backward(x, w, mean, invstd)
        return y

    @staticmethod
    def backward(ctx, g):
        x, w, mean, invstd = ctx.saved_tensors
        back = torch.ops.aten.native_batch_norm_backward
        made = back(g, x, w, None, None, mean + 0.5, invstd, True, 1e-5, [True, True, False])
        return made[0], made[1]


class WithIt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weight = nn.Conv2d(3, 4, 3, padding=1), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return AboutAnother.apply(self.conv(x), self.weight)


def test_the_bias_before_a_norm_about_another_mean_needs_a_sum():
    found = fullframe.check(WithIt(), torch.randn(2, 3, 20, 17), None, lambda y, _: y.pow(3).mean())
    (bias,) = [d for d in found.of("gradient") if d.name == "conv.bias"]
    assert found.passed and bias.scale > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_gradient_of_that_bias_is_no_number_where_plain_pytorch_has_none(value):
    net = small(nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 20, 17, dtype=torch.float64)
    x[0, 0, 3, 3] = value
    fullframe.tile(net, loss=lambda y, _: y.square().mean(), tile=7)(x, torch.zeros(())).backward()
    assert net[0].bias.grad.isnan().all()


def test_a_leaky_relu_is_bent_by_its_result():
    graph = plan_of(small(nn.BatchNorm2d(4))).graph
    (back,) = [op for op in graph.ops if op.target == "aten.leaky_relu_backward.default"]
    (made,) = [op for op in graph.ops if op.target == "aten.leaky_relu.default"]
    assert back.inputs[1] is made.output


@pytest.mark.parametrize("slope", [0.0, -0.5])
def test_but_not_where_its_sign_says_nothing(slope):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(slope)).double()
    graph = plan_of(net).graph
    (back,) = [op for op in graph.ops if op.target == "aten.leaky_relu_backward.default"]
    (made,) = [op for op in graph.ops if op.target == "aten.leaky_relu.default"]
    assert back.inputs[1] is not made.output
    assert fullframe.check(net, torch.randn(2, 3, 20, 17), None, lambda y, _: y.square().mean()).passed


def test_numbers_too_small_for_their_slope_keep_their_side():
    tiny = torch.finfo(torch.float64).smallest_normal
    x = torch.tensor([-1.0, -tiny * 2**-52, -0.0, 0.0, tiny * 2**-52, 1.0], dtype=torch.float64).view(1, 1, 1, 6)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, 1, 1, 6, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.leaky_relu(x * self.w, 0.01)

    weight = torch.arange(1.0, 7).view(1, 1, 1, 6).double()
    grads = []
    for tiled in (False, True):
        image, net = x.clone().requires_grad_(), Net()
        run = fullframe.tile(net, tile=3) if tiled else net
        (run(image) * weight).sum().backward()
        grads.append(image.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.GroupNorm(4, 4), nn.GroupNorm(1, 4, affine=False)])
def test_a_group_norm_leaves_maps_in_their_shape(norm):
    """Two sums forward and two backward go over the map, channel by channel; no view of it is made by groups."""
    plan = plan_of(small(norm))
    maps = [op for op in plan.graph.ops if len(op.output.shape) > 4 and 20 in op.output.shape]
    sums = [op for op in plan.graph.ops if op.target in ("tile.sum", "tile.moments") and 20 in op.inputs[0].shape]
    of_norm = [op for op in sums if op.args[1] == [2, 3] or op.args[1] == (2, 3)]
    assert not maps and len(of_norm) == 3


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_group_norm_of_vectors(groups):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.GroupNorm(groups, 6), nn.Tanh())
    found = fullframe.check(net, torch.randn(5, 3, 2, 2), None, lambda y, _: (y * torch.arange(6.0)).sum())
    assert found.passed


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_moments_of_groups_from_those_of_their_channels(groups):
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64) + 1e3
    mean, square = x.mean((2, 3), True), x.var((2, 3), False, True) * 30
    parts = x.view(3, groups, -1)
    torch.testing.assert_close(centres(mean, 1, groups).flatten(1), parts.mean(2), rtol=1e-14, atol=0)
    found = inverse_stds(mean, square, 1, groups, 30, 1e-5)
    torch.testing.assert_close(found.flatten(1), (parts.var(2, False) + 1e-5).rsqrt(), rtol=1e-10, atol=0)
    equal = mean[:1, :1].expand(3, 4, 1, 1)
    assert torch.equal(centres(equal, 1, groups), equal[:, :groups])


def test_attention_is_worth_more_than_one_thread():
    class Attention(nn.Module):
        def forward(self, x):
            rows = x.flatten(2).transpose(1, 2)[:, None].contiguous()
            return nn.functional.scaled_dot_product_attention(rows, rows, rows)[:, 0].transpose(1, 2).reshape(x.shape)

    with torch.no_grad():
        plan = fullframe.tile(Attention(), budget="1 GB").plan(torch.zeros(1, 16, 144, 144))
    stages = [s for s in plan.stages if any("attention" in op.target for op in s.section.ops)]
    assert len(stages) == 1 and is_expensive(stages[0])
