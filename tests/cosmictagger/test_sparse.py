"""Events that become dense by regions: the same numbers as whole arrays, and the same step."""

import numpy as np
import pytest
import torch
from torch import nn

import fullframe
from cosmictagger.data import DataError, Event, Pixels
from cosmictagger.objective import PlaneLoss
from cosmictagger.sparse import SparseBatch, sparse_batch


def drawn(seed: int, shape: tuple[int, int] = (24, 40)) -> Event:
    draws = np.random.default_rng(seed)

    def planes(values: np.ndarray) -> tuple[Pixels, ...]:
        found = []
        for _ in range(3):
            places = draws.choice(shape[0] * shape[1], 50, replace=False)
            rows, columns = np.unravel_index(places, shape)
            found.append(Pixels(rows, columns, draws.choice(values, 50).astype(np.float32)))
        return tuple(found)

    return Event(shape, planes(np.arange(1.0, 9.0)), planes(np.array([1.0, 2.0])))


def test_regions_are_those_of_whole_arrays() -> None:
    events = [drawn(k) for k in range(3)]
    charge, label = sparse_batch(events)
    images, truths = (np.stack(x) for x in ([e.image() for e in events], [e.truth() for e in events]))
    assert charge.shape == label.shape == images.shape
    draws = np.random.default_rng(9)
    for _ in range(50):
        ends = [np.sort(draws.choice(n + 1, 2, replace=False)) for n in charge.shape]
        region = tuple(slice(int(a), int(b)) for a, b in ends)
        for batch, whole in ((charge, images), (label, truths)):
            made = batch[region]
            assert made.dtype == batch.dtype
            assert torch.equal(made, torch.from_numpy(np.ascontiguousarray(whole[region])))


def test_a_step_reads_them_tile_by_tile() -> None:
    class Planes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
            self.head = nn.Conv2d(6, 9, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.head(self.body(x)).chunk(3, 1)

    torch.manual_seed(0)
    net = Planes()
    events = [drawn(k) for k in range(4)]
    found = []
    whole = [torch.from_numpy(np.stack(x)) for x in ([e.image() for e in events], [e.truth() for e in events])]
    for data in (whole, sparse_batch(events)):
        net.zero_grad()
        step = fullframe.tile(net, loss=PlaneLoss("light"), budget="1 GB", tile=(10, 17))
        loss = step(*data)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    assert len(found[0]) == 7
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_makes_no_batch_is_refused() -> None:
    event = drawn(0)
    with pytest.raises(ValueError, match="make no batch"):
        sparse_batch([event, drawn(1, (24, 42))])
    with pytest.raises(ValueError, match="make no batch"):
        sparse_batch([])
    with pytest.raises(DataError, match="no labels"):
        sparse_batch([event, Event(event.shape, event.charge)])
    with pytest.raises(ValueError, match="planes make no batch"):
        SparseBatch([event.charge, event.charge[:2]], event.shape, torch.float32)
