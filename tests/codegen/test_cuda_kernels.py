"""Generated CUDA kernels against ATen: on a CUDA device where there is one, and emulated on any machine."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import test_kernels as base
import torch
from emulated import Emulator
from hypothesis import given, settings
from test_kernels import BF16, BOOL, F32, F64, I64

from fullframe.codegen import cuda_launch as grid
from fullframe.codegen import kernel
from fullframe.codegen import kernel as kernels
from fullframe.codegen.group import Call, Group, Node, Operand, Reduction, Ref
from fullframe.codegen.kernel import Plain
from fullframe.codegen.toolchain import cuda_kernel as cuda
from fullframe.codegen.toolchain import nvrtc
from fullframe.codegen.toolchain.cuda_kernel import DeviceKernel

EMULATED = torch.device("cpu")
CUDA = torch.device("cuda", 0)
no_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
no_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
Make = Callable[[Group], DeviceKernel]


def emulated(group: Group) -> DeviceKernel:
    assert not kernel.unsupported(group, CUDA)
    return DeviceKernel(group, Emulator())


def on_device(group: Group) -> DeviceKernel:
    made = kernels.build(group, device=CUDA)
    assert isinstance(made, DeviceKernel), made.reason
    return made


@pytest.fixture(params=[pytest.param("emulated", marks=no_compiler), pytest.param("cuda", marks=no_device)])
def place(request: pytest.FixtureRequest) -> torch.device:
    return EMULATED if request.param == "emulated" else CUDA


@pytest.fixture
def make(place: torch.device) -> Make:
    return emulated if place == EMULATED else on_device


def moved(tensors: list[torch.Tensor], place: torch.device) -> list[torch.Tensor]:
    """Copies there with the same strides."""
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=place).copy_(t) for t in tensors]


def check(made: DeviceKernel, operands: list[torch.Tensor], place: torch.device) -> None:
    """The numbers of ATen, into new outputs."""
    operands = moved(operands, place)
    base.check_affine(made, operands, [torch.full_like(operands[0], 99) for _ in made.group.outputs])


# ---- the loop -----------------------------------------------------------------------------------------------

AXES = [(0, 2, 3), (2, 3), (1,), (0, 1, 2, 3), (0, 1, 3), ()]
SHAPES = [(2, 3, 5, 8), (1, 64, 2, 3), (2, 8, 30, 40), (1, 2, 1, 500), (3, 1, 1, 9), (1, 1, 1, 1), (1, 3, 1, 0), (5, 7, 1, 1)]  # fmt: skip


def reducing(dtype: torch.dtype, axes: tuple[int, ...]) -> Group:
    """Sums and moments of what varies along all axes and what does not."""
    kinds = (Reduction(Ref(7), "sum", axes), Reduction(Ref(9), "moments", axes), Reduction(Ref(1), "sum", axes))
    return base.affine(dtype, kinds)


@pytest.mark.parametrize("axes", AXES)
def test_reductions(make: Make, place: torch.device, axes: tuple[int, ...]) -> None:
    made = make(reducing(F32, axes))
    for shape in SHAPES:
        operands = base.affine_operands(shape, F32)
        check(made, operands, place)
        operands[0] = operands[0].contiguous()
        check(made, operands, place)
        check(made, [t.transpose(2, 3) if t.dim() else t for t in operands], place)


def test_reductions_over_different_axes(make: Make, place: torch.device) -> None:
    """With some in common: as the backward of group norm has."""
    axes = ((0, 2, 3), (2, 3), (1, 2, 3), (0, 1, 2, 3))
    kinds = [Reduction(Ref(7 + 2 * (i % 2)), kind, a) for i, a in enumerate(axes) for kind in ("sum", "moments")]
    made = make(base.affine(F32, tuple(kinds)))
    for shape in SHAPES:
        check(made, base.affine_operands(shape, F32), place)
    x = torch.full((2, 3, 5, 8), 0.1, device=place)
    moments = tuple(Reduction(Ref(0), "moments", a) for a in axes)
    made = make(Group(4, (Operand(F32, (False,) * 4),), (), (), moments))
    for _, mean, spread in made.run([x]):
        assert (mean == x[0, 0, 0, 0].double()).all() and (spread == 0).all()


@pytest.mark.parametrize("dtype", [BF16, F64, F32])
@pytest.mark.parametrize("reduces", [True, False])
def test_formats(make: Make, place: torch.device, dtype: torch.dtype, reduces: bool) -> None:
    made = make(reducing(dtype, (0, 2, 3)) if reduces else base.affine(dtype))
    for shape in SHAPES:
        operands = base.affine_operands(shape, dtype)
        check(made, operands, place)
        operands[0] = operands[0].contiguous()
        check(made, operands, place)


@pytest.mark.parametrize("reduces", [True, False])
def test_windows_of_larger_maps(make: Make, place: torch.device, reduces: bool) -> None:
    """Aligned and not, with steps; what is outside the window stays."""
    made = make(reducing(F32, (0, 2, 3)) if reduces else base.affine(F32))
    for channels in (3, 8):
        operands = moved(base.affine_operands((2, 2 * channels, 12, 18), F32), place)
        x, maps = operands[0], operands[3]
        cuts = [
            (slice(None), slice(0, channels), slice(3, 7), slice(5, 9)),
            (slice(1, 2), slice(channels, None), slice(None), slice(None)),
            (slice(None), slice(1, channels), slice(2, None), slice(4, 12)),
            (slice(None), slice(None, None, 2), slice(None, None, 3), slice(None, None, 2)),
        ]
        for cut in cuts:
            for layout in (torch.channels_last, torch.contiguous_format):
                big = [torch.full_like(x, 99, memory_format=layout) for _ in range(2)]
                part = [
                    x.contiguous(memory_format=layout)[cut],
                    operands[1][:, cut[1]],
                    operands[2][:, cut[1]],
                    maps[(cut[0], slice(None), *cut[2:])],
                    operands[4],
                ]
                base.check_affine(made, part, [b[cut] for b in big])
                outside = torch.ones_like(x, dtype=BOOL)
                outside[cut] = False
                assert all((b[outside] == 99).all() for b in big)


@pytest.mark.parametrize("reduces", [True, False])
def test_counting_with_64_bits(
    make: Make, place: torch.device, reduces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "OFFSET_LIMIT", 0)
    made = make(reducing(BF16, (0, 2, 3)) if reduces else base.affine(BF16))
    for shape in SHAPES:
        check(made, base.affine_operands(shape, BF16), place)


def test_in_place(make: Make, place: torch.device) -> None:
    made = make(reducing(F32, (0, 2, 3)))
    for shape in ((1, 16, 5, 40), (2, 3, 4, 5), (1, 17, 3, 9), (1, 4, 1, 1)):
        operands = moved(base.affine_operands(shape, F32), place)
        expected = [torch.empty_like(operands[0]) for _ in range(2)]
        theirs = kernels.Plain(made.group).run(operands, expected)
        ours = made.run(operands, [operands[0], torch.empty_like(operands[0])])
        assert torch.equal(operands[0], expected[0]) and torch.equal(ours[0], theirs[0])


def test_ranks(make: Make, place: torch.device) -> None:
    for rank in (1, 2, 5):
        whole = (False,) * rank
        nodes = (Node("aten.add.Tensor", (Ref(0), Ref(1)), F32), Node("aten.mul.Scalar", (Ref(2), 3), F32))
        made = make(Group(rank, (Operand(F32, whole),) * 2, nodes, (Ref(3),), (Reduction(Ref(2), "sum", (0,)),)))
        for shape in ((7,) * rank, (1,) * rank, (3, 1, 70, 1, 2)[:rank], (500, 1, 1, 1, 1)[:rank], (0,) * rank):
            x = torch.randint(-9, 9, shape).float()
            y = torch.randint(-9, 9, shape[::-1]).float().permute(*range(rank)[::-1])
            check(made, [x, y], place)


def test_a_call_knows_its_layout_only(make: Make, place: torch.device) -> None:
    made = make(base.affine(F32, (Reduction(Ref(7), "sum", (1,)),)))
    first, second = (moved(base.affine_operands((1, 8, 4, n), F32), place) for n in (8, 8))
    second[0].add_(1)
    outputs = [torch.empty_like(first[0]) for _ in range(2)]
    call = made.call(first, outputs)
    assert made.call(second, outputs) is call and isinstance(call, Call)
    (total,) = call([t.data_ptr() for t in (*second, *outputs)])
    expected = [torch.empty_like(o) for o in outputs]
    (theirs,) = kernels.Plain(made.group).run(second, expected)
    assert torch.equal(total, theirs) and torch.equal(outputs[0], expected[0])


# ---- partial sums -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_moments_are_accurate(make: Make, place: torch.device, dtype: torch.dtype) -> None:
    made = make(base.moments_group(dtype))
    draw = torch.Generator().manual_seed(5)
    for shape in ((1, 16, 32, 64), (2, 3, 30, 101), (1, 5, 1, 7), (1, 40, 2, 1)):
        normal = torch.randn(shape, generator=draw, dtype=F64)
        spike = torch.where(torch.arange(shape[3]) + torch.arange(shape[2])[:, None] == 0, 1000.0, normal)
        for exact in (normal, normal * 1e-2 + 1000, spike, (normal > 1) * 0.7 + 0.1):
            x = exact.to(dtype).to(place)
            for layout in (torch.channels_last, torch.contiguous_format):
                ours = made.run([x.contiguous(memory_format=layout)])
                theirs = kernels.Plain(made.group).run([x])
                assert torch.equal(ours[0][0], theirs[0][0])
                torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-9)
                again = made.run([x.contiguous(memory_format=layout)])
                assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_equal_values_have_no_spread(make: Make, place: torch.device) -> None:
    made = make(base.moments_group(F32))
    for shape in ((1, 3, 50, 60), (2, 8, 30, 41), (1, 1, 1, 1)):
        for layout in (torch.channels_last, torch.contiguous_format):
            x = torch.full(shape, 0.1, device=place).contiguous(memory_format=layout)
            (count, mean, spread), _ = made.run([x])
            assert (count == x.numel() / shape[1]).all() and (mean == x[0, 0, 0, 0].double()).all()
            assert (spread == 0).all()


def test_nan_and_infinity_reach_the_sums(make: Make, place: torch.device) -> None:
    made = make(base.moments_group(F32))
    for value in (float("nan"), float("inf")):
        for at in (0, 250):
            for layout in (torch.channels_last, torch.contiguous_format):
                x = torch.randn(1, 3, 10, 32).contiguous(memory_format=layout)
                x[0, 1, at // 32, at % 32] = value
                (moments, total) = made.run(moved([x], place))
                assert not total[1].isfinite() and not moments[2, 1].isfinite() and not moments[1, 1].isfinite()
                assert moments[:, [0, 2]].isfinite().all() and total[[0, 2]].isfinite().all()


# ---- calls --------------------------------------------------------------------------------------------------


DIFFERENT = ("hardswish_backward", "hardtanh_backward", "elu_backward", "threshold.")
"""Calls in which PyTorch's devices differ for NaN or at the corners of the function."""


