"""The footprint proof of every rule: enough, no more than it needs, and partial results add up.

The ops are those that the table of small networks makes, forward and backward, with the values they
take there. `loose` names the rules that may read more than an output needs, and says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from rule_cases import weighted
from usage_cases import CASES

import fullframe
from fullframe import region as box
from fullframe.graph import Graph, Op, Ref, Value
from fullframe.ops import RULES
from fullframe.ops.pointwise import Along, Pointwise
from fullframe.testing import combines, regions, sufficient, tight

WEIGHTED = ("tile.conv", "tile.conv_transpose")  # their weights are read in full, whatever the region


def loose(op: Op) -> str:
    """Why a rule may read a face that not every region needs; empty where it may not."""
    steps = op.target.removeprefix("tile.")
    if steps in ("conv", "conv_transpose", "conv_weight_grad", "max_pool"):
        axes = op.rule.axes(op)  # type: ignore[attr-defined]
        if any(a.dilation > 1 or a.stride > a.kernel for a in axes):
            return "pixels between the taps of a dilated kernel, or between strides, lie in its box"
    if steps == "resample_grad" and any(spec.mode in ("linear", "cubic") for spec in op.args[1]):
        return "an output that gives a pixel the weight zero is read"
    return {
        "max_pool_grad": "the gradient of a window goes to its maximum, which may lie elsewhere",
        "max_pool_indices": "a new value moves the maximum only if it is larger",
        "adaptive_max_grad": "as max pooling",
        "max_unpool": "as max pooling",
        "max_unpool_grad": "picks one element of each window",
    }.get(steps, "")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def graph_of(name: str) -> Graph:
    it = CASES[name]
    torch.manual_seed(0)
    net = it.make().double().train(it.train)
    x = torch.randn(it.shape, dtype=torch.float64, requires_grad=True)
    if it.loss is not None:
        assert it.target is not None
        target: Any = it.target()
    else:
        with torch.no_grad():
            made = it.make().double().train(it.train)(x)
        target = [torch.randn_like(o) for o in (made if isinstance(made, (list, tuple)) else [made])]
    return fullframe.tile(net, loss=it.loss or weighted, tile=3, workers=1).plan(x, target).graph


def evaluated(graph: Graph) -> Iterator[tuple[Op, list[torch.Tensor]]]:
    """Every op of a graph that a rule tiles, with values to run on."""
    known: dict[Value, torch.Tensor] = dict(graph.constants)
    for value in graph.inputs:
        known[value] = _filled(value)
    for op in graph.ops:
        rule: Any = op.rule
        tensors = [known[v] for v in op.inputs]
        whole = op.inputs[rule.driver].shape if rule.kind == "reduce" else op.output.shape
        reads = rule.footprint(op, box.full(whole))
        made = rule.run(op, box.full(whole), [t[box.slices(r)] for t, r in zip(tensors, reads, strict=True)])
        known[op.output] = rule.finish(op, made) if rule.kind == "reduce" else made
        assert (tuple(known[op.output].shape), known[op.output].dtype) == (op.output.shape, op.output.dtype), op
        if rule.kind != "whole" and 0 not in op.output.shape:
            yield op, tensors


def _filled(value: Value) -> torch.Tensor:
    torch.manual_seed(len(value.name) + sum(value.shape))
    if value.dtype.is_floating_point:
        made = torch.rand(value.shape, dtype=value.dtype)
        if value.name == "input1":  # a target may be a probability
            return made
        made = 2 * made - 1
        return made.abs() if "var" in value.name else made
    return torch.randint(0, 4, value.shape).to(value.dtype)


def signature(op: Op) -> str:
    return f"{op.target}{[tuple(v.shape) for v in op.inputs]}{op.args}{op.output.shape}{op.output.dtype}"


_SEEN: set[str] = set()


@pytest.mark.parametrize("name", list(CASES))
def test_footprints(name: str) -> None:
    for op, tensors in evaluated(graph_of(name)):
        if signature(op) not in _SEEN:
            _SEEN.add(signature(op))
            _check(op, tensors)


def _check(op: Op, tensors: list[torch.Tensor]) -> None:
    random, rule = Random(signature(op)), op.rule
    if rule.kind == "reduce":
        assert all(combines(op, tensors, random) for _ in range(2)), op
        return
    for region in regions(op.output.shape, random):
        assert sufficient(op, tensors, region), (op, region)
        idle = [] if loose(op) or _masked(op) else tight(op, tensors, region)
        if op.target in WEIGHTED:
            idle = [face for face in idle if face[0] == 0]
        assert not idle, (op, region, idle)


def _masked(op: Op) -> bool:
    """Whether elements may rightly not matter: a choice, a comparison, a product with zero."""
    return isinstance(op.rule, (Pointwise, Along)) and type(op.rule).__name__ != "Expand"


def test_every_rule_has_a_case() -> None:
    met = {op.target.split("[")[0] for name in CASES for op in graph_of(name).ops}
    tiled = {name for name, rule in RULES.items() if type(rule) is not Pointwise}
    assert not tiled - met, tiled - met


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
