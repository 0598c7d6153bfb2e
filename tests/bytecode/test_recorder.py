"""Bytecode: the same bits as in Python, and what has no instruction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fullframe
from fullframe import torch_compat
from fullframe.bytecode.copies import laid_out
from fullframe.bytecode.libtorch import bytecode_available
from fullframe.bytecode.recorder import COPY, WORKSPACE, Recorder
from fullframe.codegen.group import Group, Operand, Reduction, Ref
from fullframe.codegen.kernel import build

pytestmark = pytest.mark.skipif(
    not bytecode_available(), reason="no compiler, or a PyTorch without the functions that bytecode calls"
)


ATEN = torch.ops.aten


def _run(work, *bases):
    """What a function makes of arrays in Python, and from its bytecode."""
    recorder = Recorder([torch.empty(0), *bases])
    with torch.no_grad(), recorder:
        made = work(*bases)
    bytecode = recorder.finish([made])
    assert bytecode is not None, recorder.refused
    again = bytecode.run([0, *(b.data_ptr() for b in bases)])
    assert again is not None
    return made, again[0]


def test_a_table_is_not_taken_for_what_was_where_it_lies() -> None:
    """It is made while a tile is recorded, without being noted, where memory is free."""
    x = torch.randn(100, 100)
    recorder = Recorder([torch.empty(0), x])
    with torch.no_grad(), recorder:
        some = [x + k for k in range(20)]
        made, places = some[3] * 2, {t.data_ptr() for t in some}
        del some
        tried = []
        with torch_compat.without_modes():
            while not tried or tried[-1].data_ptr() not in places:
                assert len(tried) < 100
                tried.append(torch.randn(100, 100))
        recorder.tables = [((tried[-1],), None)]
        made = made * tried[-1]
    bytecode = recorder.finish([made])
    assert bytecode is not None
    again = bytecode.run([0, x.data_ptr()])
    assert again is not None and torch.equal(again[0], made)


def test_new_arrays_lie_in_one_workspace_where_others_were() -> None:
    x = torch.randn(100, 100)
    recorder = Recorder([torch.empty(0), x])
    made = x
    with torch.no_grad(), recorder:
        for _ in range(10):
            made = F.pad(made, (1, 0, 1, 0))
    bytecode = recorder.finish([made])
    assert bytecode is not None
    code, nbytes = bytecode.words[:2]
    assert code == WORKSPACE and nbytes <= 2 * made.nbytes + 128
    for _ in range(2):
        again = bytecode.run([0, x.data_ptr()])
        assert again is not None and torch.equal(again[0], made)


def _packed(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "work",
    [
        lambda x, w: torch.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        lambda x, w: torch.convolution(x[:, :, 2:-1], w, w.new_zeros(5), [2, 1], [0], [1, 2], False, [0], 1),
        lambda x, w: torch.convolution(F.pad(x, (1, 0, -1, 2)), w, None, [1], [0], [1], False, [0], 1),
        lambda x, w: x.contiguous().add_(x)[:, :, ::2, 1:].clone(),
        lambda x, w: x.new_zeros(2, 4, 9, 12).copy_(x).add_(x[:1]),
        lambda x, w: F.pad(x, (0, 0, 1, 3))[..., 2:],
        lambda x, w: F.interpolate(x, size=(13, 20), mode="bilinear"),
        lambda x, w: F.interpolate(x, scale_factor=2.5, mode="bilinear", recompute_scale_factor=False),
        lambda x, w: x.log_softmax(1),
        lambda x, w: x.sin(),
        lambda x, w: torch.stack([x, x.cos()], 1),
        lambda x, w: x.topk(2, 1)[0],
        lambda x, w: 2.5 * x + x / 3 - 1,
        lambda x, w: torch.sub(x, w[:1, :, 1:2, 1:2], alpha=0.3),
        lambda x, w: x.sum() * 0.1 + 3,
        lambda x, w: (x.bfloat16() * 0.3 + x.bfloat16()).double() + 1e-5,
        lambda x, w: x.cos().sin_(),
        lambda x, w: F.pad(x, (1, 1), value=float("-inf")),
        lambda x, w: x.new_full((5,), 1.5, dtype=torch.bfloat16),
        lambda x, w: torch.full((2, 3), 7) + torch.full((2, 3), 2),
        lambda x, w: torch.full((), 41) + 1,
        lambda x, w: torch.full((2, 3), 7) + 2,
        lambda x, w: torch.where(x > x.mean(), x, 0),
        lambda x, w: x.new_zeros(2, 4, 9, 12, dtype=torch.float64).copy_(x).add_(x).add_(x.bfloat16()),
        lambda x, w: ATEN._unsafe_view(x.contiguous(), (2, 36, 12)).sin(),
    ],
)
def test_calls_in_bytecode(work):
    x, w = _packed(2, 4, 9, 12), _packed(5, 4, 3, 3)
    made, again = _run(work, x, w)
    assert torch.equal(made, again)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str
)
@pytest.mark.parametrize("sizes", [(1, 3, 5), (3, 64, 17), (2, 16, 48), (70, 1, 33), (5, 130, 1)])
@pytest.mark.parametrize("order", [(0, 2, 1), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_copies_turn_axes(dtype, sizes, order):
    """Into another order of the axes, whole and in part, and back from a part."""
    drawn = (torch.randn(sizes) * 100).to(dtype)

    def whole(x):
        return x.permute(order).contiguous()

    def part(x):
        made = x.new_zeros(tuple(n + 2 for n in x.permute(order).shape))
        made[1:-1, 1:-1, 1:-1] = x.permute(order)
        return made[:, 1:, :-1].permute(order).contiguous()

    for work in (whole, part):
        made, again = _run(work, drawn)
        assert torch.equal(made, again)
    turned = drawn.permute(order)
    made = laid_out(turned, turned.contiguous().stride())
    assert torch.equal(made, turned) and made.is_contiguous()


@pytest.mark.parametrize("mask", [[True, False, False], [False, True, False]])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_in_bytecode(mask, transposed):
    x, w = _packed(2, 4, 9, 12), _packed(4, 4, 3, 3)
    rest = ([1, 1], [1, 1], [1, 1], transposed, [0, 0], 1)
    g = torch.randn_like(torch.convolution(x, w, None, *rest))

    def work(g, x, w):
        return ATEN.convolution_backward(g, x, w, None, *rest, mask)[mask.index(True)]

    made, again = _run(work, g, x, w)
    assert torch.equal(made, again)


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (lambda x: x.clamp(1, 2), "aten.clamp.default with a"),
        (lambda x: torch.rand_like(x), "aten.rand_like.default"),
        (lambda x: x.masked_select(x > 0), "aten.masked_select.default"),
        (lambda x: torch.tensor([1.0, 2.0]) + x[0, :2], "lift_fresh"),
        (lambda x: torch.arange(3) - torch.ones(3, dtype=torch.int64), "a sum of torch.int64"),
        (lambda x: torch.arange(4) * 0.5, "0.5 beside torch.int64"),
        (lambda x: torch.arange(4).gt(0) + 0.5, "0.5 beside torch.bool"),
        (lambda x: torch.arange(4).eq(2.0), "2.0 beside torch.int64"),
        (lambda x: x.sum().bfloat16() * 0.1, "0.1 beside torch.bfloat16"),
        (lambda x: torch.linalg.inv(x[:3, :3]), "_linalg_check_errors"),
        (lambda x: x.to_mkldnn().to_dense(), "storage"),
        (lambda x: torch.linspace(0, 1, 100_000) + x[0, 0], "large"),
        (lambda x: x.new_zeros(3, 4, dtype=torch.float16).add_(x), "a sum of torch.float32 in torch.float16"),
        (lambda x: x.clone().add_(OTHER), "elsewhere"),
    ],
)
def test_what_has_no_word_is_refused(work, why):
    x = torch.randn(3, 4)
    recorder = Recorder([x])
    with torch.no_grad(), recorder:
        made = work(x)
    assert recorder.finish([made]) is None
    assert why in recorder.refused


OTHER = torch.randn(3, 4)


def test_arrays_that_share_memory_are_refused():
    x = torch.randn(4, 4)
    assert Recorder([x, x[1:]]).refused


def test_many_axes_are_refused():
    x = torch.randn([2] * 12)
    recorder = Recorder([x])
    with torch.no_grad(), recorder:
        made = x.permute(*reversed(range(12))).contiguous()
    assert recorder.finish([made]) is None and "12 axes" in recorder.refused


@pytest.mark.parametrize("how", ["conjugate", "negative", "inference", "new"])
def test_what_looks_like_a_copy_and_is_not(how):
    with torch.inference_mode(how == "inference"):
        x = torch.randn(4, 6, dtype=torch.complex64 if how == "conjugate" else torch.float32)
    recorder = Recorder([x])
    with torch.no_grad(), recorder:
        if how == "conjugate":
            made = x.conj().clone()
        elif how == "negative":
            made = torch.empty_like(x).copy_(torch._neg_view(x))
        elif how == "inference":
            made = x.t().contiguous()
        else:
            made = x.clone().add_(torch.tensor(1.0))
    assert recorder.finish([made]) is None


def test_a_sum_that_nobody_kept_is_forgotten():
    group = Group(2, (Operand(torch.float64, (False,) * 2),), (), (), (Reduction(Ref(0), "sum", (0,)),))
    kernel: Any = build(group)
    x, w = torch.randn(7, 4096, dtype=torch.float64), torch.randn(4096, dtype=torch.float64)
    for _ in range(20):  # until the library gives out the same memory again
        recorder = Recorder([x, w])
        call, places = kernel.call([x], []), [x.data_ptr()]
        sums = call(places)
        recorder.kernel(call, [x], places, [], sums)
        address = sums[0].data_ptr()
        del sums
        with torch.no_grad(), recorder:
            made = w.clone()
        bytecode = recorder.finish([made])
        assert bytecode is not None
        again = bytecode.run([x.data_ptr(), w.data_ptr()])
        assert again is not None and torch.equal(again[0], made)
        if made.data_ptr() == address:
            return


@pytest.mark.parametrize("twice", [False, True])
def test_results_are_made_where_they_are_handed_out(twice):
    """And are not copied there: but for what is a part of an array, or is handed out already."""

    def work(x):
        made = x.permute(0, 2, 3, 1).contiguous()
        return [made, made if twice else made[:1], x.new_zeros(3, 5)]

    x = torch.randn(2, 3, 4, 5)
    recorder = Recorder([torch.empty(0), x])
    with recorder:
        made = work(x)
    bytecode = recorder.finish(made)
    assert bytecode is not None
    for _ in range(2):
        found = bytecode.run([0, x.data_ptr()])
        assert found is not None and all(torch.equal(a, b) for a, b in zip(made, found, strict=True))
        assert found[0].data_ptr() % 64 == 0
        for t in found:
            t.zero_()  # they are changed, and none may be another's
    copies = sum(words[0] == COPY for words in recorder._work)
    assert copies == 2  # the array itself, and one result


def test_small_results_do_not_keep_large_ones():
    x = torch.randn(200, 300)
    recorder = Recorder([x])
    with torch.no_grad(), recorder:
        made = [x.clone(), x[:3, :4].clone()]
    bytecode = recorder.finish(made)
    assert bytecode is not None
    large, small = bytecode.run([x.data_ptr()]) or made
    assert torch.equal(large, made[0]) and torch.equal(small, made[1])
    assert small.untyped_storage().nbytes() == small.nbytes < large.nbytes


def test_every_tile_of_an_ordinary_network_is_in_bytecode():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    step = fullframe.tile(net, loss=F.cross_entropy, budget="1 GB")
    x, y = torch.randn(1, 1, 40, 40), torch.randint(0, 4, (1, 40, 40))
    for count in range(1, 4):
        step(x, y).backward()
        assert net[1].num_batches_tracked == count
    tiles = next(line for line in step.explain().splitlines() if line.startswith("tiles:"))
    assert "in Python" not in tiles
