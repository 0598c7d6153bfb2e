"""Accelerate: `prepare`, bfloat16, accumulated gradients, clipping.

    pip install accelerate
    python examples/accelerate_loop.py

The tiled network is prepared as any other. Accelerate replaces its `forward` by one under autocast, and adds up the
gradients of two batches; both reach the tiles. In bfloat16 the weights are as far from a float32 training's as those
of plain PyTorch; without it, they are the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fullframe

TILED = {
    "budget": "1 GB",
    "tile": 24,
}  # tile= so that these small pictures are cut at all; leave it out for large ones


def train(tiled: bool, precision: str) -> torch.Tensor:
    """All parameters after two epochs, in one vector."""
    AcceleratorState._reset_state(reset_partial_state=True)  # only since this script trains several times
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    image = torch.randn(4, 1, 64, 64)
    pictures = DataLoader(TensorDataset(image, (image[:, 0] > 0.5).long()), batch_size=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, pictures = accelerator.prepare(
        fullframe.tile(net, **TILED) if tiled else net, optimizer, pictures
    )
    for _ in range(2):
        for batch, target in pictures:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(batch), target)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    state = accelerator.unwrap_model(model).state_dict()
    assert list(state) == list(net.state_dict())  # the plain network's names
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def main() -> None:
    plain, tiled = train(False, "no"), train(True, "no")
    torch.testing.assert_close(tiled, plain, rtol=1e-4, atol=1e-6)
    errors = [float((train(t, "bf16") - plain).norm() / plain.norm()) for t in (False, True)]
    assert errors[1] < 1.5 * errors[0] + 1e-6, errors
    print(
        f"float32: the same weights; bfloat16: {errors[1]:.1e} from float32's, and in plain PyTorch {errors[0]:.1e}"
    )


if __name__ == "__main__":
    main()
