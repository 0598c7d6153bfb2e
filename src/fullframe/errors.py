"""The errors that users meet."""

from __future__ import annotations


class FullframeError(ValueError):
    """Base of the errors a user of the engine can meet."""


class CaptureError(FullframeError):
    """The step cannot be recorded as one graph."""


class UnsupportedOpError(FullframeError):
    """An op cannot be run tile by tile, nor whole within the budget."""


class BudgetError(FullframeError):
    """The budget is too small; ``smallest`` is the number of bytes that would do."""

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest

    def __reduce__(self):
        return type(self), (self.args[0], self.smallest)
