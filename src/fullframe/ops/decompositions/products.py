"""Matrix products in normal form: contractions of two operands, merged axes as products of factors."""

from __future__ import annotations

from typing import Any

import torch

from fullframe.ir.graph import Value
from fullframe.ops.builder.builder import Builder
from fullframe.ops.builder.registry import decomposes

aten = torch.ops.aten

EQUATIONS = {
    "mm": "mk,kn->mn",
    "bmm": "bmk,bkn->bmn",
    "mv": "mk,k->m",
    "dot": "k,k->",
    "vdot": "k,k->",
}


def product(b: Builder, x: Value, y: Value) -> Value:
    return b.contract(x, y, EQUATIONS[b.target.split(".")[1]], b.meta_dtype)


for _name in EQUATIONS:
    decomposes(_name)(product)


def scaled(b: Builder, x: Value, number: float) -> Value:
    return x if number == 1 else b.aten(aten.mul.Scalar, x, number)


def added_product(b: Builder, base: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    equations = {"addmm": "mk,kn->mn", "baddbmm": "bmk,bkn->bmn", "addmv": "mk,k->m", "addbmm": "bmk,bkn->mn"}
    made = b.contract(x, y, equations[b.target.split(".")[1]], b.meta_dtype)
    made = scaled(b, made, alpha)
    return made if beta == 0 else b.aten(aten.add.Tensor, made, scaled(b, base, beta))


for _name in ("addmm", "baddbmm", "addmv", "addbmm"):
    decomposes(_name)(added_product)


@decomposes("addr")
def addr(b: Builder, base: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    made = scaled(b, b.contract(x, y, "m,n->mn", b.meta_dtype), alpha)
    return made if beta == 0 else b.aten(aten.add.Tensor, made, scaled(b, base, beta))


@decomposes("_linalg_det", "_linalg_slogdet")
def determinant(b: Builder, x: Value) -> Any:
    """Whole, of a matrix that lies row by row where it did so when it was recorded.

    There the factors that are returned are those of the transpose, and the gradient was recorded for these. A matrix
    recorded with gaps between its rows, as a part of a map, is given column by column.
    """
    if b.layouts[0] is not None:
        strides, start = b.layouts[0]
        if not torch.empty_strided(x.shape, strides, device="meta").is_contiguous():
            b.layouts[0] = (*[3] * (len(strides) - 2), 1, 2), start  # of which only the order counts
    return b.recorded()
