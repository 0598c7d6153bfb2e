"""Groups made runnable: compiled, or through ATen."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from fullframe.codegen import cpp as source
from fullframe.codegen import expressions as table
from fullframe.codegen.group import Argument, Call, Group, Ref
from fullframe.codegen.loop_layout import Geometry, device, measure
from fullframe.codegen.toolchain import cuda_kernel as cuda
from fullframe.codegen.toolchain import cxx as compiler
from fullframe.codegen.toolchain.cuda_kernel import DeviceKernel
from fullframe.device import CPU, NVRTC, device_of
from fullframe.errors import fall_back

_MOST_AXES = 8
_REMEMBERED = 256  # geometries per kernel: a plan has few classes of tiles


class Plain:
    """A group run by ATen, one call after the other: the reference, and what runs without a compiler."""

    compiled = False
    """`reason` says why."""

    def __init__(self, group: Group, reason: str = "asked for") -> None:
        self.group = group
        self.reason = reason

    def run(self, operands: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """As `Kernel.run`. Raises ValueError, too, when a node's dtype is not what PyTorch gives."""
        group = self.group
        extents = measure(group, operands, outputs).extents
        values = list(operands)
        with torch.no_grad():
            for node in group.nodes:
                args = [_resolved(a, values) for a in node.args]
                kwargs = {name: _resolved(a, values) for name, a in node.kwargs}
                values.append(table.find(node.target)(*args, **kwargs))
                if values[-1].dtype != node.dtype:
                    raise ValueError(f"{node.target} gives {values[-1].dtype}, the node says {node.dtype}")
            partials = [_reduced(values[r.value.index].expand(extents), r.kind, r.axes) for r in group.reductions]
            # An output may be the memory of an operand that another output still reads.
            results = [values[ref.index] for ref in group.outputs]
            if len(results) > 1:
                results = [r.clone() if any(r is o for o in operands) else r for r in results]
            for output, result in zip(outputs, results, strict=True):
                output.copy_(result.expand(extents))
        return partials

    def call(self, operands: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor] = ()) -> PlainCall:
        """As `Kernel.call`, but for these tensors alone."""
        return PlainCall(self, operands, outputs)


