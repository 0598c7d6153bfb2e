"""The errors that users meet, and the log in which they find what is done otherwise than they would expect."""

from __future__ import annotations

import logging

LOG = logging.getLogger("fullframe")
"""Captures and plans are told at the level INFO, and what falls back to a slower way, once each, as WARNING."""
_told: set[str] = set()


def fall_back(message: str) -> None:
    """Log that something is done in a slower way; each message once in a process."""
    if message not in _told:
        _told.add(message)
        LOG.warning(message)


class FullframeError(ValueError):
    """Base of the errors a user of the engine can meet."""


class CaptureError(FullframeError):
    """The step cannot be recorded as one graph."""


class UnsupportedOpError(FullframeError):
    """An op cannot be run tile by tile, nor whole within the budget."""


class BudgetError(FullframeError):
    """The budget is too small; ``smallest`` is the number of bytes that would do.

    Examples:
        >>> import torch, fullframe
        >>> net, image = torch.nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 64, 64)
        >>> try:
        ...     plan = fullframe.tile(net, budget="1 MB").plan(image)
        ... except fullframe.BudgetError as error:
        ...     plan = fullframe.tile(net, budget=error.smallest).plan(image)
        >>> plan.projected_bytes <= plan.budget
        True
    """

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest

    def __reduce__(self):
        return type(self), (self.args[0], self.smallest)


class RankError(FullframeError):
    """Ranks that make a step together differ, or one of them has failed: no parameter is changed on any."""
