"""Small networks that once gave a wrong number or an error nobody could use; each stays right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from networks import agree, close
from torch import nn

import fullframe
import fullframe.testing
from fullframe.ops.numerics.interpolate import Spec, disputed, settled, taps_at


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Beside(nn.Module):
    """The input beside a convolution of it."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return torch.cat([x, self.conv(x)], 1)


@pytest.mark.parametrize("tile", [8, 100])
def test_a_map_stored_by_a_pass_that_others_read_in_part(tile):
    # The gradient of the concatenation was stored on the channels that one branch reads, not on all.
    net = nn.Sequential(nn.Conv2d(1, 4, 3), Beside(4), nn.BatchNorm2d(8), nn.ReLU())
    agree(net, torch.randn(2, 1, 24, 20), tile=tile)


def test_average_pooling_that_keeps_the_size():
    # Taken for the identity, since source and target sizes are equal.
    agree(nn.AvgPool2d(3, 1, 1), torch.randn(2, 1, 18, 18).requires_grad_(), tile=7)


def test_a_tile_that_reads_nothing_of_a_map():
    # The last tile of the input has no pixel of the pooled map: a map not made was asked for.
    net = nn.Sequential(nn.Conv1d(1, 3, 3, 2, 1), nn.BatchNorm1d(3), nn.LeakyReLU(), nn.MaxPool1d(2))
    agree(net, torch.randn(2, 1, 22), tile=5)


