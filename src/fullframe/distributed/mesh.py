"""The ranks that make a step together: one dimension of a `DeviceMesh`, and what they tell each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fullframe.errors import RankError

Thing = TypeVar("Thing")
NAMES = ("domain", "data")
"""The dimensions that can be divided: the first spatial axis of the images, and their batch."""


class Domain:
    """The ranks of a mesh of one dimension, in its order. ``rank`` and ``size`` are those within it.

    Once a rank is lost the others no longer know what it has taken part in, and every use raises `RankError`.
    """

    def __init__(self, mesh: DeviceMesh):
        _refuse(mesh)
        assert mesh.mesh_dim_names is not None
        self.name = mesh.mesh_dim_names[0]
        self.group = mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self._lost: str = ""

    def gather(self, thing: Thing) -> list[Thing]:
        """What each rank has given, in their order. It travels as a pickle, among processes of one training."""
        found = [thing] * self.size
        with self._talking():
            dist.all_gather_object(found, thing, group=self.group)
        return found

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give tensors the numbers that they have on the first rank."""
        with self._talking(), torch.no_grad():
            for tensor in tensors:
                plain = tensor.detach()
                dense = plain if plain.is_contiguous() else plain.contiguous()
                dist.broadcast(dense, group=self.group, group_src=0)
                if dense is not plain:
                    plain.copy_(dense)

    def swap(self, outgoing: torch.Tensor, sends: Sequence[int], receives: Sequence[int]) -> torch.Tensor:
        """Send each rank so many bytes of ``outgoing``, in their order; the bytes that each has sent here."""
        incoming = torch.empty(sum(receives), dtype=torch.uint8)
        with self._talking():
            dist.all_to_all_single(incoming, outgoing, list(receives), list(sends), group=self.group)
        return incoming

    @contextmanager
    def _talking(self):
        if self._lost:
            raise RankError(f"a rank of the {self.name} was lost before ({self._lost}); start all of them again")
        try:
            yield
        except RuntimeError as error:  # of the connection: a process has gone, or the group's time is over
            self._lost = str(error).splitlines()[0]
            raise RankError(
                f"a rank of the {self.name} is gone, or did not answer within its group's timeout; no parameter has "
                f"been changed in this step ({self._lost})"
            ) from error
        except BaseException:
            self._lost = "interrupted while ranks talked to each other"
            raise

    def __deepcopy__(self, _: object) -> Domain:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a module that is tiled over a mesh cannot be pickled; pickle its state_dict()")


def _refuse(mesh: object) -> None:
    """Refuse what is no mesh of one dimension that can be divided."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh={mesh!r} must be a DeviceMesh, of torch.distributed.device_mesh.init_device_mesh say")
    names = mesh.mesh_dim_names
    if names is None or len(names) != 1 or names[0] not in NAMES:
        raise ValueError(
            f"mesh has the dimensions {names}; fullframe divides one of them, named 'domain' (the first spatial "
            "axis) or 'data' (the batch). Give that submesh, mesh['domain'], and leave the others to "
            "DistributedDataParallel or fully_shard"
        )
    if mesh.device_type != "cpu":
        raise ValueError(
            f"mesh is of {mesh.device_type} devices, on which ranks have not been tried; use "
            "init_device_mesh('cpu', ...) and the gloo backend"
        )
