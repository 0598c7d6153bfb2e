"""Sums as a fixed tree over the tiles of an image: the same bits whoever adds what, and little that waits."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from fullframe.ir.graph import Op, Value
from fullframe.native import moments
from fullframe.ops.primitives.reductions import RULES
from fullframe.runtime.accumulate import Sums
from fullframe.runtime.tasks import Partials, Sum

CPU = torch.device("cpu")


def _op(name: str, kept: int = 6) -> Op:
    """A reduction over the first of two axes."""
    x = Value("x", (64, kept), torch.float64, 8)
    args = (None, (0,)) if name == "tile.moments" else (None, (0,), False)
    shape = (3, 1, kept) if name == "tile.moments" else (kept,)
    return Op(name, (x,), args, {}, Value("y", shape, torch.float64, 8), RULES[name], lambda: None)


def _partials(ops: list[Op], tiles: int, narrow: bool = False) -> list[Partials]:
    """Of so many tiles: rows of an image, some of which have none."""
    torch.manual_seed(tiles)
    found: list[Partials] = []
    for k in range(tiles):
        window = torch.randn(1 + k % 3, 6, dtype=torch.float64) + 1e3
        made: Partials = []
        for op in ops if k % 5 != 3 else []:
            rule: Any = op.rule
            part = rule.run(op, ((0, len(window)), (0, 6)), [window])
            made.append((Sum(op, None, tuple(part.shape), True), part.float() if narrow else part))
        found.append(made)
    return found


def _copied(partials: Partials) -> Partials:
    return [(place, part.clone()) for place, part in partials]


def _added(ops: list[Op], found: list[Partials], order: list[int], together: bool = False) -> list[torch.Tensor]:
    sums = Sums(ops, len(found), CPU, together=together)
    for k in order:
        sums.add(k, _copied(found[k]))
    return list(sums.finish().values())


NAMES = ["tile.sum", "tile.amax", "tile.amin", "tile.moments", "tile.prod"]


@pytest.mark.parametrize("name", NAMES)
def test_over_no_axes_every_number_stands_alone(name):
    """To torch no axes are all axes. A group norm of vectors, whose channels have no pixels, failed."""
    x = torch.randn(4, 6, dtype=torch.float64)
    op, moments_ = _op(name), name == "tile.moments"
    op = replace(op, args=(None, ()) if moments_ else (None, (), False))
    rule: Any = op.rule
    made = rule.run(op, ((0, 4), (0, 6)), [x])
    assert torch.equal(made, torch.stack([torch.ones_like(x), x, torch.zeros_like(x)]) if moments_ else x)


@pytest.mark.parametrize("tiles", [1, 2, 3, 7, 8, 33, 75])
def test_same_bits_in_any_order_and_all_of_a_level_together(tiles):
    ops = [_op(name) for name in NAMES]
    found, order = _partials(ops, tiles), list(range(tiles))
    truth = _added(ops, found, order)
    for seed in range(3):
        random.Random(seed).shuffle(order)
        assert all(map(torch.equal, truth, _added(ops, found, order)))
        assert all(map(torch.equal, truth, _added(ops, found, order, together=True)))
    assert all(map(torch.equal, truth, _added(ops, found, order[::-1])))


@pytest.mark.parametrize("tiles", [2, 8, 11, 64])
@pytest.mark.parametrize("parts", [2, 3])
def test_shares_of_an_image_make_the_same_bits(tiles, parts):
    """As of halves, and of parts that are no whole subtrees."""
    ops = [_op(name) for name in NAMES]
    found = _partials(ops, tiles)
    truth = _added(ops, found, list(range(tiles)))
    shares = []
    for k in range(parts):
        share = Sums(ops, tiles, CPU)
        for tile in range(k * tiles // parts, (k + 1) * tiles // parts):
            share.add(tile, _copied(found[tile]))
        assert len(share.nodes) <= 2 * tiles.bit_length()
        shares.append(share)
    for order in (shares, shares[::-1]):
        whole = Sums(ops, tiles, CPU)
        for share in order:
            whole.join({place: {key: t.clone() for key, t in node.items()} for place, node in share.nodes.items()})
        assert all(map(torch.equal, truth, whole.finish().values()))


@pytest.mark.parametrize("turned", [False, True])
def test_few_nodes_wait(turned):
    ops = [_op("tile.sum")]
    for tiles in (1, 2, 5, 64, 100):
        found, sums = _partials(ops, tiles), Sums(ops, tiles, CPU)
        for k in reversed(range(tiles)) if turned else range(tiles):
            sums.add(k, found[k])
        assert sums.most <= max(1, (tiles - 1).bit_length())


def test_partial_results_in_the_type_of_the_output_are_added_in_float64():
    ops = [_op("tile.sum")]
    found = _partials(ops, 9, narrow=True)
    (made,) = _added(ops, found, list(range(9)))
    exact = sum(part.double() for partials in found for _, part in partials)
    assert made.dtype == torch.float64
    torch.testing.assert_close(made, exact, rtol=1e-14, atol=0)


def test_parts_of_an_output():
    """Tiles of two images, whose sums are apart."""
    op = _op("tile.sum")
    sums = Sums([op], 6, CPU)
    for k in range(6):
        region = ((0, 2),) if k < 3 else ((2, 6),)
        part = torch.full((region[0][1] - region[0][0],), float(k), dtype=torch.float64)
        sums.add(k, [(Sum(op, region, tuple(part.shape), True), part)])
    assert sums.finish()[op].tolist() == [3, 3, 12, 12, 12, 12]


def test_moments_in_c_and_by_torch(monkeypatch):
    """The same bits; of numbers whose mean is large, of constants, of infinite ones, and of none."""
    torch.manual_seed(0)

    def moments_of(x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(0) if len(x) else torch.zeros(x.shape[1:], dtype=x.dtype)
        return torch.stack([torch.full_like(mean, len(x)), mean, (x - mean).square().sum(0)])

    x = torch.randn(7, 5, dtype=torch.float64) + 1e6
    x[:, 1] = 0.5
    x[2, 2] = float("inf")
    for split in (0, 1, 3, 7):
        a, b = moments_of(x[:split]), moments_of(x[split:])
        found = a.clone()
        moments.combine_moments(found, b)
        with monkeypatch.context() as patch:
            patch.setattr(moments, "own", lambda name: None)
            moments.combine_moments(a, b)
        torch.testing.assert_close(a, found, rtol=0, atol=0, equal_nan=True)
        whole = moments_of(x)
        assert torch.equal(found[:2, 1], whole[:2, 1]) and found[1, 2] == float("inf")
        torch.testing.assert_close(found[:, [0, 3, 4]], whole[:, [0, 3, 4]], rtol=1e-9, atol=0)


def test_only_small_sums_wait_to_be_combined_together():
    ops = [_op("tile.sum"), _op("tile.sum", kept=2000)]
    sums = Sums(ops, 64, CPU, together=True)
    for k in range(31):
        parts = [torch.ones(op.output.shape, dtype=torch.float64) for op in ops]
        sums.add(k, [(Sum(op, None, op.output.shape, True), part) for op, part in zip(ops, parts, strict=True)])
        held = sum(part.numel() > 6 for node in sums.nodes.values() for part in node.values())
        assert held <= 5
    assert len(sums.nodes) == 31 + 5
