"""The ATen calls a kernel can contain, each as a C++ expression, with PyTorch's types and rounding.

A call is computed in one type, to which its arguments are brought first: that of the result, or for a
comparison that to which PyTorch promotes the arguments. bfloat16 is computed in float32, and rounded after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from fullframe import torch_compat
from fullframe.codegen.group import Argument, Group, Node, Ref


@dataclass(frozen=True)
class Format:
    """How one dtype is kept in C++: its name here, its type in memory, and the type it is computed in."""

    name: str
    stored: str
    held: str

    def load(self, element: str) -> str:
        if self.name == "bfloat16":
            return f"load_bfloat16({element})"
        return f"{element} != 0" if self.name == "bool" else element

    def store(self, value: str) -> str:
        return f"store_bfloat16({value})" if self.name == "bfloat16" else f"({self.stored}){value}"

    def round(self, value: str, *, any_nan: bool = False) -> str:
        how = "narrow_bfloat16" if any_nan else "round_bfloat16"
        return f"{how}({value})" if self.name == "bfloat16" else value


FORMATS: dict[torch.dtype, Format] = {
    torch.float32: Format("float32", "float", "float"),
    torch.float64: Format("float64", "double", "double"),
    torch.bfloat16: Format("bfloat16", "uint16_t", "float"),
    torch.int64: Format("int64", "int64_t", "int64_t"),
    torch.int32: Format("int32", "int32_t", "int32_t"),
    torch.int16: Format("int16", "int16_t", "int16_t"),
    torch.int8: Format("int8", "int8_t", "int8_t"),
    torch.uint8: Format("uint8", "uint8_t", "uint8_t"),
    torch.bool: Format("bool", "uint8_t", "bool"),
}


@dataclass(frozen=True)
class Call:
    """A node with its arguments by name: expressions of the type computed in, scalars also as they are."""

    node: Node
    type: torch.dtype
    arguments: dict[str, Argument]
    expressions: dict[str, str]
    """of the tensors, and of every scalar that is a number"""


@dataclass(frozen=True)
class Rule:
    """How one target is written.

    Attributes:
        write: a template over the expressions of the arguments, or a function of the call.
        types: 'same' (that of the result) or 'promoted' (that of the arguments).
        floating: only for floating results.
        exact: the result needs no rounding, because it is one of the arguments or a small number.
        narrow: scalars and zero-dimensional tensors are rounded to bfloat16 with the rest, as PyTorch
            does in some of its kernels; in the others they stay float32.
    """

    write: str | Callable[[Call], str]
    types: str = "same"
    floating: bool = False
    exact: bool = False
    narrow: bool = False


def _unary(expression: str, exact: bool = False, narrow: bool = False) -> Rule:
    return Rule(expression, floating=True, exact=exact, narrow=narrow)


def _power(call: Call) -> str:
    """PyTorch's shortcuts for small exponents, in which bfloat16 products are rounded on the way."""
    exponent, x = call.arguments["exponent"], call.expressions["self"]
    square = _rounded(call, f"({x} * {x})")
    fixed = {
        0: "1",
        1: x,
        2: f"{x} * {x}",
        3: f"{square} * {x}",
        0.5: f"m_sqrt({x})",
        -0.5: f"1 / m_sqrt({x})",
        -1: f"1 / {x}",
        -2: f"1 / {square}",
    }
    known = fixed.get(exponent) if isinstance(exponent, (int, float)) else None
    return known or f"m_pow({x}, {call.expressions['exponent']})"


def _rounded(call: Call, value: str) -> str:
    return FORMATS[call.type].round(value)


def _clamp(low: str, high: str) -> Callable[[Call], str]:
    def limited(call: Call) -> str:
        value = call.expressions["self"]
        for name, function in (("min", low), ("max", high)):
            if call.arguments.get(name) is not None:
                value = f"{function}({value}, {call.expressions[name]})"
        return value

    return limited


def _by_approximation(exact: str, tanh: str) -> Callable[[Call], str]:
    def choose(call: Call) -> str:
        template = tanh if call.arguments["approximate"] == "tanh" else exact
        return template.format_map(call.expressions)

    return choose


