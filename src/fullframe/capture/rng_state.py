"""Torch's random state, followed while a step is recorded.

A recorded step draws by numbers of its own, counted in the order of its draws. Code that puts an earlier state back
(``torch.utils.checkpoint``, ``fork_rng``) wants the numbers of then once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from fullframe.capture.threads import replaced

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
    def followed(self, real: bool = False) -> Iterator[None]:
        """Inside, torch's functions for the state of its default generator tell of their calls.

        The generator itself is set only if ``real``: nothing that is recorded draws from it, and other threads do.
        """
        owners = (torch, torch.random)

        def ask(own: Any) -> Any:
            return lambda: self._asked(own())

        def put(own: Any) -> Any:
            def to(state: torch.Tensor) -> None:
                self._set(state)
                if real:
                    own(state)

            return to

        def seed(own: Any) -> Any:
            def to(number: int) -> Any:
                self._set(None)
                return own(number) if real else torch.default_generator

            return to

        with (
            replaced(owners, "get_rng_state", ask), replaced(owners, "set_rng_state", put),
            replaced(owners, "manual_seed", seed),
        ):  # fmt: skip
            yield