def check_calls(made: DeviceKernel | Plain, place: torch.device, chunk: int, dtype: torch.dtype) -> None:
    """Some calls on numbers of all kinds."""
    assert made.compiled, made.reason
    calls, shape = base.CHUNKS[chunk], (2, 5, 7, 8)
    names = base.used(calls)
    operands = [base.window(shape, BOOL if "mask" in n else dtype, base.INPUTS.index(n)).to(place) for n in names]
    ours, theirs = (moved(base.empty_like_outputs(made.group, shape), place) for _ in range(2))
    made.run(operands, ours)
    kernels.Plain(made.group).run(operands, theirs)
    special = torch.tensor(base.SPECIAL, dtype=dtype, device=place)
    corner = torch.stack([torch.isin(x, special) | ~x.isfinite() for x in operands if x.dtype == dtype]).any(0)
    for call, a, b in zip(calls, ours, theirs, strict=True):
        gradient = operands[0] if "backward" in call[0] else None
        if call[0].startswith(DIFFERENT):
            a, b = a.masked_fill(corner, 0), b.masked_fill(corner, 0)
        base.assert_close(a, b, call, ulps=8 if gradient is None else 64, gradient=gradient)


@no_compiler
@pytest.mark.parametrize("chunk", [0, len(base.CHUNKS) - 2])
def test_some_calls_emulated(chunk: int) -> None:
    check_calls(emulated(base.calls_group(base.CHUNKS[chunk], BF16)), EMULATED, chunk, BF16)


