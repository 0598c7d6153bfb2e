"""The learning rate of each step, by a recipe's own formula or by a scheduler of torch."""

import copy
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cosmictagger.optimizers import OWN_SCHEDULES, build_optimizer, build_schedule, plain, restored
from cosmictagger.recipe import Recipe

REHEARSED = 1000
_MOVED = ("lr", "momentum", "betas")
"""Settings of an optimiser that schedulers move."""


class Rates:
    """Sets an optimiser's learning rate before each step.

    A scheduler of torch works on an optimiser of its own, made alike, of which the settings are taken over: so
    warm-up, and a learning rate that is changed when a training goes on, multiply all of its rates and do not get
    into what it goes on from. It begins when warm-up ends, and moves by one after each step; ReduceLROnPlateau moves
    with the mean IoU of each regular validation. Raises ValueError for values that it does not take, and where it
    ends before the training.
    """

    def __init__(self, recipe: Recipe, optimizer: Optimizer) -> None:
        self._recipe, self._optimizer = recipe, optimizer
        self._begin(recipe.learning_rate)
        self._rehearse()
        self._begin(recipe.learning_rate)

    def _begin(self, rate: float) -> None:
        recipe, self._base, self._taken = self._recipe, rate, 0
        self._scheduler = None
        if recipe.schedule in OWN_SCHEDULES:
            return
        alone = torch.nn.Parameter(torch.zeros(1, 1, 1, 1))
        self._shadow = build_optimizer(recipe.optimizer, recipe.optimizer_arguments, [alone], rate)
        self._scheduler = build_schedule(recipe.schedule, recipe.schedule_arguments, self._shadow)
        ends, needed = getattr(self._scheduler, "total_steps", None), recipe.steps - recipe.warmup
        if ends is not None and ends < needed:
            raise ValueError(
                f"schedule {recipe.schedule} ends after {ends} steps, and there are {needed} after warmup"
            )

    def _rehearse(self) -> None:
        """Some values are met by a scheduler only when it moves; that is found out before the training."""
        if self._scheduler is None or self.follows_scores:
            return
        try:
            for _ in range(min(self._recipe.steps - self._recipe.warmup - 1, REHEARSED)):
                self._move(self._scheduler)
        except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
            raise ValueError(f"schedule {self._recipe.schedule}: {error}") from error

    def _move(self, scheduler: LRScheduler) -> None:
        self._shadow.step()  # of no gradient: torch warns where no step came before its scheduler's
        scheduler.step()
        self._taken += 1

    @property
    def follows_scores(self) -> bool:
        """Whether it needs the scores of validations."""
        return isinstance(self._scheduler, ReduceLROnPlateau)

    def before(self, step: int, seconds: float) -> None:
        """Set the rate of step `step` (from 0), begun `seconds` after the training."""
        recipe = self._recipe
        if self._scheduler is None:
            self._set({"lr": recipe.rate(step, seconds)})
            return
        while not self.follows_scores and self._taken < step - recipe.warmup:
            self._move(self._scheduler)
        group = self._shadow.param_groups[0]
        warm = min((step + 1) / recipe.warmup, 1.0) if recipe.warmup else 1.0
        moved = {name: copy.copy(group[name]) for name in _MOVED if name in group}
        self._set(moved | {"lr": float(group["lr"]) * (recipe.learning_rate / self._base) * warm})

    def scored(self, mean_iou: float) -> None:
        """A validation has been made, at its regular time."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(mean_iou)

    def state(self) -> dict[str, Any]:
        """All that it goes on from, in JSON's types."""
        if self._scheduler is None:
            return {}
        settings = {name: value for name, value in self._shadow.param_groups[0].items() if name != "params"}
        what = f"schedule {self._recipe.schedule}"
        return {
            "learning_rate": self._base,
            "taken": self._taken,
            "settings": plain(settings, what),
            "scheduler": plain(self._scheduler.state_dict(), what),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`. Raises KeyError or TypeError where it is of another schedule."""
        if self._scheduler is None:
            return
        self._begin(state["learning_rate"])
        self._taken = state["taken"]
        group = self._shadow.param_groups[0]
        group.update(restored(state["settings"], group))
        assert self._scheduler is not None
        self._scheduler.load_state_dict(restored(state["scheduler"], self._scheduler.state_dict()))

    def _set(self, settings: dict[str, Any]) -> None:
        for group in self._optimizer.param_groups:
            group.update(settings)
