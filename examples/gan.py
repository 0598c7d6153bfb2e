"""A generative adversarial network: two networks, two optimisers, two steps that take turns.

    python examples/gan.py

Both networks are tiled, each by itself. The discriminator learns from real and generated pictures; the generator's
gradient comes back through the discriminator, tile by tile. The same loop with plain networks ends with the same
weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullframe

TILED = {
    "budget": "1 GB",
    "tile": 24,
}  # tile= so that these small pictures are cut at all; leave it out for large ones


def networks() -> tuple[nn.Module, nn.Module]:
    """A generator of pictures from noise, and a discriminator that judges every part of a picture."""
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.ConvTranspose2d(4, 8, 4, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1), nn.Tanh(),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 8, 4, stride=2, padding=1), nn.InstanceNorm2d(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3),
    )  # fmt: skip
    return generator.double(), discriminator.double()


def judged(logits: Tensor, real: bool) -> Tensor:
    """The loss of taking pictures for real or for made."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def train(tiled: bool) -> list[Tensor]:
    """Two turns of both; all parameters and buffers afterwards."""
    generator, discriminator = networks()
    make, judge = generator, discriminator
    if tiled:
        make, judge = fullframe.tile(generator, **TILED), fullframe.tile(discriminator, **TILED)
    of_generator = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    numbers = torch.Generator().manual_seed(1)
    for _ in range(2):
        real = torch.rand(2, 1, 64, 64, generator=numbers, dtype=torch.float64)
        made = make(torch.randn(2, 4, 16, 16, generator=numbers, dtype=torch.float64))
        of_discriminator.zero_grad()
        (judged(judge(real), real=True) + judged(judge(made.detach()), real=False)).backward()
        of_discriminator.step()
        of_generator.zero_grad()
        judged(judge(made), real=True).backward()
        of_generator.step()
    return [*generator.state_dict().values(), *discriminator.state_dict().values()]


def main() -> None:
    for plain, tiled in zip(train(tiled=False), train(tiled=True), strict=True):
        torch.testing.assert_close(tiled, plain, rtol=1e-7, atol=1e-9)
    print("generator and discriminator after two turns: the same weights as plain PyTorch's")


if __name__ == "__main__":
    main()
