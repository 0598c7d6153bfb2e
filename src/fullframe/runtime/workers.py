"""The worker threads of this process, which help with the tiles of a step."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from fullframe.capture.threads import ForkSafeLock

_POOLS: dict[tuple[int, int, int], ThreadPoolExecutor] = {}
_LOCK = ForkSafeLock()


def pool(workers: int, group: object = None) -> ThreadPoolExecutor:
    """So many worker threads; made anew after a fork, where threads do not survive. A group of ranks has its own:
    were one step to wait for another's tiles on one rank, and that one for its on another, none would end."""
    key = (os.getpid(), workers, id(group))
    with _LOCK:
        if key not in _POOLS:
            _POOLS[key] = ThreadPoolExecutor(workers, "fullframe", initializer=_start_worker)
        return _POOLS[key]


def _start_worker() -> None:
    # Intra-op threads, grad mode and autocast are thread-local: each worker sets its own.
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes over the process's number when it first asks: now, not later
    torch.set_grad_enabled(False)
