"""Sparse wire-plane images in larcv3 HDF5 files: reading, checking, writing.

A file holds one group per product: `Data/sparse2d_sbndwire_group` (charge) and
`Data/sparse2d_sbnd_cosmicseg_group` (labels: 0 none, 1 cosmic, 2 neutrino), each with four tables:

    extents         per event: first row and number of rows in the next two tables
    image_meta      per event and plane: number of voxels (columns, rows) and sizes
    voxel_extents   per event and plane: first row and number of rows in `voxels`
    voxels          (id, value), where column = id // rows and row = id % rows

Only pixels above threshold are stored. Whatever is wrong with a file is one DataError that names file, group and
event.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from cosmictagger.atomic import Forgiving, replacing

CHARGE = "Data/sparse2d_sbndwire_group"
LABEL = "Data/sparse2d_sbnd_cosmicseg_group"
TAGS = "Data/sparse2d_cosmictagger_group"
CLASS_NAMES = ("background", "cosmic", "neutrino")
SCORES = tuple(f"Data/sparse2d_cosmictagger_{name}_group" for name in CLASS_NAMES)
"""Products with how probable the network takes each class to be, by pixel."""
EVENT_ID = "Events/event_id"
PLANES = 3

EXTENTS = np.dtype([("first", "<u8"), ("N", "<u4")], align=True)
IMAGE_META = np.dtype(
    [
        ("valid", "u1"),
        ("projection_id", "<u8"),
        ("image_sizes", "<f8", (2,)),
        ("number_of_voxels", "<u8", (2,)),
        ("origin", "<f8", (2,)),
    ]
)
VOXEL_EXTENTS = np.dtype([("first", "<u8"), ("N", "<u4"), ("ID", "<u4")])
VOXELS = np.dtype([("id", "<u8"), ("value", "<f4")])
EVENT_IDS = np.dtype([("run", "<i8"), ("subrun", "<i8"), ("event", "<i8")])


UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, OverflowError, MemoryError)
"""What h5py raises where a file is damaged."""


class DataError(ValueError):
    """A file cannot be used; the message is one line that says which and why."""


@dataclass(frozen=True)
class Pixels:
    """The stored pixels of one plane: rows and columns int64 (n,), values float32 (n,)."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float32]

    def dense(self, shape: tuple[int, int], dtype: type) -> NDArray:
        """The plane as an array (rows, columns), zero where nothing is stored."""
        out = np.zeros(shape, dtype)
        out[self.rows, self.columns] = self.values
        return out

    def part(self, first: tuple[int, int], shape: tuple[int, int]) -> "Pixels":
        """The stored pixels of a rectangle, counted from its `first` row and column."""
        rows, columns = self.rows - first[0], self.columns - first[1]
        inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
        return Pixels(rows[inside], columns[inside], self.values[inside])


@dataclass(frozen=True)
class Event:
    """One event: three planes of charge and, where the truth is known, of labels."""

    shape: tuple[int, int]
    """Rows and columns of a plane."""
    charge: tuple[Pixels, ...]
    label: tuple[Pixels, ...] | None = None
    number: tuple[int, int, int] = (-1, -1, -1)
    """Run, subrun, event."""

    def part(self, first: tuple[int, int], shape: tuple[int, int]) -> "Event":
        """A rectangle of every plane, `shape` (rows, columns), from its `first` row and column on."""
        label = None if self.label is None else tuple(p.part(first, shape) for p in self.label)
        return Event(shape, tuple(p.part(first, shape) for p in self.charge), label, self.number)

    def flipped(self, *, drift: bool, wires: bool) -> "Event":
        """The event as the detector would see its mirror image.

        drift: x to -x. Rows turn around, and the first two planes change places, since their wires are slanted the
        other way in the other volume. wires: half a turn about the drift axis, y to -y and z to -z from the middle.
        Columns turn around, which is right to 3 of them, since the planes' wires are not centred alike. With either
        one, wires that are met first are so still, and have its noise.
        """

        def one(planes: tuple[Pixels, ...]) -> tuple[Pixels, ...]:
            rows, columns = (n - 1 for n in self.shape)
            out = [
                Pixels(rows - p.rows if drift else p.rows, columns - p.columns if wires else p.columns, p.values)
                for p in planes
            ]
            return (out[1], out[0], *out[2:]) if drift else tuple(out)

        return Event(self.shape, one(self.charge), None if self.label is None else one(self.label), self.number)

    def image(self) -> NDArray[np.float32]:
        """Charge, float32 (planes, rows, columns)."""
        return np.stack([p.dense(self.shape, np.float32) for p in self.charge])

    def truth(self) -> NDArray[np.uint8]:
        """Labels, uint8 (planes, rows, columns). Raises DataError if the event has none."""
        if self.label is None:
            raise DataError("the event has no labels")
        return np.stack([p.dense(self.shape, np.uint8) for p in self.label])


