"""Tensors whose numbers are known while a step is recorded, so that code may read them.

``torch.arange(2, x.dim()).tolist()`` depends on no data, yet a recording holds its result without
numbers. Beside every small tensor made from Python numbers alone a twin with numbers is kept; pure
functions of such tensors run on the twins as well, and so do changes in place, so that the two share
memory alike. Any other use that may change a tensor forgets its twin, and those that share memory with it.

Small buffers and tensors in attributes get a twin too, for as long as the step has not changed them otherwise:
a pointer into a queue, a flag, a mask. Whose numbers were read, itself or through what was made of it, is noted:
they are part of the recording's key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fullframe import torch_compat
from fullframe.errors import CaptureError
from fullframe.torch_compat import FunctionalTensor, without_modes, without_transforms

READERS = frozenset(
    ("item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__",
     "__contains__", "equal", "allclose", "is_nonzero")
)  # fmt: skip
MAKERS = frozenset((torch.arange, torch.linspace, torch.zeros, torch.ones, torch.full, torch.eye, torch.tensor))
LOOKS = frozenset(("__get__", "size", "dim", "numel", "nelement", "__len__", "is_floating_point", "stride"))
# Their results may lie in the memory of what they are given.
VIEWS = frozenset(
    """
__getitem__ __get__ __iter__ contiguous cpu detach diagonal double expand flatten float int long bool narrow permute
reshape squeeze t to transpose unbind unsqueeze view view_as
""".split()  # noqa: SIM905  (a table of names reads best as words)
)
# Their results have memory of their own.
FRESH = frozenset(
    """
abs add all amax amin any argmax argmin argsort bitwise_and bitwise_not bitwise_or cat ceil clamp clone concat
cumsum div eq exp flip floor floor_divide fmod full_like gather ge gt index_select isfinite isin isnan le log
logical_and logical_not logical_or logical_xor lt masked_fill max maximum mean median min minimum mul ne neg norm
ones_like pow prod remainder repeat round roll scatter sort sqrt square stack std sub sum tile topk tril triu where
zeros_like __add__ __and__ __eq__
__floordiv__ __ge__ __gt__ __invert__ __le__ __lt__ __mod__ __mul__ __ne__ __neg__ __or__ __pow__ __radd__ __rand__
__rmul__ __rsub__ __rtruediv__ __sub__ __truediv__ __xor__
""".split()  # noqa: SIM905
)
PURE = VIEWS | FRESH
IN_PLACE = frozenset(
    """
