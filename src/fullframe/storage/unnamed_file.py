"""A file without a name: bytes on a disk that are gone with the process, however it ends.

Reads and writes go by a buffer of each thread, past the page cache where the file system lets them (direct I/O), in
whole blocks; the ends of what is written, and short runs, go by the cache. Where there is no direct I/O the cache is
told to let go of what was read or written, so that it does not push out memory that somebody uses.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fullframe.errors import fall_back
from fullframe.storage.protocol import DISK_BUFFER

BLOCK = 4096  # bytes at whose multiples direct I/O begins and ends
SHORT = 16 * BLOCK  # bytes below which a run is not worth a direct write
NEAR = 16 * BLOCK  # bytes between two runs that are rather read along than skipped
LATER = 16  # writes after which the cache has most likely written a range to the disk, and can let go of it
IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x958458F6: "hugetlbfs"}  # file systems by the kernel's number


class Run(NamedTuple):
    """A run of bytes: where it begins in the file, its address in memory, and how many there are."""

    offset: int
    address: int
    nbytes: int


def disk_folder(folder: str | os.PathLike[str] | None) -> Path:
    """The folder in which stored maps may lie: the system's temporary folder where None is given.

    Raises `FileNotFoundError`, `NotADirectoryError` or `PermissionError`, `ValueError` for one that is itself in
    memory, and `OSError` where the system cannot read and write at a place of a file.
    """
    if not hasattr(os, "preadv"):
        raise OSError(
            errno.ENOSYS, f"maps on disk need preadv and pwritev, which {sys.platform} has not; leave out disk="
        )
    given = Path(tempfile.gettempdir() if folder is None else folder)
    named = f"folder={str(given)!r}" if folder is not None else f"the temporary folder {str(given)!r}"
    if not given.exists():
        raise FileNotFoundError(f"{named} does not exist; make it, or give another for the maps on disk")
    if not given.is_dir():
        raise NotADirectoryError(f"{named} is no folder; give one for the maps on disk")
    if not os.access(given, os.W_OK | os.X_OK):
        raise PermissionError(f"{named} cannot be written; give another for the maps on disk")
    kind = _kept_in_memory(given)
    if kind is not None:
        raise ValueError(
            f"{named} is in memory ({kind}), where maps would take what the budget is to spare; give a folder= on "
            "a disk"
        )
    return given.resolve()


def _kept_in_memory(folder: Path) -> str | None:
    """The name of its file system if that keeps files in memory."""
    if sys.platform != "linux":
        return None
    found = ctypes.create_string_buffer(512)  # struct statfs, which begins with the file system's number
    if ctypes.CDLL(None).statfs(os.fsencode(folder), found):
        return None
    return IN_MEMORY.get(ctypes.c_long.from_buffer(found).value & 0xFFFFFFFF)


class UnnamedFile:
    """So many bytes in a file of a folder, its own; any thread may read and write runs that do not overlap.

    Raises `OSError` where there is no room: the bytes are allocated at once.
    """

    def __init__(self, folder: Path, nbytes: int):
        self.folder, self.nbytes = folder, -(-max(nbytes, 1) // BLOCK) * BLOCK
        self._owner, self._lock, self._local = os.getpid(), threading.Lock(), threading.local()
        self._lingering: deque[tuple[int, int]] = deque()
        self._cached = _open(folder)
        closing = weakref.finalize(self, _close, [self._cached])
        try:
            _allocate(self._cached, self.nbytes)
        except OSError as error:
            closing()
            free = os.statvfs(folder)
            raise OSError(
                error.errno,
                f"no room on the disk for the stored maps of a tiled step: {self.nbytes:,} bytes, of which "
                f"{free.f_bavail * free.f_frsize:,} are free ({error.strerror}); free some, or give another folder=",
                str(folder),
            ) from error
        self._direct = _direct(self._cached)
        if self._direct is None:
            fall_back(f"maps on the disk at {folder} go by the page cache, which may be slower: it has no direct I/O")
        closing.detach()
        self.close = weakref.finalize(self, _close, [self._cached, *([] if self._direct is None else [self._direct])])

    def read(self, runs: Sequence[Run]) -> None:
        """Read runs, in the order of the file, into memory."""
        with self._named("reading"):
            for group in _grouped(runs):
                start = group[0].offset // BLOCK * BLOCK
                stop = -(-(group[-1].offset + group[-1].nbytes) // BLOCK) * BLOCK
                buffer, address = self._buffer()
                fd = self._cached if self._direct is None else self._direct
                _whole(os.preadv, fd, buffer[: stop - start], start)
                for run in group:
                    ctypes.memmove(run.address, address + run.offset - start, run.nbytes)
                if self._direct is None:
                    _let_go(fd, start, stop - start)

    def write(self, runs: Sequence[Run]) -> None:
        """Write runs from memory."""
        with self._named("writing"):
            for run in runs:
                first = -(-run.offset // BLOCK) * BLOCK
                last = (run.offset + run.nbytes) // BLOCK * BLOCK
                if self._direct is None or run.nbytes < SHORT:
                    first = last = run.offset
                self._write_cached(run, 0, first - run.offset)
                self._write_direct(run, first, last)
                self._write_cached(run, last - run.offset, run.nbytes)

    def _write_direct(self, run: Run, first: int, last: int) -> None:
        for start in range(first, last, DISK_BUFFER):
            buffer, address = self._buffer()
            n = min(DISK_BUFFER, last - start)
            ctypes.memmove(address, run.address + start - run.offset, n)
            assert self._direct is not None
            _whole(os.pwritev, self._direct, buffer[:n], start)

    def _write_cached(self, run: Run, begin: int, end: int) -> None:
        if begin >= end:
            return
        _whole(os.pwritev, self._cached, _bytes_at(run.address + begin, end - begin), run.offset + begin)
        if end - begin < BLOCK:
            return
        _let_go(self._cached, run.offset + begin, end - begin)  # which begins to write it
        with self._lock:
            self._lingering.append((run.offset + begin, end - begin))
            old = self._lingering.popleft() if len(self._lingering) > LATER else None
        if old is not None:
            _let_go(self._cached, *old)

    def _buffer(self) -> tuple[memoryview, int]:
        """This thread's own: it begins at a page, and a group of runs with its whole blocks fits."""
        found: tuple[memoryview, int] | None = getattr(self._local, "buffer", None)
        if found is None:
            memory = mmap.mmap(-1, DISK_BUFFER)
            found = memoryview(memory), ctypes.addressof(ctypes.c_char.from_buffer(memory))
            self._local.buffer = found
        return found

    def check_owner(self) -> None:
        """Raises `OSError` in a process that was forked from the one that has made it."""
        if os.getpid() != self._owner:
            raise OSError(
                errno.EBADF, "a process that was forked may not use the maps on disk of the one it was forked from"
            )

    def _named(self, doing: str) -> _Naming:
        self.check_owner()
        return _Naming(doing, self.folder)


