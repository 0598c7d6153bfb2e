"""Many files of events as one, and reading ahead.

Events are numbered through all files, so a shuffle is one of all of them. What it does badly: where more than `OPEN`
files are in use, an order that jumps between them opens one anew for most events.
"""

import glob
import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from cosmictagger.data import DataError, Event, EventFile, Pixels

OPEN = 16
"""Files that are kept open."""
ENDINGS = (".h5", ".hdf5")
T = TypeVar("T")


class EventFiles:
    """Several larcv3 files as one: `with EventFiles(paths) as events: events[0]`.

    Opening reads each file's tables, not its pixels; those are read and checked with their event. Raises DataError
    for a file that cannot be used, or whose images are of another size; IndexError past the end.
    """

    def __init__(self, paths: list[Path], *, labels: bool = True) -> None:
        self._paths, self._labels = [Path(path) for path in paths], labels
        self.path = self._paths[0]
        self._open: OrderedDict[int, EventFile] = OrderedDict()
        self._lock = threading.RLock()  # one thread reads ahead while another validates
        counts, fingerprints = [], []
        for path in self._paths:
            with EventFile(path, labels=labels) as file:
                if not counts:
                    self.shape = file.shape
                if file.shape != self.shape:
                    raise DataError(
                        f"{path}: images are {file.shape} (rows, columns), but {self.shape} in {self.path}"
                    )
                counts.append(len(file))
                fingerprints.append(file.fingerprint())
        self._ends = list(accumulate(counts))
        self._fingerprint = hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """A short name for what the files hold, in their order, the same wherever they lie."""
        return self._fingerprint

    def tags(self, index: int) -> tuple[Pixels, ...]:
        """As `EventFile.tags`."""
        with self._lock:
            file, inside = self._at(index)
            return file.tags(inside)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Event:
        with self._lock:
            file, inside = self._at(index)
            return file[inside]

    def __iter__(self) -> Iterator[Event]:
        return (self[i] for i in range(len(self)))

    def __enter__(self) -> "EventFiles":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            while self._open:
                self._open.popitem()[1].__exit__()

    def _at(self, index: int) -> tuple[EventFile, int]:
        """The file that holds an event, open, and the event's number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect_right(self._ends, index)
        first, last = (0, *self._ends)[which], self._ends[which]
        if which not in self._open:
            self._open[which] = EventFile(self._paths[which], labels=self._labels)
            if len(self._open[which]) != last - first:
                raise DataError(f"{self._paths[which]}: has changed since it was opened first")
        self._open.move_to_end(which)
        if len(self._open) > OPEN:
            self._open.popitem(last=False)[1].__exit__()
        return self._open[which], index - first


Events = EventFile | EventFiles


def files_of(named: Path) -> list[Path]:
    """The files that a user means: a file, a folder (its .h5 and .hdf5 files), a pattern, or several, between commas.

    In the order of their names, but those between commas stay in the order given. Raises DataError where there is
    none, or one is meant twice.
    """
    text = str(named)
    if named.is_dir():
        found = sorted(path for path in named.iterdir() if path.suffix in ENDINGS)
        if not found:
            raise DataError(f"{named}: no {' or '.join(ENDINGS)} file in this folder")
    elif not named.exists() and "," in text:
        found = [path for part in text.split(",") if part for path in files_of(Path(part))]
    elif not named.exists() and glob.has_magic(text):
        found = sorted(Path(path) for path in glob.glob(text, recursive=True))
        if not found:
            raise DataError(f"{named}: no file has such a name")
    else:
        return [named]
    met: set[Path] = set()
    for path in found:
        if path.resolve() in met:
            raise DataError(f"{path}: is named twice")
        met.add(path.resolve())
    return found


def open_events(named: Path, *, labels: bool = True) -> Events:
    """The events that a user means, as `files_of` says. Raises DataError for any file that cannot be used."""
    paths = files_of(named)
    return EventFile(paths[0], labels=labels) if len(paths) == 1 else EventFiles(paths, labels=labels)


def ahead(make: Callable[[int], T], numbers: Iterable[int], *, alone: int = 0) -> Generator[T, None, None]:
    """make(number) for each number in turn; a thread makes the next one while the caller works on the last.

    While the caller has one of the first `alone`, nothing is made. What `make` raises is raised here, in its turn.
    """
    with ThreadPoolExecutor(1, "reading") as pool:
        waiting: Future[T] | None = None
        for position, number in enumerate(numbers):
            if position < alone:
                yield make(number)
                continue
            coming = pool.submit(make, number)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()
