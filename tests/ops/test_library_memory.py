"""What the library keeps of each convolution that it has prepared is counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fullframe import torch_compat
from fullframe.ir import region as box
from fullframe.ir.graph import Op, Ref, Value
from fullframe.ops.primitives.convolution import RULES

GROWTH = """
import ctypes
import torch
from fullframe.ops.numerics.convolve import convolve

def resident():
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

weight = torch.randn({shape})
sizes = [{extents}[:-1] + [{extents}[-1] + 8 * k] for k in range(9)]
before = 0
for size in sizes:
    x = torch.randn(1, weight.shape[1], *size)
    convolve(x, weight, None, [1], [0], [1], False, [0], 1)
    del x
    before = before or resident()
print((resident() - before) / (len(sizes) - 1))
"""


@pytest.mark.skipif(torch_compat.onednn_convolution() is None, reason="torch is without that library")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell what is resident")
@pytest.mark.parametrize("extents, taps", [((60_000,), (3,)), ((8, 30_000), (3, 3))], ids=["line", "rows"])
def test_what_the_library_prepares_for_a_width_is_counted(extents: tuple[int, ...], taps: tuple[int, ...]) -> None:
    """Within a factor of two beside 200 kB, which the code of a small convolution takes."""
    shape = (4, 4, *taps)
    code = GROWTH.format(shape=shape, extents=list(extents))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    x, weight = (Value(name, s, torch.float32, 4) for name, s in (("x", (1, 4, *extents)), ("weight", shape)))
    made = Value("made", (1, 4, *(n - k + 1 for n, k in zip(extents, taps, strict=True))), torch.float32, 4)
    geometry = (*([n] * len(taps) for n in (1, 0, 1)), 1)
    op = Op("tile.conv", (x, weight), (Ref(0), Ref(1), None, *geometry), {}, made, RULES["tile.conv"], torch.conv2d)
    counted = sum(RULES["tile.conv"].kept(op, box.full(made.shape), [1] * len(made.shape)).values())
    grown = float(done.stdout)
    assert grown / 2 - 200_000 <= counted <= 2 * grown