class _Naming:
    """Names what failed, and where, in an error of the disk."""

    def __init__(self, doing: str, folder: Path):
        self.doing, self.folder = doing, folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"{self.doing} stored maps on the disk failed ({error.strerror or error})",
                str(self.folder),
            ) from error


def _grouped(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Runs that are read together, since they lie near each other; long ones in pieces."""
    group: list[Run] = []
    for run in _pieces(runs):
        start = group[0].offset // BLOCK * BLOCK if group else 0
        stop = -(-(run.offset + run.nbytes) // BLOCK) * BLOCK
        near = group and 0 <= run.offset - group[-1].offset - group[-1].nbytes <= NEAR
        if group and not (near and stop - start <= DISK_BUFFER):
            yield group
            group = []
        group.append(run)
    if group:
        yield group


def _pieces(runs: Sequence[Run]) -> Iterator[Run]:
    most = DISK_BUFFER - BLOCK
    for offset, address, nbytes in runs:
        at = 0
        while at < nbytes:
            n = min(nbytes - at, most - (offset + at) % BLOCK)
            yield Run(offset + at, address + at, n)
            at += n


def _whole(call, fd: int, buffer: memoryview, offset: int) -> None:  # type: ignore[no-untyped-def]
    """Call until all bytes are read or written."""
    done = 0
    while done < len(buffer):
        n = call(fd, [buffer[done:]], offset + done)
        if n <= 0:
            raise OSError(errno.EIO, "the file ends too early")
        done += n


def _bytes_at(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _open(folder: Path) -> int:
    """A new file that nobody else can open, and that no folder names."""
    if hasattr(os, "O_TMPFILE"):
        with suppress(OSError):  # a file system without such files
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fd, name = tempfile.mkstemp(prefix="fullframe-", dir=folder)
    os.unlink(name)
    return fd


def _allocate(fd: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)
    else:
        os.ftruncate(fd, nbytes)


def _direct(fd: int) -> int | None:
    """The same file opened for direct I/O, if the file system has it: it is tried out."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        found = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | flag | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, BLOCK) as block:
            os.pwritev(found, [block], 0)
            os.preadv(found, [block], 0)
    except OSError:
        os.close(found)
        return None
    return found


def _let_go(fd: int, offset: int, nbytes: int) -> None:
    """Advise the cache; what is not on the disk yet begins its way there."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)
