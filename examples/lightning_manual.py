"""Lightning with manual optimisation: two networks and two optimisers in one training step.

    pip install lightning
    python examples/lightning_manual.py

A network that cleans pictures learns from the truth and from a critic, which is trained beside it. Each is tiled by
itself; `manual_backward`, `clip_gradients` and the optimisers are Lightning's. The plain networks end with the same
weights.
"""

from __future__ import annotations

import logging
import tempfile
import warnings

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fullframe

TILED = {
    "budget": "1 GB",
    "tile": 24,
}  # tile= so that these small pictures are cut at all; leave it out for large ones


class Cleaning(lightning.LightningModule):
    """A cleaner and its critic; ``tiled`` says how they run and nothing else."""

    def __init__(self, tiled: bool):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        cleaner = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1)).double()
        critic = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3)).double()
        self.cleaner = fullframe.tile(cleaner, **TILED) if tiled else cleaner
        self.critic = fullframe.tile(critic, **TILED) if tiled else critic

    def training_step(self, batch: list[Tensor]) -> None:
        noisy, clean = batch
        of_cleaner, of_critic = self.optimizers()
        found = self.cleaner(noisy)

        of_critic.zero_grad()
        self.manual_backward(self.critic(found.detach()).mean() - self.critic(clean).mean())
        self.clip_gradients(of_critic, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        of_critic.step()

        of_cleaner.zero_grad()
        self.manual_backward(F.l1_loss(found, clean) - 0.1 * self.critic(found).mean())
        of_cleaner.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (self.cleaner, self.critic)]


def train(tiled: bool) -> Cleaning:
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand(4, 1, 64, 64, generator=generator, dtype=torch.float64)
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    module = Cleaning(tiled)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(noisy, clean), batch_size=2))
    return module


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    plain, tiled = train(tiled=False), train(tiled=True)
    for (name, a), b in zip(plain.state_dict().items(), tiled.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    print("two networks and two optimisers: the same weights as the plain networks'")


if __name__ == "__main__":
    main()
