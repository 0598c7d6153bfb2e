"""Objects of the caller's that are read and written region by region, and never held whole: sources and sinks.

An input may be anything that has a shape, a dtype and slices (a mapped file, a dataset of HDF5, an array of Zarr, an
object that makes its regions when they are asked for), and an output may go to such a thing. To a run both are maps
that live elsewhere (`storage.protocol.StoredMap`): a source is fetched from, a sink is put to.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import torch

from fullframe.ir import region as box
from fullframe.ir.region import Region
from fullframe.storage.mapped_file import let_go

AXES = 3  # of arrays in memory with fewer, code of the caller's may read numbers: they are no pictures


def is_source(thing: Any) -> bool:
    """Whether a thing among a call's arguments is read by regions: it has a shape, a dtype of numbers, and slices.

    Tensors are what they are. So are arrays of NumPy's with fewer than three axes, which code may read as a list of
    numbers, and kinds of arrays that mean more than their numbers (masked ones, say).
    """
    if isinstance(thing, (torch.Tensor, type)) or not hasattr(type(thing), "__getitem__"):
        return False
    shape, dtype = getattr(thing, "shape", None), getattr(thing, "dtype", None)
    if not isinstance(shape, Sized) or not len(shape) or dtype is None or not _numbers(dtype):
        return False
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(thing, numpy.ndarray):
        return True
    return type(thing) is numpy.memmap or (type(thing) is numpy.ndarray and thing.ndim >= AXES)


def _numbers(dtype: Any) -> bool:
    """Whether a type, of torch's or as NumPy's are named, is one of numbers."""
    if isinstance(dtype, torch.dtype):
        return True
    import numpy

    try:
        return numpy.dtype(dtype).kind in "biufc"
    except TypeError:  # of another library's own
        return False


def dtype_of(thing: Any, name: str) -> torch.dtype:
    """The dtype of an object's numbers; TypeError where torch has none for them."""
    if isinstance(thing.dtype, torch.dtype):
        return thing.dtype
    import numpy

    native = numpy.dtype(thing.dtype).newbyteorder("=")
    try:
        return torch.from_numpy(numpy.empty(0, native)).dtype
    except TypeError:
        raise TypeError(
            f"{name}, a {kind_of(thing)}, has numbers of type {thing.dtype}, for which torch has no type; give an "
            "object that makes others of them where it is sliced"
        ) from None


