"""Fused pointwise kernels: one pass over the windows of a tile for a whole group of ATen calls.

A `Group` says what is computed: operands (whole windows, per-channel vectors, per-pixel maps, scalars), nodes
(ATen calls), outputs, and partial sums or moments over chosen axes. `build` makes it runnable: as generated
C++, without torch headers, compiled once per form and kept in a private folder; or, where there is no
compiler, through ATen, with the same results within rounding. `plain` is always the ATen version.

On CUDA devices groups run as generated CUDA, compiled by the library that comes with PyTorch.

A `Tape` notes all that is done on a tile, kernels and the library's calls; a `NativeFlow` plays the tapes of many
steps without Python.

Two sums are not pointwise: `convolution`, in short chains, or by fewer products as `winograd`, and `weight_grad`, its
gradient.
"""

from .call import Call
from .convolution import CHAIN, Axis, convolution, for_convolution, parts_of, suits
from .cuda import DeviceKernel
from .flow import NativeFlow, Stage, Stages, Track
from .gradient import suits_gradient, weight_grad
from .group import Group, Node, Operand, Reduction, Ref
from .kernel import Kernel, Plain, build, build_many, plain
from .native import taping
from .table import SUPPORTED, supports
from .tape import Tape, run
from .taped import Taped
from .winograd import for_winograd, suits_winograd, winograd

__all__ = [
    "CHAIN",
    "SUPPORTED",
    "Axis",
    "Call",
    "DeviceKernel",
    "Group",
    "Kernel",
    "NativeFlow",
    "Node",
    "Operand",
    "Plain",
    "Reduction",
    "Ref",
    "Stage",
    "Stages",
    "Tape",
    "Taped",
    "Track",
    "build",
    "build_many",
    "convolution",
    "for_convolution",
    "for_winograd",
    "parts_of",
    "plain",
    "run",
    "suits",
    "suits_gradient",
    "suits_winograd",
    "supports",
    "taping",
    "weight_grad",
    "winograd",
]
