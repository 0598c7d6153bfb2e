"""Tensors whose numbers follow from the code alone, so that code may read them while it is recorded.

``torch.arange(2, x.dim()).tolist()`` depends on no data, yet a recording holds its result without
numbers. Beside every small tensor made from Python numbers alone a twin with numbers is kept; pure
functions of such tensors run on the twins as well, so that the two share memory alike. Any other
use of a tensor forgets its twin, and those that share memory with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _disable_current_modes

READERS = frozenset(("item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__"))
MAKERS = frozenset((torch.arange, torch.linspace, torch.zeros, torch.ones, torch.full, torch.eye, torch.tensor))
LOOKS = frozenset(("__get__", "size", "dim", "numel", "nelement", "__len__", "is_floating_point", "stride"))
PURE = frozenset(
    """
abs add all amax amin any bool ceil clone cpu cumsum detach div double eq exp flatten float floor floor_divide ge
gt int le log long lt max mean min mul ne neg prod remainder reshape round sqrt sub sum to unbind view __add__ __and__
__eq__ __floordiv__ __ge__ __getitem__ __gt__ __invert__ __iter__ __le__ __lt__ __mod__ __mul__ __ne__ __neg__ __or__
__radd__ __rmul__ __rsub__ __rtruediv__ __sub__ __truediv__
""".split()  # noqa: SIM905  (a table of names reads best as words)
)
LARGEST = 4096  # elements of a tensor with a twin


class Known:
    """The tensors with twins, by identity; they are kept alive so that no other takes their place."""

    def __init__(self) -> None:
        self.twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self.twins

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any, strangers: bool) -> Any:
        """Call a maker, or a function of tensors with twins; ``strangers``: whether others are among its tensors."""
        name = getattr(func, "__name__", "")
        if name in READERS and not strangers:
            with _disable_current_modes():
                found = getattr(self._twin(args[0]), name)(*args[1:])
                if name in ("numpy", "__array__"):  # not the twin's own memory, which must not change unseen
                    found = found.copy()
                    found.flags.writeable = False
                return found
        made = func(*args, **kwargs)
        if name == "__iter__":
            made = list(made)
        if (func in MAKERS or name in PURE) and not strangers and _small(made):
            with _disable_current_modes():
                twin = func(*self._twin(args), **self._twin(kwargs))
                twin = list(twin) if name == "__iter__" else twin
            self._pair(made, twin)
        elif name not in LOOKS or isinstance(made, torch.Tensor):
            self.forget((args, kwargs))
        return iter(made) if name == "__iter__" else made

    def _twin(self, thing: Any) -> Any:
        if isinstance(thing, torch.Tensor):
            return self.twins[id(thing)][1]
        if type(thing) in (list, tuple):
            return type(thing)([self._twin(x) for x in thing])
        return {k: self._twin(v) for k, v in thing.items()} if type(thing) is dict else thing

    def _pair(self, made: Any, twin: Any) -> None:
        if isinstance(made, torch.Tensor):
            self.twins[id(made)] = made, twin
            if isinstance(made, FunctionalTensor):  # its own ``tolist`` asks the tensor inside
                self.twins[id(made.elem)] = made.elem, twin
        elif isinstance(made, (list, tuple)):
            for a, b in zip(made, twin, strict=True):
                self._pair(a, b)

    def forget(self, thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            if thing in self:
                memory = self._twin(thing).untyped_storage().data_ptr()
                shared = [k for k, (_, t) in self.twins.items() if t.untyped_storage().data_ptr() == memory]
                for key in shared:
                    del self.twins[key]
        elif isinstance(thing, (list, tuple, dict)):
            for x in thing.values() if isinstance(thing, dict) else thing:
                self.forget(x)


def _small(made: Any) -> bool:
    if isinstance(made, torch.Tensor):
        return made.numel() <= LARGEST and made.layout == torch.strided
    return isinstance(made, (list, tuple)) and all(isinstance(t, torch.Tensor) and _small(t) for t in made)
