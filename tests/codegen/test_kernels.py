"""Fused kernels against ATen: every call, every number format, every shape of operand."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullframe.codegen import cpp as source
from fullframe.codegen import kernel
from fullframe.codegen import kernel as kernels
from fullframe.codegen.expressions import SUPPORTED, supports
from fullframe.codegen.group import Group, Node, Operand, Reduction, Ref
from fullframe.codegen.toolchain import cxx as compiler
from fullframe.codegen.toolchain import kept_files

F32, F64, BF16, I64, BOOL = torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool
FLOATS = (F32, F64, BF16)
A, B, C = "a", "b", "c"  # three windows, all of the dtype under test; below, what calls do with them
M = "mask"

UNARY = (
    "neg abs sign sgn square relu floor ceil trunc round reciprocal sqrt rsqrt sigmoid exp exp2 expm1 log log1p log2 "
    "log10 sin cos tan atan sinh cosh tanh erf erfc silu mish hardswish hardsigmoid isnan logical_not _to_copy clone "
    "detach alias zeros_like ones_like"
)
BACKWARD = ("silu", "mish", "hardswish", "hardsigmoid", "tanh", "sigmoid")
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    *((f"{name}.default", (A,), {}) for name in UNARY.split()),
    *(("pow.Tensor_Scalar", (A, e), {}) for e in (0, 1, 2, 3, 0.5, -0.5, -1, -2, 1.7, -3)),
    ("pow.Tensor_Tensor", (A, B), {}),
    *((f"{op}.Tensor", (A, B), k) for op in ("add", "sub", "rsub") for k in ({}, {"alpha": 0.3})),
    *((f"{op}.Scalar", (A, 0.7), {}) for op in ("add", "sub", "rsub", "mul", "div")),
    *((f"{op}.Tensor", (A, B), {}) for op in ("mul", "div")),
    *((f"{op}.Tensor", (A, B), {}) for op in ("eq", "ne", "lt", "le", "gt", "ge")),
    *((f"{op}.Scalar", (A, 0.3), {}) for op in ("eq", "ne", "lt", "le", "gt", "ge")),
    ("addcmul.default", (A, B, C), {"value": 0.3}),
    ("addcmul.default", (A, B, C), {}),
    ("addcdiv.default", (A, B, C), {"value": 0.3}),
    ("lerp.Scalar", (A, B, 0.3), {}),
    ("lerp.Scalar", (A, B, 0.8), {}),
    ("lerp.Tensor", (A, B, C), {}),
    ("where.self", (M, A, B), {}),
    ("where.ScalarOther", (M, A, 0.0), {}),
    ("where.ScalarSelf", (M, 1.0, A), {}),
    ("masked_fill.Scalar", (A, M, 0.3), {}),
    ("clamp.default", (A, -0.3, 0.7), {}),
    ("clamp.default", (A, None, 0.7), {}),
    ("clamp.default", (A, -0.3), {}),
    ("clamp.Tensor", (A, B, C), {}),
    ("clamp_min.default", (A, 0.3), {}),
    ("clamp_max.default", (A, 0.3), {}),
    ("clamp_min.Tensor", (A, B), {}),
    ("clamp_max.Tensor", (A, B), {}),
    ("maximum.default", (A, B), {}),
    ("minimum.default", (A, B), {}),
    ("full_like.default", (A, 0.3), {}),
    ("fill.Scalar", (A, 0.3), {}),
    *((f"logical_{op}.default", (A, B), {}) for op in ("and", "or", "xor")),
    *((f"bitwise_{op}.Tensor", (M, "mask2"), {}) for op in ("and", "or", "xor")),
    ("bitwise_not.default", (M,), {}),
    ("logical_not.default", (M,), {}),
    ("leaky_relu.default", (A, 0.1), {}),
    ("leaky_relu.default", (A,), {}),
    ("leaky_relu_backward.default", (A, B, 0.1, False), {}),
    ("_prelu_kernel.default", (A, B), {}),
    ("threshold.default", (A, 0.3, 2.0), {}),
    ("threshold_backward.default", (A, B, 0), {}),
    ("elu.default", (A,), {}),
    ("elu.default", (A, 1.3, 1.1, 0.9), {}),
    ("elu_backward.default", (A, 1.3, 1.1, 0.9, False, B), {}),
    ("elu_backward.default", (A, 1.3, 1.1, 0.9, True, B), {}),
    *(("gelu.default", (A,), {"approximate": how}) for how in ("none", "tanh")),
    *(("gelu_backward.default", (A, B), {"approximate": how}) for how in ("none", "tanh")),
    *((f"{op}_backward.default", (A, B), {}) for op in BACKWARD),
    ("softplus.default", (A,), {}),
    ("softplus.default", (A, 2, 1), {}),
    ("softplus_backward.default", (A, B, 2, 1), {}),
    ("hardtanh.default", (A, -0.3, 0.7), {}),
    ("hardtanh_backward.default", (A, B, -0.3, 0.7), {}),
    ("native_dropout_backward.default", (A, M, 1.25), {}),
]
INPUTS = (A, B, C, M, "mask2")
SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.3, -0.3, 0.5, 2.5, -2.5, 1e-6, 3e4, -3e4, 88.0, -90.0, 3.0, -3.0)


def window(shape: tuple[int, ...], dtype: torch.dtype, seed: int, *, special: bool = True) -> torch.Tensor:
    """Numbers of all kinds, with special ones among them, in channels_last order for rank 4."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=draw, dtype=F64) * 2
    if special:
        chosen = torch.tensor([*SPECIAL, float("nan"), float("inf"), -float("inf")], dtype=F64)
        at = torch.randint(0, 4 * len(chosen), shape, generator=draw)
        values = torch.where(at < len(chosen), chosen[at % len(chosen)], values)
    values = values > 0 if dtype == BOOL else values.to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values.contiguous()


