"""TensorBoard: scalars, pictures and histograms of weights and gradients of a tiled training.

    pip install tensorboard
    python examples/tensorboard_log.py

Parameters and their gradients are the plain network's, so what is written of them is as usual. `add_graph` traces a
module, which a tiled one refuses; give it the plain network, which the tiled step shares.
"""

from __future__ import annotations

import tempfile

import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import fullframe

TILED = {"budget": "1 GB", "tile": 24}  # tile= so that this small picture is cut at all; leave it out for large ones


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    image = torch.rand(1, 1, 64, 64)
    step = fullframe.tile(net, loss=F.mse_loss, **TILED)
    optimizer = torch.optim.Adam(step.parameters(), lr=1e-2)
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            writer.add_graph(net, image)
            for k in range(3):
                optimizer.zero_grad()
                loss = step(image, image)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                writer.add_scalar("loss", loss, k)
                for name, parameter in step.named_parameters():
                    assert parameter.grad is not None
                    writer.add_histogram(f"weight/{name}", parameter, k)
                    writer.add_histogram(f"gradient/{name}", parameter.grad, k)
            with torch.no_grad():
                writer.add_image("made", fullframe.tile(net, **TILED)(image)[0])
        written = EventAccumulator(folder).Reload()
        assert [round(event.value, 5) for event in written.Scalars("loss")] == [round(loss, 5) for loss in losses]
        assert "gradient/2.weight" in written.Tags()["histograms"]
    print(
        f"three losses from {losses[0]:.4f} to {losses[-1]:.4f} and {len(list(net.parameters()))} histograms of each"
    )


if __name__ == "__main__":
    main()