@pytest.fixture(scope="module")
def every_call() -> dict[tuple[torch.dtype, int], Any]:
    """The calls in groups, for each dtype, compiled together."""
    keys = [(dtype, i) for dtype in base.FLOATS for i in range(len(base.CHUNKS))]
    made = kernels.build_many([base.calls_group(base.CHUNKS[i], dtype) for dtype, i in keys], device=CUDA)
    return dict(zip(keys, made, strict=True))


@no_device
@pytest.mark.parametrize("dtype", base.FLOATS)
@pytest.mark.parametrize("chunk", range(len(base.CHUNKS)))
def test_every_call_on_a_device(every_call: Any, chunk: int, dtype: torch.dtype) -> None:
    check_calls(every_call[dtype, chunk], CUDA, chunk, dtype)


@pytest.mark.parametrize("axes", [True, False])
@pytest.mark.parametrize("left", base.MIXED)
def test_types_promote_as_in_aten(make: Make, place: torch.device, axes: bool, left: torch.dtype) -> None:
    if place == EMULATED and left not in (BF16, I64):
        pytest.skip("two of them are enough for the emulation")
    tensors = [base.window((3, 40), dtype, i, special=False) for i, dtype in enumerate((left, *base.MIXED))]
    tensors = [t if t.dtype == BOOL else t + 1 for t in tensors]
    tensors = moved([t if axes or not i else t[0, 3].clone() for i, t in enumerate(tensors)], place)
    nodes = []
    for i, y in enumerate(tensors[1:]):
        for name in base.PROMOTING:
            if left == y.dtype == BOOL and name in base.PROMOTING[:3]:
                continue  # not in a group
            nodes.append(Node(name, (Ref(0), Ref(i + 1)), base.aten(name.removeprefix("aten."))(tensors[0], y).dtype))
    operands = tuple(Operand(t.dtype, (False,) * t.dim()) for t in tensors)
    made = make(Group(2, operands, tuple(nodes), tuple(Ref(len(operands) + i) for i in range(len(nodes)))))
    ours, theirs = (moved(base.empty_like_outputs(made.group, (3, 40)), place) for _ in range(2))
    made.run(tensors, ours)
    kernels.Plain(made.group).run(tensors, theirs)
    for node, a, b in zip(nodes, ours, theirs, strict=True):
        base.assert_close(a, b, node, ulps=0 if place == EMULATED else 2)