def shrink(image: NDArray[np.float32], halvings: int) -> NDArray[np.float32]:
    """Charge (planes, rows, columns) averaged over squares of 2**halvings pixels."""
    return _squares(image, halvings).mean(axis=(2, 4), dtype=np.float32)


def shrink_labels(label: NDArray[np.uint8], halvings: int) -> NDArray[np.uint8]:
    """Labels (planes, rows, columns): the largest of each square of 2**halvings pixels."""
    return _squares(label, halvings).max(axis=(2, 4))


def _squares(x: NDArray, halvings: int) -> NDArray:
    side = 2**halvings
    planes, rows, columns = x.shape
    if rows % side or columns % side:
        raise DataError(f"an image of {rows} x {columns} pixels cannot be shrunk {side} times")
    return x.reshape(planes, rows // side, side, columns // side, side)


class EventFile:
    """A larcv3 file open for reading: `with EventFile(path) as events: events[0]`.

    `labels` False reads charge alone. Opening checks the tables, reading an event checks its pixels.
    Raises DataError for anything wrong, IndexError past the end.
    """

    def __init__(self, path: Path, *, labels: bool = True) -> None:
        self.path = Path(path)
        self._file = _open(self.path)
        self._tags: _Product | None = None
        try:
            self._charge = _Product(self.path, self._file, CHARGE)
            self._label = _Product(self.path, self._file, LABEL) if labels else None
            if self._label is not None:
                _check_pair(self.path, self._charge, self._label)
            self._numbers = self._event_numbers()
        except BaseException as error:
            self._file.close()
            if isinstance(error, UNREADABLE) and not isinstance(error, DataError):
                raise DataError(f"{self.path}: cannot be read; the file is damaged") from error
            raise

    @property
    def tables(self) -> h5py.File:
        """The open file itself, for what is not read here."""
        return self._file

    def tags(self, index: int) -> tuple[Pixels, ...]:
        """Classes that `predict` has given to the stored pixels of an event. Raises DataError if there are none."""
        if self._tags is None:
            if TAGS not in self._file:
                raise DataError(f"{self.path}: no group {TAGS}: name weights, or a file that `predict` has written")
            self._tags = _Product(self.path, self._file, TAGS)
            if len(self._tags) != len(self) or self._tags.shape != self.shape:
                raise DataError(f"{self.path}: {TAGS}: does not belong to {CHARGE}")
        found = self._tags.read(index)
        for plane, (pixels, charge) in enumerate(zip(found, self._charge.read(index), strict=True)):
            where = f"{self.path}: {TAGS}: event {index} plane {plane}"
            if not np.isin(pixels.values, (0, 1, 2)).all():
                raise DataError(f"{where}: a tag is not 0, 1 or 2")
            same = len(pixels.rows) == len(charge.rows)
            if not (same and (pixels.rows == charge.rows).all() and (pixels.columns == charge.columns).all()):
                raise DataError(f"{where}: tags are not those of the stored pixels")
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of every image in the file."""
        return self._charge.shape

    def fingerprint(self) -> str:
        """A short name for what the file holds, the same wherever it lies: of its events' numbers and sizes."""
        parts = [np.array(self._numbers, np.int64), self._charge.sizes()]
        parts += [] if self._label is None else [self._label.sizes()]
        return hashlib.sha256(b"".join(x.tobytes() for x in parts)).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._charge)

    def __getitem__(self, index: int) -> Event:
        if not 0 <= index < len(self):
            raise IndexError(index)
        charge = self._charge.read(index)
        for plane, pixels in enumerate(charge):
            if not np.isfinite(pixels.values).all():
                raise DataError(f"{self.path}: {CHARGE}: event {index} plane {plane}: charge is NaN or infinite")
        label = None
        if self._label is not None:
            label = self._label.read(index)
            for plane, (c, y) in enumerate(zip(charge, label, strict=True)):
                where = f"{self.path}: {LABEL}: event {index} plane {plane}"
                _check_label(where, c, y, self.shape)
        return Event(self.shape, charge, label, self._numbers[index])

    def __iter__(self) -> Iterator[Event]:
        return (self[i] for i in range(len(self)))

    def __enter__(self) -> "EventFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _event_numbers(self) -> list[tuple[int, int, int]]:
        if EVENT_ID not in self._file:
            return [(-1, -1, -1)] * len(self)  # the numbers are for the reader's convenience only
        table = _table(self.path, self._file, EVENT_ID, EVENT_IDS)
        if len(table) != len(self):
            raise DataError(f"{self.path}: {EVENT_ID} lists {len(table)} events, {CHARGE} {len(self)}")
        return [(int(r["run"]), int(r["subrun"]), int(r["event"])) for r in table]


