"""Torch's random state, followed while a step is recorded.

A recorded step draws by numbers of its own, counted in the order of its draws. Code that puts an earlier state back
(``torch.utils.checkpoint``, ``fork_rng``) wants the numbers of then once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

SEEDED = -1  # in place of a mark: a state that this step has not had


class State(NamedTuple):
    """Where a step is: how many times the state was asked for, how many times it was set, and to that of which asking
    (None: never)."""

    marks: int = 0
    sets: int = 0
    source: int | None = None


class States:
    """Notes when the random state is asked for and set."""

    def __init__(self, note: Callable[[State], None]):
        self._note, self.now = note, State()
        self._kept: list[torch.Tensor] = []

    def _asked(self, state: torch.Tensor) -> torch.Tensor:
        self._kept.append(state)
        self._to(self.now._replace(marks=len(self._kept)))
        return state

    def _set(self, state: torch.Tensor | None) -> None:
        mark = next((k for k, kept in enumerate(self._kept) if kept is state), SEEDED)
        self._to(self.now._replace(sets=self.now.sets + 1, source=mark))

    def _to(self, state: State) -> None:
        self.now = state
        self._note(state)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Inside, torch's functions for the state of its default generator tell of their calls."""
        names = ("get_rng_state", "set_rng_state", "manual_seed")
        old: dict[str, Any] = {name: getattr(torch.random, name) for name in names}

        def put(state: torch.Tensor) -> None:
            self._set(state)
            old["set_rng_state"](state)

        def seed(number: int) -> Any:
            self._set(None)
            return old["manual_seed"](number)

        new: dict[str, Any] = {
            "get_rng_state": lambda: self._asked(old["get_rng_state"]()), "set_rng_state": put, "manual_seed": seed,
        }  # fmt: skip
        for name in names:
            for module in (torch, torch.random):
                setattr(module, name, new[name])
        try:
            yield
        finally:
            for name in names:
                for module in (torch, torch.random):
                    setattr(module, name, old[name])
