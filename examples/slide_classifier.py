"""A classifier of whole large pictures, whose label hangs on details far apart.

    python examples/slide_classifier.py

As on a slide, most of a picture says nothing: here two marks of four pixels lie somewhere in noise, each leaning left
or right, and the label says whether they lean alike. What other ways lose is known beforehand:

- shrunk by four, a mark is one pixel, and both kinds are the same;
- a patch holds one of the marks at the most, and which way a single one leans says nothing about the label.

The network is trained three times by the same loop: on whole pictures tile by tile, on shrunk ones, and on patches.
The first learns it; the others stay at chance on pictures that they have not seen. A real slide of 100,000 pixels a
side differs in the budget alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullframe

SIZE, SHRINK, PATCH = 64, 4, 24
TILED = {
    "budget": "1 GB",
    "tile": 48,
}  # tile= so that these small pictures are cut at all; leave it out for large ones


class Classifier(nn.Module):
    """A convolution, the largest answer anywhere in the picture, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).amax((2, 3)))


def slides(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, SIZE, SIZE) float32 and labels (count,): 1 where both marks lean alike."""
    numbers = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(count, 1, SIZE, SIZE, generator=numbers)
    leans = torch.randint(2, (count, 2), generator=numbers)
    mark = torch.eye(SHRINK)
    for k in range(count):
        # The marks lie in opposite corners, and each is one of the blocks that shrinking averages.
        for which, corner in enumerate((0, SIZE - PATCH)):
            row, column = (corner + SHRINK * torch.randint(PATCH // SHRINK, (2,), generator=numbers)).tolist()
            images[k, 0, row : row + SHRINK, column : column + SHRINK] += mark if leans[k, which] else mark.flip(0)
    return images, (leans[:, 0] == leans[:, 1]).long()


def patches(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The corners of each picture, each with the picture's label."""
    corners = (images[..., :PATCH, :PATCH], images[..., -PATCH:, -PATCH:])
    return torch.cat(corners), labels.repeat(2)


Seen = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def train(net: nn.Module, seen: Seen, steps: int = 70) -> float:
    """Train on what is seen of pictures; the accuracy on pictures that were not trained on."""
    step = fullframe.tile(net, loss=F.cross_entropy, **TILED)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2)
    for k in range(steps):
        optimizer.zero_grad()
        step(*seen(*slides(16, seed=k))).backward()
        optimizer.step()
    images, labels = seen(*slides(64, seed=-1))
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())


def main() -> None:
    torch.manual_seed(1)
    net = Classifier()
    image, label = slides(2, seed=0)
    found = fullframe.check(net, image, label, F.cross_entropy, tile=48)
    assert found.passed, str(found)

    ways: dict[str, Seen] = {
        "whole": lambda images, labels: (images, labels),
        f"shrunk by {SHRINK}": lambda images, labels: (F.avg_pool2d(images, SHRINK), labels),
        f"patches of {PATCH}": patches,
    }
    accuracy = {name: train(copy.deepcopy(net), seen) for name, seen in ways.items()}
    for name, value in accuracy.items():
        print(f"{name}: accuracy {value:.2f} on new pictures")
    whole, *others = accuracy.values()
    assert whole > 0.95
    assert max(others) < 0.7


if __name__ == "__main__":
    main()