class PlainCall(Call):
    """A group run by ATen, on these tensors."""

    __slots__ = ("_kernel", "_operands", "_outputs")
    reusable = False

    def __init__(self, kernel: Plain, operands: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        self._kernel, self._operands, self._outputs = kernel, operands, outputs

    def __call__(self, places: Sequence[int]) -> list[torch.Tensor]:
        """As `Call`; the places are those of the tensors."""
        return self._kernel.run(self._operands, self._outputs)


def _resolved(argument: Argument, values: list[torch.Tensor]) -> torch.Tensor | Argument:
    return values[argument.index] if isinstance(argument, Ref) else argument


def _reduced(value: torch.Tensor, kind: str, axes: tuple[int, ...]) -> torch.Tensor:
    """A reduction in float64; `axes` empty means none."""
    value = value.to(torch.float64)
    total = value.sum(axes) if axes else value
    if kind == "sum":
        return total.clone()
    count = value.numel() // max(total.numel(), 1)
    if not count:
        return torch.zeros((3, *total.shape), dtype=torch.float64, device=value.device)
    first = value[tuple(slice(0, 1) if a in axes else slice(None) for a in range(value.dim()))]
    # About one of the values, so that the mean of equal values is that value; unless that one is not finite.
    first = first.nan_to_num(0.0, 0.0, 0.0)
    mean = first + (value - first).mean(axes, keepdim=True) if axes else value
    spread = (value - mean).square()
    spread = spread.sum(axes) if axes else spread
    return torch.stack([torch.full_like(total, count), mean.reshape(total.shape), spread])


class HostCall(Call):
    """A kernel for the CPU on tensors of known layout."""

    __slots__ = ("_function", "geometry", "words")

    def __init__(self, function: Callable[..., int], geometry: Geometry) -> None:
        self._function, self.geometry = function, geometry
        self.words = (ctypes.c_int64 * len(geometry.words))(*geometry.words)

    @property
    def entry(self) -> int:
        """The address of the machine code."""
        return ctypes.cast(self._function, ctypes.c_void_p).value or 0  # pyright: ignore[reportArgumentType]

    def __call__(self, places: Sequence[int]) -> list[torch.Tensor]:
        """As `Call`."""
        geometry = self.geometry
        if not geometry.shapes:
            self._run(places, None)
            return []
        partials = torch.zeros(geometry.offsets[-1], dtype=torch.float64)
        self._run(places, partials.data_ptr())
        rest = zip(geometry.shapes, geometry.steps, geometry.offsets, strict=False)
        return [partials.as_strided(shape, stride, start) for shape, stride, start in rest]

    def _run(self, places: Sequence[int], partials: int | None) -> None:
        if 0 in self.geometry.extents:
            return
        pointers = (ctypes.c_void_p * len(places))(*places)
        if self._function(self.words, pointers, ctypes.c_void_p(partials)):
            raise MemoryError("no memory for the scratch of a kernel")


class Kernel:
    """A group compiled for this processor. Threads may run it at the same time; it survives fork."""

    compiled, reason = True, ""

    def __init__(self, group: Group, function: Callable[..., int]) -> None:
        self.group = group
        self._function = function
        self._calls: dict[tuple[object, ...], HostCall] = {}

    def call(self, operands: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor] = (),
             lies: Sequence[tuple[int, ...]] | None = None) -> HostCall:  # fmt: skip
        """The call for tensors of these layouts. Raises ValueError when they are not those of the group.

        ``lies`` are strides by which the order of the loop's axes is chosen, where those of the tensors are not to
        decide it: without axes that a tensor does not have.
        """
        own = tuple((t.dtype, t.shape, t.stride(), t.get_device()) for t in (*operands, *outputs))
        key = (len(operands), own, lies and tuple(lies))
        call = self._calls.get(key)
        if call is None:
            if not all(device_of(t.device).on_host for t in (*operands, *outputs)):
                raise ValueError(f"the kernel is for the CPU, the tensors are on {device((*operands, *outputs))}")
            call = HostCall(self._function, measure(self.group, operands, outputs, lies))
            if len(self._calls) >= _REMEMBERED:
                self._calls.clear()
            self._calls[key] = call
        return call

    def run(self, operands: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """Run the group once.

        Args:
            operands: per operand, a CPU tensor of the loop's rank with extent 1 where it is broadcast, or a
                zero-dimensional one. Any strides.
            outputs: per output, the tensor that receives it, of the loop's shape. Any strides; it may be
                exactly the memory of an operand, but not overlap one otherwise, nor another output.

        Returns:
            Per reduction a float64 tensor of the shape of the kept axes; for moments (3, *kept): count,
            mean, sum of squared deviations (0, 0, 0 for no elements).

        Raises:
            ValueError: the tensors are not those of the group.
            MemoryError: no memory for a few kilobytes of scratch.
        """
        return self.call(operands, outputs)([t.data_ptr() for t in (*operands, *outputs)])


def build(group: Group, *, compile: bool = True, device: torch.device = CPU) -> Kernel | DeviceKernel | Plain:
    """The group compiled for a device, or, where that cannot be, through ATen, with the reason in `.reason`."""
    return build_many([group], compile=compile, device=device)[0]


def build_many(
    groups: Iterable[Group], *, compile: bool = True, device: torch.device = CPU
) -> list[Kernel | DeviceKernel | Plain]:
    """As `build` for each group; groups of one form are compiled once, several at the same time."""
    groups = list(groups)
    if not compile:
        return [Plain(group) for group in groups]
    refused = [unsupported(group, device) for group in groups]
    toolchain = device_of(device).toolchain
    if not toolchain:
        return [Plain(group, why) for group, why in zip(groups, refused, strict=True)]
    if toolchain == NVRTC:
        failed = iter(cuda.prepare([g for g, why in zip(groups, refused, strict=True) if not why], device))
        reasons = [why or next(failed) for why in refused]
        return [Plain(g, why) if why else DeviceKernel(g) for g, why in zip(groups, reasons, strict=True)]
    sources = [None if why else source.generate(g) for g, why in zip(groups, refused, strict=True)]
    distinct = list(dict.fromkeys(text for text in sources if text))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        loaded = dict(zip(distinct, pool.map(_load, distinct), strict=True))
    kernels: list[Kernel | DeviceKernel | Plain] = []
    for group, why, text in zip(groups, refused, sources, strict=True):
        function = loaded[text] if text else why
        kernels.append(Plain(group, function) if isinstance(function, str) else Kernel(group, function))
    return kernels


def _load(text: str) -> Callable[..., int] | str:
    """The function, or why there is none."""
    try:
        return compiler.load(text, source.ENTRY)
    except compiler.BuildError as error:
        fall_back(f"fused ops are not compiled, torch runs them one by one, which is slower: {error}")
        return str(error)


def unsupported(group: Group, device: torch.device = CPU) -> str:
    """Why a group cannot be compiled: the first part of it that is not supported; '' when all is."""
    toolchain = device_of(device).toolchain
    if not toolchain:
        return f"no kernels for {device.type}"
    if group.rank > _MOST_AXES:
        return f"no kernels for a loop of {group.rank} axes"
    for operand in group.operands:
        if operand.dtype not in table.FORMATS:
            return f"no kernels for {operand.dtype}"
    for node in group.nodes:
        dtypes = [*(group.dtype(ref) for ref in node.refs()), node.dtype]
        if not table.supports(node.target, node.args, dtypes):
            return f"no kernels for {node.target} of {', '.join(map(str, dtypes))}"
    return cuda.unsupported(group) if toolchain == NVRTC else ""
