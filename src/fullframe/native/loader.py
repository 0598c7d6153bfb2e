"""C++ of our own that does what an op of the library's does: loaded by name, run on tensors, recorded as bytecode."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock

import torch

from fullframe.bytecode.recorder import current
from fullframe.codegen.toolchain import cxx as compiler
from fullframe.errors import fall_back

Words = ctypes.Array[ctypes.c_int64]
"""Numbers as a kernel takes them."""
_LOCK = Lock()
_LOADED: dict[str, Callable[..., int] | None] = {}
SOURCES = {
    "convolution": ("vectors.h", "blocks.h", "convolution.cpp", "couples.h", "winograd.cpp"),
    "moments": ("moments.cpp",),
    "gradient": ("vectors.h", "gradient.cpp", "couples.h", "winograd_gradient.cpp"),
}
"""The files that are compiled together."""


def own(name: str, source: str = "") -> Callable[..., int] | None:
    """A function of one of the `SOURCES`, by default the one it is named after; None without a compiler, or where the
    source has it only for other processors.

    It is compiled by the thread that asks first.
    """
    if name not in _LOADED:
        with _LOCK:
            if name not in _LOADED:
                _LOADED[name] = _load(name, source or name)
    return _LOADED[name]


def _load(name: str, source: str) -> Callable[..., int] | None:
    here = Path(__file__).parent / "src"
    text = "".join((here / file).read_text() for file in SOURCES[source])
    try:
        return compiler.load(text, f"fullframe_{name}")
    except compiler.BuildError as error:
        fall_back(f"convolutions are torch's own, not the engine's, which may be slower: {error}")
        return None


def run(function: Callable[..., int], words: Words, tensors: Sequence[torch.Tensor | None]) -> None:
    """Call a function with numbers, an array of ctypes, and the addresses of tensors."""
    places = (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
    if function(words, places):
        raise MemoryError("no memory for what a kernel lays out anew")
    if (recorder := current()) is not None:
        recorder.own(function, words, tensors)
