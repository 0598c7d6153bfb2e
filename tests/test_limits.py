"""The limits that keep the engine readable: lines of a file, lines and parameters of a function, and where `Any` stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[1] / "src" / "fullframe"
LINES, FUNCTION, PARAMETERS = 500, 60, 6
# A decomposition has the arguments of its ATen op.
OF_ATEN = ENGINE / "ops" / "decompositions"
# Functions with more: the check of a user's network, the geometry of a convolution, and the door of the engine.
MORE = {"check.check": 1, "native.weight_gradient.weight_grad": 1, "tiled.tile": 3}
# Folders and modules that may say `Any`, each with what it meets there that has no type.
ANY = {
    "autograd": "the contexts of torch's autograd functions, and what a caller's module returns",
    "bytecode.calls": "calls as torch's dispatcher hands them on",
    "bytecode.recorder": "calls as torch's dispatcher hands them on",
    "capture": "calls as torch's modes hand them on, and objects of the caller's modules",
    "check": "inputs, targets and outputs of the caller's",
    "compiler.pipeline": "calls as torch's dispatcher hands them on",
    "frontend": "objects of the caller's: what a call reads, keeps and returns",
    "ir.graph": "arguments of ATen's calls",
    "ops.builder": "arguments of ATen's calls",
    "ops.decompose": "arguments of ATen's calls",
    "ops.decompositions": "arguments of ATen's calls",
    "ops.numerics.convolve": "arguments of ATen's calls",
    "oracle": "calls as torch's dispatcher hands them on",
    "storage.external": "sources and sinks of the caller's",
    "storage.mapped_file": "sources and sinks of the caller's",
    "tiled": "arguments, attributes and outputs of the caller's",
    "torch_compat": "torch's private names, which have no types",
}

FILES = sorted(ENGINE.rglob("*.py"))


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    a = function.args
    given = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len(given) - (given[:1] in (["self"], ["cls"], ["ctx"]))


def test_files_and_functions_stay_short() -> None:
    for file in FILES:
        text = file.read_text()
        assert len(text.splitlines()) <= LINES, file
        module = ".".join(file.relative_to(ENGINE).with_suffix("").parts)
        for function in _functions(ast.parse(text)):
            name = f"{module}.{function.name}"
            assert (function.end_lineno or 0) - function.lineno < FUNCTION, name
            if file.parent != OF_ATEN:
                assert _parameters(function) <= PARAMETERS + MORE.get(name, 0), name


def _says_any(tree: ast.AST) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def test_any_stands_only_where_torch_or_the_caller_is_met() -> None:
    met = set()
    for file in (f for f in FILES if _says_any(ast.parse(f.read_text()))):
        module = ".".join(file.relative_to(ENGINE).with_suffix("").parts)
        found = [place for place in ANY if f"{module}.".startswith(f"{place}.")]
        assert found, f"{module} says Any: give it a type, or a place in ANY with the reason"
        met.update(found)
    assert met == ANY.keys(), f"no longer needed: {ANY.keys() - met}"


@pytest.mark.parametrize("file", sorted((*ENGINE.rglob("*.cpp"), *ENGINE.rglob("*.h"))), ids=lambda f: f.name)
def test_sources_of_kernels_stay_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LINES
