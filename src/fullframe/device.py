"""Devices: all that the engine knows of the kinds of hardware on which steps run, in one object for each.

The rest of the engine asks `device_of` and never which kind it has. A new kind is a class here, or anywhere else, and
an entry in `DEVICES`.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import TypeVar

import torch

from fullframe.budget import host_bytes

CXX, NVRTC = "C++", "NVRTC"
"""The toolchains that make kernels (`fullframe.codegen.kernel`)."""
BYTECODE, GRAPH = "bytecode", "graph"
"""The ways of running a step again without Python (`fullframe.runtime`)."""
Mark = torch.cuda.Event | torch.Event | None
"""A moment of a stream, where there are streams."""


class Device:
    """A kind of device; the methods are given the one that is meant, as torch names it.

    What is written here holds for one of which nothing more is known than that torch computes on it: tiles in the
    order of the image, op by op. `Cpu` and `Cuda` know more.
    """

    toolchain = ""
    """What makes kernels for it: `CXX`, `NVRTC`, or nothing, and all is done by torch's ops."""
    replay = ""
    """How a step runs again without Python: `BYTECODE` of its tiles, one `GRAPH` of it all, or not at all."""
    on_host = False
    """Whether its tensors lie in the processor's own memory, and its ops are done when they return."""
    separate_bias = False
    """Whether the library adds a convolution's bias in a pass of its own; then it joins the pass that follows."""
    windows = 0
    """Tile policy: so many of the largest windows fit in the budget, one tile at a time; 0 for tiles that fit caches,
    as many at a time as there are workers."""

    speed: int | None = None
    """Million operations that it makes in a second, by which what a disk takes is judged; None: it is measured."""

    def free_bytes(self, place: torch.device) -> int:
        """Bytes that are free now."""
        raise NotImplementedError(f"how much memory is free on {place} is not known; give a budget")

    def block(self, nbytes: int, place: torch.device) -> torch.Tensor:
        """Bytes in which stored maps live. Raises `MemoryError`, or what torch raises for lack of memory."""
        return torch.empty(nbytes, dtype=torch.uint8, device=place)

    def lock(self, owner: object, block: torch.Tensor, place: torch.device) -> None:
        """Let copies between a block of the host's memory and the device be fast, as long as its owner lives."""

    def synchronize(self, place: torch.device) -> None:
        """Wait until all is done that was asked of it."""

    def mark(self, place: torch.device) -> Mark:
        """What `wait` takes: that the current stream has come so far. None where there are no streams."""

    def wait(self, mark: Mark, place: torch.device) -> None:
        """Let what follows on the current stream wait until a mark has been reached."""

    def streams(self, count: int, place: torch.device) -> StreamPool | None:
        """Streams on which tiles take turns, so that copies and arithmetic overlap; None where there are none."""


class Cpu(Device):
    """The processor, and the host's memory."""

    toolchain, replay, on_host = CXX, BYTECODE, True

    def free_bytes(self, place: torch.device) -> int:
        """The machine's available memory, or what the container's limits leave, whichever is less."""
        return host_bytes()

    def block(self, nbytes: int, place: torch.device) -> torch.Tensor:
        """As `Device.block`: private and anonymous, with huge pages asked for.

        The first touch of a map in pages of 4 KB costs as much as a convolution over it, and Python's default shared
        mapping would not take the advice. Raises `MemoryError` where the system has not so many.
        """
        if not nbytes or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.empty(nbytes, dtype=torch.uint8)
        try:
            block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(
                f"no memory for the stored maps of a tiled step: {nbytes:,} bytes ({error.strerror}); free some, "
                "raise the limit (ulimit -v), or give a smaller budget"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages: same numbers, slower first touch
                block.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(block, dtype=torch.uint8)


class Cuda(Device):
    """CUDA devices. Their caches are small beside their memory, and they want much to do at once: large tiles."""

    toolchain, replay, separate_bias, windows = NVRTC, GRAPH, True, 32
    speed = 10_000_000  # a guess, of one that is neither small nor large

    def free_bytes(self, place: torch.device) -> int:
        """What the device has free; what torch's allocator holds unused counts as free."""
        unused = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return int(torch.cuda.mem_get_info(place)[0]) + unused

    def lock(self, owner: object, block: torch.Tensor, place: torch.device) -> None:
        """As `Device.lock`: copies of locked pages need not be waited for. Raises `MemoryError`."""
        if not block.nbytes:
            return
        runtime = torch.cuda.cudart()
        assert runtime is not None
        error = int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0))
        if error:
            raise MemoryError(
                f"CUDA error {error} when locking {block.nbytes:,} bytes of the host's memory for the stored maps; "
                "free some of it, allow the process to lock more (ulimit -l), or raise the budget"
            )
        weakref.finalize(owner, _unlock, runtime, block, place)

    def synchronize(self, place: torch.device) -> None:
        """As `Device.synchronize`."""
        torch.cuda.synchronize(place)

    def mark(self, place: torch.device) -> Mark:
        """As `Device.mark`."""
        return torch.cuda.current_stream(place).record_event()

    def wait(self, mark: Mark, place: torch.device) -> None:
        """As `Device.wait`."""
        if mark is not None:
            torch.cuda.current_stream(place).wait_event(mark)

    def streams(self, count: int, place: torch.device) -> StreamPool:
        """As `Device.streams`."""
        return StreamPool(place, count)


def _unlock(runtime: ModuleType, block: torch.Tensor, place: torch.device) -> None:
    try:
        torch.cuda.synchronize(place)  # no copy may be on its way
    finally:
        runtime.cudaHostUnregister(block.data_ptr())


Place = TypeVar("Place")
Partials = list[tuple[Place, torch.Tensor]]


class StreamPool:
    """Streams of a CUDA device over which the tiles of a section take turns."""

    def __init__(self, device: torch.device, count: int):
        self.device = device
        self.streams = [torch.cuda.Stream(device) for _ in range(count)]

    def run(
        self, tiles: int, tile: Callable[[int], Partials[Place]], take: Callable[[int, Partials[Place]], None]
    ) -> None:
        """Run ``tile`` for 0..n-1, each on the next stream, and ``take`` its number and what it returns on
        the caller's stream."""
        main = torch.cuda.current_stream(self.device)
        for stream in self.streams:
            stream.wait_stream(main)
        try:
            for k in range(tiles):
                stream = self.streams[k % len(self.streams)]
                with torch.cuda.stream(stream):
                    partials = tile(k)
                main.wait_stream(stream)
                for _, partial in partials:
                    partial.record_stream(main)
                take(k, partials)
        finally:  # whatever happened: what they read may be let go of now
            for stream in self.streams:
                main.wait_stream(stream)


CPU = torch.device("cpu")
DEVICES: dict[str, Device] = {"cpu": Cpu(), "cuda": Cuda()}
"""The kinds of devices, by torch's names."""
_UNKNOWN = Device()


def device_of(place: torch.device) -> Device:
    """What is known of a device's kind."""
    return DEVICES.get(place.type, _UNKNOWN)
