"""Mixed precision by `torch.autocast`: the tiled step does what autocast says, and rounds no more than plain PyTorch.

    python examples/mixed_precision.py

bfloat16 needs no loss scale. float16 with a `GradScaler` does, and works with ``fullframe.tile(net)`` (the module),
whose gradients are made once the scale is known; the step with ``loss=``, whose are made with the loss, refuses it.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullframe

TILED = {
    "budget": "1 GB",
    "tile": 24,
}  # tile= so that these small pictures are cut at all; leave it out for large ones


def gradients(net: nn.Module, image: Tensor, target: Tensor, tiled: bool, autocast: bool) -> Tensor:
    """All gradients of one step in one vector, float64."""
    net = copy.deepcopy(net)
    model = fullframe.tile(net, **TILED) if tiled else net
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(image), target)
    loss.backward()
    return torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None])


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    image = torch.randn(2, 1, 64, 64)
    target = (image[:, 0] > 0.5).long()
    truth = gradients(copy.deepcopy(net).double(), image.double(), target, tiled=False, autocast=False)
    errors = {}
    for name, tiled in (("plain PyTorch", False), ("fullframe", True)):
        found = gradients(net, image, target, tiled, autocast=True)
        errors[name] = float((found - truth).norm() / truth.norm())
        print(f"{name}, bfloat16: gradients differ from float64's by {errors[name]:.2%}")
    assert errors["fullframe"] < 1.5 * errors["plain PyTorch"]

    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(fullframe.tile(net, **TILED)(image), target)
    scaler.scale(loss).backward()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler.unscale_(optimizer)
    found = torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None])
    error = float((found - truth).norm() / truth.norm())
    print(f"fullframe, float16 with a loss scale: {error:.2%}")
    assert error < errors["fullframe"]
    with torch.autocast("cpu", torch.float16):
        loss = fullframe.tile(net, loss=F.cross_entropy, **TILED)(image, target)
    try:
        scaler.scale(loss).backward()
    except RuntimeError as error:
        print(f"refused: {error}")
    else:
        raise AssertionError("float16 gradients were scaled after they were made")


if __name__ == "__main__":
    main()
