"""Bytecode that is done, and its results."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fullframe.bytecode.libtorch import entries

SMALL = 1024  # numbers of a partial result


class Result(NamedTuple):
    """A partial result: how it lies among all of a tile, and from which of its numbers on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int


class Bytecode:
    """Bytecode that is done. Threads may run it at the same time.

    ``words`` are its instructions, and ``marks`` where in them its parts begin; ``slots`` counts its places, and
    ``nbytes`` those of its ``results``.
    """

    def __init__(self, words: Sequence[int], marks: Sequence[int], slots: int, nbytes: int, results: Sequence[Result],
                 held: object):  # fmt: skip
        self.words = (ctypes.c_int64 * len(words))(*words)
        self.marks, self.slots, self.nbytes, self.results, self._held = marks, slots, nbytes, results, held

    def run(self, bases: Sequence[int]) -> list[torch.Tensor] | None:
        """The partial results, of a tile whose arrays are at these addresses; None where the library failed."""
        made = torch.empty(self.nbytes // 8, dtype=torch.float64)
        small = made.numel() > SMALL
        places = (ctypes.c_void_p * (len(bases) + 1))(*bases, made.data_ptr())
        found = entries()
        if found is None or found.interpret(self.words, places, len(places), self.slots, found.library):
            return None
        # Small ones wait to be added up, and would keep the memory of large ones beside them.
        return [t.clone() if small and t.numel() <= SMALL else t for t in self.views(made)]

    def views(self, made: torch.Tensor) -> list[torch.Tensor]:
        """The results in a block of their own."""
        return [made.view(dtype).as_strided(shape, stride, at) for dtype, shape, stride, at in self.results]
