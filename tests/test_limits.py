"""The limits that keep the engine readable: lines of a file, lines and parameters of a function."""

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


@pytest.mark.parametrize("file", sorted((*ENGINE.rglob("*.cpp"), *ENGINE.rglob("*.h"))), ids=lambda f: f.name)
def test_sources_of_kernels_stay_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LINES