def test_casts_round_where_pytorch_rounds(make: Make, place: torch.device) -> None:
    """And a NaN that arithmetic made stays one: on NVIDIA's devices all its bits are set."""
    to = ("aten._to_copy.default",)
    nodes = (
        Node(*to, (Ref(0),), BF16, (("dtype", BF16),)),
        Node(*to, (Ref(1),), F32, (("dtype", F32),)),
        Node(*to, (Ref(0),), BOOL, (("dtype", BOOL),)),
        Node("aten.sub.Tensor", (Ref(1), Ref(1)), BF16),
    )
    made = make(Group(2, (Operand(F32, (False, False)),), nodes, tuple(Ref(i) for i in (1, 2, 3, 4))))
    bits = torch.randint(-(2**31), 2**31 - 1, (64, 100), generator=torch.Generator().manual_seed(1))
    x = bits.to(torch.int32).view(F32)
    x[0, :3] = torch.tensor([-1, 0x7FFFFFFF, 0x7F800000], dtype=torch.int32).view(F32)
    ours, theirs = (moved(base.empty_like_outputs(made.group, (64, 100)), place) for _ in range(2))
    made.run(moved([x], place), ours)
    kernels.Plain(made.group).run(moved([x], place), theirs)
    for a, b in zip(ours, theirs, strict=True):
        base.assert_close(a, b, "cast", ulps=0)


@no_compiler
@settings(max_examples=3, deadline=None, database=None, derandomize=True)
@given(base.random_groups())
def test_random_groups_emulated(case: tuple[Group, list[torch.Tensor]]) -> None:
    check(emulated(case[0]), case[1], EMULATED)


@no_device
@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(base.random_groups())
def test_random_groups_on_a_device(case: tuple[Group, list[torch.Tensor]]) -> None:
    check(on_device(case[0]), case[1], CUDA)


# ---- what needs no device -----------------------------------------------------------------------------------