def aten(name: str) -> Any:
    """The overload of a name without its namespace."""
    packet, overload = name.rsplit(".", 1)
    return getattr(getattr(torch.ops.aten, packet), overload)


def used(calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> list[str]:
    """The inputs that some calls read."""
    return [name for name in INPUTS if any(name in args for _, args, _ in calls)]


def calls_group(calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]], dtype: torch.dtype) -> Group:
    """One output per call."""
    names = used(calls)
    tensors = [torch.ones(1, 1, dtype=BOOL if "mask" in name else dtype) for name in names]
    nodes = []
    for name, args, kwargs in calls:
        result = aten(name)(*[tensors[names.index(a)] if a in INPUTS else a for a in args], **kwargs)
        refs = tuple(Ref(names.index(a)) if a in INPUTS else a for a in args)
        nodes.append(Node(f"aten.{name}", refs, result.dtype, tuple(kwargs.items())))
    operands = tuple(Operand(t.dtype, (False,) * 4) for t in tensors)
    return Group(4, operands, tuple(nodes), tuple(Ref(len(names) + i) for i in range(len(nodes))))


def empty_like_outputs(group: Group, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Outputs filled with a number that no test computes, in channels_last order for rank 4."""
    made = [torch.full(shape, 99).to(group.dtype(ref)) for ref in group.outputs]
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in made]


WITHOUT = (
    "test_all_that_is_supported_is_tested",
    "test_without_a_compiler",
    "test_compilation_can_be_declined_and_unsupported_calls_run_through_aten",
    "test_equal_forms_have_one_source",
)


@pytest.fixture(autouse=True)
def _compiler(request: pytest.FixtureRequest) -> None:
    """Most compare what is compiled with what ATen gives."""
    if request.node.originalname not in WITHOUT and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("no compiler")


def compiled(group: Group) -> kernels.Kernel:
    """The group compiled; says why when it is not."""
    made = kernels.build(group)
    assert isinstance(made, kernels.Kernel), made.reason
    return made


def assert_close(
    ours: torch.Tensor, theirs: torch.Tensor, what: object, *, ulps: float = 8, gradient: torch.Tensor | None = None
) -> None:
    """Equal up to a few ulps of the largest of 1, the result and the gradient it is a multiple of; NaN and
    infinity in the same places.
    """
    assert ours.dtype == theirs.dtype
    if not ours.dtype.is_floating_point:
        assert torch.equal(ours, theirs), what
        return
    a, b = ours.double(), theirs.double()
    same = (a == b) | (a.isnan() & b.isnan())
    scale = b.abs().clamp_min(1)
    if gradient is not None:
        scale = scale.maximum(gradient.double().abs().nan_to_num(1, 1, 1))
    bad = ~same & ~((a - b).abs() <= ulps * torch.finfo(ours.dtype).eps * scale)
    assert not bad.any(), (what, a[bad][:3], b[bad][:3])


# ---- every call -----------------------------------------------------------------------------------------------

CHUNK = 12
CHUNKS = [CALLS[i : i + CHUNK] for i in range(0, len(CALLS), CHUNK)]


@pytest.fixture(scope="module")
def every_call() -> dict[tuple[torch.dtype, int], kernels.Kernel | kernels.Plain]:
    """The calls in groups, for each dtype, compiled together."""
    keys = [(dtype, i) for dtype in FLOATS for i in range(len(CHUNKS))]
    made = kernels.build_many([calls_group(CHUNKS[i], dtype) for dtype, i in keys])
    return dict(zip(keys, made, strict=True))


@pytest.mark.rest
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("chunk", range(len(CHUNKS)))
def test_every_call_gives_what_aten_gives(every_call: Any, chunk: int, dtype: torch.dtype) -> None:
    made = every_call[dtype, chunk]
    assert made.compiled, made.reason
    shape = (2, 5, 7, 9)
    names = used(CHUNKS[chunk])
    operands = [window(shape, BOOL if "mask" in name else dtype, INPUTS.index(name)) for name in names]
    ours, theirs = (empty_like_outputs(made.group, shape) for _ in range(2))
    made.run(operands, ours)
    kernels.Plain(made.group).run(operands, theirs)
    for call, a, b in zip(CHUNKS[chunk], ours, theirs, strict=True):
        gradient = operands[0] if "backward" in call[0] else None
        assert_close(a, b, call, ulps=8 if gradient is None else 64, gradient=gradient)


def test_all_that_is_supported_is_tested() -> None:
    tested = {f"aten.{name}" for name, _, _ in CALLS}
    variants = {"aten.where.Scalar", "aten.masked_fill.Tensor"}
    scalars = {f"aten.bitwise_{op}.Scalar" for op in ("and", "or", "xor")}
    assert SUPPORTED - tested == variants | scalars


def test_supports() -> None:
    assert supports("aten.mul.Tensor", (Ref(0), Ref(1)), (F32, BF16))
    assert supports("aten.logical_and.default", (Ref(0), Ref(1)), (BOOL, BOOL))
    assert supports("aten._to_copy.default", (Ref(0),), (I64, F32))
    assert not supports("aten.convolution.default", (Ref(0),), (F32,))
    assert not supports("aten.mul.Tensor", (Ref(0), Ref(1)), (torch.complex64, F32))
    assert not supports("aten.add.Tensor", (Ref(0), Ref(1)), (BOOL, BOOL))
    assert not supports("aten.pow.Tensor_Scalar", (Ref(0), 2), (I64,))
    assert not supports("aten.bitwise_and.Tensor", (Ref(0), Ref(1)), (F32, F32))


# ---- types ----------------------------------------------------------------------------------------------------

MIXED = (F32, F64, BF16, I64, BOOL)
PROMOTING = ("aten.mul.Tensor", "aten.add.Tensor", "aten.div.Tensor", "aten.gt.Tensor")


@pytest.mark.parametrize("axes", [True, False])
@pytest.mark.rest
def test_types_promote_as_in_aten(axes: bool) -> None:
    """Every pair of dtypes, the second with axes or zero-dimensional."""
    groups, inputs = [], []
    for left in MIXED:
        tensors = [window((3, 40), dtype, i, special=False) for i, dtype in enumerate((left, *MIXED))]
        tensors = [t if t.dtype == BOOL else t + 1 for t in tensors]
        tensors = [t if axes or not i else t[0, 3].clone() for i, t in enumerate(tensors)]
        nodes = []
        for i, y in enumerate(tensors[1:]):
            for name in PROMOTING:
                if left == y.dtype == BOOL and name in PROMOTING[:3]:
                    continue  # not in a group
                result = aten(name.removeprefix("aten."))(tensors[0], y).dtype
                nodes.append(Node(name, (Ref(0), Ref(i + 1)), result))
        operands = tuple(Operand(t.dtype, (False,) * t.dim()) for t in tensors)
        count = len(operands)
        groups.append(Group(2, operands, tuple(nodes), tuple(Ref(count + i) for i in range(len(nodes)))))
        inputs.append(tensors)
    for made, operands in zip(kernels.build_many(groups), inputs, strict=True):
        assert made.compiled, made.reason
        ours, theirs = (empty_like_outputs(made.group, (3, 40)) for _ in range(2))
        made.run(operands, ours)
        kernels.Plain(made.group).run(operands, theirs)
        for node, a, b in zip(made.group.nodes, ours, theirs, strict=True):
            assert_close(a, b, (node, made.group.operands), ulps=0)


def test_casts_round_where_pytorch_rounds() -> None:
    to = ("aten._to_copy.default",)
    nodes = (
        Node(*to, (Ref(0),), BF16, (("dtype", BF16),)),
        Node(*to, (Ref(1),), F32, (("dtype", F32),)),
        Node(*to, (Ref(0),), F64, (("dtype", F64),)),
        Node(*to, (Ref(0),), BOOL, (("dtype", BOOL),)),
    )
    group = Group(2, (Operand(F32, (False, False)),), nodes, tuple(Ref(i) for i in (1, 2, 3, 4)))
    bits = torch.randint(-(2**31), 2**31 - 1, (64, 100), generator=torch.Generator().manual_seed(1))
    x = bits.to(torch.int32).view(F32)
    x[0, :2] = torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32).view(F32)  # NaNs whose low bits are all set
    ours, theirs = (empty_like_outputs(group, (64, 100)) for _ in range(2))
    compiled(group).run([x], ours)
    kernels.Plain(group).run([x], theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, "cast", ulps=0)


# ---- shapes, strides ---------------------------------------------------------------------------------------

ALL = (0, 1, 2, 3)


def affine(dtype: torch.dtype, reductions: tuple[Reduction, ...] = (), rank: int = 4) -> Group:
    """leaky_relu(x * scale + shift) * map + constant; x whole, scale and shift per channel (axis 1)."""
    whole = (False,) * rank
    channel = tuple(axis != 1 for axis in range(rank))
    pixel = tuple(axis == 1 for axis in range(rank))
    operands = tuple(Operand(dtype, b) for b in (whole, channel, channel, pixel, ()))
    nodes = (
        Node("aten.mul.Tensor", (Ref(0), Ref(1)), dtype),
        Node("aten.add.Tensor", (Ref(5), Ref(2)), dtype),
        Node("aten.leaky_relu.default", (Ref(6), 0.125), dtype),
        Node("aten.mul.Tensor", (Ref(7), Ref(3)), dtype),
        Node("aten.add.Tensor", (Ref(8), Ref(4)), dtype),
    )
    return Group(rank, operands, nodes, (Ref(7), Ref(9)), reductions)


def affine_operands(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Small integers: sums and products are exact in any order."""
    draw = torch.Generator().manual_seed(sum(shape))
    rank = len(shape)
    channel = [1 if axis != 1 else shape[1] for axis in range(rank)]
    pixel = [1 if axis == 1 else n for axis, n in enumerate(shape)]
    made = [torch.randint(-3, 4, s, generator=draw).to(dtype) for s in (shape, channel, channel, pixel, ())]
    if rank == 4:
        made[0] = made[0].contiguous(memory_format=torch.channels_last)
    return made


REDUCTIONS = (
    Reduction(Ref(7), "sum", (0, 2, 3)),
    Reduction(Ref(9), "sum", ALL),
    Reduction(Ref(9), "sum", (1,)),
    Reduction(Ref(0), "sum", (0, 1, 3)),
    Reduction(Ref(7), "sum", ()),
    Reduction(Ref(1), "sum", (2, 3)),
)
MOMENTS = tuple(Reduction(Ref(7), "moments", axes) for axes in ((0, 2, 3), (2, 3), ALL, (1,)))


def check_affine(made: Any, operands: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    expected = [o.clone() for o in outputs]
    theirs = kernels.Plain(made.group).run(operands, expected)
    ours = made.run(operands, outputs)
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a, b)
    for reduction, a, b in zip(made.group.reductions, ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == F64
        if reduction.kind == "sum":
            assert torch.equal(a, b), reduction
        else:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=2e-7)


CHANNELS = (1, 2, 3, 7, 8, 15, 16, 17, 24, 32, 33, 48, 65, 96, 255, 256, 2100)


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_number_of_channels(dtype: torch.dtype) -> None:
    """Exactly ATen's numbers, for windows, channels per vector, odd channels, and all kinds of partial sum."""
    simple, sums, moments = kernels.build_many(
        [affine(dtype), affine(dtype, REDUCTIONS[:2]), affine(dtype, MOMENTS[:1])]
    )
    for made in (simple, sums, moments):
        assert made.compiled, made.reason
        for channels in CHANNELS:
            for n, h, w in ((1, 1, 1), (2, 3, 70), (1, 1, 0)):
                operands = affine_operands((n, channels, h, w), dtype)
                check_affine(made, operands, [torch.full_like(operands[0], 99) for _ in range(2)])


@pytest.mark.parametrize("axes", [r.axes for r in REDUCTIONS])
def test_sums_over_any_axes(axes: tuple[int, ...]) -> None:
    group = affine(F32, tuple(Reduction(Ref(v), "sum", axes) for v in (0, 1, 7)))
    made = compiled(group)
    for shape in ((2, 3, 5, 40), (1, 64, 2, 3), (3, 1, 1, 9), (1, 2, 1, 5000)):
        operands = affine_operands(shape, F32)
        check_affine(made, operands, [torch.empty_like(operands[0]) for _ in range(2)])
        operands[0] = operands[0].contiguous()
        check_affine(made, operands, [torch.empty_like(operands[0]) for _ in range(2)])


def test_windows_of_larger_maps() -> None:
    """Rows and columns, channels, steps, transposed: in and out; what is outside the window stays."""
    made = compiled(affine(F32, (*REDUCTIONS[:3], *MOMENTS[:2])))
    for channels in (3, 16, 40):
        operands = affine_operands((2, 2 * channels, 20, 90), F32)
        x, maps = operands[0], operands[3]
        cuts = [
            (slice(None), slice(0, channels), slice(3, 17), slice(5, 80)),
            (slice(1, 2), slice(channels, None), slice(None), slice(None)),
            (slice(None), slice(None, None, 2), slice(None, None, 3), slice(None, None, 2)),
        ]
        for cut in cuts:
            for layout in (torch.channels_last, torch.contiguous_format):
                big = [torch.full_like(x, 99, memory_format=layout) for _ in range(2)]
                given = [
                    x.contiguous(memory_format=layout)[cut],
                    operands[1][:, cut[1]],
                    operands[2][:, cut[1]],
                    maps[(cut[0], slice(None), *cut[2:])],
                    operands[4],
                ]
                check_affine(made, given, [b[cut] for b in big])
                outside = torch.ones_like(x, dtype=BOOL)
                outside[cut] = False
                assert all((b[outside] == 99).all() for b in big)
        turned = [t.transpose(2, 3) if t.dim() else t for t in operands]
        check_affine(made, turned, [torch.empty_like(x).transpose(2, 3), torch.empty_like(turned[0])])


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_any_rank(rank: int) -> None:
    whole = (False,) * rank
    nodes = (Node("aten.add.Tensor", (Ref(0), Ref(1)), F32), Node("aten.mul.Scalar", (Ref(2), 3), F32))
    reductions = (Reduction(Ref(2), "sum", tuple(range(rank))), Reduction(Ref(3), "sum", (0,)))
    made = compiled(Group(rank, (Operand(F32, whole), Operand(F32, whole)), nodes, (Ref(3),), reductions))
    for shape in ((7,) * rank, (1,) * rank, (3, 1, 70, 1, 2)[:rank], (5000, 1, 1, 1, 1)[:rank], (0,) * rank):
        x = torch.randint(-9, 9, shape).float()
        y = torch.randint(-9, 9, shape[::-1]).float().permute(*range(rank)[::-1])
        check_affine(made, [x, y], [torch.full_like(x, 99)])


def test_vectors_along_other_axes() -> None:
    """What looks like a vector per channel may lie along rows or columns, or be the whole run."""
    for axis in range(4):
        vector = tuple(a != axis for a in range(4))
        operands = (Operand(F32, (False,) * 4), Operand(F32, vector))
        reductions = (Reduction(Ref(2), "sum", (axis,)), Reduction(Ref(2), "sum", tuple({0, 1, 2, 3} - {axis})))
        node = Node("aten.mul.Tensor", (Ref(0), Ref(1)), F32)
        made = compiled(Group(4, operands, (node,), (Ref(2),), reductions))
        for shape in ((2, 16, 6, 33), (2, 3, 1, 3000), (1, 1, 1, 3000), (1, 4000, 1, 1), (40, 1, 2, 2)):
            x, v = torch.randint(-9, 9, shape).float(), torch.randint(-9, 9, (shape[axis],)).float()
            v = v.view([-1 if a == axis else 1 for a in range(4)])
            for layout in (torch.channels_last, torch.contiguous_format):
                x = x.contiguous(memory_format=layout)
                check_affine(made, [x, v], [torch.empty_like(x)])


def test_in_place() -> None:
    made = compiled(affine(F32, REDUCTIONS[:1]))
    for shape in ((1, 16, 5, 40), (2, 3, 4, 5), (1, 17, 3, 9)):
        operands = affine_operands(shape, F32)
        expected = [torch.empty_like(operands[0]) for _ in range(2)]
        theirs = kernels.Plain(made.group).run(operands, expected)
        ours = made.run(operands, [operands[0], torch.empty_like(operands[0])])
        assert torch.equal(operands[0], expected[0]) and torch.equal(ours[0], theirs[0])


def test_wrong_tensors_are_refused() -> None:
    made = compiled(affine(F32))
    operands = affine_operands((1, 4, 5, 6), F32)
    outputs = [torch.empty_like(operands[0]) for _ in range(2)]
    for other in (
        operands[:4],
        [operands[0].double(), *operands[1:]],
        [operands[0][0], *operands[1:]],
        [operands[0], operands[1][:, :3], *operands[2:]],
        [operands[0], operands[0], *operands[2:]],
    ):
        with pytest.raises(ValueError):
            made.run(other, outputs)
    with pytest.raises(ValueError):
        made.run(operands, [outputs[0], outputs[0][:, :1].expand(1, 4, 5, 6)])
    with pytest.raises(ValueError):
        Group(2, (Operand(F32, (True,)),), (), ())
    with pytest.raises(ValueError):
        Group(1, (), (Node("aten.neg.default", (Ref(0),), F32),), ())


# ---- partial sums ---------------------------------------------------------------------------------------------


def moments_group(dtype: torch.dtype) -> Group:
    reductions = (Reduction(Ref(0), "moments", (0, 2, 3)), Reduction(Ref(0), "sum", (0, 2, 3)))
    return Group(4, (Operand(dtype, (False,) * 4),), (), (), reductions)


@pytest.mark.parametrize("dtype", FLOATS)
def test_moments_are_accurate(dtype: torch.dtype) -> None:
    """Far from zero, with outliers, of two values only, of few elements: 1e-7 of the true sum of squares."""
    made = compiled(moments_group(dtype))
    draw = torch.Generator().manual_seed(5)
    for shape in ((1, 16, 32, 512), (2, 3, 100, 301), (1, 96, 20, 64), (1, 5, 1, 7), (1, 40, 2, 1), (3, 1, 77, 130)):
        normal = torch.randn(shape, generator=draw, dtype=F64)
        spike = torch.full(shape, 0.1, dtype=F64)
        spike[:, :, 0, 0] = 1000.0
        cases = {
            "normal": normal,
            "shifted": normal + 100,
            "far": normal * 1e-2 + 1000,
            "spike": spike,
            "two values": (normal > 1) * 0.7 + 0.1,
            "outlier first": torch.where(spike > 1, spike, normal),
        }
        for name, exact in cases.items():
            x = exact.to(dtype)
            for layout in (torch.channels_last, torch.contiguous_format):
                ours = made.run([x.contiguous(memory_format=layout)])
                theirs = kernels.Plain(made.group).run([x])
                assert torch.equal(ours[0][0], theirs[0][0])
                count, spread = theirs[0][0], theirs[0][2]
                off = (ours[0] - theirs[0]).abs()
                # Two values only: their squares are rounded the same way every time, so nothing averages out.
                bound = 2e-7 if name == "two values" else 1e-7
                assert (off[2] <= bound * spread).all(), (name, shape, (off[2] / spread).max())
                assert (off[1] <= 1e-7 * (spread / count).sqrt() + 1e-14).all(), (name, shape)
                scale = x.double().abs().sum((0, 2, 3))
                assert ((ours[1] - theirs[1]).abs() <= 2e-7 * scale).all()


def test_nan_and_infinity_reach_the_sums() -> None:
    made = compiled(moments_group(F32))
    for value in (float("nan"), float("inf")):
        for at in (0, 250):
            x = torch.randn(1, 3, 10, 30).contiguous(memory_format=torch.channels_last)
            x[0, 1, at // 30, at % 30] = value
            moments, total = made.run([x])
            assert not total[1].isfinite() and not moments[2, 1].isfinite()
            assert moments[:, [0, 2]].isfinite().all() and total[[0, 2]].isfinite().all()


# ---- random groups ------------------------------------------------------------------------------------------

BINARY = ("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.maximum.default", "aten.minimum.default")


@st.composite
def random_groups(draw: st.DrawFn) -> tuple[Group, list[torch.Tensor]]:
    """Linear calls, choices and comparisons on small integers, which are exact in float32."""
    rank = draw(st.integers(1, 4))
    shape = draw(st.lists(st.integers(1, 40), min_size=rank, max_size=rank))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    operands, tensors = [Operand(F32, (False,) * rank)], [torch.randint(-3, 4, shape, generator=seed).float()]
    for _ in range(draw(st.integers(1, 3))):
        broadcast = tuple(draw(st.lists(st.booleans(), min_size=rank, max_size=rank)))
        broadcast = tuple(b or n == 1 for b, n in zip(broadcast, shape, strict=True)) if any(broadcast) else broadcast
        extents = [1 if b else n for b, n in zip(broadcast, shape, strict=True)]
        order = draw(st.permutations(range(rank)))
        inverse = sorted(range(rank), key=lambda axis: order[axis])
        stored = torch.randint(-3, 4, [extents[a] for a in order], generator=seed).float()
        operands.append(Operand(F32, broadcast))
        tensors.append(stored.permute(inverse))
    nodes: list[Node] = []
    for _ in range(draw(st.integers(1, 4))):
        values = [Ref(i) for i in range(len(operands) + len(nodes))]
        a, b = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        nodes.append(Node(draw(st.sampled_from(BINARY)), (a, b), F32))
    values = [Ref(i) for i in range(len(operands) + len(nodes))]
    axes = tuple(sorted(draw(st.sets(st.integers(0, rank - 1)))))
    kinds = st.sampled_from(("sum", "moments"))
    reductions = tuple(
        Reduction(draw(st.sampled_from(values)), draw(kinds), axes) for _ in range(draw(st.integers(0, 2)))
    )
    outputs = tuple(draw(st.lists(st.sampled_from(values), min_size=1, max_size=3)))
    return Group(rank, tuple(operands), tuple(nodes), outputs, reductions), tensors


@settings(max_examples=10, deadline=None, database=None, derandomize=True)
@given(random_groups())
def test_random_groups(case: tuple[Group, list[torch.Tensor]]) -> None:
    group, operands = case
    check_affine(compiled(group), operands, [torch.full_like(operands[0], 99) for _ in group.outputs])


# ---- compilers, cache, threads, processes -----------------------------------------------------------------------


def same_as_plain(made: Any) -> None:
    operands = affine_operands((1, 6, 4, 9), F32)
    check_affine(made, operands, [torch.empty_like(operands[0]) for _ in range(2)])


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and nothing remembered of another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept_files.directory.cache_clear()
    compiler.find.cache_clear()
    yield tmp_path / "fullframe" / "kernels"
    kept_files.directory.cache_clear()
    compiler.find.cache_clear()


def test_without_a_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    made = kernels.build(affine(F32, REDUCTIONS[:2]))
    assert not made.compiled and "no C++ compiler" in made.reason
    same_as_plain(made)


def test_the_environment_names_the_instruction_set(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is another kernel in the cache; one that would end the process is refused."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("another architecture")
    monkeypatch.delenv(compiler.VARIABLE, raising=False)
    same_as_plain(kernels.build(affine(F32)))
    monkeypatch.setenv(compiler.VARIABLE, "x86-64")
    compiler.find.cache_clear()
    same_as_plain(kernels.build(affine(F32)))
    assert compiler.isa().endswith("-march=x86-64")
    assert len(list(fresh.glob("*.so"))) == 2
    for wrong, said in (("pdp-11", "knows no such instruction set"), ("sapphirerapids", "this processor has no AMX")):
        monkeypatch.setenv(compiler.VARIABLE, wrong)
        compiler.find.cache_clear()
        if wrong == "pdp-11" or "__AMX_TILE__" not in compiler.for_isa("native").identity:
            with pytest.raises(ValueError, match=f"FULLFRAME_CPU_ISA={wrong}: .*{said}"):
                kernels.build(affine(F32, REDUCTIONS[:2]))


def test_a_compiler_that_fails(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "PRELUDE", "this is not C++")
    made = kernels.build(affine(F32, REDUCTIONS[:2]))
    assert not made.compiled and "failed" in made.reason
    same_as_plain(made)
    assert not list(fresh.glob("*"))


def test_compilation_can_be_declined_and_unsupported_calls_run_through_aten() -> None:
    assert not kernels.build(affine(F32), compile=False).compiled
    node = Node("aten.cumsum.default", (Ref(0), 0), F32)
    made = kernels.build(Group(2, (Operand(F32, (False, False)),), (node,), (Ref(1),)))
    assert not made.compiled and "aten.cumsum.default" in made.reason
    out = torch.empty(3, 4)
    made.run([torch.ones(3, 4)], [out])
    assert torch.equal(out[2], torch.full((4,), 3.0))


def test_damaged_and_foreign_files_in_the_cache_are_replaced(fresh: Path) -> None:
    group = affine(F32, REDUCTIONS[:2])
    same_as_plain(kernels.build(group))
    (path,) = fresh.glob("*.so")
    assert path.stat().st_mode & 0o777 == 0o600 and fresh.stat().st_mode & 0o777 == 0o700
    whole = path.read_bytes()
    for damaged in (b"", whole[:1000], whole[:-40] + b"x" * 40, b"not a library"):
        path.unlink()
        path.write_bytes(damaged)
        same_as_plain(compiled(group))
        assert path.read_bytes()[-32:] != damaged[-32:]
    path.chmod(0o666)  # anybody may have written it
    same_as_plain(compiled(group))
    assert path.stat().st_mode & 0o777 == 0o600
    fresh.chmod(0o777)
    kept_files.directory.cache_clear()
    assert kept_files.directory() != fresh
    same_as_plain(compiled(group))


RACE = """
import sys
sys.path[:0] = {path!r}
import torch
from fullframe.codegen import kernel as kernels
from fullframe.codegen.group import Group, Node, Operand, Ref
nodes = [Node("aten.mul.Scalar", (Ref(0), 2.0), torch.float32)]
for i in range(3):
    nodes.append(Node("aten.add.Scalar", (Ref(i + 1), i + 1), torch.float32))
groups = [Group(1, (Operand(torch.float32, (False,)),), tuple(nodes[:n]), (Ref(n),)) for n in (1, 2, 3, 4)]
for n, made in enumerate(kernels.build_many(groups)):
    assert made.compiled, made.reason
    y = torch.empty(100)
    made.run([torch.ones(100)], [y])
    assert (y == 2 + n * (n + 1) / 2).all()
"""


@pytest.mark.rest
def test_processes_may_race(fresh: Path) -> None:
    command = [sys.executable, "-c", RACE.format(path=sys.path)]
    racers = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(2)]
    assert [racer.wait(120) for racer in racers] == [0, 0]
    assert len(list(fresh.glob("*.so"))) == 4 == len(list(fresh.glob("*")))


def test_threads_share_a_kernel() -> None:
    made = compiled(affine(F32, (*REDUCTIONS[:2], *MOMENTS[:1])))

    def work(i: int) -> None:
        operands = affine_operands((1, 3 + i % 5, 20, 50 + i), F32)
        check_affine(made, operands, [torch.empty_like(operands[0]) for _ in range(2)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(40)))


def _in_child() -> None:
    same_as_plain(kernels.build(affine(F32, REDUCTIONS[:2])))


def test_kernels_survive_fork() -> None:
    same_as_plain(compiled(affine(F32, REDUCTIONS[:2])))
    child = multiprocessing.get_context("fork").Process(target=_in_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_equal_forms_have_one_source() -> None:
    assert source.generate(affine(F32)) == source.generate(affine(F32))
    assert kernel.unsupported(affine(F32)) == ""
    assert ctypes.sizeof(ctypes.c_int64) == 8