add_ clamp_ copy_ div_ fill_ fill_diagonal_ floor_divide_ logical_and_ logical_not_ logical_or_ masked_fill_ mul_
remainder_ sub_ zero_ __iadd__ __iand__ __ifloordiv__ __imod__ __imul__ __ior__ __isub__ __itruediv__ __setitem__
""".split()  # noqa: SIM905
)
# The shape of their results follows from numbers.
SHAPED = frozenset(("argwhere", "bincount", "masked_select", "nonzero", "repeat_interleave", "unique"))
INDEXING = frozenset(("__getitem__", "__setitem__"))
LARGEST = 1 << 18  # elements of a tensor with a twin
LARGEST_MASK = 1 << 20  # the same where they are true or false


@dataclass(frozen=True, eq=False)
class BufferSource:
    """A tensor of the call whose numbers may be read: its number and name, and what stands for it."""

    number: int
    name: str
    tensor: torch.Tensor
    placeholder: torch.Tensor


class ConstantTracker:
    """The tensors with twins, by identity; they are kept alive so that no other takes their place.

    ``sources`` are tensors of the call that may have a twin; ``read`` are which of them had their numbers read.
    """

    def __init__(self, sources: Iterable[BufferSource] = ()) -> None:
        self.twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.origins: dict[int, frozenset[int]] = {}
        self.sources: dict[int, BufferSource] = {}
        for source in sources:
            if isinstance(source.placeholder, FunctionalTensor):
                self.sources[id(source.placeholder)] = self.sources[id(source.placeholder.elem)] = source
        self.read: set[int] = set()

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self.twins

    def adopt(self, placeholder: torch.Tensor, name: str) -> bool:
        """Give the placeholder of one of the call's tensors a twin, if a function of this name could use it."""
        if id(placeholder) not in self.sources or name not in PURE | IN_PLACE | READERS | SHAPED:
            return False
        source = self.sources[id(placeholder)]
        path, tensor = source.name, source.tensor
        inner: Any = source.placeholder
        if torch_compat.has_data_mutation(inner.elem):
            return False
        if not _small(tensor):
            if name in READERS | SHAPED:
                raise CaptureError(
                    f"the step reads the numbers of {path}, {tensor.numel()} of them, in Python ({name}); of at most "
                    f"{LARGEST} numbers, or {LARGEST_MASK} of a mask, a recording can be made for those that it "
                    "meets. Compute what it needs of them outside the step and pass it in"
                )
            return False
        with _apart():
            self._pair(source.placeholder, tensor.detach().clone(), frozenset((source.number,)))
        return True

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any, strangers: bool) -> Any:
        """Call a maker, or a function of tensors with twins; ``strangers``: whether others are among its tensors."""
        name = _name(func)
        if not strangers and name in READERS:
            return self._reading(name, args, kwargs)
        if not strangers and (name in SHAPED or (name == "where" and len(args) == 1 and not kwargs)):
            return self._shaped(func, args, kwargs)
        made = func(*args, **kwargs)
        if name == "__iter__":
            made = list(made)
        followed = "out" not in kwargs and (func in MAKERS or name in PURE | IN_PLACE)
        if followed and not strangers and (_small(made) or name == "__setitem__"):
            self._follow(func, args, kwargs, made)
        elif followed and name in IN_PLACE | INDEXING:
            self.forget(args[0])
        elif followed and name in FRESH:
            pass
        elif name not in LOOKS or isinstance(made, torch.Tensor):
            self.forget((args, kwargs))
        return iter(made) if name == "__iter__" else made

    def _follow(self, func: Callable[..., Any], args: Any, kwargs: Any, made: Any) -> None:
        """Do the same to the twins."""
        with _apart():
            twin = func(*self._twin(args), **self._twin(kwargs))
            twin = list(twin) if isinstance(made, list) else twin
        origins = self._origins((args, kwargs))
        if _name(func) in IN_PLACE:
            self._mix(args[0], origins)
        self._pair(made, twin, origins)

    def _mix(self, tensor: torch.Tensor, origins: frozenset[int]) -> None:
        """All that lie in one memory with a tensor that was changed in place come from what changed it, too."""
        if origins:
            for key in self._sharing(tensor):
                self.origins[key] = self.origins.get(key, frozenset()) | origins

    def read_by(self, name: str, tensor: torch.Tensor) -> Any:
        """What one of the readers gives of a tensor with a twin."""
        return self._reading(name, (tensor,), {})

    def _reading(self, name: str, args: Any, kwargs: Any) -> Any:
        self.read |= self._origins((args, kwargs))
        with _apart():
            # Of the twin's class: a tensor of a recording has a ``tolist`` of its own.
            found = getattr(self._twin(args[0]), name)(*self._twin(args[1:]), **self._twin(kwargs))
            if name in ("numpy", "__array__"):  # not the twin's own memory, which must not change unseen
                found = found.copy()
                found.flags.writeable = False
            return found

    def _shaped(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.read |= self._origins((args, kwargs))
        with _apart():
            twin = func(*self._twin(args), **self._twin(kwargs))
        return (
            type(twin)(self._constant(t) for t in twin) if isinstance(twin, (list, tuple)) else self._constant(twin)
        )

    def _constant(self, twin: torch.Tensor) -> torch.Tensor:
        """A tensor of the recording that has the numbers of a twin."""
        made = torch.tensor(twin.tolist(), dtype=twin.dtype, device=twin.device).reshape(twin.shape)
        self._pair(made, twin, frozenset())
        return made

    def settle(self, index: Any) -> Any:
        """An index in which masks are positions and numbers are Python's, where those are known."""
        if isinstance(index, tuple):
            return tuple(part for i in index for part in self._settled(i))
        settled = self._settled(index)
        return settled[0] if len(settled) == 1 else settled

    def _settled(self, index: Any) -> tuple[Any, ...]:
        if isinstance(index, slice):
            return (slice(*(self._settled(i)[0] for i in (index.start, index.stop, index.step))),)
        if isinstance(index, torch.Tensor) and id(index) in self.sources and index.dtype == torch.bool:
            self.adopt(index, "nonzero")
        if not isinstance(index, torch.Tensor) or index not in self:
            return (index,)
        twin = self._twin(index)
        if twin.dtype in (torch.bool, torch.uint8) and twin.dim():
            return tuple(self._shaped(lambda t: t.nonzero(as_tuple=True), (index,), {}))
        if twin.dim() == 0 and not twin.dtype.is_floating_point and twin.dtype != torch.bool:
            return (self._reading("item", (index,), {}),)
        return (index,)

    def _twin(self, thing: Any) -> Any:
        if isinstance(thing, torch.Tensor):
            return self.twins[id(thing)][1]
        if isinstance(thing, slice):
            return slice(*(self._twin(i) for i in (thing.start, thing.stop, thing.step)))
        if type(thing) in (list, tuple):
            return type(thing)([self._twin(x) for x in thing])
        return {k: self._twin(v) for k, v in thing.items()} if type(thing) is dict else thing

    def _origins(self, thing: Any) -> frozenset[int]:
        """The tensors of the call that twins among these come from."""
        if isinstance(thing, torch.Tensor):
            return self.origins.get(id(thing), frozenset())
        parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
        return frozenset().union(*(self._origins(x) for x in parts))

    def _pair(self, made: Any, twin: Any, origins: frozenset[int]) -> None:
        if isinstance(made, torch.Tensor):
            # FunctionalTensor's own ``tolist`` asks the tensor inside.
            for tensor in (made, made.elem) if isinstance(made, FunctionalTensor) else (made,):
                self.twins[id(tensor)] = tensor, twin
                self.origins[id(tensor)] = self.origins.get(id(tensor), frozenset()) | origins
        elif isinstance(made, (list, tuple)):
            for a, b in zip(made, twin, strict=True):
                self._pair(a, b, origins)

    def _sharing(self, tensor: torch.Tensor) -> list[int]:
        memory = self._twin(tensor).untyped_storage().data_ptr()
        return [k for k, (_, t) in self.twins.items() if t.untyped_storage().data_ptr() == memory]

    def forget(self, thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            if thing in self:
                for key in self._sharing(thing):
                    del self.twins[key]
                    self.origins.pop(key, None)
        elif isinstance(thing, (list, tuple, dict)):
            for x in thing.values() if isinstance(thing, dict) else thing:
                self.forget(x)


@contextmanager
def _apart() -> Iterator[None]:
    """Inside, twins are computed with: neither recorded, nor taken for tensors of one of torch.func's transforms."""
    with without_modes(), without_transforms():
        yield


def _name(func: Callable[..., Any]) -> str:
    """The name of one of torch's own functions; others of that name may do anything."""
    own = not isinstance(func, (torch_compat.OpOverload, torch_compat.OpOverloadPacket))
    own = own and (getattr(func, "__module__", None) or "torch").startswith("torch")
    return getattr(func, "__name__", "") if own else ""


def _small(made: Any) -> bool:
    if isinstance(made, torch.Tensor):
        largest = LARGEST_MASK if made.dtype == torch.bool else LARGEST
        return made.numel() <= largest and made.layout == torch.strided
    return (
        type(made) is not torch.Size
        and isinstance(made, (list, tuple))
        and all(isinstance(t, torch.Tensor) and _small(t) for t in made)
    )
