"""Small tensors that rules make once and read again at every run: where to look, and with what weight."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import TypeVar

from fullframe.torch_compat import without_modes

Made = TypeVar("Made")
_KEPT = 1024  # of each function; the least recently used go first
_HELD: ContextVar[list[object] | None] = ContextVar("held", default=None)


def table(make: Callable[..., Made]) -> Callable[..., Made]:
    """Remember what a function of hashable arguments made."""

    @lru_cache(maxsize=_KEPT)
    def remembered(*args: Hashable) -> Made:
        with without_modes():  # what is recorded meanwhile finds a table as a number, however often it is read
            return make(*args)

    @wraps(make)
    def found(*args: Hashable) -> Made:
        made = remembered(*args)
        held = _HELD.get()
        if held is not None:
            held.append(made)
        return made

    return found


@contextmanager
def held() -> Iterator[list[object]]:
    """All tables that are read inside, for whoever reads their memory later than they may be remembered."""
    found: list[object] = []
    token = _HELD.set(found)
    try:
        yield found
    finally:
        _HELD.reset(token)
