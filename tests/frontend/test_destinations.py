"""``out=``: outputs that go to files and objects region by region, and are the same numbers there."""

from itertools import count

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
from fullframe.runtime import executor

SHAPE = (1, 4, 44, 36)
NUMBERS = count()  # of files


class Taken:
    """An object of the user's own that takes regions, each number once."""

    def __init__(self, shape, dtype=np.float32, kept=None):
        self.kept, self.counts = np.zeros(shape, dtype) if kept is None else kept, np.zeros(shape, int)
        self.shape, self.dtype = self.kept.shape, self.kept.dtype

    def __setitem__(self, part, numbers):
        assert all(type(s) is slice and 0 <= s.start < s.stop <= n for s, n in zip(part, self.shape, strict=True))
        assert numbers.dtype == self.dtype.newbyteorder("=") and numbers.shape == self.kept[part].shape
        self.counts[part] += 1
        self.kept[part] = numbers

    def __array__(self, dtype=None, copy=None):
        assert (self.counts == 1).all()
        return self.kept


class TakenTensors(Taken):
    """One whose dtype is torch's: it has tensors."""

    def __init__(self, shape):
        super().__init__(shape)
        self.dtype = torch.float32

    def __setitem__(self, part, tensor):
        assert isinstance(tensor, torch.Tensor)
        self.counts[part] += 1
        self.kept[part] = tensor.numpy()


def memmap(folder, shape=SHAPE, dtype=np.float32):
    return np.memmap(folder / f"{next(NUMBERS)}.raw", dtype, "w+", shape=shape)


def zarr_array(path):
    zarr = pytest.importorskip("zarr", reason="comes with the packages of the examples")
    return zarr.open(str(path), mode="w", shape=SHAPE, chunks=(1, 3, 7, 9), dtype="f4")


KINDS = {
    "memmap": memmap,
    "big endian": lambda folder: memmap(folder, dtype=">f4"),
    "part of a memmap": lambda folder: memmap(folder, (2, *SHAPE))[1],
    "hdf5": lambda folder: h5py.File(folder / f"{next(NUMBERS)}.h5", "w").create_dataset(
        "x", SHAPE, "f4", chunks=(1, 3, 7, 9)
    ),
    "zarr": lambda folder: zarr_array(folder / f"{next(NUMBERS)}.zarr"),
    "array": lambda folder: np.zeros(SHAPE, np.float32),
    "channels last": lambda folder: np.zeros((1, 44, 36, 4), np.float32).transpose(0, 3, 1, 2),
    "tensor": lambda folder: torch.zeros(SHAPE),
    "parameter": lambda folder: nn.Parameter(torch.zeros(SHAPE)),
    "object": lambda folder: Taken(SHAPE),
    "object of tensors": lambda folder: TakenTensors(SHAPE),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1))


def image():
    return torch.randn(1, 3, 44, 36, generator=torch.Generator().manual_seed(1))


def tiled(module, **kwargs):
    return fullframe.tile(module.eval(), **{"tile": 16, "workers": 2, "budget": "1 GB"} | kwargs)


@pytest.fixture(scope="module")
def step():
    return tiled(net())


@pytest.fixture(scope="module")
def expected(step):
    with torch.no_grad():
        return step(image())


def numbers(thing):
    return thing.detach() if isinstance(thing, torch.Tensor) else torch.from_numpy(np.array(thing, np.float32))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_there_is_what_would_be_handed_out(kind, mode, step, expected, tmp_path):
    for x in (image(), np.asarray(image())):
        out = KINDS[kind](tmp_path)
        with mode():
            assert step(x, out=out) is out
        assert torch.equal(numbers(out[...] if kind in ("hdf5", "zarr") else out), expected)


def test_tensors_of_inference_mode_are_written_too(step, expected):
    with torch.inference_mode():
        out = torch.zeros(SHAPE)
        assert step(image(), out=out) is out
        assert torch.equal(out, expected)


def test_the_plan_counts_windows_and_not_the_output(step):
    with torch.no_grad():
        handed, gone = step.plan(image()), step.plan(image(), out=Taken(SHAPE))
    assert handed.bytes.outputs == 4 * np.prod(SHAPE) and gone.bytes.outputs == 0
    assert "is written by regions: 25.3 kB" in str(gone) and "is written" not in str(handed)


def test_without_a_compiler_the_numbers_are_the_same(expected, monkeypatch):
    monkeypatch.setattr(executor, "bytecode_available", lambda: False)
    out = Taken(SHAPE)
    with torch.no_grad():
        tiled(net(), workers=1)(image(), out=out)
    assert torch.equal(numbers(out), expected)


