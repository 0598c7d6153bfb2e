"""Arguments of recorded calls: the tensors among them, and how they lay in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from fullframe.ir.graph import Ref, Value

Kind = TypeVar("Kind")


class Recorded:
    """A recorded ATen call, with the tensors it was given by name as its last arguments.

    ``orders``: for each tensor the axes from the slowest to the fastest in memory when it was
    recorded. Kernels may read a tensor wrongly that lies in memory as its caller never lays it.
    """

    def __init__(self, call: Callable[..., Any], names: tuple[str, ...], orders: Any, index: int | None):
        self.call, self.names, self.orders, self.index = call, names, orders, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.orders is not None:
            args = _laid(args, iter(self.orders))
        places = len(args) - len(self.names)
        made = self.call(*args[:places], **dict(zip(self.names, args[places:], strict=True)), **kwargs)
        return made if self.index is None else made[self.index]


def memory_order(strides: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(strides)), key=lambda a: (-strides[a], a)))


def _laid(arg: Any, orders: Any) -> Any:
    """Tensors among arguments laid out in memory in the given orders of their axes."""
    if isinstance(arg, torch.Tensor):
        order = next(orders, None) or tuple(range(arg.dim()))
        back = [order.index(a) for a in range(len(order))]
        return arg.permute(order).contiguous().permute(back)
    return type(arg)(_laid(a, orders) for a in arg) if type(arg) in (list, tuple) else arg


def meta_of(arg: Any) -> Any:
    if isinstance(arg, Value):
        return torch.empty(arg.shape, dtype=arg.dtype, device="meta")
    if isinstance(arg, (list, tuple)):
        return [meta_of(a) for a in arg]
    return arg


def members(arg: Any, kind: type[Kind]) -> Iterator[Kind]:
    """What is of a kind among arguments, in their order."""
    if isinstance(arg, kind):
        yield arg
    elif isinstance(arg, (list, tuple)):
        for a in arg:
            yield from members(a, kind)


def replaced(arg: Any, new: dict[Value, Value]) -> Any:
    if isinstance(arg, Value):
        return new[arg]
    return type(arg)(replaced(a, new) for a in arg) if type(arg) in (list, tuple) else arg


def templated(arg: Any, inputs: list[Value]) -> Any:
    if isinstance(arg, Value):
        inputs.append(arg)
        return Ref(len(inputs) - 1)
    if (
        isinstance(arg, (list, tuple))
        and any(isinstance(a, (Value, list, tuple)) for a in arg)
        and not hasattr(arg, "_fields")
    ):
        return [templated(a, inputs) for a in arg]
    return arg


def frozen(arg: Any) -> Any:
    if isinstance(arg, dict):
        return tuple((k, frozen(v)) for k, v in sorted(arg.items()))
    if isinstance(arg, (list, tuple)):
        return tuple(frozen(a) for a in arg)
    # 1, 1.0 and True are equal in Python and different in ATen.
    return (type(arg).__name__, arg) if isinstance(arg, (bool, int, float)) else arg
