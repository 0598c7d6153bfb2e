"""What is trained, and how: every choice of a training, and the learning rate of each of its steps."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from cosmictagger.model import NetworkConfig
from cosmictagger.objective import PlaneLoss
from cosmictagger.optimizers import check_optimizer, check_schedule


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how. Raises ValueError for values that make no sense."""

    network: NetworkConfig
    loss: str = "light"
    learning_rate: float = 3e-4
    """Of the optimiser, once warm and before it falls."""
    batch: int = 1
    """Events that go through the network together."""
    steps: int = 1000
    seed: int = 0
    validate_every: int = 100
    """Steps between validations, each with a checkpoint."""
    checkpoint_every: int | None = None
    """Steps between checkpoints besides; None: at validations only."""
    minutes: float | None = None
    """Stop after the step that passes this time."""
    background: float | None = None
    """Share of background that the untrained network expects; None: weights as published."""
    schedule: str = "constant"
    """How the learning rate falls, to zero at the last step or at the end of the minutes: not at all (constant), in a
    straight line (linear), or as half a cosine (cosine); or a scheduler of torch.optim.lr_scheduler by its name,
    which moves by one after each step that is not of the warm-up, and knows nothing of minutes."""
    warmup: int = 0
    """Steps over which the learning rate rises in a straight line first."""
    crop: tuple[int, int] | None = None
    """Rows and columns, before shrinking, of the part of each event that a step takes; None: the whole event."""
    flips: bool = False
    """Mirror events along the drift and turn them about it, each half of the time; see `Event.flipped`."""
    validate_first: bool = False
    """Score the untrained network, too."""
    validation_events: int | None = None
    """Score the first so many of the validation events; None: all of them."""
    optimizer: str = "Adam"
    """One of torch.optim, by its name."""
    optimizer_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Its keyword arguments, but for the learning rate."""
    schedule_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of a scheduler of torch."""
    accumulate: int = 1
    """Batches of which a step is made; see `accumulation`."""

    def __post_init__(self) -> None:
        PlaneLoss(self.loss)
        for name, least in {
            "batch": 1,
            "accumulate": 1,
            "steps": 1,
            "seed": 0,
            "validate_every": 1,
            "checkpoint_every": 1,
            "warmup": 0,
            "validation_events": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if self.crop is not None and min(self.crop) < 1:
            raise ValueError(f"crop is {list(self.crop)}; rows and columns must be at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be positive")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes}; it must be positive")
        check_optimizer(self.optimizer, self.optimizer_arguments)
        check_schedule(self.schedule, self.schedule_arguments)
        if self.optimizer == "Rprop" and (self.warmup or self.schedule != "constant"):
            raise ValueError("optimizer Rprop reads its learning rate once; leave warmup and schedule out")

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Learning rate of step `step` (from 0), begun `seconds` after the training, by a schedule of our own."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        by_time = 0.0 if self.minutes is None else min(seconds / (60 * self.minutes), 0.99)
        by_steps = (step - self.warmup) / max(self.steps - self.warmup, 1)
        done = max(by_steps, by_time)
        if self.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * (1 - done if self.schedule == "linear" else 1)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` steps though nothing is validated."""
        return self.checkpoint_every is not None and step % self.checkpoint_every == 0


def completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """What a training's folder records of its recipe, with what older versions did not know. Raises TypeError."""
    known = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}
    made = {f.name: f.default_factory() for f in fields(Recipe) if f.default_factory is not MISSING}
    return {**known, **made, **recorded}
