"""The four named networks, and images they refuse."""

import pytest
import torch

from cosmictagger.model import (
    VARIANTS,
    NetworkConfig,
    UResNet,
    check_image_shape,
    count_parameters,
    expect_background,
)

SMALL = NetworkConfig(
    n_initial_filters=2, depth=2, blocks_per_layer=1, blocks_deepest_layer=1, blocks_final=0, bottleneck_deepest=4
)


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [("uresnet", 18_382_131), ("a21", 8_510_547), ("scc21", 18_367_891), ("polaris", 1_926_403)],
)
def test_published_parameter_counts(variant, parameters):
    with torch.device("meta"):
        assert count_parameters(UResNet(VARIANTS[variant])) == parameters


def test_output_is_one_map_of_logits_per_plane():
    logits = UResNet(SMALL)(torch.rand(2, 3, 8, 12))
    assert isinstance(logits, tuple)
    assert [tuple(x.shape) for x in logits] == [(2, 3, 8, 12)] * 3


def test_initial_weights_are_xavier_uniform_with_zero_bias():
    torch.manual_seed(0)
    conv = UResNet().net_core.down_blocks.blocks[0].convolution_1.conv
    bound = (6 / (16 * 9 + 16 * 9)) ** 0.5
    assert conv.bias.abs().max() == 0
    assert 0.95 * bound < conv.weight.abs().max() <= bound


@pytest.mark.parametrize("shape", [(1, 3, 10, 12), (1, 3, 12, 10), (1, 2, 8, 8), (3, 8, 8), (1, 3, 0, 8)])
def test_unsuitable_image_is_refused_in_one_line(shape):
    with pytest.raises(ValueError, match=r"multiples of 4|must be \(batch, 3 planes") as error:
        UResNet(SMALL)(torch.zeros(shape))
    assert "\n" not in str(error.value)


def test_full_images_suit_every_variant():
    for config in VARIANTS.values():
        check_image_shape((1, 3, 1280, 2048), config)


@pytest.mark.parametrize("change", [{"depth": 0}, {"n_initial_filters": 0}, {"filter_size_deepest": 4}])
def test_impossible_configuration_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        NetworkConfig(**change)


def test_network_can_start_by_expecting_background():
    net = UResNet(SMALL)
    with torch.no_grad():
        net.bottleneck.weight.zero_()
    expect_background(net, 0.99)
    assert torch.allclose(net(torch.rand(1, 3, 8, 8))[0].softmax(1)[:, 0], torch.tensor(0.99))
    with pytest.raises(ValueError, match="background is 1"):
        expect_background(net, 1.0)
    with pytest.raises(ValueError, match="without bias"):
        expect_background(UResNet(NetworkConfig(**{**vars(SMALL), "bias": False})), 0.9)


def test_planes_stay_apart_with_block_concat():
    net = UResNet(NetworkConfig(**{**vars(SMALL), "block_concat": True})).eval()
    image = torch.rand(1, 3, 8, 8)
    other = image.clone()
    other[:, 1] += 1
    with torch.no_grad():
        a, b = net(image), net(other)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[2], b[2])
    assert not torch.equal(a[1], b[1])
