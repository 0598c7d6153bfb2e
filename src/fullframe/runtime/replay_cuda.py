"""Runs recorded on a CUDA device and replayed again: a step is thousands of small launches, and Python is slow at
them.

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

from fullframe.compiler.program import Program
from fullframe.device import GRAPH, device_of
from fullframe.errors import fall_back
from fullframe.ir.graph import Value
from fullframe.ops.numerics.table_cache import held
from fullframe.runtime.executor import Run
from fullframe.storage.pool import Pool, Stores


class Feed(NamedTuple):
    """A tensor that a run reads; ``lasting`` where it is the same one at the next call (a parameter, a buffer)."""

    value: Value
    tensor: torch.Tensor
    lasting: bool


Feeds = Sequence[Feed]


class CudaReplay:
    """One recorded run."""

    def __init__(self, program: Program, stores: Stores, device: torch.device, feeds: Feeds):
        self.program, self.stores, self.flags = program, stores, _flags()
        self.run = Run(program.plan, stores, device)
        # Detached: a parameter may be given other memory (p.data = ...), and must then be seen to have moved.
        self.fed = [_fed(f, device) for f in feeds]
        self.places = [_place(t) for t in self.fed]
        self.run.feed([f.value for f in feeds], self.fed)
        self.graph = torch.cuda.CUDAGraph()
        self.replayed = torch.cuda.Event()
        # A stream of its own: torch's is that of the device that recorded first. It is left again if this fails.
        recording = torch.cuda.graph(self.graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local")
        with held() as self.tables, torch.cuda.stream(torch.cuda.current_stream(device)), recording:
            self.run.advance(len(program.plan.stages))

    def fits(self, program: Program, feeds: Feeds) -> bool:
        """Whether the same run on these tensors reads what lasts where it was, and computes in the same way."""
        if program is not self.program or self.flags != _flags():
            return False
        return all(place == _place(f.tensor) for place, f in zip(self.places, feeds, strict=True) if f.lasting)

    def replay(self, feeds: Feeds) -> Run:
        """The run with results in memory of their own."""
        stream = torch.cuda.current_stream(self.run.device)
        stream.wait_event(self.replayed)  # of another stream, perhaps
        with torch.no_grad():
            for old, feed in zip(self.fed, feeds, strict=True):
                if not feed.lasting:
                    old.copy_(feed.tensor)
            self.graph.replay()
            inputs = {f.value: f.tensor.detach() for f in feeds}
            made = {v: t.clone() for v, t in self.run.values.items() if v in self.program.made and v not in inputs}
        self.replayed.record(stream)
        return self.run.finished(inputs | made)


def _fed(feed: Feed, device: torch.device) -> torch.Tensor:
    tensor = feed.tensor.detach()
    return tensor if feed.lasting else tensor.to(device, copy=True)


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()


def _flags() -> tuple[object, ...]:
    """How torch's libraries are to compute: a recording holds what they chose."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda.matmul
    kinds = (cudnn, cudnn.conv, cuda) if hasattr(cudnn, "conv") else (cudnn, cuda)
    precision = tuple(getattr(kind, "fp32_precision", None) for kind in kinds)
    reduced = (cuda.allow_fp16_reduced_precision_reduction, cuda.allow_bf16_reduced_precision_reduction)
    return cudnn.enabled, cudnn.deterministic, cudnn.benchmark, precision, reduced


def replayable(program: Program) -> bool:
    """Whether a program's runs may be recorded: one go, that nothing waits for, as an op without a rule may."""
    return program.lasting and program.ruled and not program.graph.late and not program.plan.offloaded


class CudaReplays:
    """The latest recorded run of a tiled module: one, since it keeps its memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replay: CudaReplay | None = None
        self._last: Program | None = None
        self._refused: WeakSet[Program] = WeakSet()

    def replay(self, program: Program, pool: Pool, device: torch.device, feeds: Feeds) -> Run | None:
        """The finished run of a program; None where it is not recorded, or another thread is at it."""
        if (
            device_of(device).replay != GRAPH
            or torch.cuda.is_current_stream_capturing()
            or not self._lock.acquire(blocking=False)
        ):
            return None
        try:
            repeated, self._last = self._last is program, program
            if self._replay is not None and not self._replay.fits(program, feeds):
                self._release(pool)
            if repeated and self._replay is None and program not in self._refused and replayable(program):
                self._replay = self._record(program, pool, device, feeds)
            return self._replay.replay(feeds) if self._replay is not None else None
        except torch.OutOfMemoryError as error:  # nothing of the call's has changed yet
            self._refuse(program, error)
            self._release(pool)
            return None
        finally:
            self._lock.release()

    def release(self, pool: Pool) -> None:
        """Let go of the recorded run and its memory, unless another thread is at it."""
        if self._lock.acquire(blocking=False):
            try:
                self._release(pool)
            finally:
                self._lock.release()

    def _release(self, pool: Pool) -> None:
        if self._replay is not None:
            torch.cuda.current_stream(self._replay.run.device).wait_event(self._replay.replayed)
            pool.give(self._replay.stores)
            self._replay = None

    def _record(self, program: Program, pool: Pool, device: torch.device, feeds: Feeds) -> CudaReplay | None:
        stores = pool.take(program.plan.bytes.stores, device)
        try:
            with _ONE_AT_A_TIME:
                return CudaReplay(program, stores, device, feeds)
        except Exception as error:  # the device was waited for, say; the run that follows says what is wrong
            self._refuse(program, error)
            pool.give(stores)
            return None

    def _refuse(self, program: Program, error: Exception) -> None:
        self._refused.add(program)
        fall_back(f"a step is not replayed as a CUDA graph, but launched from Python, which is slower: {error}")

    def __deepcopy__(self, _: object) -> CudaReplays:
        return CudaReplays()

    def __reduce__(self) -> tuple[type[CudaReplays], tuple[()]]:
        return CudaReplays, ()


_ONE_AT_A_TIME = threading.Lock()  # torch can record one graph of a process at a time
