"""The footprint proof of the pointwise ops, on operands made from their schemas; that of all others is in test_rules."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from footprints import check_beside

from fullframe.ir.graph import Op, Ref, Value
from fullframe.ops.builder.builder import RULES
from fullframe.ops.primitives.elementwise import Pointwise
from fullframe.testing import regions, sufficient


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


POINTWISE = [name for name, rule in RULES.items() if type(rule) is Pointwise]
KEYWORDS: dict[str, dict[str, Any]] = {
    "aten._to_copy.default": {"dtype": torch.float32},
    "aten.round.decimals": {"decimals": 1},
    "aten.div.Tensor_mode": {"rounding_mode": "floor"},
    "aten.div.Scalar_mode": {"rounding_mode": "floor"},
}
NUMBERS = {"int": 1, "float": 0.5, "number": 0.5, "Scalar": 0.5, "bool": False, "SymInt": 1}


@pytest.mark.parametrize("target", POINTWISE)
def test_pointwise_footprints(target: str) -> None:
    """Every op of the table of pointwise names, on broadcast operands made from its schema."""
    _, packet, overload = target.split(".")
    call = getattr(getattr(torch.ops.aten, packet), overload)
    integral = "bitwise" in target
    args: list[Any] = []
    tensors: list[torch.Tensor] = []
    shapes = [(2, 3, 4, 5), (3, 1, 5), (2, 3, 1, 1), (1, 1, 1, 1)]
    if "prelu" in target:
        shapes = [(2, 3, 4, 5)] * 3
    for a in call._schema.arguments:
        kind = str(a.type)
        if kind == "Tensor" or target == "aten.clamp.Tensor":
            shape = shapes[len(tensors) % len(shapes)]
            made = torch.randint(0, 4, shape) if integral else torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1
            if a.name in ("condition", "mask"):
                made = made > 0.5
            if a.name == "value" and "masked_fill" in target:
                made = torch.tensor(0.5, dtype=torch.float64)
            tensors.append(made)
            args.append(Ref(len(tensors) - 1))
        elif target == "aten.clamp.default":
            args.append(0.3)
        elif a.kwarg_only or (a.has_default_value() and "Scalar" not in kind and "number" not in kind):
            break
        else:
            number = next((v for k, v in NUMBERS.items() if k in kind), None)
            args.append(int(number) if integral and number is not None else number)
    kwargs = KEYWORDS.get(target, {})
    made = call(*[tensors[a.index] if isinstance(a, Ref) else a for a in args],
                **kwargs)  # fmt: skip
    made = made[0] if isinstance(made, tuple) else made
    inputs = tuple(Value(f"x{k}", tuple(t.shape), t.dtype, 8) for k, t in enumerate(tensors))
    output = Value("y", tuple(made.shape), made.dtype, made.itemsize)
    first = lambda *a, **k: r[0] if isinstance(r := call(*a, **k), tuple) else r  # noqa: E731
    op = Op(target, inputs, tuple(args), kwargs, output, RULES[target], first)
    for region in regions(op.output.shape, Random(target)):
        assert sufficient(op, tensors, region, tolerance=1e-15), (op, region)
        check_beside(op, region)
