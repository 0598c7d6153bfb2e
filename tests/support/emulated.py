"""Generated CUDA kernels run on the CPU: the same source through a C++ compiler, each thread of a block a thread."""

from __future__ import annotations

import ctypes
from threading import Lock
from typing import Any

import torch

from fullframe.codegen import cuda as cuda_source
from fullframe.codegen.toolchain import cxx as compiler
from fullframe.codegen.toolchain.cuda_driver import Start

HEAD = """
#pragma GCC optimize("no-strict-aliasing")
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static
struct Dim { unsigned x, y; };
static thread_local Dim threadIdx, blockIdx;
static Dim gridDim;
static pthread_barrier_t barrier;
static void __syncthreads() { pthread_barrier_wait(&barrier); }
static unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
"""

TAIL = """
struct Part { int entry; unsigned self; void **arguments; };

static void *work(void *given) {
    const Part part = *(Part *)given;
    const Geometry &g = *(const Geometry *)part.arguments[0];
    const Places &p = *(const Places *)part.arguments[1];
    threadIdx.x = part.self;
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
            switch (part.entry) { CASES }
            __syncthreads();  // all blocks have the same shared memory here
        }
    return nullptr;
}

extern "C" int emulate(int entry, unsigned x, unsigned y, void **arguments) {
    pthread_t threads[THREADS];
    Part parts[THREADS];
    gridDim = {x, y};
    pthread_barrier_init(&barrier, nullptr, THREADS);
    for (unsigned i = 0; i < THREADS; i++) {
        parts[i] = {entry, i, arguments};
        if (pthread_create(threads + i, nullptr, work, parts + i)) return 1;
    }
    for (unsigned i = 0; i < THREADS; i++) pthread_join(threads[i], nullptr);
    pthread_barrier_destroy(&barrier);
    return 0;
}
"""

ALL = (*cuda_source.ENTRIES, cuda_source.JOIN)


LOCKS: dict[int | None, Lock] = {}


class Emulated:
    """The functions of a source."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._one = LOCKS.setdefault(ctypes.cast(function, ctypes.c_void_p).value, Lock())

    def bound(self, entry: str, blocks: tuple[int, int]) -> Start:
        def start(arguments: ctypes.Array[Any]) -> None:
            with self._one:  # a source has one barrier and one shared memory
                assert self._function(ALL.index(entry), *blocks, arguments) == 0

        return start


class Emulator:
    """As `fullframe.codegen.toolchain.cuda_kernel.Cuda`, for tensors on the CPU: a small device of small blocks."""

    threads = 16

    def accepts(self, place: torch.device) -> bool:
        return place.type == "cpu"

    def processors(self, place: torch.device) -> int:
        return 1

    def load(self, source: str, place: torch.device) -> Emulated:
        """Raises BuildError."""
        cases = "".join(f"case {i}: {entry}(g, p); break;\n" for i, entry in enumerate(ALL) if f" {entry}(" in source)
        return Emulated(compiler.load(HEAD + source + TAIL.replace("CASES", cases), "emulate"))
