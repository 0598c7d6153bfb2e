"""Random networks on three processes: the bits of one process with the same tiles, and the numbers of plain PyTorch.

Run seeds alone with ``python tests/distributed/test_random_networks.py FIRST LAST``.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from randomnets import Case, draw
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils import _pytree as pytree

import fullframe
from fullframe.schedule import verify
from fullframe.schedule.request import Request

WORLD = 3
BUDGET = "4 GB"
FIRST, MANY = 1_000, 200


class Shards:
    """A rank's parts of the tensors of a case."""

    def __init__(self, case: Case, seed: int, rank: int):
        self.seed, self.rank = seed, rank
        self.dim = next(t.dim() for t in pytree.tree_leaves(case.input) if isinstance(t, torch.Tensor))

    def axis(self, tensor: torch.Tensor) -> int | None:
        if tensor.dim() == self.dim:
            return 2
        labels = tensor.dim() == self.dim - 1 and (tensor.dim() > 2 or not tensor.is_floating_point())
        return 1 if labels else None

    def of(self, things: Any) -> Any:
        return pytree.tree_map(self._one, things)

    def _one(self, tensor: Any) -> Any:
        axis = self.axis(tensor) if isinstance(tensor, torch.Tensor) else None
        if axis is None:
            return tensor
        n = tensor.shape[axis]
        cuts = sorted(random.Random(self.seed).sample(range(1, n), WORLD - 1))
        low, high = list(pairwise((0, *cuts, n)))[self.rank]
        return tensor.narrow(axis, low, high - low)


class Together(torch.autograd.Function):
    """The whole of what ranks have in shards along the rows; its gradient is each one's part."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.place = None
        if tensor.shape == shape:
            return tensor.clone()
        parts: list[Any] = [None] * WORLD
        dist.all_gather_object(parts, tensor.detach())
        axis = next(a for a in range(tensor.dim()) if tensor.shape[a] != shape[a])
        begin = sum(p.shape[axis] for p in parts[: dist.get_rank()])
        ctx.place = axis, begin, tensor.shape[axis]
        return torch.cat(parts, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad if ctx.place is None else grad.narrow(*ctx.place), None


def judged(case: Case, seed: int, mesh: DeviceMesh) -> str:
    """What became of a case: right, refused with why, or what is wrong."""
    state, shards = fuzzing.State(case), Shards(case, seed, dist.get_rank())
    try:
        expected = fuzzing.run_steps(case, state, fuzzing.plain(case))
    except (RuntimeError, ValueError, IndexError):
        return "unusable"
    if not all(bool(t.isfinite().all()) for ts in expected.values() for t in ts.values() if t is not None):
        return "unusable"
    shapes = [t.shape for t in expected["output"].values() if t is not None] * 2

    def together(argument: Any, target: Any) -> Any:
        if case.loss is not None:
            return step(shards.of(argument), shards.of(target))
        made = step(shards.of(argument))
        return pytree.tree_map(lambda t: Together.apply(t, shapes.pop(0)), made)

    try:
        with fuzzing.settings(case, False):
            step = fullframe.tile(case.net, loss=case.loss, tile=case.tile, budget=BUDGET, workers=1, mesh=mesh)
            found = fuzzing.run_steps(case, state, together)
            one = fullframe.tile(case.net, loss=case.loss, tile=case.tile, budget=BUDGET, workers=1)
            alone = fuzzing.run_steps(case, state, fuzzing.tiled_run(case, one))
    except fullframe.FullframeError as error:
        return f"refused: {error}"
    for name, grad in found["gradient"].items():
        if name.startswith("input") and grad is not None:
            dist.all_reduce(grad)
    if case.loss is not None:  # other outputs of a step come in shards
        for results in (expected, found, alone):
            results["output"] = {k: t for k, t in results["output"].items() if k.startswith("0,")}
    gap, where = fuzzing.worst_of(expected, found)
    if gap > 1e-9 and gap > 3 * fuzzing.worst_of(expected, alone)[0]:
        return f"wrong by {gap} in {where}"
    other = [n for kind in found for n, t in found[kind].items() if not _same(t, alone[kind][n])]
    return f"other bits than one process in {other}" if other else "right"


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def search(rank: int, port: int, first: int, last: int, folder: str) -> None:
    """These seeds, in one of the processes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    verify.ON = True
    Request.hands = WORLD  # type: ignore[method-assign,assignment]  # the same tiles for one process
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("domain",))
    found = {}
    for seed in range(first, last):
        case = draw(seed)
        small = case is None or any(
            t.shape[2] <= WORLD for t in pytree.tree_leaves(case.input) if isinstance(t, torch.Tensor)
        )
        found[seed] = "unusable" if case is None or small else judged(case, seed, mesh)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def searched(first: int, last: int, folder: Path) -> Counter[str]:
    """How often what was found, on the rank where it was worst."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(search, (port, first, last, str(folder)), WORLD)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
    tally: Counter[str] = Counter()
    for seed in ranks[0]:
        said = {there[seed] for there in ranks}
        bad = sorted(said - {"right"})
        tally[f"{seed}: {bad[0]}" if bad and bad[0] != "unusable" else min(said)] += 1
    return tally


@pytest.mark.fuzz
def test_random_networks(tmp_path: Path) -> None:
    tally = searched(FIRST, FIRST + MANY, tmp_path)
    print(tally)
    assert not [k for k in tally if "wrong" in k or "bits" in k], tally
    assert tally["right"] >= MANY // 4, tally
    assert sum(n for k, n in tally.items() if "refused" in k) <= 0.04 * MANY, tally


if __name__ == "__main__":
    print(searched(int(sys.argv[1]), int(sys.argv[2]), Path("/tmp")))