def _sum(sign: str, first: str, second: str) -> Callable[[Call], str]:
    """first ± alpha * second."""

    def combine(call: Call) -> str:
        a, b, alpha = call.expressions[first], call.expressions[second], call.expressions["alpha"]
        if call.arguments["alpha"] == 1:
            return f"{a} {sign} {b}"
        held = FORMATS[call.type].held
        return f"m_fma(({held})({sign}{alpha}), {b}, {a})"

    return combine


_MOVED = Rule("{self}", exact=True, narrow=True)
_CHOICE = Rule("{condition} ? {self} : {other}", exact=True, narrow=True)
_RULES: dict[str, Rule] = {
    "neg.default": Rule("-{self}", exact=True),
    "abs.default": Rule("m_abs({self})", exact=True),
    "sign.default": Rule("sign({self})", exact=True),
    "sgn.default": Rule("sign({self})", exact=True),
    "square.default": Rule("{self} * {self}"),
    "relu.default": Rule("clamp_low({self}, ({T})0)", exact=True),
    "floor.default": _unary("m_floor({self})", exact=True),
    "ceil.default": _unary("m_ceil({self})", exact=True),
    "trunc.default": _unary("m_trunc({self})", exact=True),
    "round.default": _unary("m_rint({self})", exact=True),
    "reciprocal.default": _unary("1 / {self}"),
    "sqrt.default": _unary("m_sqrt({self})"),
    "rsqrt.default": _unary("1 / m_sqrt({self})"),
    "sigmoid.default": _unary("sigmoid({self})"),
    "pow.Tensor_Scalar": Rule(_power, floating=True, narrow=True),
    "pow.Tensor_Tensor": _unary("m_pow({self}, {exponent})", narrow=True),
    "addcmul.default": _unary("m_fma({value} * {tensor1}, {tensor2}, {self})"),
    "addcdiv.default": _unary("{self} + {value} * {tensor1} / {tensor2}"),
    "lerp.Scalar": _unary("lerp({self}, {end}, {weight})"),
    "lerp.Tensor": _unary("lerp({self}, {end}, {weight})", narrow=True),
    "where.self": _CHOICE,
    "where.ScalarSelf": _CHOICE,
    "where.ScalarOther": _CHOICE,
    "where.Scalar": _CHOICE,
    "masked_fill.Scalar": Rule("{mask} ? {value} : {self}", exact=True, narrow=True),
    "masked_fill.Tensor": Rule("{mask} ? {value} : {self}", exact=True, narrow=True),
    "clamp.default": Rule(_clamp("clamp_low", "clamp_high"), exact=True, narrow=True),
    "clamp.Tensor": Rule(_clamp("m_max", "m_min"), exact=True, narrow=True),
    "clamp_min.default": Rule(_clamp("clamp_low", "clamp_high"), exact=True, narrow=True),
    "clamp_max.default": Rule(_clamp("clamp_low", "clamp_high"), exact=True, narrow=True),
    "clamp_min.Tensor": Rule(_clamp("m_max", "m_min"), exact=True, narrow=True),
    "clamp_max.Tensor": Rule(_clamp("m_max", "m_min"), exact=True, narrow=True),
    "maximum.default": Rule("m_max({self}, {other})", exact=True, narrow=True),
    "minimum.default": Rule("m_min({self}, {other})", exact=True, narrow=True),
    "isnan.default": Rule("{self} != {self}", types="promoted", exact=True),
    "logical_not.default": Rule("!({self} != 0)", types="promoted", exact=True),
    "bitwise_not.default": Rule("{not}{self}", exact=True),
    "_to_copy.default": _MOVED,
    "clone.default": _MOVED,
    "detach.default": _MOVED,
    "alias.default": _MOVED,
    "zeros_like.default": Rule("0", exact=True),
    "ones_like.default": Rule("1", exact=True),
    "full_like.default": Rule("{fill_value}", exact=True, narrow=True),
    "fill.Scalar": Rule("{value}", exact=True, narrow=True),
    "leaky_relu.default": _unary("{self} > 0 ? {self} : {self} * {negative_slope}"),
    "leaky_relu_backward.default": _unary("{self} > 0 ? {grad_output} : {grad_output} * {negative_slope}"),
    "_prelu_kernel.default": _unary("{self} > 0 ? {self} : {weight} * {self}"),
    "threshold.default": Rule("{self} <= {threshold} ? {value} : {self}"),
    "threshold_backward.default": Rule("{self} <= {threshold} ? 0 : {grad_output}", exact=True),
    "elu.default": _unary("elu({self}, {alpha}, {scale}, {input_scale})"),
    "elu_backward.default": _unary(
        "elu_backward({grad_output}, {alpha}, {scale}, {input_scale}, {is_result} != 0, {self_or_result})"
    ),
    "gelu.default": Rule(_by_approximation("gelu({self})", "gelu_tanh({self})"), floating=True),
    "gelu_backward.default": Rule(
        _by_approximation("gelu_backward({grad_output}, {self})", "gelu_tanh_backward({grad_output}, {self})"),
        floating=True,
    ),
    "silu.default": _unary("silu({self})"),
    "silu_backward.default": _unary("silu_backward({grad_output}, {self})"),
    "mish.default": _unary("mish({self})"),
    "mish_backward.default": _unary("mish_backward({grad_output}, {self})"),
    "softplus.default": _unary("softplus({self}, {beta}, {threshold})"),
    "softplus_backward.default": _unary("softplus_backward({grad_output}, {self}, {beta}, {threshold})"),
    "hardtanh.default": Rule("clamp_high(clamp_low({self}, {min_val}), {max_val})", exact=True, narrow=True),
    "hardtanh_backward.default": _unary(
        "{self} > {min_val} && {self} < {max_val} ? {grad_output} : 0", exact=True, narrow=True
    ),
    "hardswish.default": _unary("hardswish({self})"),
    "hardswish_backward.default": _unary("hardswish_backward({grad_output}, {self})"),
    "hardsigmoid.default": _unary("hardsigmoid({self})"),
    "hardsigmoid_backward.default": _unary("hardsigmoid_backward({grad_output}, {self})"),
    "tanh_backward.default": _unary("{grad_output} * m_fma(-{output}, {output}, ({T})1)"),
    "sigmoid_backward.default": _unary("{grad_output} * (1 - {output}) * {output}"),
    "native_dropout_backward.default": _unary("{grad_output} * ({T}){mask} * {scale}"),
}
_FUNCTIONS = "exp exp2 expm1 log log1p log2 log10 sin cos tan atan sinh cosh tanh erf erfc"
for _name in _FUNCTIONS.split():  # each is a function of the mathematics library
    _RULES[f"{_name}.default"] = _unary(f"m_{_name}({{self}})")
