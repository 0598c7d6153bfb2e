"""From CUDA source to machine code: finding NVIDIA's runtime compiler, which comes with PyTorch; a cache on disk."""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path

import torch

from fullframe.codegen.toolchain import kept_files
from fullframe.codegen.toolchain.cxx import BuildError

FLAGS = ("-std=c++17", "--fmad=false")
"""Every node is rounded as PyTorch rounds it, so multiplications and additions are not contracted."""


def names() -> list[str]:
    """Where the library may be: with PyTorch, then anywhere the loader looks. The version of PyTorch's first."""
    major = (torch.version.cuda or "0").split(".")[0]
    beside = Path(torch.__file__).parent
    found = [
        path
        for pattern in (
            f"nvidia/*/lib/libnvrtc*.so.{major}*",
            "torch/lib/libnvrtc*.so*",
            "nvidia/*/lib/libnvrtc*.so*",
        )
        for path in sorted(beside.parent.glob(pattern))
        if not path.name.startswith("libnvrtc-builtins") and ".alt." not in path.name
    ]
    return [*dict.fromkeys(map(str, found)), f"libnvrtc.so.{major}", "libnvrtc.so"]


class Nvrtc:
    """The library. Threads may compile at the same time."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._checked("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def _checked(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise BuildError(f"{name} failed with code {code}")

    def compile(self, source: str, architecture: str) -> bytes:
        """The machine code of a source for an architecture, as 'sm_90'. Raises BuildError."""
        program = ctypes.c_void_p()
        name = b"fullframe.cu"
        self._checked("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name, 0, None, None)
        try:
            flags = [flag.encode() for flag in (f"--gpu-architecture={architecture}", *FLAGS)]
            code = self._library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
            if code:
                message = self._library.nvrtcGetErrorString(code).decode()
                log = self._text(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
                raise BuildError(f"NVRTC {self.version} failed: {message}: {log.strip()[:2000]}")
            return self._text(program, "nvrtcGetCUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._checked(f"{what}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        self._checked(what, program, content)
        return content.raw


@cache
def find() -> Nvrtc:
    """The compiler of this machine. Raises BuildError when there is none."""
    for name in names():
        try:
            return Nvrtc(ctypes.CDLL(name))
        except (OSError, AttributeError, BuildError):
            continue
    raise BuildError("no CUDA compiler found (libnvrtc)")


def build(source: str, architecture: str) -> bytes:
    """The machine code of a source, from the cache or built now. Raises BuildError."""
    made = find()
    key = hashlib.sha256("\0".join((source, architecture, *FLAGS, made.version)).encode()).hexdigest()
    path = kept_files.directory() / f"{key}.cubin"
    content = kept_files.kept(path)
    if content is None:
        content = made.compile(source, architecture)
        try:
            kept_files.keep(content, path)
        except OSError as error:
            raise BuildError(f"the kernel could not be kept: {error}") from error
    return content