def kind_of(thing: Any) -> str:
    """What an object is, for messages."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


class External:
    """An object of the caller's, by the ``name`` that messages have for it. One thread at a time is in it, unless it
    is memory or has an attribute ``thread_safe`` that is True."""

    def __init__(self, thing: Any, name: str):
        self.thing, self.name = thing, name
        self.shape = tuple(int(n) for n in thing.shape)
        self.dtype = dtype_of(thing, name)
        self._lock: AbstractContextManager[Any] = nullcontext() if _shared(thing) else _lock_of(thing)

    def open(self) -> None:
        """As `StoredMap.open`."""

    def close(self) -> None:
        """As `StoredMap.close`."""

    def expect(self, region: Region) -> None:
        """As `StoredMap.expect`."""

    @contextmanager
    def _named(self, region: Region, what: str) -> Iterator[None]:
        """Tell which region of which object was wanted when it failed."""
        assert box.contains(box.full(self.shape), region), f"{region} is outside {self.name} of shape {self.shape}"
        try:
            yield
        except Exception as error:
            error.add_note(f"when {what} {self.name}{words(region)}, a {kind_of(self.thing)} of shape {self.shape}")
            raise


class Source(External):
    """What is read: an input of a call."""

    def __init__(self, thing: Any, name: str, device: torch.device):
        super().__init__(thing, name)
        self.device = device

    def fetch(self, region: Region) -> torch.Tensor:
        """The numbers of a region, in memory of their own: the object may use its own again for the next."""
        shape = box.shape_of(region)
        window = torch.empty(shape, dtype=self.dtype)
        with self._named(region, "reading"), self._lock:
            made = self.thing[box.slices(region)]
            self._take(made, window, region)
            let_go(made)
        return window.to(self.device)

    def put(self, region: Region, window: torch.Tensor) -> None:
        """A source is only read."""
        raise AssertionError(f"{self.name} is only read")

    def _take(self, made: Any, window: torch.Tensor, region: Region) -> None:
        """Copy what the object has made, if it is what was asked for."""
        if isinstance(made, torch.Tensor):
            self._check(tuple(made.shape), made.dtype, made.dtype, region)
            window.copy_(made.detach())
            return
        import numpy

        if numpy.ma.is_masked(made):
            raise ValueError(
                f"{self.name}, a {kind_of(self.thing)}, returns a masked array for {words(region)}, in which numbers "
                "are missing; fill them"
            )
        array = numpy.asarray(made)
        found = dtype_of(array, self.name) if _numbers(array.dtype) else None
        self._check(array.shape, found, array.dtype, region)
        numpy.copyto(window.numpy(), array)

    def _check(self, shape: tuple[int, ...], dtype: Any, said: Any, region: Region) -> None:
        if shape != box.shape_of(region) or dtype != self.dtype:
            raise ValueError(
                f"{self.name}, a {kind_of(self.thing)} that says it has shape {self.shape} and dtype "
                f"{self.thing.dtype}, returns {said} of shape {shape} for {words(region)}, which must have the shape "
                f"{box.shape_of(region)} and the dtype of the object"
            )


class Sink(External):
    """What is written: the place of an output."""

    def __init__(self, thing: Any, name: str):
        if not hasattr(type(thing), "__setitem__") or not hasattr(thing, "shape") or not hasattr(thing, "dtype"):
            raise TypeError(
                f"{name} is a {kind_of(thing)}; an output goes to an object that has a shape and a dtype and takes "
                "slices: thing[slices] = numbers"
            )
        super().__init__(thing, name)
        if not getattr(getattr(thing, "flags", None), "writeable", True):
            raise ValueError(f"{name}, a {kind_of(thing)}, cannot be written")

    def fetch(self, region: Region) -> torch.Tensor:
        """A sink is only written."""
        raise AssertionError(f"{self.name} is only written")

    def put(self, region: Region, window: torch.Tensor) -> None:
        """Have the object keep a region. It has a tensor if its dtype is torch's, else an array."""
        part = box.slices(region)
        with self._named(region, "writing"), self._lock:
            if isinstance(self.thing, torch.Tensor):
                with torch.inference_mode(self.thing.is_inference()):
                    self.thing.detach()[part] = window
            elif isinstance(self.thing.dtype, torch.dtype):
                self.thing[part] = window.contiguous()
            else:
                self.thing[part] = window.cpu().contiguous().numpy()
            let_go(self.thing, part)


def words(region: Region) -> str:
    """A region as the slices that name it."""
    return f"[{', '.join(f'{low}:{high}' for low, high in region)}]"


# One thread at a time ------------------------------------------------------------------------------


class _Lock:
    """A lock that lives as long as something that has it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


# By the identity of the object, which lasts as long as the lock: who has the one has the other.
_LOCKS: WeakValueDictionary[int, _Lock] = WeakValueDictionary()
_MAKING = threading.Lock()


def _shared(thing: Any) -> bool:
    """Whether several threads may be in an object at a time: it is memory, or says so."""
    numpy = sys.modules.get("numpy")
    memory = isinstance(thing, torch.Tensor) or (numpy is not None and isinstance(thing, numpy.ndarray))
    return memory or getattr(thing, "thread_safe", False) is True


def _lock_of(thing: Any) -> _Lock:
    with _MAKING:
        found = _LOCKS.get(id(thing))
        if found is None:
            found = _LOCKS[id(thing)] = _Lock()
        return found