def test_division_by_multiplication() -> None:
    draw = random.Random(1)
    divisors = [*range(1, 70), 2**15, 2**20 - 1, 2**30, 2**31 - 1, *(draw.randrange(1, 2**31) for _ in range(200))]
    for divisor in divisors:
        magic, shift = grid.reciprocal(divisor)
        assert magic < 2**32
        near = [divisor * k + d for k in (1, 2, 3, 2**31 // divisor) for d in (-1, 0, 1)]
        for n in (0, 1, 2**31 - 1, *near, *(draw.randrange(2**31) for _ in range(20))):
            if n < 2**31:
                assert ((n * magic >> 32) + n) >> shift == n // divisor


def test_what_cannot_be_compiled_runs_through_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    different = base.affine(F32, (base.REDUCTIONS[0], base.REDUCTIONS[2]))
    (made,) = kernels.build_many([different], device=CUDA)
    assert isinstance(made, Plain) and "different axes" in made.reason
    assert not kernels.build(base.affine(F32), compile=False, device=CUDA).compiled

    def missing() -> None:
        raise nvrtc.BuildError("no CUDA compiler found")

    monkeypatch.setattr(cuda, "CUDA", cuda.Cuda())
    monkeypatch.setattr(nvrtc, "find", missing)
    monkeypatch.setattr(cuda.driver, "device", lambda index: type("Any", (), {"architecture": "sm_90"}))
    made = kernels.build(base.affine(F32), device=CUDA)
    assert isinstance(made, Plain) and "no CUDA compiler" in made.reason


def test_tensors_elsewhere_are_refused() -> None:
    operands = base.affine_operands((1, 4, 5, 6), F32)
    outputs = [torch.empty_like(operands[0]) for _ in range(2)]
    with pytest.raises(ValueError, match="for CUDA devices"):
        DeviceKernel(base.affine(F32)).run(operands, outputs)
    with pytest.raises(ValueError, match="on meta"):
        kernels.Plain(base.affine(F32)).run(operands, [o.to("meta") for o in outputs])


# ---- what needs one -----------------------------------------------------------------------------------------


@no_device
def test_a_kernel_for_the_cpu_refuses_tensors_of_a_device() -> None:
    made = kernels.build(base.affine(F32))
    operands = base.affine_operands((1, 4, 5, 6), F32)
    outputs = [torch.empty_like(operands[0]) for _ in range(2)]
    made.run(operands, outputs)
    if made.compiled:
        with pytest.raises(ValueError, match="for the CPU"):
            made.run(moved(operands, CUDA), moved(outputs, CUDA))
    with pytest.raises(ValueError):
        on_device(base.affine(F32)).run([operands[0], *moved(operands[1:], CUDA)], moved(outputs, CUDA))


@no_device
def test_a_number_on_the_cpu_is_taken_as_it_is_in_each_call() -> None:
    made = on_device(reducing(F32, (0, 2, 3)))
    operands = base.affine_operands((1, 8, 5, 8), F32)
    for value in (3, -2):
        check_with = [*moved(operands[:4], CUDA), torch.tensor(float(value))]
        base.check_affine(made, check_with, [torch.empty_like(check_with[0]) for _ in range(2)])


@no_device
def test_streams() -> None:
    """A kernel runs after what its stream was given before."""
    made = on_device(reducing(F32, (0, 2, 3)))
    stream = torch.cuda.Stream(CUDA)
    operands = moved(base.affine_operands((2, 64, 256, 256), F32), CUDA)
    late = operands[0].clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            late.mul_(2)
        late.mul_(2.0**-20)
        outputs = [torch.empty_like(late) for _ in range(2)]
        partials = made.run([late, *operands[1:]], outputs)
    stream.synchronize()
    expected = [torch.empty_like(late) for _ in range(2)]
    theirs = kernels.Plain(made.group).run(operands, expected)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert torch.equal(partials[0], theirs[0])


@no_device
def test_threads_share_a_kernel() -> None:
    made = on_device(reducing(F32, (0, 2, 3)))

    def work(i: int) -> None:
        check(made, base.affine_operands((1, 3 + i % 5, 20, 50 + i), F32), CUDA)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(40)))


@no_device
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_large_maps(dtype: torch.dtype) -> None:
    """Many blocks and chunks, in both orders of memory."""
    for axes in ((0, 2, 3), (1,), (2, 3)):
        made = on_device(reducing(dtype, axes))
        for shape in ((2, 64, 300, 517), (1, 3, 1000, 1024), (1, 2100, 20, 30)):
            operands = base.affine_operands(shape, dtype)
            check(made, operands, CUDA)
            operands[0] = operands[0].contiguous()
            check(made, operands, CUDA)