class Excite(nn.Module):
    """Global pooling of a map whose channels lie innermost, as a norm over channels leaves it."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.pool = nn.LayerNorm(3), nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return x * torch.sigmoid(self.conv(self.pool(x)))


def test_global_pooling_of_channels_last_runs_in_tiles():
    # Its gradient rewrites strides (as_strided), which ran whole or was refused.
    image = torch.randn(2, 3, 19, 17).requires_grad_()
    found = fullframe.check(Excite(), image, tile=6)
    assert found.passed and found.plan is not None and not found.plan.whole, found


def test_a_scalar_operand_of_a_fused_pass():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return F.avg_pool2d(x, 3, 1, 1) * self.gain

    agree(Gain(), torch.randn(2, 1, 18, 18), tile=7)


@pytest.mark.rest
def test_a_map_stored_with_a_halo_has_the_same_bits_for_any_number_of_workers():
    # The halo of such a map belongs to the neighbouring tiles, which store it themselves.
    net = nn.Sequential(nn.Conv2d(1, 4, 3), Beside(4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    image, label = torch.randn(2, 1, 40, 36), torch.randint(0, 2, (2, 38, 34))
    found = []
    for workers in (1, 2, 4):
        net.zero_grad()
        loss = fullframe.tile(net, loss=F.cross_entropy, tile=6, workers=workers)(image, label)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
        net[2].reset_running_stats()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_strides_are_those_of_the_recording_not_of_a_window():
    # as_strided ran on windows, which lie in memory as they please: wrong numbers without an error.
    class Shear(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            return torch.as_strided(y.contiguous(), (1, 2, 9, 10), (198, 99, 11, 1))

    agree(Shear(), torch.randn(1, 2, 9, 11), tile=5)
    agree(Shear(), torch.randn(1, 2, 9, 11).to(memory_format=torch.channels_last), tile=5)


def test_memory_outside_a_tensor_is_refused():
    class Peek(nn.Module):
        def forward(self, x):
            return torch.as_strided(x[:, :1], (1, 1, 9, 11), (198, 99, 11, 1), 99)

    with pytest.raises(fullframe.CaptureError, match="as_strided"):
        fullframe.tile(Peek(), tile=5)(torch.randn(1, 2, 9, 11))


@pytest.mark.parametrize(
    "draw", [torch.poisson, lambda x: x.multinomial(1), lambda x: torch.rand_like(x, generator=torch.Generator())]
)
def test_random_numbers_that_would_hang_on_the_tiling_are_refused(draw):
    # Run whole, such an op drew anew each time its value was made: forward and backward disagreed.
    class Noisy(nn.Module):
        def forward(self, x):
            return x * draw(x.abs().flatten(1)).sum()

    with pytest.raises(fullframe.CaptureError, match="draw"):
        fullframe.tile(Noisy(), tile=5)(torch.randn(1, 2, 9, 11))


def test_gumbel_noise_is_one_draw_whatever_is_recomputed():
    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, x):
            return F.gumbel_softmax(self.conv(x), dim=1)

    found = fullframe.check(Sample(), torch.randn(1, 1, 19, 17), tile=5)
    assert found.passed and found.plan is not None and not found.plan.whole, found


@pytest.mark.rest
def test_an_op_run_whole_sees_tensors_laid_out_as_recorded():
    # ATen's attention kernel for the CPU reads tensors wrongly whose last axis is not innermost.
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)

        def forward(self, x):
            return self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x)

    agree(Block(), torch.randn(2, 4, 5, 7).requires_grad_(), tile=3)


def test_a_tensor_given_by_name_to_an_op_run_whole():
    class Masked(nn.Module):
        def forward(self, x):
            y = x.flatten(2).transpose(1, 2)[:, None]
            return F.scaled_dot_product_attention(y, y.sin(), y.cos(), attn_mask=torch.eye(35, dtype=x.dtype))

    agree(Masked(), torch.randn(2, 4, 5, 7).requires_grad_(), tile=3)


def test_an_image_of_whole_numbers_is_tiled():
    class Labels(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.conv = nn.Embedding(5, 4), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            return self.conv(self.table(x[:, 0]).movedim(-1, 1))

    found = fullframe.check(Labels(), torch.randint(0, 5, (2, 1, 19, 17)), tile=6)
    assert found.passed and found.plan is not None and not found.plan.whole, found
    assert any(len(stage.grid) > 1 for stage in found.plan.stages)


def test_modules_made_by_the_compilers_of_torch():
    conv = nn.Conv2d(2, 2, 3)
    compiled = torch.compile(nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU()), backend="eager")
    traced = torch.jit.trace(conv.double(), torch.randn(1, 2, 9, 9, dtype=torch.float64))
    for part in (compiled, torch.jit.script(nn.Sequential(nn.Conv2d(2, 2, 3))), traced):
        step = fullframe.tile(nn.Sequential(part.double(), nn.ReLU()), tile=4)
        image = torch.randn(1, 2, 12, 11, dtype=torch.float64)
        plain = nn.Sequential(part, nn.ReLU())(image)
        assert float((step(image) - plain).abs().max()) < 1e-12 and not step.plan(image).whole


def test_a_mark_for_the_profiler_is_no_op():
    class Marked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3)

        def forward(self, x):
            with torch.profiler.record_function("here"):
                return self.conv(x)

    agree(Marked(), torch.randn(1, 2, 12, 11), tile=4)


def test_reentrant_checkpoints_are_refused():
    class Saved(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.conv, x, use_reentrant=True)

    with pytest.raises(fullframe.CaptureError, match="use_reentrant=False"):
        fullframe.tile(Saved(), tile=4)(torch.randn(1, 2, 12, 11).requires_grad_())


class Bytes(nn.Module):
    """Takes a picture in bytes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.to(self.conv.weight.dtype) / 255)


class Labels(nn.Module):
    """Takes a map of labels."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.conv = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.table(x).permute(0, 3, 1, 2))


@pytest.mark.parametrize("net, image", [
    (Bytes(), torch.randint(0, 256, (2, 3, 29, 35), dtype=torch.uint8)),
    (Labels(), torch.randint(0, 5, (2, 29, 35))),
], ids=["bytes", "labels"])  # fmt: skip
def test_pictures_of_whole_numbers_are_tiled(net, image):
    target = torch.randint(0, 4, (2, 29, 35))
    found = fullframe.check(net, image, target, F.cross_entropy, tile=11)
    assert found.passed, str(found)
    assert max(len(s.grid) for s in found.plan.stages) == 2 * 3 * 4


class Depth(nn.Module):
    """Keeps or drops a branch for each image, by a number of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) * torch.rand(len(x), 1, 1, 1, dtype=x.dtype).round()


def test_recording_leaves_the_random_state_alone():
    net, image = Depth(), torch.randn(3, 3, 17, 19)
    before = torch.get_rng_state()
    plan = fullframe.tile(net, tile=5).plan(image)
    assert plan.graph.seed is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert fullframe.check(net, image, tile=5).passed