class Several(nn.Module):
    """Outputs of which one is made of another, one is there twice, one is the input, and two are not cut into tiles."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        a = self.a(x)
        self.features = a.clone()
        b = self.b(F.relu(a))
        return {"first": a, "rest": (b, b.detach(), x, a.mean((2, 3)), self.a.weight)}


def test_outputs_in_containers_go_each_to_its_own():
    torch.manual_seed(0)
    module = Several()
    run = tiled(module)
    with torch.no_grad():
        expected = run(image())
        small = Taken((1, 4))
        out = {"first": Taken(SHAPE), "rest": (Taken(SHAPE), None, Taken((1, 3, 44, 36)), small, None)}
        for _ in range(2):
            for sink in (out["first"], *out["rest"]):
                if sink is not None:
                    sink.counts[...] = 0
            found = run(image(), out=out)
    assert found["first"] is out["first"] and found["rest"][0] is out["rest"][0] and found["rest"][3] is small
    assert torch.equal(numbers(found["first"]), expected["first"]) and torch.equal(module.features, expected["first"])
    for a, b in zip(found["rest"], expected["rest"], strict=True):
        assert torch.equal(a if isinstance(a, torch.Tensor) else numbers(a), b)


def test_an_input_may_be_copied_from_file_to_file(tmp_path):
    source, out = memmap(tmp_path), memmap(tmp_path)
    source[...] = np.random.default_rng(0).standard_normal(SHAPE)
    with torch.no_grad():
        tiled(nn.Identity())(source, out=out)
    assert (source == out).all() and source.any()


def test_a_module_may_have_an_out_of_its_own():
    class Own(nn.Module):
        def forward(self, x, out=None):
            return x if out is None else x * out

    with torch.no_grad():
        assert torch.equal(tiled(Own())(image(), out=torch.full((1,), 2.0)), image() * 2)


def test_steps_in_turns_with_and_without(step, expected, recordings):
    with torch.no_grad():
        for _ in range(2):
            out = Taken(SHAPE)
            assert torch.equal(step(image()), expected)
            assert torch.equal(numbers(step(image(), out=out)), expected)
    assert len(recordings) <= 2


# What is refused ---------------------------------------------------------------------------------------------------


REFUSED = {
    "shape": (lambda: Taken((1, 4, 44, 35)), r"out, a .*Taken, has shape \(1, 4, 44, 35\).*goes there \(1, 4, 44, 36\)"),
    "dtype": (lambda: Taken(SHAPE, np.float64), r"dtype float64, and the output that goes there .*torch.float32"),
    "tensor": (lambda: torch.zeros(SHAPE, dtype=torch.float64), r"dtype torch.float64"),
    "no slices": (lambda: np.float32(1), "takes slices"),
    "text": (lambda: "x.tif", "out is a builtins.str"),
    "read only": (lambda: np.broadcast_to(np.float32(0), SHAPE), "cannot be written"),
    "structure": (lambda: [Taken(SHAPE)], r"structure \['\*'\], and what the call returns \*"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(what, step):
    make, words = REFUSED[what]
    out = make()
    for _ in range(2):
        with torch.no_grad(), pytest.raises((ValueError, TypeError), match=words):
            step(image(), out=out)
    if isinstance(out, Taken):
        assert not out.counts.any()


def test_with_gradients_it_is_refused(step):
    with pytest.raises(ValueError, match=r"out= is for calls without gradients.*no_grad"):
        step(image(), out=Taken(SHAPE))


def test_a_step_with_a_loss_has_none():
    with torch.no_grad(), pytest.raises(TypeError, match=r"step\(input, target\); got .*'out'"):
        fullframe.tile(net(), loss=F.mse_loss, budget="1 GB")(image(), image(), out=Taken(SHAPE))


def test_what_is_read_is_not_written(tmp_path):
    run, x = tiled(nn.Conv2d(4, 4, 3, padding=1)), memmap(tmp_path)
    again = np.memmap(x.filename, x.dtype, "r+", shape=x.shape)
    data = h5py.File(tmp_path / "x.h5", "w").create_dataset("x", data=x)
    t = torch.zeros(SHAPE)
    pairs = [(x, x), (x, x[...]), (x, again), (x, x[..., ::-1]), (data, data), (data, data.file["x"]), (t, t), (t, t.numpy()),
             (t.numpy(), t)]  # fmt: skip
    with torch.no_grad():
        for source, out in pairs:
            with pytest.raises(fullframe.CaptureError, match="out shares its numbers with input0"):
                run(source, out=out)
        with pytest.raises(fullframe.CaptureError, match="out shares its numbers with bias"):
            whole = nn.Conv2d(4, 4, (44, 36))
            tiled(whole)(x, out=whole.bias.detach().view(1, 4, 1, 1))
        both = memmap(tmp_path, (2, *SHAPE))
        run(both[0], out=both[1])  # parts of one file


def test_an_array_is_known_whatever_the_mode_in_which_it_is_opened(tmp_path):
    first = zarr_array(tmp_path / "x.zarr")
    zarr = pytest.importorskip("zarr", reason="comes with the packages of the examples")
    run = tiled(nn.Conv2d(4, 4, 3, padding=1))
    with torch.no_grad():
        for mode in ("r", "r+"):
            with pytest.raises(fullframe.CaptureError, match="out shares its numbers with input0"):
                run(zarr.open(str(tmp_path / "x.zarr"), mode=mode), out=first)
        run(first, out=zarr_array(tmp_path / "y.zarr"))


def test_what_goes_elsewhere_is_not_kept_as_a_tensor():
    class Keeping(nn.Module):
        def forward(self, x):
            self.kept = [x + 1]
            return self.kept[0]

    with torch.no_grad(), pytest.raises(fullframe.CaptureError, match="keeps the output that goes to out"):
        tiled(Keeping())(torch.zeros(SHAPE), out=Taken(SHAPE))


def test_destinations_lie_apart():
    class Two(nn.Module):
        def forward(self, x):
            return x + 1, x + 2

    out = np.zeros(SHAPE, np.float32)
    with torch.no_grad(), pytest.raises(fullframe.CaptureError, match="out1 shares its numbers with out0"):
        tiled(Two())(torch.zeros(SHAPE), out=(out, out[::-1]))


def test_a_write_error_is_an_error(step, expected):
    class Full(Taken):
        left = 3

        def __setitem__(self, part, given):
            self.left -= 1
            if self.left == 0:
                raise OSError("no space left")
            super().__setitem__(part, given)

    with torch.no_grad(), pytest.raises(OSError, match="no space left") as raised:
        step(image(), out=Full(SHAPE))
    assert "when writing out[0:1, 0:4, " in raised.value.__notes__[0]
    with torch.no_grad():
        assert torch.equal(numbers(step(image(), out=Taken(SHAPE))), expected)
