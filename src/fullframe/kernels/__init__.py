"""Fused pointwise kernels: one pass over the windows of a tile for a whole group of ATen calls.

A `Group` says what is computed: operands (whole windows, per-channel vectors, per-pixel maps, scalars), nodes
(ATen calls), outputs, and partial sums or moments over chosen axes. `build` makes it runnable: as generated
C++, without torch headers, compiled once per form and kept in a private folder; or, where there is no
compiler, through ATen, with the same results within rounding. `plain` is always the ATen version.

On CUDA devices groups run as generated CUDA, compiled by the library that comes with PyTorch.

`weight_grad` is the one sum that is not pointwise: of a convolution, where the library is slow at it.
"""

from .call import Call
from .cuda import DeviceKernel
from .gradient import weight_grad
from .group import Group, Node, Operand, Reduction, Ref
from .kernel import Kernel, Plain, build, build_many, plain
from .table import SUPPORTED, supports
from .tape import Tape, Taped, run, taping

__all__ = [
    "SUPPORTED",
    "Call",
    "DeviceKernel",
    "Group",
    "Kernel",
    "Node",
    "Operand",
    "Plain",
    "Reduction",
    "Ref",
    "Tape",
    "Taped",
    "build",
    "build_many",
    "plain",
    "run",
    "supports",
    "taping",
    "weight_grad",
]