class DropPath(nn.Module):
    """A convolution left out for some images of the batch, by a mask made from nothing."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x) * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(0.5)


def test_recording_leaves_the_random_numbers_of_the_step_alone():
    # A step that was recorded first drew other masks than the same step later.
    tiled = fullframe.tile(DropPath(), tile=7)
    image = torch.randn(8, 1, 18, 18)
    torch.manual_seed(1)
    first = tiled(image)
    torch.manual_seed(1)
    assert torch.equal(first, tiled(image))


def test_a_random_activation_in_place_is_drawn_by_the_oracle_too():
    # The test kit's random numbers reached only the activation that makes a new map.
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.RReLU(inplace=True)).double()
    image = torch.randn(1, 1, 18, 18, dtype=torch.float64)
    tiled = fullframe.tile(net, tile=7)
    torch.manual_seed(1)
    found = tiled(image)
    torch.manual_seed(1)
    with fullframe.testing.drawn():
        assert torch.allclose(found, net(image))


class Code(nn.Module):
    """Down to a few pixels by channel shuffles, and up again: several maps are needed at once near the end."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 2, 5, padding="same"), nn.Conv2d(2, 2, 5, 2, 2)
        self.code, self.mix, self.norm = nn.Linear(8, 8), nn.Conv2d(18, 18, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        y = F.adaptive_avg_pool2d(self.down(self.stem(x).tanh()), 2).flatten(1)
        y = F.pad(F.interpolate(self.code(y).view(-1, 2, 2, 2), size=(11, 13)), (0, 2, 0, 1))
        return self.norm(F.pixel_shuffle(self.mix(F.pixel_unshuffle(y, 3)), 3)[..., :11, :13])


def test_making_again_what_was_not_read_yet_comes_to_an_end():
    # Values made again for the same reader were dropped and made again in turn, for ever.
    with pytest.raises(fullframe.BudgetError) as refused:
        fullframe.tile(Code(), loss=F.mse_loss, budget=1, tile=(7, 9)).plan(
            torch.randn(2, 3, 11, 13), torch.randn(2, 2, 11, 13)
        )
    agree(Code(), torch.randn(2, 3, 11, 13), torch.randn(2, 2, 11, 13), F.mse_loss, budget=2 * refused.value.smallest)


def test_instance_norm_of_one_image_in_channels_last():
    # Plain PyTorch's gradient is wrong here, and right for contiguous tensors; ours is the latter in both.
    torch.set_default_dtype(torch.float64)
    try:
        net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.InstanceNorm2d(3), nn.Conv2d(3, 3, 1))
        image, weights = torch.randn(1, 3, 15, 12), torch.randn(1, 3, 15, 12)
        (net(image) * weights).sum().backward()
        expected = net[0].weight.grad.clone()
        net.zero_grad()
        net.to(memory_format=torch.channels_last)
        (fullframe.tile(net, tile=7)(image) * weights).sum().backward()
        assert close(expected, net[0].weight.grad)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_window_that_is_empty_along_one_axis_only():
    # The padded map has columns that lie in the padding: nothing of the map is read for them, but rows
    # beyond those made were asked for.
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(1, 2, 1)
            self.wide = nn.Conv2d(2, 2, 3, padding=6, dilation=3, padding_mode="replicate")

        def forward(self, x):
            x = self.first(x).relu()
            return self.wide(x) * torch.sigmoid(F.pad(x, (0, 6, 0, 6)))

    agree(Gated(), torch.randn(2, 1, 7, 7), tile=(3, 6))


def test_what_only_an_unused_output_depends_on_has_no_gradient():
    # It had a gradient of zeros, which an optimiser with weight decay or momentum does not take for none.
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.first, self.second = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3), nn.Conv2d(2, 1, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.first(x), self.second(x)

    net = Two()
    image = torch.randn(1, 1, 18, 18)
    net(image)[0].mean().backward()
    expected = {k: p.grad for k, p in net.named_parameters()}
    net.zero_grad()
    fullframe.tile(net, tile=7)(image)[0].mean().backward()
    for name, p in net.named_parameters():
        assert (p.grad is None) == (expected[name] is None), name
        assert p.grad is None or close(p.grad, expected[name], 1e-5)


@pytest.mark.parametrize("loss", [None, F.mse_loss])
def test_hooks_of_parameters_that_are_not_used_stay_silent(loss):
    # The hook was called with None.
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))
    net.spare = nn.Parameter(torch.ones(1))
    net.forward = net[0].forward
    net.spare.register_hook(lambda g: g * 3)
    image = torch.randn(1, 1, 18, 18)
    tiled = fullframe.tile(net, loss=loss, tile=7)
    (tiled(image).mean() if loss is None else tiled(image, image)).backward()
    assert net.spare.grad is None and net[0].weight.grad is not None


