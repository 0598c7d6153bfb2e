"""The builder that lowerings write ops with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from math import prod
from typing import Any

import torch

from fullframe.graph import Op, Ref, Value
from fullframe.ops import layout, pointwise, reduce, resample, window
from fullframe.ops.norm_rules import STACKED
from fullframe.ops.rule import BaseRule, Whole

RULES: dict[str, BaseRule] = {
    **pointwise.RULES,
    **layout.RULES,
    **reduce.RULES,
    **window.RULES,
    **resample.RULES,
}
"""One rule per op name."""

WHOLE = Whole()
POINTWISE = pointwise.Pointwise()
PICK = pointwise.Pick(0, 1, scores_out=False)
POINTWISE_BUT_LAST = pointwise.PointwiseWithTable()


class Builder:
    """Collects ops; equal ops are made once.

    While one recorded call is lowered, ``target``, ``call``, ``arguments`` and ``meta`` (the shape
    and dtype of the call's outputs, a list) describe it.
    """

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.target = ""
        self.path = ""
        self.call: Callable[..., Any] = torch.empty
        self.arguments: tuple[Any, ...] = ()
        self.keywords: dict[str, Any] = {}
        self.meta: list[tuple[tuple[int, ...], torch.dtype] | None] = []
        self.device = torch.device("cpu")
        self._names = count()
        self._made: dict[Any, Value] = {}
        self._source: dict[Value, Value] = {}  # what a reshaped value was before

    @property
    def meta_shape(self) -> tuple[int, ...]:
        """Shape of the recorded call's (first) output."""
        assert self.meta[0] is not None
        return self.meta[0][0]

    @property
    def meta_dtype(self) -> torch.dtype:
        """Dtype of the recorded call's (first) output."""
        assert self.meta[0] is not None
        return self.meta[0][1]

    def value(self, shape: Sequence[int], dtype: torch.dtype, name: str = "") -> Value:
        """A new value."""
        return Value(name or f"v{next(self._names)}", tuple(shape), dtype, dtype.itemsize)

    def record(
        self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any], meta: Any,
        call: Callable[..., Any], rule: BaseRule,
    ) -> Value:
        """Add an op with `Value`s anywhere in its arguments; an equal op is found again."""
        key = (target, _freeze(args), _freeze(kwargs), meta)
        if key in self._made:
            return self._made[key]
        inputs: list[Value] = []
        template = tuple(_template(a, inputs) for a in args)
        output = self.value(*meta)
        self.ops.append(Op(target, tuple(inputs), template, kwargs, output, rule, call, self.path))
        self._made[key] = output
        return output

    def emit(
        self, target: str, tensors: Sequence[Value | None], shape: Sequence[int], dtype: torch.dtype, *,
        args: tuple[Any, ...] = (),
    ) -> Value:
        """Add one of our own ops (``tile.*``)."""
        rule = RULES[target]
        return self.record(target, (*tensors, *args), {}, (tuple(shape), dtype), _never, rule)

    def aten(self, overload: Any, *args: Any, **kwargs: Any) -> Value:
        """Add an ATen op with one output; its shape and dtype come from running it on meta tensors."""
        out = overload(*(_meta(a) for a in args), **kwargs)
        meta = (tuple(out.shape), out.dtype)
        target = str(overload)
        return self.record(target, args, kwargs, meta, overload, RULES.get(target, WHOLE))

    def recorded(self) -> list[Value | None]:
        """The recorded call as it is: one op per output."""
        kwargs = {k: v for k, v in self.keywords.items() if k not in ("memory_format", "pin_memory", "layout", "device")}
        if len(self.meta) == 1 and self.meta[0] is not None:
            rule = RULES.get(self.target, WHOLE)
            return [self.record(self.target, self.arguments, kwargs, self.meta[0], self.call, rule)]
        return [None if m is None else self.whole_output(k) for k, m in enumerate(self.meta)]

    def whole_output(self, index: int) -> Value:
        """Output ``index`` of the recorded call, which is run whole."""
        meta = self.meta[index]
        assert meta is not None
        call = Output(self.call, index)
        return self.record(f"{self.target}[{index}]", self.arguments, self.keywords, meta, call, WHOLE)

    # Shorthands, in the words of the rules.

    def point(self, function: Callable[..., torch.Tensor], tensors: Sequence[Value], shape: Sequence[int],
              dtype: torch.dtype, *args: Any) -> Value:  # fmt: skip
        """A pointwise function of our own over broadcast values."""
        return self._function(function, tensors, (tuple(shape), dtype), args, POINTWISE)

    def stacked(self, function: Callable[..., torch.Tensor], tensors: Sequence[Value], shape: Sequence[int],
                dtype: torch.dtype, *args: Any) -> Value:  # fmt: skip
        """A pointwise function of moments, whose axis 0 stacks count, mean and squares."""
        return self._function(function, tensors, (tuple(shape), dtype), args, STACKED)

    def small(self, function: Callable[..., torch.Tensor], tensors: Sequence[Value], shape: Sequence[int],
              dtype: torch.dtype, *args: Any) -> Value:  # fmt: skip
        """A function of our own on untiled values, run whole."""
        return self._function(function, tensors, (tuple(shape), dtype), args, WHOLE)

    def picked(self, function: Callable[..., torch.Tensor], tensors: Sequence[Value], shape: Sequence[int],
               dtype: torch.dtype, *args: Any) -> Value:  # fmt: skip
        """A per-pixel function of class scores (axis 1 in full), or of targets and class weights."""
        rule = PICK if len(tensors[0].shape) > len(shape) else POINTWISE_BUT_LAST
        return self._function(function, tensors, (tuple(shape), dtype), args, rule)

    def _function(self, function: Any, tensors: Any, meta: Any, args: Any, rule: BaseRule) -> Value:
        return self.record(f"tile.{function.__name__}", (*tensors, *args), {}, meta, function, rule)

    def full(self, shape: Sequence[int], number: Any, dtype: torch.dtype) -> Value:
        kwargs = {"dtype": dtype, "device": self.device}
        return self.record("tile.full", (number,), kwargs, (tuple(shape), dtype), torch.full, RULES["tile.full"])

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        x = self._source.get(x, x)
        if x.shape == tuple(shape):
            return x
        out = self.emit("tile.reshape", (x,), shape, x.dtype)
        self._source[out] = x
        return out

    def expand(self, x: Value, shape: Sequence[int]) -> Value:
        if x.shape == tuple(shape):
            return x
        return self.record("aten.expand.default", (x,), {}, (tuple(shape), x.dtype), _never, RULES["aten.expand.default"])

    def slice(self, x: Value, axis: int, start: int, length: int, step: int = 1) -> Value:
        if (start, length) == (0, x.shape[axis]):
            return x
        shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
        return self.emit("tile.slice", (x,), shape, x.dtype, args=(axis, start, step))

    def embed(self, x: Value, axis: int, start: int, extent: int, step: int = 1) -> Value:
        if (start, extent) == (0, x.shape[axis]):
            return x
        shape = (*x.shape[:axis], extent, *x.shape[axis + 1 :])
        return self.emit("tile.embed", (x,), shape, x.dtype, args=(axis, start, step, extent))

    def cat(self, xs: Sequence[Value], axis: int) -> Value:
        if len(xs) == 1:
            return xs[0]
        extent = sum(x.shape[axis] for x in xs)
        shape = (*xs[0].shape[:axis], extent, *xs[0].shape[axis + 1 :])
        return self.emit("tile.cat", xs, shape, xs[0].dtype, args=(axis,))

    def reduce(self, target: str, x: Value, axes: tuple[int, ...], keepdim: bool, dtype: torch.dtype) -> Value:
        kept = [1 if a in axes else n for a, n in enumerate(x.shape) if keepdim or a not in axes]
        return self.emit(target, (x,), kept, dtype, args=(axes, keepdim))

    def sum(self, x: Value, axes: tuple[int, ...], keepdim: bool, dtype: torch.dtype) -> Value:
        if prod(x.shape[a] for a in axes) == 1 and x.dtype == dtype:
            kept = [1 if a in axes else n for a, n in enumerate(x.shape) if keepdim or a not in axes]
            return self.reshape(x, kept)
        return self.reduce("tile.sum", x, axes, keepdim, dtype)

    def moments(self, x: Value, axes: tuple[int, ...]) -> Value:
        shape = (3, *(1 if a in axes else n for a, n in enumerate(x.shape)))
        return self.emit("tile.moments", (x,), shape, torch.float64, args=(axes,))


class Output:
    """One output of an op that makes several."""

    def __init__(self, call: Callable[..., Any], index: int):
        self.call, self.index = call, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)[self.index]


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this op runs through its rule")


def _meta(arg: Any) -> Any:
    if isinstance(arg, Value):
        return torch.empty(arg.shape, dtype=arg.dtype, device="meta")
    if isinstance(arg, (list, tuple)):
        return [_meta(a) for a in arg]
    return arg


def _template(arg: Any, inputs: list[Value]) -> Any:
    if isinstance(arg, Value):
        inputs.append(arg)
        return Ref(len(inputs) - 1)
    if isinstance(arg, (list, tuple)) and any(isinstance(a, (Value, list, tuple)) for a in arg) and not hasattr(arg, "_fields"):
        return [_template(a, inputs) for a in arg]
    return arg


def _freeze(arg: Any) -> Any:
    if isinstance(arg, dict):
        return tuple((k, _freeze(v)) for k, v in sorted(arg.items()))
    if isinstance(arg, (list, tuple)):
        return tuple(_freeze(a) for a in arg)
    # 1, 1.0 and True are equal in Python and different in ATen.
    return (type(arg).__name__, arg) if isinstance(arg, (bool, int, float)) else arg
