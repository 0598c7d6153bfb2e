"""Where the last bit decides: maxima, ties, bends and comparisons are the same in every tile."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from fuzzing import uncompiled
from networks import agree
from torch import nn

import fullframe
from fullframe.partition.saved_values import pinned_values


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("act", [torch.tanh, F.gelu])
@pytest.mark.parametrize("budget", [None, 1])
def test_a_map_equals_its_maximum_wherever_it_is_read(act, budget):
    # Recomputed in another pass the map differed in its last bit, nothing equalled the maximum any
    # more, and the maximum's gradient was lost or divided by nothing.
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, x):
            y = act(self.conv(x))
            return y * y.amax((2, 3), keepdim=True).sigmoid() * y.max()

    net, image = Gate().double(), torch.randn(2, 1, 13, 11).double()
    if budget is not None:
        with pytest.raises(fullframe.BudgetError) as refused:
            fullframe.tile(net, budget=1, tile=4).plan(image)
        budget = refused.value.smallest
    agree(net, image, tile=4, budget=budget)


def top(y):
    return y.amax((2, 3), keepdim=True)


@pytest.mark.parametrize("chosen", [
    lambda y: y >= top(y), lambda y: ~(y < top(y)), lambda y: (y - top(y)).eq(0), lambda y: (y - top(y)).exp() >= 1,
    lambda y: y >= F.max_pool2d(y, 3, 1, 1), lambda y: (F.max_pool2d(y, 3, 1, 1) - y) <= 0,
    lambda y: F.interpolate(F.max_pool2d(y, 2), scale_factor=2) == y, lambda y: (y / top(y)).floor(),
])  # fmt: skip
def test_peaks_are_the_same_pixels_in_every_tile(chosen):
    # Only equality of a map and its maximum was known; compared in other ways, peaks recomputed were lost.
    class Peaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, x):
            y = F.gelu(self.conv(x))
            return y * chosen(y)

    for seed in range(4):
        torch.manual_seed(seed)
        agree(Peaks(), torch.randn(2, 1, 14, 22), tile=5)


@pytest.mark.parametrize("pool", [lambda x: F.max_pool2d(x, 2), lambda x: F.adaptive_max_pool2d(x, (3, 4))])
def test_tiles_that_share_a_window_agree_on_its_maximum(pool):
    # Each decided again, on numbers equal but for their last bit: the gradient went to no pixel, or to two.
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = pool(self.conv(x).log_softmax(1))
            return y * torch.linspace(0, 1, y[0].numel()).view(y[0].shape)

    # Vectors and their rests make other last bits of a few constants in a hundred.
    image = torch.randn(300, 3, 1, 1).double().expand(300, 3, 8, 9).contiguous()
    agree(Pooled().double(), image, tile=(8, 3))


def test_a_window_of_minus_infinities_has_its_first_pixel_for_a_maximum():
    # The padding was as low, and came first: its position was given, before the image's first row.
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 1, 9, 11))

        def forward(self, x):
            y, where = F.max_pool2d((x * self.weight).masked_fill(x > 9, float("-inf")), 3, 2, 1, return_indices=True)
            return y.clamp(min=-1), where

    image = torch.rand(1, 1, 9, 11).double()
    image[..., :3, :4] = 10
    agree(Masked().double(), image, tile=5)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_norm_makes_exact_zeros_of_a_constant_map(compiled):
    # Means of tiles were joined as a weighted sum, which rounds: a ReLU after the norm then took zeros for positive.
    net = nn.Sequential(nn.Conv2d(1, 7, 1), nn.BatchNorm2d(7), nn.ReLU()).double()
    nn.init.zeros_(net[0].weight)
    with nullcontext() if compiled else uncompiled():
        fullframe.tile(net, tile=(5, 3))(torch.randn(3, 1, 13, 11).double()).sum().backward()
    assert not net[1].bias.grad.any()


@pytest.mark.parametrize("depth", [3, 4, 5, 23, 24, 25])
@pytest.mark.parametrize("peak", [lambda h: h.clamp(min=0.5), lambda h: torch.maximum(h, h.roll((1, 1), (2, 3)))])
def test_a_map_compared_with_what_hands_its_numbers_on(peak, depth):
    # One was stored because it was deep, the other recomputed beside it, with other last bits.
    class Compared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3, padding=1)

        def forward(self, x):
            h = self.conv(x)
            for k in range(depth):
                h = h.sin() * 1.3 if k % 2 else h.exp() * 0.7
            return h * (h == peak(h))

    agree(Compared().double(), torch.randn(2, 2, 19, 11).double(), tile=7)


def test_of_several_nan_adaptive_pooling_takes_the_last():
    x = torch.randn(1, 1, 8, 8).double()
    x[0, 0, 1, 1] = x[0, 0, 2, 2] = float("nan")
    net = nn.AdaptiveMaxPool2d(2, return_indices=True)
    assert torch.equal(net(x)[1], fullframe.tile(net, tile=4)(x)[1])


@pytest.mark.parametrize("copy", [
    lambda h: F.conv2d(h, F.pad(torch.ones(3, 1, 1, 1).double(), (1, 1, 1, 1)), padding=1, groups=3),
    lambda h: F.linear(h.movedim(1, -1), torch.eye(3).double()).movedim(-1, 1),
    lambda h: F.fold(F.unfold(h, 2, stride=2), h.shape[2:], 2, stride=2),
])  # fmt: skip
def test_a_map_compared_with_what_copies_it(copy):
    # A convolution was taken for new numbers; the map beside its stored copy was recomputed.
    class Copied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3, padding=1)

        def forward(self, x):
            h = F.gelu(self.conv(x)).tanh()
            return h * (h >= copy(h))

    net, image = Copied().double(), torch.randn(2, 2, 18, 22).double()
    with pytest.raises(fullframe.BudgetError) as refused:
        fullframe.tile(net, budget=1, tile=4).plan(image)
    for budget in (None, refused.value.smallest):
        agree(net, image, tile=4, budget=budget)


class Siamese(nn.Module):
    """The size of the difference of what a network makes of two images, as in change detection."""

    def __init__(self, parts, apart):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1)
        )
        self.parts, self.apart = parts, apart

    def forward(self, x):
        first, second = map(self.net, self.parts(x))
        return self.apart(first, second).abs() + (first > second) * first


@pytest.mark.parametrize("parts", [lambda x: x, lambda x: torch.cat(x, 1).split(1, 1)], ids=["two", "stacked"])
@pytest.mark.parametrize("apart", [
    lambda a, b: a - b, lambda a, b: torch.add(a, b, alpha=-1), torch.rsub, lambda a, b: a / b - 1,
    lambda a, b: torch.stack([a, b]).diff(dim=0)[0], lambda a, b: F.avg_pool2d(a - b, 3, 1, 1),
    lambda a, b: F.interpolate(a - b, scale_factor=2, mode="bilinear")[..., ::2, ::2],
])  # fmt: skip
def test_equal_parts_of_two_images_stay_equal(parts, apart):
    # Recomputed for one image in other tiles, its numbers differed in the last bit: the difference had a sign.
    net = Siamese(parts, apart).double()
    for p in net.parameters():
        nn.init.normal_(p)
    first, second = torch.randn(2, 3, 1, 24, 19).double()
    second[..., :12] = first[..., :12]
    plan = fullframe.tile(net, tile=7).plan((first, second))
    pinned = pinned_values(plan.graph, plan.tile_axes)
    compared = [op.inputs for op in plan.graph.ops if op.target == "aten.gt.Tensor"]
    assert compared and all(v in pinned for pair in compared for v in pair)
    with pytest.raises(fullframe.BudgetError) as refused:
        fullframe.tile(net, budget=1, tile=7).plan((first, second))
    agree(net, (first, second), tile=7, budget=refused.value.smallest)