def test_a_part_of_nothing_in_a_map_that_is_not_cut():
    # What is empty was never made, and could not be freed.
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3)

        def forward(self, x):
            y = F.adaptive_avg_pool2d(self.conv(x), (2, 1)) * torch.ones(1, 3, 2, 1).double()
            z = torch.ones(1, 3, 2, 1).double()
            z = torch.cat([z[..., :1], z[..., 1:] * 2], 3)
            return y * z + torch.cat([y[..., :1], y[..., 1:] * 2], 3)

    agree(Halves().double(), torch.randn(1, 1, 13, 11).double(), tile=5)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.rest
def test_a_recurrent_layer_may_list_its_weights_again(cell):
    # The list was taken for tensors that the recording leaves behind, and refused without a name.
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.read = nn.Conv2d(1, 4, 3, padding=1), cell(4, 3, batch_first=True)

        def forward(self, x):
            return self.read(self.conv(x).mean(2).transpose(1, 2))[0]

    agree(Reader(), torch.randn(2, 1, 13, 11), tile=5)


def test_a_list_of_results_left_in_an_attribute():
    # It was refused, before that without a name.
    class Leaves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.seen = nn.Conv2d(1, 4, 3), []

        def forward(self, x):
            y = self.conv(x)
            self.seen = [y]
            return y

    net = Leaves()
    out = fullframe.tile(net)(torch.randn(1, 1, 9, 9))
    assert len(net.seen) == 1 and net.seen[0] is out


@pytest.mark.parametrize("layer", [
    lambda: nn.Conv2d(2, 4, 1, padding=3), lambda: nn.Conv2d(2, 4, 2, padding=4),
    lambda: nn.Conv2d(2, 4, 3, padding=6, stride=2),
    lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 1, padding=2)),
])  # fmt: skip
def test_tiles_that_lie_in_the_padding(layer):
    agree(layer().double(), torch.randn(1, 2, 17, 11).double(), tile=5)


def test_a_complex_number_in_the_backward():
    class Wave(nn.Module):
        def forward(self, x):
            return torch.exp(1j * x).real

    agree(Wave(), torch.randn(1, 1, 8, 8).double().requires_grad_(), tile=4)


def test_gradients_of_prelu_are_those_of_torch():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.PReLU(3), nn.Conv2d(3, 2, 3), nn.PReLU(init=-0.5))
    agree(net.double(), torch.randn(2, 2, 15, 13).double(), tile=5)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.contiguous()


@pytest.mark.parametrize("shape", [(1, 4, 6, 5), (1, 4, 3, 6, 5)])
def test_the_norm_of_one_image_whose_gradient_has_its_channels_innermost(shape):
    """Plain PyTorch's batch norm mistakes the layout of such a gradient, so the oracle is given a dense one."""
    torch.manual_seed(0)
    image, weight = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    norm = nn.BatchNorm1d if len(shape) == 3 else nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm3d

    def gradient(dense, run):
        net = norm(4).double()
        x = image.clone().requires_grad_()
        innermost = weight[0].movedim(0, -1)
        run(net, lambda y: ((_Dense.apply(y) if dense else y).squeeze(0).movedim(0, -1) * innermost).sum(), x)
        return x.grad

    def plain(net, loss, x):
        loss(net(x)).backward()

    def ours(net, loss, x):
        fullframe.tile(net, loss=lambda y, _: loss(y))(x, x.detach()).backward()

    torch.testing.assert_close(gradient(False, ours), gradient(True, plain), rtol=0, atol=1e-13)


def test_a_group_norm_of_channels_last_whose_bias_is_frozen():
    """Plain PyTorch reads memory that is not there in this backward, and the process ends; the oracle is contiguous."""
    image, target = torch.randn(3, 2, 8, 6, dtype=torch.float64), torch.randn(3, 2, 8, 6, dtype=torch.float64)
    plain = nn.GroupNorm(2, 2).double()
    F.mse_loss(plain(image), target).backward()
    ours = nn.GroupNorm(2, 2).double()
    ours.bias.requires_grad_(False)
    fullframe.tile(ours, loss=F.mse_loss)(image.to(memory_format=torch.channels_last), target).backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=0, atol=1e-14)
    assert ours.bias.grad is None


