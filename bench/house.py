"""Prints how the engine's source is divided, as a Markdown table: `python bench/house.py --before REVISION ...`."""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENGINE = "src/fullframe/"
SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def checkout() -> dict[str, str]:
    """Text by path from the root, of the engine as it lies here."""
    files = [ROOT / "pyproject.toml", *(ROOT / ENGINE).rglob("*.py")]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def revision(name: str) -> dict[str, str]:
    """The same of a commit; CalledProcessError where git does not know it."""
    command = ["git", "-C", str(ROOT), "archive", name, "pyproject.toml", ENGINE]
    packed = subprocess.run(command, check=True, capture_output=True).stdout
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith((".py", ".toml")) else None
            if file is not None:
                texts[member.name] = file.read().decode()
    return texts


def statements(tree: ast.AST) -> int:
    """Statements without docstrings."""
    documented = sum(isinstance(n, SCOPES) and ast.get_docstring(n, clean=False) is not None for n in ast.walk(tree))
    return sum(isinstance(n, ast.stmt) for n in ast.walk(tree)) - documented


def room(path: str) -> str:
    """The folder of a module directly below the engine, empty for a module that stands loose."""
    parts = path.removeprefix(ENGINE).split("/")
    return parts[0] if len(parts) > 1 else ""


def imported(path: str, tree: ast.AST) -> set[str]:
    """Names directly below the engine that a module imports, inside of functions and for types too."""
    package = path.removeprefix("src/").split("/")[:-1]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{start}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("fullframe.")}


def floors(project: str) -> int:
    """Layers that import-linter keeps of the engine."""
    contracts = tomllib.loads(project).get("tool", {}).get("importlinter", {}).get("contracts", [])
    layers = [c["layers"] for c in contracts if c["type"] == "layers" and c["name"] == "floors of the engine"]
    return sum("fullframe." in layer for found in layers for layer in found)


def figures(texts: dict[str, str]) -> dict[str, int]:
    """What the table says of one state of the source."""
    trees = {path: ast.parse(text) for path, text in texts.items() if path.endswith(".py")}
    rooms = {room(path) for path in trees} - {""}
    arrows = {(room(path), to) for path, tree in trees.items() for to in imported(path, tree)}
    functions = [n for tree in trees.values() for n in ast.walk(tree) if isinstance(n, SCOPES[2:])]
    return {
        "folders": len(rooms),
        "floors kept by import-linter": floors(texts["pyproject.toml"]),
        "modules in no folder": sum(not room(path) and not path.endswith("__init__.py") for path in trees),
        "pairs of folders of which one imports the other": sum(
            a in rooms and b in rooms and a != b for a, b in arrows
        ),
        "lines of the longest file": max(len(texts[path].splitlines()) for path in trees),
        "lines of the longest function": max((n.end_lineno or 0) - n.lineno + 1 for n in functions),
        "statements without docstrings": sum(map(statements, trees.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", metavar="REVISION", action="append", default=[])
    before: list[str] = parser.parse_args().before
    columns = [figures(revision(name)) for name in before] + [figures(checkout())]
    print("| |", " | ".join([*(f"`{name}`" for name in before), "now"]), "|")
    print("|---|" + "--:|" * len(columns))
    for row in columns[0]:
        print("|", row, "|", " | ".join(f"{column[row]:,}" for column in columns), "|")


if __name__ == "__main__":
    main()