for _name, _sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    for _overload in ("Tensor", "Scalar"):
        _RULES[f"{_name}.{_overload}"] = Rule(f"{{self}} {_sign} {{other}}", "promoted", exact=True, narrow=True)
for _name, _sign in {"and": "&", "or": "|", "xor": "^"}.items():
    _RULES[f"logical_{_name}.default"] = Rule(f"({{self}} != 0) {_sign} ({{other}} != 0)", "promoted", exact=True)
    for _overload in ("Tensor", "Scalar"):
        _RULES[f"bitwise_{_name}.{_overload}"] = Rule(f"{{self}} {_sign} {{other}}", exact=True)
for _overload in ("Tensor", "Scalar"):
    _RULES[f"add.{_overload}"] = Rule(_sum("+", "self", "other"), narrow=True)
    _RULES[f"sub.{_overload}"] = Rule(_sum("-", "self", "other"), narrow=True)
    _RULES[f"rsub.{_overload}"] = Rule(_sum("-", "other", "self"), narrow=True)
    _RULES[f"mul.{_overload}"] = Rule("{self} * {other}")
    _RULES[f"div.{_overload}"] = Rule("{self} / {other}", floating=True)

SUPPORTED: frozenset[str] = frozenset(f"aten.{name}" for name in _RULES)
"""The targets that can be in a group."""

_LOGIC = ("bitwise", "logical", "where", "masked_fill", "zeros_like", "ones_like", "full_like", "fill")


def supports(target: str, args: Sequence[object], dtypes: Sequence[torch.dtype]) -> bool:
    """Whether a call can be part of a compiled group.

    Args:
        target: the overload, as 'aten.mul.Tensor'.
        args: its positional arguments, as in `Node.args`.
        dtypes: of the tensors among the arguments, and of the result where it is known.
    """
    if target not in SUPPORTED or any(dtype not in FORMATS for dtype in dtypes):
        return False
    rule, name = _RULES[target.removeprefix("aten.")], target.removeprefix("aten.").split(".")[0]
    if any(isinstance(a, (list, tuple, complex)) for a in args):
        return False
    floating = any(dtype.is_floating_point for dtype in dtypes)
    if rule.floating and not floating:
        return False
    if name.startswith("bitwise"):
        return not floating
    arithmetic = rule.types == "same" and not name.startswith(_LOGIC) and rule is not _MOVED
    return not (arithmetic and dtypes and all(dtype == torch.bool for dtype in dtypes))