def test_what_reads_the_layout_of_a_norm_of_transposed_images():
    """Of such images fake tensors have other strides than real ones, and local response norm asks for a view."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv3d(1, 4, (2, 4, 1), padding=(0, 1, 0)), nn.BatchNorm3d(4)
            self.after = nn.LocalResponseNorm(2)

        def forward(self, x):
            return self.after(self.norm(self.conv(x.transpose(3, 2)).transpose(3, 2)))

    agree(Turned(), torch.randn(1, 1, 6, 7, 7), tile=5)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_neighbours_of_which_plain_pytorch_has_two(mode):
    """In float64 and contiguous memory its forward may take another pixel than its gradient; where, is known."""
    for source in range(1, 60):
        for given in ({"scale_factor": 2.3}, {"scale_factor": 1.7}, {"size": 94}, {"size": 2 * source + 1}):
            line = torch.arange(float(source), dtype=torch.float64).view(1, 1, source)
            plain = F.interpolate(line, mode=mode, **given)[0, 0].tolist()
            spec = Spec(mode, source, len(plain), scale=given.get("scale_factor"))
            found = disputed(spec)
            ours = [taps_at(settled(spec), k)[0][0] for k in range(len(plain))]
            assert (ours == plain) == (found is None)
            assert found is None or (ours[found[0]], plain[found[0]]) == found[1:]


def test_neighbours_of_which_plain_pytorch_has_two_are_refused():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Upsample(scale_factor=2.3))
    image = torch.randn(1, 1, 43, 43)
    agree32 = fullframe.tile(net, tile=16)(image)
    torch.testing.assert_close(agree32, net(image), rtol=0, atol=1e-5)
    with pytest.raises(fullframe.CaptureError, match=r"in 1 \(Upsample\).*41 to 94 in float64.*use float32"):
        fullframe.tile(net.double(), tile=16)(image.double())


class Resized(nn.Module):
    """The image by `torch.nn.functional.interpolate`."""

    def __init__(self, **given: Any):
        super().__init__()
        self.given: dict[str, Any] = given

    def forward(self, x):
        return F.interpolate(x, **self.given)


@pytest.mark.parametrize("shape, factor, mode", [
    ((60,), 1.01, "linear"), ((60, 30), (1.01, 1.7), "bilinear"), ((110, 64), 1.01, "bilinear"),
    ((5, 110, 12), 1.01, "trilinear"), ((60, 30), (1.01, 1.7), "bicubic"), ((110, 12), 1.01, "bicubic"),
    ((60, 30), 1.01, "nearest"), ((20, 21), 2.01, "nearest"), ((60, 80), 1.01, "nearest-exact"),
])  # fmt: skip
@pytest.mark.parametrize("aligned", [None, True])
def test_a_scale_that_keeps_the_size_or_doubles_it(shape, factor, mode, aligned):
    """Where ATen copies or doubles whatever the scale, so do we."""
    aligned = None if "nearest" in mode else aligned
    net = Resized(scale_factor=factor, mode=mode, align_corners=aligned)
    for channels in (2, 5):
        image = torch.randn(1, channels, *shape)
        agree(net, image.requires_grad_(), tile=23)
    if len(shape) == 2:
        agree(net, image.detach().contiguous(memory_format=torch.channels_last).requires_grad_(), tile=23)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "bilinear-aa", "bicubic-aa"])
@pytest.mark.parametrize("factor", [2.0, 1.5, 1.7, 0.5, 0.6, 3.0])
def test_a_scale_that_plain_pytorch_minds_one_way(mode, factor):
    net = Resized(scale_factor=factor, mode=mode.removesuffix("-aa"), antialias=mode.endswith("-aa"))
    agree(net, torch.randn(1, 2, 50, 40).requires_grad_(), tile=23)


@pytest.mark.parametrize("shape, given, says", [
    ((60,), {"scale_factor": 1.01}, "from 60 to 60.*pixel 1 from 1 .*and from 0 "),
    ((45, 44), {"scale_factor": 2.01}, "from 45 to 90.*recompute_scale_factor"),
    ((60, 60), {"scale_factor": (1.01, 1.7)}, "from 60 to 60.*recompute_scale_factor"),
    ((6, 20, 9), {"scale_factor": 1.01}, "from 6 to 6.*recompute_scale_factor"),
    ((60, 30), {"scale_factor": 1.01, "mode": "bicubic"}, "60 to 60 by scale_factor=1.01: plain PyTorch's forward"),
    ((60, 30), {"scale_factor": (1.01, 2.0), "mode": "bilinear", "antialias": True}, "60 to 60.*PyTorch's gradient"),
    ((60, 30), {"scale_factor": (1.01, 2.0), "mode": "bicubic", "antialias": True}, "60 to 60.*PyTorch's gradient"),
    ((9, 5), {"size": (4, 1), "mode": "bilinear", "antialias": True}, "9 to 4 rows and one column"),
    ((9, 1), {"size": (13, 1), "mode": "bicubic", "antialias": True}, "9 to 13 rows and one column"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resampling_of_which_plain_pytorch_has_two_ways_is_refused(shape, given, says, dtype):
    with pytest.raises(fullframe.CaptureError, match=rf"in module \(Resized\), aten\.\w+.*{says}"):
        fullframe.tile(Resized(**given), tile=9)(torch.randn(1, 2, *shape, dtype=dtype))


@pytest.mark.parametrize("sizes", [((9, 5), (9, 1)), ((1, 5), (4, 1)), ((9, 5), (1, 1))])
def test_antialiasing_to_one_column_of_which_there_is_one_way(sizes):
    net = Resized(size=sizes[1], mode="bilinear", antialias=True)
    agree(net, torch.randn(1, 2, *sizes[0]).requires_grad_(), tile=3)


@pytest.mark.parametrize("mode, aligned", [("linear", True), ("bicubic", False), ("bicubic", True)])
@pytest.mark.parametrize("sizes", [(10000, 25000), (20000, 12345)])
def test_a_long_axis(mode, aligned, sizes):
    """The pixel below a position is that of the position in float32, in plain PyTorch, even in float64."""
    wide = () if mode == "linear" else (1,)
    net = Resized(size=(*wide, sizes[1]), mode=mode, align_corners=aligned)
    agree(net, torch.randn(1, 1, *wide, sizes[0]).requires_grad_(), tile=(*wide, 9000))


@pytest.mark.parametrize("resample", [
    lambda x: F.adaptive_avg_pool2d(x, 7), lambda x: F.avg_pool2d(x, 3, 2, 1), lambda x: F.avg_pool2d(x, 3, 1, 1),
    lambda x: F.interpolate(x, size=(7, 9), mode="area"), lambda x: F.pad(x, (3, 2, 4, 1), mode="reflect"),
    lambda x: F.pad(x, (3, 2, 4, 1), mode="replicate"), Resized(scale_factor=1.7), Resized(scale_factor=2.0),
    *(Resized(mode=mode, align_corners=aligned, antialias=wide, **given)
      for mode in ("bilinear", "bicubic") for aligned in (False, True) for wide in (False, True)
      for given in ({"scale_factor": 2.0}, {"scale_factor": 1.7}, {"size": (33, 22)}, {"size": (21, 22)})),
])  # fmt: skip
@pytest.mark.parametrize("worst", [float("inf"), float("nan")])
def test_a_pixel_that_is_not_finite_spoils_what_reads_it_only(resample, worst):
    # What filled up short lists of pixels was multiplied by 0; and plain PyTorch's own zeros in gradients were left
    # out.
    class Net(nn.Module):
        def forward(self, x):
            return resample(x)

    image = torch.randn(2, 2, 21, 22, dtype=torch.float64)
    image[0, 0, [0, 9, 20], [0, 10, 4]] = worst
    gradient = torch.randn_like(resample(image))
    gradient[1, 1, 0, 0] = gradient[1, 0, gradient.shape[2] // 2, 3] = worst
    found = []
    for run in (resample, fullframe.tile(Net(), tile=9)):
        x = image.clone().requires_grad_()
        y = run(x)
        y.backward(gradient)
        found.append([y.detach(), x.grad])
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_a_difference_of_nothing():
    """Every other image of a batch of one: the sum over no images was made by no tile."""

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            y = self.second(self.first(x).relu())
            return (y[0::2] - y[1::2]).abs(), y

    agree(Pairs(), torch.randn(1, 1, 20, 17), tile=8)
