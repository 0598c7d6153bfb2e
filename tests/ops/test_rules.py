"""Every op of the coverage list in a small network, tiled against float64 plain PyTorch, and proven alone.

A network is recorded once for all that is asked of it.
"""

from __future__ import annotations

import pytest
import torch
from footprints import evaluated, prove, signature
from rule_cases import USED, difference, graph_of
from usage_cases import CASES

from fullframe.ops.builder.builder import RULES
from fullframe.ops.builder.registry import DECOMPOSITIONS
from fullframe.ops.primitives.elementwise import Pointwise
from fullframe.ops.primitives.rule import BaseRule

_SEEN: set[str] = set()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", list(CASES))
def test_tiled_equals_plain_and_footprints_hold(name: str) -> None:
    for tile in CASES[name].tiles:
        found = difference(name, tile)
        assert found.worst < 1e-9, (tile, found)
        if not CASES[name].whole:
            assert not found.whole, (tile, found.whole)
    for op, tensors in evaluated(graph_of(name)):
        if signature(op) not in _SEEN:
            _SEEN.add(signature(op))
            prove(op, tensors)


def descendants(cls: type) -> set[type]:
    return {d for c in cls.__subclasses__() for d in {c, *descendants(c)}}


ABSTRACT = {"Aligned", "Layout", "OverAxes", "Reduction"}  # bases of families, no op's own rule


@pytest.mark.rest
def test_every_rule_has_a_case() -> None:
    """By construction: each entry of RULES, and each class of rules, is that of an op proven above."""
    ops = [op for name in CASES for op in graph_of(name).ops]
    met = {op.target.split("[")[0] for op in ops}
    tiled = {name for name, rule in RULES.items() if type(rule) is not Pointwise}
    assert not tiled - met, tiled - met
    classes = {c.__name__ for c in descendants(BaseRule) if c.__module__.startswith("fullframe.")}
    assert not (left := classes - ABSTRACT - {type(op.rule).__name__ for op in ops}), left


ELSEWHERE = {  # decompositions of calls that only an accelerator records, or that functionalisation rewrites here
    "aten.native_batch_norm.default",
    "aten.cudnn_batch_norm.default",
    "aten._fused_rms_norm.default",
    "aten._fused_rms_norm_backward.default",
}


@pytest.mark.rest
def test_every_decomposition_has_a_case() -> None:
    """By construction: each recorded call with a decomposition is met in a network compared with plain PyTorch."""
    for name in CASES:
        graph_of(name)
    assert not (left := set(DECOMPOSITIONS) - USED - ELSEWHERE), sorted(left)


def test_a_rule_without_a_case_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two tests above do fail: for a new entry, a new class, a new decomposition."""
    few = {n: CASES[n] for n in list(CASES)[:3]}
    monkeypatch.setitem(globals(), "CASES", few)
    for check in (test_every_rule_has_a_case, test_every_decomposition_has_a_case):
        monkeypatch.setitem(globals(), "USED", set())
        with pytest.raises(AssertionError):
            check()
