"""One tile: what it reads and writes of the caller's memory, and the bytecode that was recorded of it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import torch

from fullframe.bytecode.program import Taped
from fullframe.capture.threads import Turns
from fullframe.codegen.kernel import Kernel, Plain
from fullframe.codegen.toolchain.cuda_kernel import DeviceKernel
from fullframe.ir.graph import Value
from fullframe.partition.fusion import Unit
from fullframe.runtime.tasks import Part, Partials, Sum, Task
from fullframe.schedule.plan import LARGE
from fullframe.storage.arena import Arena

MOVED = "a tensor whose layout has changed"
Kernels = dict[Unit, Kernel | DeviceKernel | Plain]


RECORDING = Turns()  # one tile at a time is put on tape


def part_of(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    return tensor if part is None else tensor[part]


def as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor of any kind, as they lie in memory: kernels know of no conjugate or negative bit."""
    tensor = tensor.detach()
    tensor = tensor if type(tensor) is torch.Tensor else tensor.as_subclass(torch.Tensor)
    return tensor.resolve_conj().resolve_neg()


def aligned(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """A broadcast operand with leading axes of extent 1, but for a zero-dimensional one."""
    missing = rank - tensor.dim()
    return tensor[(None,) * missing] if missing and tensor.dim() else tensor


class TapedTask:
    """A task's tape, the values that it reads and writes outside of the arena, with their strides, and what its
    results are: partial results of sums, and untiled values."""

    __slots__ = ("places", "strides", "tape", "values")

    def __init__(
        self, tape: Taped, values: Sequence[Value], strides: Sequence[tuple[int, ...]], places: Sequence[Sum | Value]
    ):
        self.tape, self.values, self.strides, self.places = tape, values, strides, places

    def run(self, values: MutableMapping[Value, torch.Tensor], arena: Arena) -> Partials | None:
        """The partial results, with the untiled values put among ``values``; None where a tensor lies otherwise in
        memory than when the tape was written."""
        bases = [arena.block.data_ptr()]
        for value, stride in zip(self.values, self.strides, strict=True):
            tensor = values[value]
            if tensor.stride() != stride:
                return None
            bases.append(tensor.data_ptr())
        made = self.tape.run(bases)
        if made is None:
            return None
        partials = self.hand_out(made, values)
        if len(made) > 1:
            values.update((v, values[v].clone()) for v in self.places if isinstance(v, Value))
        return partials

    def hand_out(self, made: Sequence[torch.Tensor], values: MutableMapping[Value, torch.Tensor]) -> Partials:
        """Results: the untiled values among the others, the partial results returned."""
        partials: Partials = []
        for place, tensor in zip(self.places, made, strict=True):
            if isinstance(place, Sum):
                partials.append((place, tensor))
            else:
                values[place] = tensor
        return partials


def apart(task: Task, values: Mapping[Value, torch.Tensor], arena: Arena) -> list[Value]:
    """What a task reads, and the maps it writes, that are neither windows nor in the arena."""
    found = dict.fromkeys(
        value
        for job in task.jobs
        for value in (
            *(r.value for r in job.reads if not r.window and r.empty is None),
            *(t.value for t in job.targets if t.shape is None),
            *(s.value for s in job.stores if s.region is not None),
        )
    )
    block = arena.block.untyped_storage().data_ptr()
    return [v for v in found if values[v].untyped_storage().data_ptr() != block]


def kept(task: Task) -> list[Value]:
    """The untiled values that a task makes."""
    return [s.value for job in task.jobs for s in job.stores if s.region is None]


def fit(task: Task) -> bool:
    """Whether a task may go on tape: its kernels' calls are known, and what it makes besides maps is small."""
    known = all(job.ready is not None or not job.unit.fused for job in task.jobs)
    return not task.fetches and known and all(v.nbytes <= LARGE for v in kept(task))