class _Product:
    """The tables of one group; voxels are read event by event. Planes come in the order of their projection."""

    def __init__(self, path: Path, file: h5py.File, group: str) -> None:
        self.path, self.group = path, group
        if not isinstance(file.get(group), h5py.Group):
            raise DataError(f"{path}: no group {group}")
        self._extents = _table(path, file, f"{group}/extents", EXTENTS)
        self._planes = _table(path, file, f"{group}/voxel_extents", VOXEL_EXTENTS)
        meta = _table(path, file, f"{group}/image_meta", IMAGE_META)
        self._voxels = _dataset(path, file, f"{group}/voxels", VOXELS)
        if len(meta) != len(self._planes):
            raise DataError(f"{path}: {group}: {len(meta)} images but {len(self._planes)} extents of voxels")
        self.shape = self._common_shape(meta)
        self._projections = meta["projection_id"].astype(np.int64)
        self._check_extents()

    def __len__(self) -> int:
        return len(self._extents)

    def sizes(self) -> NDArray[np.int64]:
        """Stored pixels of each plane of each event, and the images' shape after them."""
        three = np.arange(PLANES)
        rows = self._extents["first"].astype(np.int64)[:, None] + three
        number = self._projections[rows]
        known = (np.sort(number, axis=1) == three).all(axis=1)[:, None]
        order = np.where(known, np.argsort(number, axis=1), three)
        each = self._planes["N"][np.take_along_axis(rows, order, axis=1)].astype(np.int64)
        return np.array([*each.ravel(), *self.shape], np.int64)

    def _common_shape(self, meta: NDArray) -> tuple[int, int]:
        sizes = {(int(r), int(c)) for c, r in meta["number_of_voxels"]}
        if not sizes:
            raise DataError(f"{self.path}: {self.group}: no events")
        if len(sizes) > 1:
            raise DataError(f"{self.path}: {self.group}: images differ in size: {sorted(sizes)} (rows, columns)")
        return sizes.pop()

    def _sound(self) -> bool:
        """Whether all is well with the extents, all at once: a file may hold many thousand events."""
        first, count = (self._extents[name].astype(np.int64) for name in ("first", "N"))
        start, length = (self._planes[name].astype(np.int64) for name in ("first", "N"))
        voxels, planes = len(self._voxels), len(self._planes) - PLANES
        inside = (start >= 0) & (start <= voxels) & (length >= 0) & (length <= voxels) & (start + length <= voxels)
        return bool(inside.all() and (count == PLANES).all() and ((first >= 0) & (first <= planes)).all())

    def _check_extents(self) -> None:
        if self._sound():
            return
        for event, extent in enumerate(self._extents):
            where = f"{self.path}: {self.group}: event {event}"
            if int(extent["N"]) != PLANES:
                raise DataError(f"{where}: {int(extent['N'])} planes instead of {PLANES}")
            if not 0 <= int(extent["first"]) <= len(self._planes) - PLANES:
                raise DataError(f"{where}: its planes run past the end of voxel_extents")
            for plane in self._planes_of(event):
                first, count = int(plane["first"]), int(plane["N"])
                if min(first, count) < 0 or first + count > len(self._voxels):
                    raise DataError(f"{where}: its pixels run past the end of voxels")

    def _planes_of(self, event: int) -> NDArray:
        first = int(self._extents[event]["first"])
        planes, number = (x[first : first + PLANES] for x in (self._planes, self._projections))
        return planes[np.argsort(number)] if sorted(number) == list(range(PLANES)) else planes

    def read(self, event: int) -> tuple[Pixels, ...]:
        rows, columns = self.shape
        out = []
        for plane, extent in enumerate(self._planes_of(event)):
            where = f"{self.path}: {self.group}: event {event} plane {plane}"
            first = int(extent["first"])
            try:
                voxels = self._voxels[first : first + int(extent["N"])]
            except UNREADABLE as error:
                raise DataError(f"{where}: cannot be read; the file is damaged") from error
            ids = voxels["id"]
            if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < rows * columns:
                raise DataError(f"{where}: a pixel lies outside the image of {rows} x {columns}")
            ids = ids.astype(np.int64)
            if len(np.unique(ids)) < len(ids):
                raise DataError(f"{where}: a pixel is stored twice")
            out.append(Pixels(ids % rows, ids // rows, voxels["value"].astype(np.float32)))
        return tuple(out)


def _open(path: Path) -> h5py.File:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if not path.is_file():
        raise DataError(f"{path}: not a file")
    try:
        return h5py.File(path, "r")
    except PermissionError as error:
        raise DataError(f"{path}: no permission to read it") from error
    except OSError as error:
        with path.open("rb") as file:
            damaged = file.read(4) == b"\x89HDF"
        reason = "the HDF5 file is truncated or damaged" if damaged else "not an HDF5 file"
        raise DataError(f"{path}: {reason}") from error


def _dataset(path: Path, file: h5py.File, key: str, dtype: np.dtype) -> h5py.Dataset:
    found = file.get(key)
    if not isinstance(found, h5py.Dataset):
        raise DataError(f"{path}: no table {key}")
    missing = [name for name in dtype.names or () if name not in (found.dtype.names or ())]
    if missing:
        raise DataError(f"{path}: {key} has no column {missing[0]!r}")
    if found.ndim != 1:
        raise DataError(f"{path}: {key} has {found.ndim} axes instead of one")
    for name in dtype.names or ():
        have, want = found.dtype[name], dtype[name]
        if have.shape != want.shape or have.base.kind not in ("uif" if want.base.kind == "f" else "ui"):
            raise DataError(f"{path}: {key}: column {name!r} is {have}, where {want} is expected")
    return found


def _table(path: Path, file: h5py.File, key: str, dtype: np.dtype) -> NDArray:
    try:
        return _dataset(path, file, key, dtype)[:]
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"{path}: {key} cannot be read; the file is damaged") from error


def _check_pair(path: Path, charge: _Product, label: _Product) -> None:
    if len(charge) != len(label):
        raise DataError(f"{path}: {len(charge)} events of charge but {len(label)} of labels")
    if charge.shape != label.shape:
        raise DataError(f"{path}: charge is {charge.shape} (rows, columns) but labels are {label.shape}")


def _check_label(where: str, charge: Pixels, label: Pixels, shape: tuple[int, int]) -> None:
    if not np.isin(label.values, (0, 1, 2)).all():
        raise DataError(f"{where}: a label is not 0, 1 or 2")
    named = label.values > 0
    has_charge = np.zeros(shape, bool)
    has_charge[charge.rows, charge.columns] = True
    bare = int((~has_charge[label.rows[named], label.columns[named]]).sum())
    if bare:
        raise DataError(f"{where}: {bare} labelled pixels are not in the image: labels of another event?")


class EventWriter:
    """Writes events one after another to an open HDF5 file. Use `writing(path)` to get one."""

    def __init__(self, file: h5py.File, check: Callable[[], None] = lambda: None) -> None:
        self._file, self._check = file, check
        self._tables: dict[str, h5py.Dataset] = {}
        self._groups: tuple[str, ...] | None = None

    def append(self, event: Event, tags: tuple[Pixels, ...] | None = None) -> None:
        """Add an event, with the classes a network gave to its pixels if any.

        Raises DataError if it has labels or tags and an earlier one has not, or the other way round.
        """
        products = {CHARGE: event.charge, LABEL: event.label, TAGS: tags}
        present = {group: planes for group, planes in products.items() if planes is not None}
        if self._groups not in (None, tuple(present)):
            raise DataError("every event of a file must have the same products")
        self._groups = tuple(present)
        self._append(EVENT_ID, EVENT_IDS, [event.number])
        for group, planes in present.items():
            self._append_product(group, planes, event.shape)
        self._file.flush()
        self._check()

    def copy_from(self, events: EventFile, without: tuple[str, ...]) -> None:
        """Take over everything that a file of events holds, byte for byte, but for the groups named."""
        for top, item in events.tables.items():
            if not isinstance(item, h5py.Group):
                events.tables.copy(top, self._file)
                continue
            inside = self._file.require_group(top)
            for key, value in item.attrs.items():
                inside.attrs[key] = value
            for name in item:
                if f"{top}/{name}" not in without:
                    events.tables.copy(f"{top}/{name}", inside)
        for key, value in events.tables.attrs.items():
            self._file.attrs[key] = value
        self._file.flush()
        self._check()

    def append_products(self, products: dict[str, tuple[Pixels, ...]], shape: tuple[int, int]) -> None:
        """Add an event's planes to products beside those that were taken over; `shape` (rows, columns) of a plane."""
        for group, planes in products.items():
            self._append_product(group, planes, shape)
        self._file.flush()
        self._check()

    def _append_product(self, group: str, planes: tuple[Pixels, ...], shape: tuple[int, int]) -> None:
        rows, columns = shape
        size = (columns, rows)
        voxels = [_voxels(pixels, rows) for pixels in planes]
        first = self._append(f"{group}/voxels", VOXELS, np.concatenate(voxels))
        starts = first + np.cumsum([0, *(len(v) for v in voxels)])
        extents = [(start, len(v), k) for k, (start, v) in enumerate(zip(starts, voxels, strict=False))]
        first = self._append(f"{group}/voxel_extents", VOXEL_EXTENTS, extents)
        self._append(f"{group}/image_meta", IMAGE_META, [(1, k, size, size, (0, 0)) for k in range(len(planes))])
        self._append(f"{group}/extents", EXTENTS, [(first, len(planes))])

    def _append(self, key: str, dtype: np.dtype, rows: list | NDArray) -> int:
        """Add rows to a table, made when first needed; returns the number of rows it had."""
        if key not in self._tables:
            many = dtype is VOXELS
            self._tables[key] = self._file.create_dataset(
                key,
                shape=(0,),
                maxshape=(None,),
                dtype=dtype,
                chunks=(16384 if many else 64,),
                compression="gzip" if many else None,
            )
        table = self._tables[key]
        before = table.shape[0]
        table.resize(before + len(rows), axis=0)
        table[before:] = np.array(rows, dtype)
        return before


def _voxels(pixels: Pixels, rows: int) -> NDArray:
    out = np.empty(len(pixels.values), VOXELS)
    out["id"] = pixels.columns * rows + pixels.rows
    out["value"] = pixels.values
    out.sort(order="id")
    return out


@contextmanager
def writing(path: Path) -> Iterator[EventWriter]:
    """`with writing(path) as out: out.append(event)`: the file appears whole at the end, or not at all.

    Raises OSError where the disk is full.
    """
    with replacing(Path(path)) as part, part.open("r+b", buffering=0) as raw:
        forgiving = Forgiving(raw, Path(path))
        with h5py.File(forgiving, "w") as file:
            yield EventWriter(file, forgiving.check)
        forgiving.check()
