"""The network and its losses against numbers computed with the public CosmicTagger, plain and tiled."""

from dataclasses import fields
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import fullframe
from cosmictagger.model import NetworkConfig, UResNet, count_parameters
from cosmictagger.objective import PlaneLoss

NAMES = (
    "uresnet_default",
    "sum_plain",
    "conv_resample_multiplicative",
    "block_concat",
    "norm_none_no_connection",
    "deeper",
)
LOSSES = ("none", "light", "focal")
# None is plain PyTorch; the image has 96 x 160 pixels: not dividing it, dividing it, one number, all of it
TILES = (None, (40, 72), (32, 160), 33, (96, 160))


def cases(ordinary: dict) -> list:
    """Every network, loss and tile; of the tiled ones only the `ordinary` are quick enough for every run."""
    out = []
    for name, loss, tile in product(NAMES, LOSSES, TILES):
        quick = tile is None or name in ordinary.get((loss, tile), ())
        mark = () if quick else pytest.mark.slow
        out.append(pytest.param(name, loss, tile, marks=mark, id=f"{name}-{loss}-{tile}"))
    return out


STEPS = cases(
    {
        ("light", (40, 72)): ("conv_resample_multiplicative", "block_concat"),
        ("focal", 33): ("norm_none_no_connection",),
        ("none", (32, 160)): ("uresnet_default",),
    }
)
QUICK = [("sum_plain", (40, 72)), ("deeper", (40, 72))]
FORWARDS = [
    pytest.param(
        name, tile, marks=() if (name, tile) in QUICK or tile is None else pytest.mark.slow, id=f"{name}-{tile}"
    )
    for name, tile in product(NAMES, TILES)
]


def load(reference: Path, index: dict, name: str) -> tuple[UResNet, dict[str, np.ndarray]]:
    known = {f.name for f in fields(NetworkConfig)}
    config = NetworkConfig(**{k: v for k, v in index[name].items() if k in known})
    with np.load(reference / f"{name}.npz") as file:
        arrays = dict(file)
    net = UResNet(config).double()
    state = {k.removeprefix("state/"): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("state/")}
    net.load_state_dict(state)  # strict: the names are those of the public network
    return net, arrays


def run(net: UResNet, loss: str, image: torch.Tensor, label: torch.Tensor, tile) -> torch.Tensor:
    criterion = PlaneLoss(loss)
    if tile is None:
        return criterion(net(image), label)
    return fullframe.tile(net, loss=criterion, tile=tile)(image, label)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count_and_names(reference, reference_index, name):
    net, _ = load(reference, reference_index, name)
    assert count_parameters(net) == reference_index[name]["parameters"]


def test_index_is_covered(reference_index):
    assert set(reference_index) == set(NAMES)


@pytest.mark.parametrize(("name", "loss", "tile"), STEPS)
def test_loss_gradients_and_buffers(reference, reference_index, name, loss, tile):
    net, arrays = load(reference, reference_index, name)
    image = torch.from_numpy(arrays["input"]).double()
    label = torch.from_numpy(arrays["label"]).long()
    value = run(net, loss, image, label, tile)
    assert float(value.detach()) == pytest.approx(float(arrays[f"loss/{loss}"]), rel=1e-9)
    buffers = dict(net.named_buffers())
    after = {k.removeprefix("after/"): v for k, v in arrays.items() if k.startswith("after/")}
    assert set(after) == set(buffers)
    for key, expected in after.items():
        np.testing.assert_allclose(buffers[key].numpy(), expected, rtol=1e-9, atol=1e-12, err_msg=key)
    if loss == "none":
        return  # the reference holds no gradients for it
    value.backward()
    expected = {k.removeprefix(f"grad/{loss}/"): v for k, v in arrays.items() if k.startswith(f"grad/{loss}/")}
    assert set(expected) == {k for k, _ in net.named_parameters()}
    scale = max(float(np.abs(v).max()) for v in expected.values() if v.size)
    for key, parameter in net.named_parameters():
        if not expected[key].size:
            assert parameter.grad is None or not parameter.grad.any(), key
            continue
        assert parameter.grad is not None, key
        worst = float(np.abs(parameter.grad.numpy() - expected[key]).max())
        assert worst <= 1e-5 * scale, f"{key}: off by {worst:.3g}, scale {scale:.3g}"


@pytest.mark.parametrize(("name", "tile"), FORWARDS)
def test_logits(reference, reference_index, name, tile):
    net, arrays = load(reference, reference_index, name)
    image = torch.from_numpy(arrays["input"]).double()
    call = net
    if tile is not None:
        call = fullframe.tile(net, tile=tile)
    with torch.no_grad():
        logits = torch.stack(list(call(image)), dim=1).numpy()
    expected = arrays["logits"]
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
