"""Steps on several processes, for `tests/distributed`: the networks, and what each process does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fullframe
from fullframe.runtime.executor import Run

WORLD = 4
ROWS, COLUMNS, TILE = 24, 20, 8


class Net(nn.Module):
    """A U-Net of two levels with strides, a transposed convolution, a resize, pooling and a global gate."""

    def __init__(self, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), norm(4), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), norm(4), nn.ReLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.head = nn.Conv2d(12, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        b = self.down(a)
        b = b * self.gate(b)
        c = F.interpolate(F.max_pool2d(b, 2), size=a.shape[2:], mode="bilinear")
        return self.head(torch.cat([a, self.up(b), c], 1))


class Far(nn.Module):
    """Reads further than a shard reaches, and upside down."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(2, 2, (9, 3), padding=(8, 1), dilation=(2, 1))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.wide(x)).flip(2) + x * torch.tensor(0.5, dtype=x.dtype)


class Tinted(nn.Module):
    """Has a tensor that is no buffer, and another one on each rank."""

    def __init__(self, rank: int):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1).double()
        self.tint = torch.full((1, 3, 1, 1), 1.0 + rank, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * self.tint


class Classes(nn.Module):
    """An image's class: what is left of the rows is the same on every rank."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.linear = nn.Linear(4 * 3 * 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(F.adaptive_avg_pool2d(self.conv(x).relu(), (3, 2)).flatten(1))


def _squares(made: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (made - target).square().mean()


class Case(NamedTuple):
    """A network, its loss, the ranks of the world that run it, and how many rows (or images) each has."""

    net: Callable[[], nn.Module]
    loss: Callable[..., torch.Tensor] | None
    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    target: str = "labels"
    axis: str = "domain"
    steps: int = 2


def _batch_norm() -> nn.Module:
    return Net(nn.BatchNorm2d)


def _group_norm() -> nn.Module:
    return Net(lambda n: nn.GroupNorm(2, n))


CASES = {
    "batch norm, 2 ranks": Case(_batch_norm, F.cross_entropy, (0, 1), (16, 8)),
    "batch norm, 3 ranks that do not begin at 0": Case(_batch_norm, F.cross_entropy, (1, 2, 3), (5, 9, 10)),
    "batch norm, more ranks than rows of tiles": Case(_batch_norm, F.cross_entropy, (0, 1, 2, 3), (1, 2, 3, 18)),
    "batch norm, 1 rank": Case(_batch_norm, F.cross_entropy, (2,), (24,)),
    "batch norm over a batch in parts": Case(_batch_norm, F.cross_entropy, (0, 1), (1, 1), axis="data"),
    "group norm, 3 ranks": Case(_group_norm, F.cross_entropy, (0, 1, 2), (11, 4, 9)),
    "a halo larger than shards, and dropout": Case(Far, _squares, (0, 1, 2, 3), (6, 6, 6, 6), "image"),
    "a module without a loss": Case(_group_norm, None, (0, 1), (7, 17), "scores"),
    "classes of images": Case(Classes, F.cross_entropy, (0, 1), (12, 12), "classes"),
}


def made(case: Case) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The network of a case, and the whole image and target."""
    torch.manual_seed(3)
    net = case.net().double()
    image = torch.randn(2, 2, ROWS, COLUMNS, dtype=torch.float64)
    targets = {
        "labels": torch.randint(0, 3, (2, ROWS, COLUMNS)), "image": torch.randn_like(image),
        "classes": torch.randint(0, 3, (2,)), "scores": torch.randn(2, 3, ROWS, COLUMNS, dtype=torch.float64),
    }  # fmt: skip
    return net, image, targets[case.target]


def tiled(case: Case, net: nn.Module, mesh: DeviceMesh | None = None) -> fullframe.Tiled:
    return fullframe.tile(net, loss=case.loss, budget="1 GB", tile=TILE, workers=1, mesh=mesh)


def steps(step: Any, net: nn.Module, image: torch.Tensor, target: torch.Tensor, count: int) -> dict[str, Any]:
    """What is left after some steps whose gradients add up."""
    image = image.clone().requires_grad_()
    losses = []
    torch.manual_seed(4)
    made = []
    for _ in range(count):
        if target.dtype == image.dtype and target.shape[1] == 3:  # a module: its outputs, and their gradients
            made.append(step(image))
            made[-1].backward(target)
            continue
        loss = step(image, target)
        loss.backward()
        losses.append(loss.detach())
    return {
        "outputs": [m.detach() for m in made],
        "losses": losses,
        "gradients": {n: p.grad for n, p in net.named_parameters()},
        "buffers": dict(net.named_buffers()),
        "image": image.grad,
    }


def shard(tensor: torch.Tensor, case: Case, at: int) -> torch.Tensor:
    """What a rank is given of a tensor."""
    ends = [0, *accumulate(case.sizes)]
    if case.axis == "data":
        return tensor[ends[at] : ends[at + 1]]
    if tensor.dim() < 3:
        return tensor
    return tensor.narrow(tensor.dim() - 2, ends[at], case.sizes[at])


# In each process -----------------------------------------------------------------------------------


def work(rank: int, port: int, folder: str) -> None:
    """All that one process of the world does; what it finds is saved in a folder."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    meshes = {key: DeviceMesh("cpu", list(key[0]), mesh_dim_names=(key[1],)) for key in _groups()}
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        if rank in case.ranks:
            net, image, target = made(case)
            if rank != case.ranks[0]:  # the first one's parameters are everybody's
                nn.init.zeros_(next(net.parameters()))
            at = case.ranks.index(rank)
            step = tiled(case, net, meshes[case.ranks, case.axis])
            found[name] = steps(step, net, shard(image, case, at), shard(target, case, at), case.steps)
            found[name]["explained"] = step.explain()
    found["replicas"] = _replicas(rank)
    found["small"] = _small(rank, meshes[(0, 1, 2, 3), "domain"])
    found["faults"] = dict(_faults(rank, meshes[(0, 1, 2, 3), "domain"]))
    torch.save(found, Path(folder) / f"{rank}.pt")
    _killed(rank, meshes[(0, 1, 2, 3), "domain"], Path(folder))


def _replicas(rank: int) -> dict[str, Any]:
    """DistributedDataParallel over two images, each of which two ranks make together."""
    case = CASES["group norm, 3 ranks"]._replace(sizes=(14, 10), steps=1)
    net, image, target = made(case)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "domain"))
    replica, part = divmod(rank, 2)
    step = tiled(case, net, mesh["domain"])
    outer = nn.parallel.DistributedDataParallel(step, process_group=mesh["data"].get_group())
    mine = slice(replica, replica + 1)
    outer(shard(image, case, part)[mine], shard(target, case, part)[mine]).backward()
    return {n: p.grad for n, p in net.named_parameters()}


def deep() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Maps of a megabyte each, enough of them to be worth making again; the image and labels."""
    torch.manual_seed(5)
    layers: list[nn.Module] = [nn.Conv2d(2, 8, 3, padding=1)]
    for _ in range(4):
        layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    net = nn.Sequential(*layers).double()
    return net, torch.randn(1, 2, 256, 64, dtype=torch.float64), torch.randint(0, 8, (1, 256, 64))


def _small(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """A step within the smallest budget there is, where values are made again."""
    net, image, target = deep()
    mine, its = image[:, :, 64 * rank : 64 * rank + 64], target[:, 64 * rank : 64 * rank + 64]

    def within(budget: int | str) -> fullframe.Tiled:
        return fullframe.tile(net, loss=F.cross_entropy, tile=64, budget=budget, workers=1, mesh=mesh)

    plenty = within("1 GB").plan(mine, its)
    least = 0
    try:
        within(1).plan(mine, its)
    except fullframe.BudgetError as error:
        least = error.smallest
    step = within(least)
    plan = step.plan(mine, its)
    step(mine, its).backward()
    return {
        "gradients": {n: p.grad for n, p in net.named_parameters()},
        "again": sum(bool(s.section.clone or s.section.recompute) for s in plan.stages),
        "projected": plan.projected_bytes, "least": least,
        "arenas": (plan.bytes.arena, plenty.bytes.arena),
    }  # fmt: skip


def _groups() -> dict[tuple[tuple[int, ...], str], None]:
    return dict.fromkeys((case.ranks, case.axis) for case in CASES.values())


def _faults(rank: int, mesh: DeviceMesh) -> Iterator[tuple[str, Any]]:
    """What is said of faults, whether anything has changed, and the step after them."""
    case = CASES["batch norm, more ranks than rows of tiles"]
    net, image, target = made(case)
    mine, its = shard(image, case, rank), shard(target, case, rank)
    step = tiled(case, net, mesh)
    for at in (0, 7, 1000):
        before = {n: t.clone() for n, t in net.state_dict().items()}
        begun = time.monotonic()
        with _failing(rank == 2, at):
            yield f"fault {at}", _message(lambda: step(mine, its))
        yield f"fault {at} took", time.monotonic() - begun
        yield f"fault {at} changed", [n for n, t in net.state_dict().items() if not torch.equal(t, before[n])]
    yield "after", steps(step, net, mine, its, case.steps)
    with _failing(True, 10**9) as counted:
        yield "replayed", _message(lambda: step(mine, its))
    yield "in Python", 10**9 - counted.left
    with _failing(rank == 2, 3, "end"):  # between meetings, when tiles are in bytecode
        yield "fault late", _message(lambda: step(mine, its))
    yield "again", _message(lambda: step(mine, its))
    narrow = mine[..., :-1] if rank == 1 else mine
    yield "shape", _message(lambda: step(narrow, its))
    yield "no image", _message(lambda: step(mine[:, :, :0] if rank == 0 else mine, its))
    other = nn.Conv2d(2, 3, 1 if rank == 3 else 3, padding=rank != 3).double()
    yield "network", _message(lambda: tiled(case, other, mesh)(mine, its))
    step = fullframe.tile(nn.Conv2d(2, 3, 3, padding=1).double(), loss=F.cross_entropy, budget=1000, mesh=mesh)
    yield "budget", _message(lambda: step(mine, its))
    yield "attribute", _message(lambda: tiled(case, Tinted(rank), mesh)(mine, its))
    branch = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU() if rank else nn.Tanh()).double()
    yield "step", _message(lambda: tiled(case, branch, mesh)(mine, its))


class _failing:
    """Has the tile of a given number fail, or the end of a stage's sums, counted from now on."""

    def __init__(self, here: bool, at: int, name: str = "make"):
        self.here, self.left, self.name, self.call = here, at, name, getattr(Run, name)

    def __enter__(self) -> _failing:
        def call(run: Run, *args: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise ArithmeticError("a fault in a tile")
            return self.call(run, *args)

        if self.here:
            setattr(Run, self.name, call)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(Run, self.name, self.call)


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _killed(rank: int, mesh: DeviceMesh, folder: Path) -> None:
    """A rank goes in the midst of a step."""
    case = CASES["batch norm, more ranks than rows of tiles"]
    net, image, target = made(case)
    step = tiled(case, net, mesh)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    if rank == 1:
        Run.make = lambda *_: os._exit(3)  # type: ignore[method-assign]
    begun = time.monotonic()
    said = _message(lambda: step(shard(image, case, rank), shard(target, case, rank)))
    changed = [n for n, t in net.state_dict().items() if not torch.equal(t, before[n])]
    again = _message(lambda: step(shard(image, case, rank), shard(target, case, rank)))
    torch.save((said, time.monotonic() - begun, changed, again), folder / f"killed{rank}.pt")
    os._exit(0)  # the group cannot be taken down in order any more
