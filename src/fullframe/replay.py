"""Runs recorded on a CUDA device and played again: a step is thousands of small launches, and Python is slow at them.

A step that runs twice in a row is recorded as a CUDA graph at the second time. Its maps, windows and sums then stay
where they were; parameters and buffers are read where they live, inputs are copied to where the first ones were, and
what it makes is copied out. What cannot be recorded (an op that waits for the device) runs as it did.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakSet

import torch

from fullframe.executor import Run
from fullframe.graph import Value
from fullframe.program import Program
from fullframe.store import Arena, Arenas


class Feed(NamedTuple):
    """A tensor that a run reads; ``lasting`` where it is the same one at the next call (a parameter, a buffer)."""

    value: Value
    tensor: torch.Tensor
    lasting: bool


Feeds = Sequence[Feed]


class Replay:
    """One recorded run."""

    def __init__(self, program: Program, arena: Arena, device: torch.device, feeds: Feeds):
        self.program, self.arena = program, arena
        self.run = Run(program.plan, arena, device)
        # Detached: a parameter may be given other memory (p.data = ...), and must then be seen to have moved.
        self.fed = [_fed(f, device) for f in feeds]
        self.run.feed([f.value for f in feeds], self.fed)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.run.advance(len(program.plan.steps))
        self.played = torch.cuda.Event()

    def fits(self, program: Program, feeds: Feeds) -> bool:
        """Whether the same run on these tensors reads what lasts where it was."""
        pairs = zip(self.fed, feeds, strict=False)
        return program is self.program and all(_place(a) == _place(f.tensor) for a, f in pairs if f.lasting)

    def play(self, feeds: Feeds) -> Run:
        """The run with results in memory of their own."""
        stream = torch.cuda.current_stream(self.run.device)
        stream.wait_event(self.played)  # of another stream, perhaps
        with torch.no_grad():
            for old, feed in zip(self.fed, feeds, strict=True):
                if not feed.lasting:
                    old.copy_(feed.tensor)
            self.graph.replay()
            inputs = {f.value: f.tensor.detach() for f in feeds}
            made = {v: t.clone() for v, t in self.run.values.items() if v in self.program.made and v not in inputs}
        self.played.record(stream)
        return self.run.finished(inputs | made)


def _fed(feed: Feed, device: torch.device) -> torch.Tensor:
    tensor = feed.tensor.detach()
    return tensor if feed.lasting else tensor.to(device, copy=True)


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()


class Replays:
    """The latest recorded run of a tiled module: one, since it keeps its memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replay: Replay | None = None
        self._last: Program | None = None
        self._refused: WeakSet[Program] = WeakSet()

    def play(self, program: Program, arenas: Arenas, device: torch.device, feeds: Feeds) -> Run | None:
        """The finished run of a program; None where it is not recorded, or another thread is at it."""
        plain = device.type != "cuda" or program.graph.late or program.plan.away or not program.lasting
        if plain or not self._lock.acquire(blocking=False):
            return None
        try:
            again, self._last = self._last is program, program
            if self._replay is not None and not self._replay.fits(program, feeds):
                arenas.give(self._replay.arena)
                self._replay = None
            if self._replay is None and again and program not in self._refused:
                self._replay = self._record(program, arenas, device, feeds)
            return self._replay.play(feeds) if self._replay is not None else None
        finally:
            self._lock.release()

    def _record(self, program: Program, arenas: Arenas, device: torch.device, feeds: Feeds) -> Replay | None:
        arena = arenas.take(program.plan.bytes.arena, device)
        try:
            return Replay(program, arena, device, feeds)
        except RuntimeError:  # the device was waited for
            self._refused.add(program)
            arenas.give(arena)
            return None

    def __deepcopy__(self, _: object) -> Replays:
        return Replays()

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()
