"""Ranges of stages whose tiles are in bytecode, for the C++ that replays them on several threads (scheduler.cpp)."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fullframe.bytecode.libtorch import entries
from fullframe.bytecode.program import Bytecode

ROOM, FREES, MULTI_THREADED = 1, 2, 4
HELPER, OWNER, WAITING = 0, 1, 2


class BoundBytecode(NamedTuple):
    """Bytecode, and what it is given: addresses of a table, and bytes behind each."""

    bytecode: Bytecode
    bases: Sequence[tuple[int, int]]


class NativeStage(NamedTuple):
    """A stage: those it waits for, its tiles, whether the caller has to find ``room`` when it begins and has
    something to free after it, and whether only the owner's thread makes it (``multi_threaded``).

    ``bound`` are its tiles' bytecode, and ``after`` adds up their results, with a part for each; a stage without them
    is made by the caller. ``meetings``: how many of those with other ranks must be over.
    """

    before: Sequence[int]
    tiles: int
    room: bool
    frees: bool
    multi_threaded: bool
    bound: Sequence[BoundBytecode] = ()
    after: BoundBytecode | None = None
    meetings: int = 0


class NativeStages:
    """Stages as the C++ takes them."""

    def __init__(self, stages: Sequence[NativeStage]):
        self.list = list(stages)
        self._held: list[ctypes.Array[ctypes.c_int64]] = []
        words: list[int] = []
        for s in stages:
            flags = ROOM * s.room + FREES * s.frees + MULTI_THREADED * s.multi_threaded
            words += (self._array(s.before), len(s.before), s.tiles, flags)
            words += (self._bound(s.bound), self._bound([s.after] if s.after else []))
            words += (self._array(s.after.bytecode.marks if s.after else ()), s.meetings)
        self.words = (ctypes.c_int64 * len(words))(*words)

    def _array(self, numbers: Sequence[int]) -> int:
        if not numbers:
            return 0
        self._held.append((ctypes.c_int64 * len(numbers))(*numbers))
        return ctypes.addressof(self._held[-1])

    def _bound(self, bound: Sequence[BoundBytecode]) -> int:
        words: list[int] = []
        for bytecode, bases in bound:
            words += (
                ctypes.addressof(bytecode.words),
                self._array([n for base in bases for n in base]),
                len(bases),
                bytecode.slots,
                bytecode.nbytes,
            )
        return self._array(words)


class NativeScheduler:
    """Stages in work. Threads call `run`, one of them as the owner.

    ``calls`` are begin(stage), tile(stage, tile, address of its results), add(stage, tile), end(stage), free(stage),
    multi_threaded(on) and poll(). What one raises is the first of the ``errors``.
    """

    COUNTS = (1, 3, 2, 1, 1, 1, 0)  # numbers of arguments

    def __init__(self, stages: NativeStages, stage_range: range, max_in_flight: int, most: int,
                 table: ctypes.Array[ctypes.c_void_p], calls: Sequence[Callable[..., None]]):  # fmt: skip
        found = entries()
        assert found is not None
        self._entries = found
        self.failed, self._stop = 0, stage_range.stop
        self._inside, self._closed, self._changed = 0, False, threading.Condition()
        self.errors: list[BaseException] = []
        made = [self._guarded(call, n) for call, n in zip(calls, self.COUNTS, strict=True)]
        # Not by ctypes.cast, which makes a function hold itself, and with it all that a stage had.
        addresses = (ctypes.c_void_p * len(made))(*(ctypes.c_void_p.from_buffer(f).value for f in made))
        self._held: tuple[object, ...] | None = (stages, table, made, addresses)
        numbers = (ctypes.c_int64(n) for n in (stage_range.start, stage_range.stop, max_in_flight, most))
        self._scheduler = ctypes.c_void_p(
            found.scheduler_new(stages.words, *numbers, table, found.library, addresses)
        )
        if not self._scheduler:
            raise MemoryError("no memory to begin the steps of a tiled call")

    def _guarded(self, call: Callable[..., None], count: int):
        """A function for the C++. An interrupt may end it before anything of it has run, and is lost then; so it is
        not what it returns that says that all is well."""

        def guarded(*args: int) -> None:
            try:
                call(*args[:-1])
                ctypes.c_int64.from_address(args[-1]).value = 1
            except BaseException as error:
                self.errors.append(error)

        numbers = [ctypes.c_int64] * min(count, 2) + [ctypes.c_void_p] * (count > 2)
        return ctypes.CFUNCTYPE(None, *numbers, ctypes.c_void_p)(guarded)

    def run(self, who: int, until: int | None = None) -> None:
        """Make tiles until all stages before one are done, or one has failed; nothing once it is closed. An owner
        that is ``WAITING`` makes only what nobody else may."""
        until = self._stop if until is None else until
        with self._changed:
            if self._closed:
                return
            self._inside += 1
        try:
            failed = self._entries.scheduler_run(self._scheduler, ctypes.c_int64(who), ctypes.c_int64(until))
            self.failed = max(self.failed, failed)
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def met(self) -> None:
        """One more meeting with other ranks is over."""
        if not self._entries.scheduler_met(self._scheduler):
            self.failed = max(self.failed, 1)

    def check(self) -> None:
        """Raise what a call has raised, or that the library failed."""
        if self.errors:
            raise self.errors[0]
        if self.failed == 1:
            raise KeyboardInterrupt
        if self.failed:
            raise MemoryError("the results of a step could not be added up: short of memory?")

    def fail(self) -> None:
        """Let no thread begin another tile."""
        self._entries.scheduler_fail(self._scheduler)

    def close(self) -> None:
        """Give back its memory, when no thread is in `run` any more."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._inside)
        self._entries.scheduler_delete(self._scheduler)
        self._held = None  # the calls hold what holds this
