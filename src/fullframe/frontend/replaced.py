"""Functions of torch's in whose place somebody has put others: a faster attention, a logger, a test's stand-in.

What installed packages read as globals is no part of a guard snapshot. But every layer calls these, so a recording
made with one of them holds as long as it is there.
"""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

import torch
import torch.nn.functional

SPACES = (torch.nn.functional, torch, torch.Tensor, torch.linalg, torch.special, torch.fft)
_latest: list[Any] = []
_versions: list[list[Any]] = []  # which keep the functions alive, so that no other gets the identity of one
_version = 0


def functions_version() -> int:
    """Which functions torch's namespaces hold: the same number while they are the same ones."""
    global _latest, _version
    values = chain.from_iterable(vars(space).values() for space in SPACES)
    if len(_latest) != sum(len(vars(space)) for space in SPACES) or not all(map(operator.is_, values, _latest)):
        values = [v for space in SPACES for v in vars(space).values()]
        functions = [f for f in values if callable(f) and not isinstance(f, type)]  # modules appear when imported
        found = (k for k, known in enumerate(_versions) if _same(functions, known))
        _version = next(found, len(_versions))
        if _version == len(_versions):
            _versions.append(functions)
        _latest = values
    return _version


def _same(values: list[Any], others: list[Any]) -> bool:
    return len(values) == len(others) and all(map(operator.is_, values, others))
