"""Replicas of a training side by side, each of which is one step on two processes.

    python examples/replicas.py
    torchrun --nproc-per-node 4 examples/replicas.py
    pip install accelerate && torchrun --nproc-per-node 4 examples/replicas.py --accelerate

Of four processes two and two have an image together, half of its rows each, and gradients are averaged over both
images. The mesh has a dimension for each: `domain` is given to `fullframe.tile`, `data` to DistributedDataParallel.
With --accelerate `prepare` wraps the step instead, over all four: those that have an image together have the same
gradients, so that the mean over four is that over two images. Both are held against plain PyTorch.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fullframe

SIDE = 64


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 2, 2, stride=2),
    )  # fmt: skip


def draw(number: int) -> tuple[Tensor, Tensor]:
    """An image (1, 1, rows, columns), and which of its pixels are bright (1, rows, columns)."""
    image = torch.randn(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(number))
    return image, (image[:, 0] > 0.5).long()


def plain(replicas: int) -> list[Tensor]:
    """The gradients of plain PyTorch, averaged over the images of all replicas."""
    net = network()
    for number in range(replicas):
        image, target = draw(number)
        (F.cross_entropy(net(image), target) / replicas).backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerate", action="store_true")
    given = parser.parse_args()

    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:  # one process
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    size = dist.get_world_size()
    together = 2 if size % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (size // together, together), mesh_dim_names=("data", "domain"))
    replica, part = mesh.get_local_rank("data"), mesh.get_local_rank("domain")
    rows = slice(part * SIDE // together, (part + 1) * SIDE // together)

    net = network()
    step: nn.Module = fullframe.tile(net, loss=F.cross_entropy, budget="1 GB", workers=1, mesh=mesh["domain"])
    if given.accelerate:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        step = accelerator.prepare(step)
    else:
        step = nn.parallel.DistributedDataParallel(step, process_group=mesh["data"].get_group())

    image, target = draw(replica)
    loss = step(image[:, :, rows], target[:, rows])
    loss.backward()
    for parameter, expected in zip(net.parameters(), plain(size // together), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    if dist.get_rank() == 0:
        print(f"{size // together} images, {together} processes each: loss {loss.item():.6f} of the first, gradients")
        print("of their mean as in plain PyTorch")
    dist.barrier()  # none closes its connections while another is still at work
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
