"""The processes that train together: one, or those that torchrun has started.

Each has its rows of every image, and the engine makes one step of all of them; gradients are equal in every process,
and so are the weights. What depends on a clock is decided by the first process, which alone writes files.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among `size`, by its `rank`; `mesh` is what the engine divides images over, None for one alone."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def rows(self, image: Tensor) -> Tensor:
        """The rows (last axis but one) that this process has of (..., rows, columns)."""
        low, high = (k * image.shape[-2] // self.size for k in (self.rank, self.rank + 1))
        return image[..., low:high, :]

    def total(self, counts: Tensor) -> Tensor:
        """The sum of the processes' integers, of one shape."""
        if self.mesh is not None:
            dist.all_reduce(counts)
        return counts

    def agreed(self, number: float) -> float:
        """The first process's number."""
        if self.mesh is None:
            return number
        told = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(told, 0)
        return told.item()

    def dealt(self, items: Sequence[T]) -> Sequence[T]:
        """The items that are this process's, dealt out one by one."""
        return items[self.rank :: self.size]

    def gathered(self, mine: list[T]) -> list[T]:
        """What all processes have, in the order in which it was dealt out."""
        if self.mesh is None:
            return mine
        hands: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(hands, mine)
        return [hands[k % self.size][k // self.size] for k in range(sum(map(len, hands)))]


def processors() -> int | None:
    """Threads for each process of this machine; None: as many as there are processors."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here == 1:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // here)


@contextmanager
def joined() -> Iterator[World]:
    """This process and those that torchrun started with it, which part at the end; one alone without torchrun."""
    if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    dist.init_process_group("gloo")
    try:
        size = dist.get_world_size()
        yield World(dist.get_rank(), size, init_device_mesh("cpu", (size,), mesh_dim_names=("domain",)))
    finally:
        dist.destroy_process_group()
