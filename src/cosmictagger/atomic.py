"""Files that are either whole or not there."""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` if the block succeeds and vanishes if it does not.

    Missing parent folders are made, and go again if the block fails. Raises OSError if the folder cannot be written,
    or `path` is a folder itself.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file")
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        with named(path):
            yield part
        part.chmod(0o666 & ~_umask())  # mkstemp keeps others out; an ordinary file does not
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        with suppress(OSError):  # where something else has come to lie there
            for folder in missing:
                folder.rmdir()
        raise


def part_of_file(path: Path) -> str | None:
    """The name of the file that `replacing` was about to make of a part; None for anything else."""
    found = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}\.part", path.name)
    return found[1] if found and path.is_file() and not path.is_symlink() else None


def swept(folder: Path, names: set[str]) -> None:
    """Remove the parts of files of these names, which a process left that was killed while it wrote them.

    The caller must be the only one who writes there.
    """
    for path in folder.iterdir():
        if part_of_file(path) in names:
            path.unlink()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name `path` in an error of a file that names none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder to this process while the block runs; the lock ends with the process, however that ends.

    Raises BlockingIOError if another process has it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process works in it", str(folder)) from error
        yield
    finally:
        os.close(handle)


class Forgiving:
    """A file for HDF5 that keeps a failed write to itself until it is asked.

    HDF5 does not recover from one: it tries again when the process ends, and takes the process with it. Nothing is
    written after the first failure; `check` raises it.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._failure: OSError | None = None

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def write(self, data: bytes) -> int:
        if self._failure is None:
            try:
                left = memoryview(data).cast("B")
                while len(left):  # nearly full, a disk may take a part
                    left = left[self._file.write(left) :]
            except OSError as error:
                self._fail(error)
        return len(data)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def readinto(self, buffer: bytearray) -> int:
        found = self._file.read(len(buffer))
        buffer[:] = found + bytes(len(buffer) - len(found))
        return len(buffer)

    def flush(self) -> None:
        """Nothing is kept back."""

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._fail(error)
            return size or 0

    def _fail(self, error: OSError) -> None:
        self._failure = self._failure or OSError(error.errno, error.strerror, str(self._path))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
