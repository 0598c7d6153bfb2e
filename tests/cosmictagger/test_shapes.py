"""Configurations read from the shapes of a state dict."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from cosmictagger.data import DataError
from cosmictagger.model import VARIANTS, NetworkConfig, UResNet
from cosmictagger.shapes import infer_config
from cosmictagger.weights import load_weights

TINY = NetworkConfig(2, 3, 1, 1, 1, 3, 4)
CHANGES = [
    {}, {"n_initial_filters": 3}, {"depth": 1}, {"depth": 2}, {"blocks_per_layer": 2}, {"blocks_deepest_layer": 3},
    {"blocks_final": 0}, {"filter_size_deepest": 5}, {"bottleneck_deepest": 7}, {"residual": False}, {"bias": False},
    {"normalization": "none"}, {"growth_rate": "multiplicative"}, {"downsampling": "convolutional"},
    {"upsampling": "convolutional"}, {"block_concat": True},
    {"downsampling": "convolutional", "upsampling": "convolutional", "growth_rate": "multiplicative"},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_setting_is_read_from_the_shapes(change):
    config = replace(TINY, **change)
    assert infer_config(UResNet(config).state_dict()) == config


@pytest.mark.parametrize("name", VARIANTS)
def test_published_networks_are_recognised(name):
    with torch.device("meta"):
        assert infer_config(UResNet(VARIANTS[name]).state_dict()) == VARIANTS[name]


@pytest.mark.parametrize("connections", ["sum", "none"])
def test_what_shapes_do_not_tell_is_asked_for(connections, tmp_path):
    net = UResNet(replace(TINY, connections=connections))
    torch.save({"state_dict": net.state_dict()}, tmp_path / "model.ckpt")
    with pytest.raises(DataError, match="whether skips are added or dropped; say --connections"):
        load_weights(tmp_path / "model.ckpt")
    assert load_weights(tmp_path / "model.ckpt", connections=connections).config == net.config
    with pytest.raises(DataError, match="joins its skips by concat, not sum"):
        infer_config(UResNet(TINY).state_dict(), "sum")


def test_tensors_of_another_network_are_refused():
    state = UResNet(TINY).state_dict()
    lost = {key: value for key, value in state.items() if "main_module.bottleneck" not in key}
    for wrong in ({}, lost, {**state, "initial_convolution.conv.weight": torch.zeros(3)}):
        with pytest.raises(DataError, match="not the tensors of a CosmicTagger network"):
            infer_config(wrong)


def test_the_public_networks(reference, reference_index):
    known = {f.name for f in fields(NetworkConfig)}
    for name, described in reference_index.items():
        config = NetworkConfig(**{k: v for k, v in described.items() if k in known})
        with np.load(reference / f"{name}.npz") as file:
            state = {k.removeprefix("state/"): torch.empty(file[k].shape) for k in file if k.startswith("state/")}
        told = None if config.connections == "concat" else config.connections
        found = infer_config(state, told)
        assert UResNet(found).state_dict().keys() == state.keys()
        assert found == (replace(config, residual=found.residual) if not (config.blocks_per_layer) else config)
