"""Threads: whose turn it is, and functions of torch's replaced for the thread that records alone."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ClassMethodDescriptorType
from typing import Any


class ForkSafeLock:
    """A lock that its thread may take again. Copies are new ones, and so is that of a process forked meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _ALL.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Free the lock of a thread that is not there any more."""
        if not self._lock._is_owned():  # pyright: ignore[reportAttributeAccessIssue]
            self._lock = threading.RLock()

    def __deepcopy__(self, _: object) -> ForkSafeLock:
        return ForkSafeLock()

    def __reduce__(self) -> tuple[type[ForkSafeLock], tuple[()]]:
        return ForkSafeLock, ()


def _renew() -> None:
    for turns in list(_ALL):
        turns.renew()


_ALL: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
# A recording changes what other threads see of its modules: guard snapshots and recordings are one at a time.
RECORDING = ForkSafeLock()


def _of_class(method: Any) -> Callable[..., Any]:
    """A class method, in Python or in C (as that of autograd's functions from torch 2.14 on), as a function of the
    class first."""
    return (
        method.__func__
        if isinstance(method, classmethod)
        else lambda cls, *a, **k: method.__get__(None, cls)(*a, **k)
    )


@contextmanager
def replaced(owners: Sequence[Any], name: str, make: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    """Inside, this thread finds under a name of the owners what ``make`` makes of what is there.

    Other threads go on as before. A class is given a class method, and ``make`` a function of the class first.
    """
    old, me = vars(owners[0])[name], threading.get_ident()
    bound = isinstance(old, (classmethod, ClassMethodDescriptorType))
    before = _of_class(old) if bound else old
    after = make(before)

    def either(*args: Any, **kwargs: Any) -> Any:
        return (after if threading.get_ident() == me else before)(*args, **kwargs)

    for owner in owners:
        setattr(owner, name, classmethod(either) if bound else either)
    try:
        yield
    finally:
        for owner in owners:
            setattr(owner, name, old)
