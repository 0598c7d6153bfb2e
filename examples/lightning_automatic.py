"""Lightning with automatic optimisation: bfloat16, accumulated gradients, clipping, checkpoints, resuming.

    pip install lightning
    python examples/lightning_automatic.py

One line of the module is fullframe's: the network is tiled where it is made. Checkpoints hold the plain network's
names, so they load into a module with or without tiles. The same training with the plain network ends with the same
weights in double precision, and in bfloat16 with some as near to those.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fullframe

TILED = {
    "budget": "1 GB",
    "tile": 24,
}  # tile= so that these small pictures are cut at all; leave it out for large ones


class Segmentation(lightning.LightningModule):
    """A small segmentation network; ``tiled`` says how it runs and nothing else."""

    def __init__(self, tiled: bool):
        super().__init__()
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1),
        )  # fmt: skip
        self.net = fullframe.tile(net, **TILED) if tiled else net

    def training_step(self, batch: list[Tensor]) -> Tensor:
        image, target = batch
        return F.cross_entropy(self.net(image), target)

    def validation_step(self, batch: list[Tensor]) -> None:
        image, target = batch
        self.log("accuracy", (self.net(image).argmax(1) == target).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(tiled: bool, precision: str, folder: Path, epochs: int = 2, resume: Path | None = None) -> Segmentation:
    """Train for some epochs, or go on from a checkpoint until so many."""
    double = precision == "64-true"
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(4, 1, 64, 64, generator=generator, dtype=torch.float64 if double else torch.float32)
    pictures = DataLoader(TensorDataset(image, (image[:, 0] > 0.5).long()), batch_size=2)
    trainer = lightning.Trainer(
        accelerator="cpu", precision=precision, max_epochs=epochs, accumulate_grad_batches=2, gradient_clip_val=0.1,
        callbacks=[ModelCheckpoint(folder, monitor="accuracy", mode="max", save_last=True)],
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    module = Segmentation(tiled)
    trainer.fit(module, pictures, pictures, ckpt_path=resume)
    return module


def weights(module: nn.Module) -> Tensor:
    """All parameters in one vector, float64."""
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    with tempfile.TemporaryDirectory() as folder:
        plain, tiled = (train(t, "64-true", Path(folder, f"{t}")) for t in (False, True))
        for (name, a), b in zip(plain.state_dict().items(), tiled.state_dict().values(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")

        mixed, parts = train(True, "bf16-mixed", Path(folder, "mixed")), Path(folder, "parts")
        train(True, "bf16-mixed", parts, epochs=1)
        resumed = train(True, "bf16-mixed", parts, epochs=2, resume=parts / "last.ckpt")
        for a, b in zip(mixed.state_dict().values(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b)  # not one bit is lost by stopping
        Segmentation(tiled=False).load_state_dict(mixed.state_dict())
        rounded = train(False, "bf16-mixed", Path(folder, "rounded"))
    errors = [distance(weights(module), weights(plain)) for module in (rounded, mixed)]
    assert errors[1] < 1.5 * errors[0], errors
    print(
        f"float64: the plain network's weights; bfloat16: {errors[1]:.1e} away, and the plain network {errors[0]:.1e}"
    )


if __name__ == "__main__":
    main()
