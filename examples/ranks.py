"""One step on several processes, each of which has a part of the rows of every image.

    python examples/ranks.py
    torchrun --nproc-per-node 2 examples/ranks.py
    torchrun --nproc-per-node 4 examples/ranks.py --rows 1024 --columns 1024 --steps 20

A small U-Net learns to mark bright discs in noise. No process ever has a whole image: each draws its own rows. Two
lines make it one training: the mesh, and the call of `fullframe.tile`. Batch norm and loss are those of whole images,
so every rank has the same loss and the same gradients, and the optimiser needs to know nothing. That the losses are
equal is asserted in the end.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fullframe


class UNet(nn.Module):
    """Two levels, batch norm, and a global gate."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.first = self._block(1, width)
        self.second = self._block(width, 2 * width)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2 * width, 2 * width, 1), nn.Sigmoid())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.head = nn.Conv2d(2 * width, 2, 1)

    @staticmethod
    def _block(inner: int, outer: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(F.max_pool2d(a, 2))
        return self.head(torch.cat([a, self.up(b * self.gate(b))], 1))


def draw(step: int, rows: range, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """These rows of an image (1, 1, rows, columns) of discs in noise, and of its labels (1, rows, columns)."""
    torch.manual_seed(step)  # on all ranks the same discs
    centres = torch.rand(12, 2) * torch.tensor(shape)
    y, x = torch.meshgrid(torch.arange(rows.start, rows.stop), torch.arange(shape[1]), indexing="ij")
    near = ((y[..., None] - centres[:, 0]) ** 2 + (x[..., None] - centres[:, 1]) ** 2).amin(-1)
    labels = (near < (shape[0] / 16) ** 2).long()
    torch.manual_seed(1_000_000 * step + rows.start)  # and noise of its own
    return (labels + torch.randn(labels.shape))[None, None], labels[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--budget", default="1 GB", help="of each process")
    given = parser.parse_args()

    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:  # one process
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("domain",))
    rows = range(rank * given.rows // size, (rank + 1) * given.rows // size)

    net = UNet()
    step = fullframe.tile(net, loss=F.cross_entropy, budget=given.budget, workers=1, mesh=mesh)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for number in range(given.steps):
        image, labels = draw(number, rows, (given.rows, given.columns))
        optimizer.zero_grad()
        loss = step(image, labels)
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {number}: loss {loss.item():.6f}", flush=True)
    losses: list[float] = [0.0] * size
    dist.all_gather_object(losses, loss.item())
    assert set(losses) == {loss.item()}, "the loss is that of whole images, the same on every rank"
    if rank == 0:
        print(step.explain())
    dist.barrier()  # none closes its connections while another is still at work
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
