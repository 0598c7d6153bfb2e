"""The C++ that runs bytecode, and the functions of PyTorch's library that it calls."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fullframe.codegen.toolchain import cxx as compiler
from fullframe.errors import fall_back

SOURCES = ("interpreter.cpp", "scheduler.cpp")  # beside this file; a profiler puts one of its own before them
FUNCTIONS = ("aoti_torch_create_tensor_from_blob", "aoti_torch_delete_tensor_object", "aoti_torch_get_data_ptr",
             "aoti_torch_get_strides", "torch_new_list_reserve_size", "torch_list_push_back",
             "torch_new_stable_ivalue", "torch_new_string_handle", "aoti_torch_call_dispatcher",
             "aoti_torch_cpu_add_Tensor", "aoti_torch_get_dtype")  # fmt: skip
TYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
)
FORMATS = {torch.strided: 0, torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2,
           torch.channels_last_3d: 3}  # fmt: skip


class Entries(NamedTuple):
    """The entries of the C++, and the ``library`` that each is given."""

    interpret: Callable[..., int]
    scheduler_new: Callable[..., int | None]
    scheduler_run: Callable[..., int]
    scheduler_met: Callable[..., int]
    scheduler_fail: Callable[..., int]
    scheduler_delete: Callable[..., int]
    release: Callable[..., int]
    copy: Callable[..., int]
    library: ctypes.Array[ctypes.c_void_p]


def bytecode_available() -> bool:
    """Whether bytecode can be run: there is a compiler, and this PyTorch has the functions."""
    return entries() is not None


@cache
def entries() -> Entries | None:
    """The entries; None without a compiler, or where this PyTorch has not the functions."""
    source = "".join((Path(__file__).parent / name).read_text() for name in SOURCES)
    try:
        library = _torch()
        named = [getattr(library, name) for name in FUNCTIONS]
        made = [compiler.load(source, f"fullframe_{name}") for name in Entries._fields[:-1]]
    except (compiler.BuildError, OSError, AttributeError) as error:
        fall_back(f"tiles are not replayed from bytecode, each runs op by op in Python, which is slower: {error}")
        return None
    interpret, new, run, met, fail, delete, give_back, copy = made
    new.restype = ctypes.c_void_p  # type: ignore[attr-defined]
    addresses = (ctypes.c_void_p * len(named))(*(ctypes.cast(f, ctypes.c_void_p) for f in named))
    return Entries(interpret, new, run, met, fail, delete, give_back, copy, addresses)


def release(most: int) -> None:
    """Give back the workspaces of tiles that are done, but for those of at most so many bytes."""
    found = entries()
    if found is not None:
        found.release(ctypes.c_int64(most))


def _torch() -> ctypes.CDLL:
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))


@cache
def codes() -> dict[torch.dtype, int]:
    """The library's numbers of types."""
    return {t: getattr(_torch(), f"aoti_torch_dtype_{str(t).removeprefix('torch.')}")() for t in TYPES}
