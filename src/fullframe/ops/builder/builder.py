"""The builder that decompositions write ops with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from math import prod
from typing import Any

import torch

from fullframe.capture.rng_state import State
from fullframe.errors import CaptureError
from fullframe.ir.graph import Op, Value
from fullframe.ops.builder.arguments import Recorded, frozen, members, memory_order, meta_of, replaced, templated
from fullframe.ops.builder.views import View, common, factors_of, laid_out, refine, solid, spans
from fullframe.ops.primitives import convolution as window
from fullframe.ops.primitives import elementwise as pointwise
from fullframe.ops.primitives import layout
from fullframe.ops.primitives import pooling as pool
from fullframe.ops.primitives import random as noise
from fullframe.ops.primitives import reductions as contract
from fullframe.ops.primitives import reductions as reduce
from fullframe.ops.primitives import resize as resample
from fullframe.ops.primitives.elementwise import STACKED
from fullframe.ops.primitives.rule import BaseRule, Whole

RULES: dict[str, BaseRule] = {
    **pointwise.RULES,
    **layout.RULES,
    **reduce.RULES,
    **contract.CONTRACTIONS,
    **window.RULES,
    **pool.RULES,
    **resample.RULES,
    **noise.RULES,
}
"""One rule per op name."""

NOTHING = {"tile.sum": 0, "tile.prod": 1}  # what no numbers make, to which no tile would add anything
WHOLE = Whole()
POINTWISE = pointwise.Pointwise()
TABLE = pointwise.Table()
ALONG = pointwise.Along()


class Builder:
    """Collects ops; equal ops are made once.

    While one recorded call is decomposed, ``target``, ``call``, ``arguments``, ``meta`` (the shape
    and dtype of the call's outputs, a list) and ``layouts`` (strides and offset of each tensor among
    the arguments when it was recorded) describe it.
    """

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.target = ""
        self.path = ""
        self.call: Callable[..., Any] = torch.empty
        self.arguments: tuple[Any, ...] = ()
        self.keywords: dict[str, Any] = {}
        self.meta: list[tuple[tuple[int, ...], torch.dtype] | None] = []
        self.layouts: list[tuple[tuple[int, ...], int] | None] = []
        self.device = torch.device("cpu")
        self._names = count()
        self._made: dict[Any, Value] = {}
        self._views: dict[Value, View] = {}
        self._unsplit: dict[Value, Value] = {}  # what a value was before axes of it were split
        self.maker: dict[Value, Op] = {}
        self.mean_of: dict[Value, Value] = {}  # what batch norms normalised, by the mean they took away
        self.centred: dict[Value, Value] = {}  # gradients whose sums are zero, by the sum that was taken away
        self.activated: dict[tuple[Value, float], Value] = {}  # leaky ReLUs, by what they are of and their slope
        self._drawn: int | None = 0  # the number of the next draw; None: it is to follow a seed of the code's own
        self._marks: list[int | None] = []  # and what it was when the state was asked for
        self.state = State()
        self.seed: Value | None = None

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
        self,
        target: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        meta: Any,
        call: Callable[..., Any],
        rule: BaseRule,
    ) -> Value:
        """Add an op with `Value`s anywhere in its arguments; an equal op is found again."""
        if type(rule) is pointwise.Pointwise:
            lifted = self._lifted(target, args, kwargs, meta, call)
            if lifted is not None:
                return lifted
        key = (target, frozen(args), frozen(kwargs), meta)
        if key in self._made:
            return self._made[key]
        inputs: list[Value] = []
        template = tuple(templated(a, inputs) for a in args)
        output = self.value(*meta)
        op = Op(target, tuple(inputs), template, kwargs, output, rule, call, self.path)
        self.ops.append(op)
        self.maker[output] = op
        self._made[key] = output
        return output

    def emit(
        self,
        target: str,
        tensors: Sequence[Value | None],
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        args: tuple[Any, ...] = (),
    ) -> Value:
        """Add one of our own ops (``tile.*``)."""
        rule = RULES[target]
        return self.record(target, (*tensors, *args), {}, (tuple(shape), dtype), _never, rule)

    def aten(self, overload: Any, *args: Any, **kwargs: Any) -> Value:
        """Add an ATen op with one output; its shape and dtype come from running it on meta tensors."""
        out = overload(*(meta_of(a) for a in args), **kwargs)
        meta = (tuple(out.shape), out.dtype)
        target = str(overload)
        return self.record(target, args, kwargs, meta, overload, RULES.get(target, WHOLE))

    def recorded(self) -> list[Value | None]:
        """The recorded call as it is: one op per output."""
        if self.draws():
            raise CaptureError(
                f"in {self.path or 'the step'}, {self.target} draws random numbers, which would differ each time "
                "a tile is made; draw them with torch.rand or torch.randn, or outside, and pass them in"
            )
        rule = self.rule()
        if len(self.meta) == 1 and self.meta[0] is not None:
            return [self._whole(rule, self.target, self.meta[0], None)]
        return [None if m is None else self.output(k, rule) for k, m in enumerate(self.meta)]

    def rule(self) -> BaseRule:
        """The rule of the recorded call: by its name, or pointwise where ATen says so of a call with one output."""
        tags = getattr(self.call, "tags", ())
        pointwise_ = torch.Tag.pointwise in tags and len(self.meta) == 1 and any(members(self.arguments, Value))
        return RULES.get(self.target, POINTWISE if pointwise_ else WHOLE)

    def draws(self) -> bool:
        """Whether the recorded call draws random numbers of its own; attention without dropout does not."""
        if torch.Tag.nondeterministic_seeded not in getattr(self.call, "tags", ()):
            return False
        schema = self.call._schema.arguments  # type: ignore[attr-defined]
        given = dict(zip((a.name for a in schema), self.arguments, strict=False)) | self.keywords
        chances = [given.get(a.name, a.default_value) for a in schema if a.name in ("dropout_p", "dropout")]
        return not chances or any(chances)

    def output(self, index: int, rule: BaseRule = WHOLE) -> Value:
        """Output ``index`` of the recorded call, made by a call of its own."""
        meta = self.meta[index]
        assert meta is not None
        return self._whole(rule, f"{self.target}[{index}]", meta, index)

    def _whole(self, rule: BaseRule, target: str, meta: Any, index: int | None) -> Value:
        kwargs = {
            k: v for k, v in self.keywords.items() if k not in ("memory_format", "pin_memory", "layout", "device")
        }
        named = {k: v for k, v in kwargs.items() if any(members(v, Value))}
        kwargs = {k: v for k, v in kwargs.items() if k not in named}
        call = self.call
        if rule is WHOLE or named or index is not None:
            orders = None
            if rule is WHOLE:
                orders = tuple(x and memory_order(x[0]) for x in self.layouts)
            call = Recorded(self.call, tuple(named), orders, index)
        return self.record(target, (*self.arguments, *named.values()), kwargs, meta, call, rule)

    # Shorthands, in the words of the rules.

    def point(self, function: Callable[..., torch.Tensor], tensors: Sequence[Value], shape: Sequence[int],
              dtype: torch.dtype, *args: Any) -> Value:  # fmt: skip
        """A pointwise function of our own over broadcast values."""
        return self._function(function, tensors, (tuple(shape), dtype), args, POINTWISE)

    def stacked(self, function: Callable[..., torch.Tensor], m: Value, *args: Any) -> Value:
        """A pointwise function of moments, whose axis 0 stacks count, mean and squares."""
        source, _ = self.unmerged(m)
        made = self._function(function, (source,), (source.shape[1:], torch.float64), args, STACKED)
        return self.reshape(made, m.shape[1:])

    def small(self, function: Callable[..., torch.Tensor], tensors: Sequence[Value], shape: Sequence[int],
              dtype: torch.dtype, *args: Any) -> Value:  # fmt: skip
        """A function of our own on untiled values, run whole."""
        return self._function(function, tensors, (tuple(shape), dtype), args, WHOLE)

    def table(self, function: Callable[..., torch.Tensor], tensors: Sequence[Value], shape: Sequence[int],
              dtype: torch.dtype, *args: Any) -> Value:  # fmt: skip
        """A pointwise function whose last tensor is a small table, taken in full."""
        if not shape:  # a single number beside a table would be taken for a row of it
            line = [self.reshape(tensors[0], (1,)), *tensors[1:]]
            return self.reshape(self.table(function, line, (1,), dtype, *args), ())
        return self._function(function, tensors, (tuple(shape), dtype), args, TABLE)

    def along(self, function: Callable[..., torch.Tensor], tensors: Sequence[Value],
              meta: tuple[Sequence[int], torch.dtype], axis: int, *args: Any) -> Value:  # fmt: skip
        """A function that is pointwise but for ``axis``, which it takes and makes in full.

        It is called with the tensors, the axis and ``args``; tensors of another rank are tables.
        """
        shape, dtype = meta
        lines = [x for x in tensors if len(x.shape) == len(shape)]
        separated, at, factors = self.side_by_side(lines, axis)
        if factors is not None:
            new = dict(zip(lines, separated, strict=True))
            fine = _with(laid_out(factors), at, shape[axis])
            tensors = [new.get(x, x) for x in tensors]
        else:
            fine = tuple(shape)
        return self.reshape(self._function(function, tensors, (fine, dtype), (at, *args), ALONG), shape)

    def _function(self, function: Any, tensors: Any, meta: Any, args: Any, rule: BaseRule) -> Value:
        return self.record(f"tile.{function.__name__}", (*tensors, *args), {}, meta, function, rule)

    def full(self, shape: Sequence[int], number: Any, dtype: torch.dtype) -> Value:
        kwargs = {"dtype": dtype, "device": self.device}
        return self.record("tile.full", (number,), kwargs, (tuple(shape), dtype), torch.full, RULES["tile.full"])

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """A view of ``x``. Views of views collapse; merged axes are remembered as products."""
        shape = tuple(shape)
        base = self._views[x].source if x in self._views else x
        root = self._unsplit.get(base, base)
        for known in (x, base, root):
            if known.shape == shape:
                return known
        fine = common(root.shape, shape)
        if fine is None:
            base, fine = x, common(x.shape, shape)
        else:
            base = root
        if fine is None:
            return self.emit("tile.reshape", (x,), shape, x.dtype)
        if fine != solid(base.shape):
            split = shape if solid(shape) == fine else fine
            made = self.emit("tile.reshape", (base,), split, x.dtype)
            self._unsplit[made] = self._unsplit.get(base, base)
            if split == shape:
                return made
            base = made
        out = self.emit("tile.reshape", (base,), shape, x.dtype)
        self._views[out] = View(base, factors_of(base.shape, shape))
        return out

    def factors(self, x: Value) -> tuple[tuple[int, ...], ...]:
        """Each axis of a value as a product."""
        return self._views[x].factors if x in self._views else tuple(solid((n,)) for n in x.shape)

    def merged(self, x: Value) -> bool:
        return x in self._views and self._views[x].merged

    def unmerged(self, x: Value) -> tuple[Value, list[tuple[int, ...]]]:
        """A value with merged axes taken apart, and which of its axes each axis became."""
        if not self.merged(x):
            return x, [(a,) for a in range(len(x.shape))]
        factors = self.factors(x)
        return self.reshape(x, laid_out(factors)), spans(factors)

    def unmerged_except(self, x: Value, axes: Sequence[int]) -> tuple[Value, list[int]]:
        """A value with all axes but ``axes`` taken apart, and where ``axes`` are in it.

        Where one of ``axes`` is a product itself, the value as it is.
        """
        y, where = self.unmerged(x)
        if any(len(where[a]) > 1 for a in axes):
            return x, list(axes)
        return y, [where[a][0] for a in axes]

    def aligned(self, xs: Sequence[Value], shape: Sequence[int]) -> list[tuple[int, ...]] | None:
        """One factoring of each axis of ``shape`` that fits all values broadcast to it."""
        found: list[tuple[int, ...]] = []
        for axis, n in enumerate(shape):
            known: list[tuple[int, ...]] = []
            for x in xs:
                at = axis - (len(shape) - len(x.shape))
                if at >= 0 and x.shape[at] == n:
                    known.append(self.factors(x)[at])
            part = refine(known) if known else solid((n,))
            if part is None:
                return None
            found.append(part)
        return found

    def refactored(self, x: Value, factors: Sequence[tuple[int, ...]]) -> Value:
        """A value (right-aligned, axes of extent 1 stretched) with its axes split as given."""
        shift = len(factors) - len(x.shape)
        shape: list[int] = []
        for axis, n in enumerate(x.shape):
            part = factors[axis + shift] or (1,)
            shape += [1] * len(part) if n == 1 else part
        return self.reshape(x, shape)

    def _lifted(self, target: str, args: Any, kwargs: Any, meta: Any, call: Any) -> Value | None:
        """A pointwise op on merged axes, made on their factors; None where none is merged."""
        values = list(members(args, Value))
        if not any(self.merged(v) for v in values):
            return None
        factors = self.aligned(values, meta[0])
        if factors is None:
            return None
        args = replaced(args, {v: self.refactored(v, factors) for v in values})
        made = self.record(target, args, kwargs, (laid_out(factors), meta[1]), call, POINTWISE)
        return self.reshape(made, meta[0])

    def expand(self, x: Value, shape: Sequence[int]) -> Value:
        if x.shape == tuple(shape):
            return x
        rule = RULES["aten.expand.default"]
        if not self.merged(x):
            return self.record("aten.expand.default", (x,), {}, (tuple(shape), x.dtype), _never, rule)
        factors = self.aligned([x], shape)
        assert factors is not None
        wide = self.expand(self.refactored(x, factors), laid_out(factors))
        return self.reshape(wide, shape)

    def permute(self, x: Value, order: Sequence[int]) -> Value:
        shape = [x.shape[a] for a in order]
        y, where = self.unmerged(x)
        fine = [k for a in order for k in where[a]]
        if fine == sorted(fine):
            return self.reshape(y, shape)
        meta = (tuple(y.shape[k] for k in fine), x.dtype)
        return self.reshape(
            self.record("aten.permute.default", (y, fine), {}, meta, _never, RULES["aten.permute.default"]), shape
        )

    def slice(self, x: Value, axis: int, start: int, length: int, step: int = 1) -> Value:
        if (start, length) == (0, x.shape[axis]):
            return x
        shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
        y, (at,) = self.unmerged_except(x, [axis])
        fine = (*y.shape[:at], length, *y.shape[at + 1 :])
        return self.reshape(self.emit("tile.slice", (y,), fine, x.dtype, args=(at, start, step)), shape)

    def embed(self, x: Value, axis: int, start: int, extent: int, step: int = 1) -> Value:
        if (start, extent) == (0, x.shape[axis]):
            return x
        shape = (*x.shape[:axis], extent, *x.shape[axis + 1 :])
        y, (at,) = self.unmerged_except(x, [axis])
        fine = (*y.shape[:at], extent, *y.shape[at + 1 :])
        return self.reshape(self.emit("tile.embed", (y,), fine, x.dtype, args=(at, start, step, extent)), shape)

    def flip(self, x: Value, axes: Sequence[int]) -> Value:
        y, at = self.unmerged_except(x, axes)
        meta = (y.shape, x.dtype)
        made = self.record(
            "aten.flip.default", (y, at), {}, meta, torch.ops.aten.flip.default, RULES["aten.flip.default"]
        )
        return self.reshape(made, x.shape)

    def side_by_side(self, xs: Sequence[Value], axis: int) -> tuple[Sequence[Value], int, Any]:
        """Values that differ along one axis only, their merged axes taken apart in one way.

        Also where the axis is then, and the factors of each axis: None where nothing was to do, or
        where the axis itself is a product.
        """
        if not any(self.merged(x) for x in xs) or any(len(self.factors(x)[axis]) > 1 for x in xs):
            return xs, axis, None
        shape = [max(x.shape[a] for x in xs) for a in range(len(xs[0].shape))]
        factors = self.aligned(xs, _with(shape, axis, 1))
        if factors is None:
            return xs, axis, None
        at = spans(factors)[axis][0]
        return [self.refactored(x, _with(factors, axis, solid((x.shape[axis],)))) for x in xs], at, factors

    def cat(self, xs: Sequence[Value], axis: int) -> Value:
        if len(xs) == 1:
            return xs[0]
        extent = sum(x.shape[axis] for x in xs)
        shape = _with(xs[0].shape, axis, extent)
        xs, at, factors = self.side_by_side(xs, axis)
        fine = shape if factors is None else _with(laid_out(factors), at, extent)
        return self.reshape(self.emit("tile.cat", xs, fine, xs[0].dtype, args=(at,)), shape)

    def reduce(self, target: str, x: Value, axes: Sequence[int], keepdim: bool, dtype: torch.dtype) -> Value:
        kept = [1 if a in axes else n for a, n in enumerate(x.shape) if keepdim or a not in axes]
        if 0 in x.shape and 0 not in kept and (target in NOTHING or dtype == torch.bool):
            return self.full(kept, NOTHING.get(target, target == "tile.amin"), dtype)
        y, where = self.unmerged(x)
        fine = tuple(k for a in axes for k in where[a])
        left = [1 if a in fine else n for a, n in enumerate(y.shape) if keepdim or a not in fine]
        return self.reshape(self.emit(target, (y,), left, dtype, args=(fine, keepdim)), kept)

    def sum(self, x: Value, axes: Sequence[int], keepdim: bool, dtype: torch.dtype) -> Value:
        kept = [1 if a in axes else n for a, n in enumerate(x.shape) if keepdim or a not in axes]
        if 0 not in x.shape and prod(x.shape[a] for a in axes) == 1 and x.dtype == dtype:
            return self.reshape(x, kept)
        return self.reduce("tile.sum", x, axes, keepdim, dtype)

    def moments(self, x: Value, axes: Sequence[int]) -> Value:
        y, where = self.unmerged(x)
        fine = tuple(k for a in axes for k in where[a])
        shape = (3, *(1 if a in fine else n for a, n in enumerate(y.shape)))
        if 0 in x.shape and 0 not in shape:
            return self.full((3, *(1 if a in axes else n for a, n in enumerate(x.shape))), 0, torch.float64)
        made = self.emit("tile.moments", (y,), shape, torch.float64, args=(fine,))
        return self.reshape(made, (3, *(1 if a in axes else n for a, n in enumerate(x.shape))))

    def contract(self, x: Value, y: Value, equation: str, dtype: torch.dtype) -> Value:
        """A product summed over the axes that ``equation`` (as in einsum, ``mk,kn->mn``) contracts."""
        terms, out = equation.split("->")
        names = terms.split(",")
        letters, extent, pieces = _letters(), {}, {}
        for operand, name in zip((x, y), names, strict=True):
            for axis, letter in enumerate(name):
                extent[letter] = operand.shape[axis]
                pieces.setdefault(letter, []).append(self.factors(operand)[axis])
        if 0 in extent.values():
            return self.full([extent[k] for k in out], 0, dtype)
        split = {k: refine(v) or solid((extent[k],)) for k, v in pieces.items()}
        fresh = {k: "".join(next(letters) for _ in split[k] or (1,)) for k in split}
        operands = [self.reshape(o, laid_out([split[k] for k in n])) for o, n in zip((x, y), names, strict=True)]
        written = ["".join(fresh[k] for k in n) for n in (*names, out)]
        if prod(y.shape) > prod(x.shape):
            operands.reverse()
            written[:2] = written[1::-1]
        shape = laid_out([split[k] for k in out])
        made = self.emit("tile.contract", operands, shape, dtype, args=(f"{written[0]},{written[1]}->{written[2]}",))
        return self.reshape(made, [extent[k] for k in out])

    def iota(self, shape: Sequence[int], axis: int) -> Value:
        """The position along an axis, of extent 1 along all others."""
        line = [n if a == axis else 1 for a, n in enumerate(shape)]
        return self.emit("tile.iota", (), line, torch.int64, args=(axis, self.device))

    def draw(self, shape: Sequence[int], dtype: torch.dtype, kind: str) -> Value:
        """Random numbers, uniform in [0, 1) or standard normal; each call has bits of its own."""
        if self.seed is None:
            self.seed = self.value((), torch.int64, "seed")
        if self._drawn is None:
            raise CaptureError(
                f"in {self.path or 'the step'}, {self.target} draws after the random state was set inside the step, "
                "to numbers that a recorded step does not have; draw outside and pass the numbers in"
            )
        number, self._drawn = self._drawn, self._drawn + 1
        return self.emit("tile.random", (self.seed,), shape, dtype, args=(kind, number))

    def follow(self, state: State) -> None:
        """Go where the random state is: one that is put back has the numbers of before."""
        self._marks += [self._drawn] * (state.marks - len(self._marks))
        if state.sets != self.state.sets and state.source is not None:
            self._drawn = self._marks[state.source] if state.source >= 0 else None
        self.state = state


def _letters() -> Any:
    return iter("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _with(shape: Sequence[Any], axis: int, extent: Any) -> tuple[Any, ...]:
    return (*shape[:axis], extent, *shape[axis + 1 :])


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this op runs through its rule")
