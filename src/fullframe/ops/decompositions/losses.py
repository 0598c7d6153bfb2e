"""Losses in normal form: a map of one number per element, then its sum or mean."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from fullframe.errors import CaptureError
from fullframe.ir.graph import Value
from fullframe.ops.builder.builder import Builder
from fullframe.ops.builder.registry import cast, decomposes, wide

aten = torch.ops.aten


# Negative log likelihood. Scores are (N, C, ...), targets (N, ...) become (N, 1, ...). --------------


def nll(scores: torch.Tensor, target: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Weighted negative log likelihood of each pixel; zero where ignored."""
    *weight, axis, ignore = rest
    used = target != ignore
    index = torch.where(used, target, 0)
    loss = -scores.gather(axis, index)
    if weight:
        loss = loss * weight[0][index]
    return torch.where(used, loss, 0)


def nll_gradient(g: torch.Tensor, target: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Gradient of `nll` with respect to the scores of all ``classes``; g as the target, or one number."""
    *weight, axis, ignore, classes = rest
    used = target != ignore
    index = torch.where(used, target, 0)
    part = -torch.where(used, g * weight[0][index] if weight else g, 0)
    out = part.new_zeros([classes if a == axis else n for a, n in enumerate(part.shape)])
    return out.scatter_(axis, index, part)


def pixel_weight(target: torch.Tensor, weight: torch.Tensor, ignore: int) -> torch.Tensor:
    """Class weight of each pixel, zero where ignored."""
    used = target != ignore
    return torch.where(used, weight[torch.where(used, target, 0)], 0)


def _class_axis(b: Builder, scores: Value, target: Value) -> tuple[Value, int]:
    """The target with an axis for the classes."""
    axis = 1 if len(scores.shape) > 1 else 0
    return b.reshape(target, [1 if a == axis else n for a, n in enumerate(scores.shape)]), axis


@decomposes("nll_loss2d_forward", "nll_loss_forward")
def nll_forward(b: Builder, scores: Value, target: Value, weight: Any, reduction: int, ignore: int) -> list[Value]:
    if weight is not None and weight.dtype != scores.dtype:
        raise _mixed(b, f"plain PyTorch refuses weights of {weight.dtype} for scores of {scores.dtype}")
    labels, axis = _class_axis(b, scores, target)
    kind, axes = wide(scores.dtype), tuple(range(len(labels.shape)))
    table = () if weight is None else (weight,)
    each = b.along(nll, (scores, labels, *table), (labels.shape, scores.dtype), axis, ignore)
    if reduction == 0:
        return [b.reshape(each, target.shape), b.full((), 0, scores.dtype)]
    if weight is None:
        total = b.sum(b.aten(aten.ne.Scalar, labels, ignore), axes, False, torch.int64)
        total = cast(b, total, kind)
    else:
        total = b.sum(b.table(pixel_weight, (labels, weight), labels.shape, kind, ignore), axes, False, kind)
    loss = b.sum(each, axes, False, kind)
    loss = b.aten(aten.div.Tensor, loss, total) if reduction == 1 else loss
    return [cast(b, loss, scores.dtype), cast(b, total, scores.dtype)]


@decomposes("nll_loss2d_backward", "nll_loss_backward")
def nll_backward(b: Builder, g: Value, scores: Value, target: Value, weight: Any, reduction: int, ignore: int,
                 total: Value) -> Value:  # fmt: skip
    labels, axis = _class_axis(b, scores, target)
    g = b.aten(aten.div.Tensor, g, total) if reduction == 1 else g
    g = b.reshape(g, labels.shape if reduction == 0 else [1] * len(labels.shape))
    table = () if weight is None else (weight,)
    return b.along(
        nll_gradient,
        (cast(b, g, scores.dtype), labels, *table),
        (scores.shape, scores.dtype),
        axis,
        ignore,
        scores.shape[axis],
    )


# Losses of one element each ------------------------------------------------------------------------

EACH = ("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy",
        "binary_cross_entropy_with_logits")  # fmt: skip


def _name(b: Builder) -> str:
    return b.target.split(".")[1]


def _each(
    b: Builder, tensors: tuple[Any, ...], rest: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> Value:
    given = [t for t in tensors if t is not None]
    where = tuple(t is not None for t in tensors)
    return b.point(_EACH[_name(b)], given, shape, dtype, where, rest)


def _caller(name: str) -> Any:
    call = getattr(aten, name).default

    def each(*args: Any) -> torch.Tensor:
        *tensors, where, rest = args
        found = iter(torch.broadcast_tensors(*tensors))
        return call(*(next(found) if yes else None for yes in where), 0, *rest)

    each.__name__ = name
    return each


_EACH = {n: _caller(n) for name in EACH for n in (name, f"{name}_backward") if hasattr(aten, n)}


def _taken_apart(b: Builder, given: tuple[Any, ...]) -> tuple[tuple[Any, ...], int, tuple[Any, ...]]:
    """A call's tensors (or None), its reduction and the numbers after it, defaults filled in."""
    schema = b.call._schema.arguments  # type: ignore[attr-defined]
    full = [given[k] if k < len(given) else b.keywords.get(a.name, a.default_value) for k, a in enumerate(schema)]
    at = next(k for k, a in enumerate(schema) if a.name == "reduction")
    return tuple(full[:at]), full[at], tuple(full[at + 1 :])


def _made_type(b: Builder, tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> torch.dtype:
    """The type of what a call makes of tensors of several types, which torch's recording does not always know.

    Raises CaptureError where plain PyTorch refuses them when it runs.
    """
    if len({t.dtype for t in tensors if t is not None}) == 1:
        return b.meta_dtype
    ones = [None if t is None else torch.ones(1, dtype=t.dtype) for t in tensors]
    try:
        return b.call(*ones, 0, *numbers).dtype
    except RuntimeError as error:
        raise _mixed(b, f"plain PyTorch refuses them: {error}") from error


def _mixed(b: Builder, why: str) -> CaptureError:
    return CaptureError(
        f"in {b.path or 'the step'}, {b.target} of tensors of several types: {why}; convert one to the type of the "
        "other"
    )


def forward(b: Builder, *given: Any, **_: Any) -> Value:
    tensors, reduction, numbers = _taken_apart(b, given)
    kind = _made_type(b, tensors, numbers)
    if kind != b.meta_dtype:
        raise _mixed(b, f"plain PyTorch makes {kind}, which torch's own recording takes for {b.meta_dtype}")
    shape = torch.broadcast_shapes(*(t.shape for t in tensors if t is not None))
    each = _each(b, tensors, numbers, shape, b.meta_dtype)
    if reduction == 0:
        return each
    total = b.sum(each, tuple(range(len(shape))), False, wide(b.meta_dtype))
    if reduction == 1:
        total = b.aten(aten.div.Scalar, total, prod(shape))
    return cast(b, total, b.meta_dtype)


def backward(b: Builder, *given: Any, **_: Any) -> Value:
    (g, *tensors), reduction, numbers = _taken_apart(b, given)
    if reduction == 1:
        g = b.aten(aten.div.Scalar, g, prod(b.meta_shape))
    each = _each(b, (g, *tensors), numbers, b.meta_shape, _made_type(b, (g, *tensors), numbers))
    return cast(b, each, b.meta_dtype)


for _loss in _EACH:
    decomposes(_loss)(backward if _loss.endswith("_backward") else forward)
