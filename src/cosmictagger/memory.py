"""How much memory a stretch of work adds to the process."""

from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """`with PeakMemory(device) as peak: ...; peak.added` is the growth at its highest, in bytes.

    On the CPU this is the resident set; on a CUDA device what its allocator handed out. None where the system
    cannot tell, or if not `wanted`.
    """

    def __init__(self, device: torch.device, *, wanted: bool = True) -> None:
        self._device, self._wanted = device, wanted
        self.added: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self._wanted:
            self._before = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._wanted and self._before is not None:
            self.added = max(0, self._highest() - self._before)

    def _start(self) -> int | None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        try:
            _CLEAR.write_text("5")  # asks the kernel to forget the highest resident set so far
            return _status("VmRSS")
        except OSError:
            return None

    def _highest(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device)
        return _status("VmHWM")


def _status(key: str) -> int:
    """A line of the process's status, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {key}")
