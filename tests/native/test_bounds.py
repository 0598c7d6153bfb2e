"""Compiled convolutions of random geometry: exact for small integers, and beside pages that nobody may touch."""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from fullframe.native.convolution import Axis, convolution, for_convolution
from fullframe.native.loader import own
from fullframe.native.weight_gradient import weight_grad
from fullframe.native.winograd import for_winograd, suits_winograd, winograd

PAGE, CASES = mmap.PAGESIZE, 40


@dataclass
class Case:
    dtype: torch.dtype
    batch: int
    out: int
    deep: int
    pixels: list[int]
    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    padding: list[int]

    @property
    def extents(self) -> list[int]:
        axes = zip(self.pixels, self.kernel, self.stride, self.dilation, self.padding, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, d, p in axes]


def draw(rng: random.Random) -> Case:
    """A convolution that has outputs."""
    while True:
        rank = rng.choice([2, 2, 2, 3])
        kernel, stride, dilation = (
            [rng.choice(of) for _ in range(rank)] for of in ([1, 2, 3, 3, 5, 7], [1, 1, 2, 3], [1, 1, 2, 3])
        )
        pixels = [rng.randint(1, 12 if rank == 3 else 40) for _ in range(rank)]
        pixels[-1] = rng.randint(60, 200) if rng.random() < 0.2 else pixels[-1]
        if rng.random() < 0.3:
            kernel[-1], stride[-1], dilation[-1] = 3, 1, 1
        out, deep = rng.choice([8, 16, 17, 31, 48, 50, 100]), rng.choice([1, 2, 3, 6, 16, 18, 32, 34, 64])
        dtype, batch = rng.choice([torch.float32, torch.bfloat16]), rng.choice([1, 2])
        padding = [rng.randint(0, 3) for _ in range(rank)]
        case = Case(dtype, batch, out, deep, pixels, kernel, stride, dilation, padding)
        if min(case.extents) > 0:
            return case


class Guarded:
    """Copies of tensors in memory of their own, which ends, or begins, at a page that nobody may touch."""

    def __init__(self) -> None:
        self.system = ctypes.CDLL(None)
        self.held: list[mmap.mmap] = []

    def copy(self, tensor: torch.Tensor, ends: bool) -> torch.Tensor:
        size = -(-tensor.nbytes // PAGE) * PAGE + 2 * PAGE
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(block))
        for page in (start, start + size - PAGE):
            assert self.system.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
        self.held.append(block)
        at = size - PAGE - tensor.nbytes if ends else PAGE
        flat = torch.frombuffer(block, dtype=tensor.dtype, count=tensor.numel(), offset=at)
        return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are guarded by Linux's mprotect")
@pytest.mark.parametrize("seed", range(6))
def test_exact_and_within_bounds(seed):
    if own("convolution") is None:
        pytest.skip("no compiler")
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator)

    for _ in range(CASES):
        case, guarded = draw(rng), Guarded()
        rank, shape = len(case.pixels), (case.out, case.deep, *case.kernel)
        form = torch.channels_last if rank == 2 else torch.channels_last_3d
        x = numbers(case.batch, case.deep, *case.pixels).to(case.dtype).contiguous(memory_format=form)
        g = numbers(case.batch, case.out, *case.extents).to(case.dtype).contiguous(memory_format=form)
        weight, bias = numbers(*shape).to(case.dtype), numbers(case.out).to(case.dtype)
        weight = for_convolution(weight) if rng.random() < 0.7 else weight
        x, g, weight, bias = (guarded.copy(t, rng.random() < 0.5) for t in (x, g, weight, bias))
        geometry = (case.stride, case.padding, case.dilation)
        axes = [Axis(*a) for a in zip(case.extents, *geometry, strict=True)]
        made = convolution(x, weight, bias, axes, 1)
        if made is not None:
            like = F.conv2d if rank == 2 else F.conv3d
            truth = like(x.double(), weight.double(), bias.double(), *geometry)
            assert torch.equal(made, truth.to(case.dtype)), case
        if suits_winograd(shape, case.dtype, 1, case.stride, case.dilation):
            sums, first = guarded.copy(for_winograd(weight), rng.random() < 0.5), rng.randint(0, 3)
            assert torch.equal(winograd(x, sums, bias, axes, first), made), case
        made = weight_grad(g, x, shape, *geometry, 1)
        if made is not None:
            none, mask = torch.zeros(1, dtype=torch.float64).expand(shape), [False, True, False]
            back = torch.ops.aten.convolution_backward
            truth = back(g.double(), x.double(), none, None, *geometry, False, [0] * rank, 1, mask)[1]
            assert torch.equal(made.double(), truth), case