@cache
def _parameters(target: str) -> tuple[tuple[str, Argument], ...]:
    """Names and default values of a target's parameters."""
    schema = find(target)._schema
    return tuple((a.name, a.default_value if a.has_default_value() else None) for a in schema.arguments)


def find(target: str) -> torch_compat.OpOverload:
    """The ATen overload of a target."""
    packet, overload = target.removeprefix("aten.").rsplit(".", 1)
    return getattr(getattr(torch.ops.aten, packet), overload)


def literal(value: float | int | bool, held: str) -> str:
    """A Python number as a C++ constant of type `held`."""
    if held == "bool":
        return str(bool(value)).lower()
    if held not in ("float", "double"):
        return f"({held}){int(value)}LL"
    number = float(torch.tensor(value, dtype=torch.float32 if held == "float" else torch.float64).item())
    if math.isfinite(number):
        return number.hex() + ("f" if held == "float" else "")
    text = '__builtin_nan("")' if math.isnan(number) else "__builtin_inf()"
    return f"({held})({'-' if number < 0 else ''}{text})"


def converted(value: str, source: torch.dtype, to: torch.dtype) -> str:
    """The expression of `value`, held as `source`, converted to `to` and held as that."""
    if source == to:
        return value
    if to == torch.bool:
        return f"({value} != 0)"
    narrowed = f"({FORMATS[to].held}){value}"
    return FORMATS[to].round(narrowed, any_nan=True) if source != torch.bool else narrowed


def _type(group: Group, node: Node, rule: Rule, dimensioned: list[bool]) -> torch.dtype:
    """What a node is computed in."""
    if rule.types != "promoted":
        return node.dtype
    operands = [a for a in node.args if isinstance(a, (Ref, bool, int, float))]
    samples: list[torch.Tensor | float] = [
        torch.empty((1,) if dimensioned[a.index] else (), dtype=group.dtype(a), device="meta")
        if isinstance(a, Ref)
        else a
        for a in operands
    ]
    return torch.result_type(samples[0], samples[-1])


def write(group: Group, node: Node, names: list[str], dimensioned: list[bool]) -> str:
    """The C++ expression of a node, in the type its result is held in.

    `names` and `dimensioned` tell, per value of the group, its C++ name and whether it has axes.
    """
    rule = _RULES[node.target.removeprefix("aten.")]
    kind = _type(group, node, rule, dimensioned)
    held = FORMATS[kind].held
    arguments = dict(_parameters(node.target))
    arguments.update(zip(arguments, node.args, strict=False))
    arguments.update(node.kwargs)
    wide = False
    expressions = {"T": held, "not": "!" if kind == torch.bool else "~"}
    for name, value in arguments.items():
        if isinstance(value, Ref):
            source, text = group.dtype(value), names[value.index]
            scalar = not rule.narrow and not dimensioned[value.index] and kind == torch.bfloat16
            wide |= scalar and source != kind
            to = torch.float32 if scalar else torch.bool if name in ("condition", "mask") else kind
            expressions[name] = converted(text, source, to)
        elif isinstance(value, (bool, int, float)):
            narrow = torch.tensor(value, dtype=kind).item() if rule.narrow else value
            expressions[name] = literal(narrow, held)
    call = Call(node, kind, arguments, expressions)
    text = rule.write.format_map(expressions) if isinstance(rule.write, str) else rule.write(call)
    result = FORMATS[node.dtype]
    if rule.exact:
        return f"({result.held})({text})"
    return result.round(f"({result.held})({text})", any_nan=wide)


def definitions(group: Group, names: list[str]) -> Iterator[str]:
    """The C++ statements that make the nodes of a group, whose values have these names."""
    dimensioned = group.dimensioned()
    for name, node in zip(names[len(group.operands) :], group.nodes, strict=True):
        yield f"const {FORMATS[node.dtype].held} {name} = {write(group, node, names, dimensioned)};"
