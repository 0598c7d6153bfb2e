"""A call whose course depends on the data: a program for each way it has taken.

A program assumes how the conditions fall that its step asks for. Where they fall otherwise nothing has been changed
when that is seen, and the step runs again, by the program of the way that it takes in fact. Each way has read other
things than the others, so each has a key of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd.function import FunctionCtx

from fullframe.capture.conditions import MAX_PATHS, Diverged
from fullframe.compiler.program import Program
from fullframe.errors import CaptureError
from fullframe.frontend.inputs import Call
from fullframe.frontend.reads import Reads
from fullframe.frontend.recapture_reasons import outside
from fullframe.runtime.executor import Run

Answers = tuple[bool, ...]
Key = tuple[Reads, Hashable]
Programs = dict[tuple[Reads, Hashable, Answers], Program]  # the latest used is last


def keys(call: Call, programs: Iterable[Key]) -> Iterator[Key]:
    """The call's key in the terms of each recording, for they have read different things."""
    for reads in dict.fromkeys(reads for reads, _ in reversed(list(programs))):
        call.take_snapshot(reads)
        yield reads, call.key(reads)


def matching(call: Call, programs: Programs, known: Answers = ()) -> Iterator[tuple[Reads, Hashable, Answers]]:
    """Keys of the ways that hold for a call with these answers to its first conditions, the latest used first.

    The call is looked at by the reads of each.
    """
    latest = list(reversed(programs))
    for key in keys(call, [(reads, other) for reads, other, _ in programs]):
        yield from (k for k in latest if k[2][: len(known)] == known and k[:2] == key)


def keep(programs: Programs, key: Key, program: Program, most: int) -> None:
    """Put a program last; of at most so many keys, each with all of its ways."""
    latest = next(reversed(programs.items()), None)
    if latest is not None and latest[1] is program and latest[0][:2] == key:
        return  # where it is; to hash a long key again would take longer than to see that it is the same
    programs.pop((*key, program.answers), None)
    programs[*key, program.answers] = program
    if len(programs) > most:
        kept = list(dict.fromkeys(k[:2] for k in reversed(programs)))[:most]
        for k in [k for k in programs if k[:2] not in kept]:
            del programs[k]


def warn_of_paths(known: int, where: str) -> None:
    """Say that a call goes several ways, once one was ``known`` and another has been recorded; refuse too many."""
    if known >= MAX_PATHS:
        raise CaptureError(
            f"the course of the computation depends on the data, at {where} and elsewhere, and has gone {MAX_PATHS} "
            "ways by now, each of which is recorded and planned; use torch.where in place of an if"
        )
    if known == 1:
        warnings.warn(
            f"the course of the computation depends on the data at {where}: each way that it takes is recorded and "
            "planned, and a step that takes another way than the last runs twice; torch.where would not",
            stacklevel=outside(),
        )


@contextmanager
def assuming(program: Program, run: Run) -> Iterator[None]:
    """Inside a step fails for what it has assumed, if that is not so, rather than for what follows from it."""
    try:
        yield
    except (Diverged, MemoryError, OSError):
        raise
    except Exception as error:
        if not program.settle(run.values):
            raise CaptureError(
                f"the step failed ({error}) while it assumed how the data fall that its course depends on, at "
                f"{program.conditions[0].where}; use torch.where in place of an if"
            ) from error
        raise


class Idle(torch.autograd.Function):
    """An output that asks for a gradient and hands none on, as of a norm of order 0."""

    @staticmethod
    def forward(ctx: FunctionCtx, made: torch.Tensor, _leaf: torch.Tensor) -> torch.Tensor:
        return made.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, *_upstream: torch.Tensor) -> tuple[None, None]:
        return None, None
