"""larcv3 files: real events, round trips, and every way a file can be wrong."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from cosmictagger.data import (
    CHARGE,
    LABEL,
    TAGS,
    DataError,
    Event,
    EventFile,
    Pixels,
    shrink,
    shrink_labels,
    writing,
)
from cosmictagger.simulate import Detector, simulate_numbered

SMALL = Detector().coarser(16)


@pytest.fixture
def events(tmp_path: Path) -> Path:
    path = tmp_path / "events.h5"
    with writing(path) as out:
        for number in range(2):
            out.append(simulate_numbered(7, number, SMALL))
    return path


def read_all(path: Path) -> list[Event]:
    with EventFile(path) as file:
        return list(file)


def test_real_events_have_the_known_occupancy(real_events):
    with EventFile(real_events) as file:
        assert len(file) == 3
        assert file.shape == (1280, 2048)
        image = np.stack([e.image() for e in file])
        truth = np.stack([e.truth() for e in file])
    assert image.shape == (3, 3, 1280, 2048)
    assert image[image > 0].min() >= 5
    charged, cosmic, neutrino = (float(x.mean()) for x in (image > 0, truth == 1, truth == 2))
    assert (round(charged, 3), round(cosmic, 4), round(neutrino, 4)) == (0.007, 0.003, 0.0007)
    # wires of the collection plane end before the image does: columns are columns, not rows
    assert not image[:, 2, :, :191].any()
    assert image[:, 2, 1279].any()


def test_real_events_survive_a_round_trip_bit_for_bit(real_events, tmp_path):
    with EventFile(real_events) as file, writing(tmp_path / "copy.h5") as out:
        for event in file:
            out.append(event)
    with h5py.File(real_events) as before, h5py.File(tmp_path / "copy.h5") as after:
        names: list[str] = []
        before.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in names:
            assert after[name].dtype == before[name].dtype, name
            assert np.array_equal(after[name][:], before[name][:]), name


def test_event_without_neutrino_is_fine(tmp_path):
    event = simulate_numbered(7, 0, SMALL)
    assert event.label is not None
    label = tuple(Pixels(p.rows, p.columns, np.minimum(p.values, 1)) for p in event.label)
    with writing(tmp_path / "a.h5") as out:
        out.append(Event(event.shape, event.charge, label))
    assert set(np.unique(read_all(tmp_path / "a.h5")[0].truth())) == {0, 1}


def test_empty_plane_and_charge_alone(tmp_path):
    nothing = Pixels(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    with writing(tmp_path / "a.h5") as out:
        out.append(Event((8, 8), (nothing,) * 3))
    with EventFile(tmp_path / "a.h5", labels=False) as file:
        assert not file[0].image().any()
        with pytest.raises(DataError, match="no labels"):
            file[0].truth()


def test_predicted_tags_are_one_more_product(events, tmp_path):
    event = read_all(events)[0]
    with writing(tmp_path / "tagged.h5") as out:
        out.append(event, event.label)
        with pytest.raises(DataError, match="same products"):
            out.append(event)
    with h5py.File(tmp_path / "tagged.h5") as file:
        assert np.array_equal(file[f"{TAGS}/voxels"][:], file[f"{LABEL}/voxels"][:])


def test_failed_writing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), writing(tmp_path / "a.h5") as out:
        out.append(simulate_numbered(7, 0, SMALL))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_folders_made_for_a_failed_file_go_again(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "new" / "folder" / "a.h5"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_shrinking_averages_charge_and_keeps_the_largest_label():
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    assert shrink(image, 1).tolist() == [[[2.5, 4.5], [10.5, 12.5]]]
    assert shrink_labels((image % 3).astype(np.uint8), 1).tolist() == [[[2, 2], [2, 2]]]
    assert np.array_equal(shrink(image, 0), image)
    with pytest.raises(DataError, match="cannot be shrunk"):
        shrink(image[:, :3], 1)


def test_a_part_is_what_slicing_gives(events):
    event = read_all(events)[0]
    part = event.part((16, 40), (32, 64))
    assert np.array_equal(part.image(), event.image()[:, 16:48, 40:104])
    assert np.array_equal(part.truth(), event.truth()[:, 16:48, 40:104])


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("wires", [False, True])
def test_a_flipped_event_is_what_the_detector_would_see(drift, wires):
    """Points in the argon, moved and packed, lie where the flipped event has their pixels."""
    detector = Detector()
    rows = detector.shape[0]
    x, y, z = np.random.default_rng(3).uniform((-199, -199, 1), (199, 199, 499), (50, 3)).T

    def packed(x, y, z):
        depth = ((detector.drift - np.abs(x)) / detector.row_pitch).astype(np.int64)
        row = np.where(x < 0, depth, rows - 1 - depth)
        found = [np.where(x < 0, *(detector.column(k, v, y, z) for v in (0, 1))).astype(np.int64) for k in range(3)]
        values = np.arange(1, len(x) + 1, dtype=np.float32)
        return tuple(Pixels(row, column, values) for column in found)

    moved = packed(-x if drift else x, -y if wires else y, 500 - z if wires else z)
    flipped = Event(detector.shape, packed(x, y, z)).flipped(drift=drift, wires=wires)
    for expected, found in zip(moved, flipped.charge, strict=True):
        assert np.array_equal(found.rows, expected.rows)
        apart = np.abs(found.columns - expected.columns).max()
        assert apart <= 3 if wires else apart == 0  # the middle of the argon is not that of the slanted planes' wires


def spoil_voxel(path: Path, group: str, column: str, value: float) -> None:
    with h5py.File(path, "r+") as file:
        table = file[f"{group}/voxels"]
        rows = table[:]
        rows[column][len(rows) - 1] = value  # the last pixel of event 1
        table[:] = rows


def spoil_table(path: Path, key: str, change) -> None:
    with h5py.File(path, "r+") as file:
        rows = file[key][:]
        del file[key]
        file[key] = change(rows)


def set_column(column: str, index: int, value):
    def change(rows):
        rows[column][index] = value
        return rows

    return change


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def remove(path: Path, key: str) -> None:
    with h5py.File(path, "r+") as file:
        del file[key]


def repeat_voxel(path: Path, group: str) -> None:
    with h5py.File(path) as file:
        before = int(file[f"{group}/voxels"][-2]["id"])
    spoil_voxel(path, group, "id", before)


def signed(rows, column: str):
    rows = rows.astype([("id", "<i8"), ("value", "<f4")])
    rows[column][-1] = -1
    return rows


BROKEN = {
    "missing": (lambda p: p.unlink(), "no such file"),
    "folder": (lambda p: (p.unlink(), p.mkdir()), "not a file"),
    "not hdf5": (lambda p: p.write_text("run,subrun,event\n"), "not an HDF5 file"),
    "empty": (lambda p: p.write_bytes(b""), "not an HDF5 file"),
    "truncated": (lambda p: truncate(p, 0.6), "truncated or damaged"),
    "nearly nothing left": (lambda p: truncate(p, 0.01), "truncated or damaged"),
    "no charge": (lambda p: remove(p, CHARGE), f"no group {CHARGE}"),
    "no labels": (lambda p: remove(p, LABEL), f"no group {LABEL}"),
    "no table": (lambda p: remove(p, f"{CHARGE}/voxels"), f"no table {CHARGE}/voxels"),
    "no column": (
        lambda p: spoil_table(p, f"{CHARGE}/extents", lambda r: r[["first"]].copy()),
        "has no column 'N'",
    ),
    "nan": (lambda p: spoil_voxel(p, CHARGE, "value", np.nan), "event 1 plane 2: charge is NaN or infinite"),
    "infinite": (lambda p: spoil_voxel(p, CHARGE, "value", np.inf), "event 1 plane 2: charge is NaN or infinite"),
    "outside": (lambda p: spoil_voxel(p, CHARGE, "id", 2**40), "event 1 plane 2: a pixel lies outside the image"),
    "label 3": (lambda p: spoil_voxel(p, LABEL, "value", 3), "event 1 plane 2: a label is not 0, 1 or 2"),
    "label nan": (lambda p: spoil_voxel(p, LABEL, "value", np.nan), "a label is not 0, 1 or 2"),
    "fewer labels": (
        lambda p: spoil_table(p, f"{LABEL}/extents", lambda r: r[:1]),
        "2 events of charge but 1 of labels",
    ),
    "other size": (
        lambda p: spoil_table(p, f"{LABEL}/image_meta", lambda r: (r["number_of_voxels"].fill(64), r)[1]),
        "labels are (64, 64)",
    ),
    "two planes": (lambda p: spoil_table(p, f"{CHARGE}/extents", set_column("N", 1, 2)), "event 1: 2 planes"),
    "planes past the end": (
        lambda p: spoil_table(p, f"{CHARGE}/extents", set_column("first", 1, 5)),
        "event 1: its planes run past the end",
    ),
    "pixels past the end": (
        lambda p: spoil_table(p, f"{CHARGE}/voxel_extents", set_column("N", 5, 10**9)),
        "event 1: its pixels run past the end",
    ),
    "no events": (
        lambda p: [
            spoil_table(p, f"{CHARGE}/{t}", lambda r: r[:0]) for t in ("extents", "image_meta", "voxel_extents")
        ],
        "no events",
    ),
    "pixel twice": (lambda p: repeat_voxel(p, LABEL), "event 1 plane 2: a pixel is stored twice"),
    "negative pixel": (
        lambda p: spoil_table(p, f"{CHARGE}/voxels", lambda r: signed(r, "id")),
        "event 1 plane 2: a pixel lies outside the image",
    ),
    "fractional pixels": (
        lambda p: spoil_table(p, f"{CHARGE}/voxels", lambda r: r.astype([("id", "<f4"), ("value", "<f4")])),
        "column 'id' is float32, where uint64 is expected",
    ),
    "charge in words": (
        lambda p: spoil_table(p, f"{CHARGE}/voxels", lambda r: r.astype([("id", "<u8"), ("value", "S4")])),
        "column 'value' is |S4",
    ),
    "two axes": (lambda p: spoil_table(p, f"{CHARGE}/voxels", lambda r: r[:, None]), "voxels has 2 axes"),
    "labels of another event": (
        lambda p: spoil_table(p, f"{LABEL}/extents", set_column("first", 1, 0)),
        "event 1 plane 0: ",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_wrong_is_said_in_one_line(how, events):
    spoil, message = BROKEN[how]
    spoil(events)
    with pytest.raises(DataError) as error:
        read_all(events)
    assert message in str(error.value)
    assert str(events) in str(error.value)
    assert "\n" not in str(error.value)


def test_planes_come_in_the_order_of_their_projection(events):
    before = read_all(events)
    for group in (CHARGE, LABEL):
        for table in ("image_meta", "voxel_extents"):
            spoil_table(events, f"{group}/{table}", lambda r: r[[2, 0, 1, 5, 4, 3]])
    for old, new in zip(before, read_all(events), strict=True):
        assert np.array_equal(old.image(), new.image())
        assert np.array_equal(old.truth(), new.truth())


def test_other_products_in_the_file_do_no_harm(events):
    with h5py.File(events, "r+") as file:
        file["Data/particle_sbndseg_group/extents"] = np.zeros(2)
    assert len(read_all(events)) == 2


def test_damage_anywhere_is_an_error_or_harmless(events):
    content, refused = events.read_bytes(), 0
    for place in range(0, len(content), 397):
        events.write_bytes(content[:place] + b"\xff\x5a" * 4 + content[place + 8 :])
        try:
            read_all(events)
        except DataError:
            refused += 1
    assert refused > 20


def test_damage_inside_the_compressed_pixels(events):
    content = bytearray(events.read_bytes())
    with h5py.File(events) as file:
        chunk = file[f"{CHARGE}/voxels"].id.get_chunk_info(0)
    for k in range(chunk.byte_offset, chunk.byte_offset + chunk.size):
        content[k] = 0
    events.write_bytes(content)
    with pytest.raises(DataError, match=f"{CHARGE}: event 0 plane 0: cannot be read"):
        read_all(events)
