"""A timm encoder, frozen, and a head of one's own that is trained on whole pictures.

    pip install timm
    python examples/timm_frozen.py

The encoder's parameters ask for no gradient, so its backward is not made; its batch norms are in eval mode and keep
their statistics. Here its weights are random, so that nothing is downloaded; ``pretrained=True`` changes nothing
else.
"""

from __future__ import annotations

import copy

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullframe

TILED = {"budget": "2 GB", "tile": 48}  # tile= so that this small picture is cut at all; leave it out for large ones


class Segmenter(nn.Module):
    """A frozen encoder of timm's, and a head on two of its levels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.create_model("resnet10t", features_only=True, out_indices=(0, 1), pretrained=False)
        self.encoder.requires_grad_(False)
        fine, coarse = self.encoder.feature_info.channels()
        self.head = nn.Conv2d(fine + coarse, 2, 1)

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        self.encoder.eval()  # frozen statistics too
        return self

    def forward(self, image: Tensor) -> Tensor:
        fine, coarse = self.encoder(image)
        coarse = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return self.head(torch.cat((fine, coarse), 1))


def train(net: Segmenter, tiled: bool, image: Tensor, target: Tensor) -> list[float]:
    """The losses of three steps; the head of ``net`` is trained."""
    net.train()
    model = fullframe.tile(net, loss=F.cross_entropy, **TILED) if tiled else None
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(image), target) if model is None else model(image, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    net = Segmenter().double()
    image = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    target = (F.avg_pool2d(image[:, :1], 2)[:, 0] > 0).long()
    other, before = copy.deepcopy(net), copy.deepcopy(net.encoder.state_dict())
    plain, tiled = train(other, False, image, target), train(net, True, image, target)
    assert all(abs(a - b) < 1e-9 for a, b in zip(plain, tiled, strict=True)), (plain, tiled)
    assert tiled[-1] < tiled[0]
    for name, value in net.encoder.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the frozen encoder has changed"
    for a, b in zip(net.head.parameters(), other.head.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    print(f"losses {tiled[0]:.4f} to {tiled[-1]:.4f} as in plain PyTorch, the encoder untouched")


if __name__ == "__main__":
    main()
