"""Private names of torch come from one module, which says what is missing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fullframe
from fullframe import torch_compat

SOURCE = Path(fullframe.__file__).parent


def chain(node: ast.AST) -> str:
    """``torch.a.b`` of an attribute, where it begins at a plain name."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def private(path: str) -> bool:
    parts = path.split(".")
    return parts[0] == "torch" and any(p.startswith("_") and not p.endswith("__") for p in parts)


def found_in(source: str) -> list[str]:
    """The private names of torch that a source uses, with the modules of torch that it has by other names."""
    tree = ast.parse(source)
    aliases = {"torch": "torch"}
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names += [f"{node.module}.{alias.name}" for alias in node.names]
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
            aliases |= {a.asname: a.name for a in node.names if a.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (path := chain(node)):
            first, _, rest = path.partition(".")
            names.append(f"{aliases[first]}.{rest}" if first in aliases else path)
    return sorted({name for name in names if private(name)})


def test_no_other_module_uses_a_private_name():
    files = [p for p in SOURCE.rglob("*.py") if p.name != "torch_compat.py"]
    used = {str(p.relative_to(SOURCE)): found_in(p.read_text()) for p in files}
    assert {path: names for path, names in used.items() if names} == {}


def test_the_search_finds_what_it_is_for():
    text = "import torch\nfrom torch.utils import _pytree as p\nfrom torch.autograd import forward_ad as f\n"
    text += "torch._C._get_x()\nf._level\nimport torch._dynamo\ntorch.nn.Linear\n"
    assert found_in(text) == [
        "torch._C",
        "torch._C._get_x",
        "torch._dynamo",
        "torch.autograd.forward_ad._level",
        "torch.utils._pytree",
    ]


def test_this_torch_has_all_names():
    assert torch_compat.missing() == ()


def run(setup: str, then: str) -> subprocess.CompletedProcess[str]:
    path = f"import sys; sys.path[:0] = {sys.path!r}\n"
    return subprocess.run([sys.executable, "-c", path + setup + then], capture_output=True, text=True, check=False)


def test_a_name_that_recording_needs_is_missed_when_the_package_is_imported():
    done = run("import torch\ndel torch._functionalize_has_data_mutation\n", "import fullframe\n")
    error = done.stderr.strip().splitlines()[-1]
    assert (
        error.startswith("ImportError") and "_functionalize_has_data_mutation" in error and torch.__version__ in error
    )


SUBSTITUTED = """
import torch
for name in ("_get_nnpack_enabled", "_get_fp32_precision_getter", "_set_cudnn_enabled", "_cuda_getCurrentRawStream"):
    if hasattr(torch._C, name):
        delattr(torch._C, name)

class Without:
    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        raise AssertionError(name)

torch.ops.mkldnn = Without()
"""
STEP = """
import fullframe
from fullframe import torch_compat
assert len(torch_compat.missing()) >= 5, torch_compat.missing()
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
image = torch.randn(1, 1, 24, 20)
expected = net(image).square().mean()
expected.backward()
wanted = [p.grad.clone() for p in net.parameters()]
net.zero_grad()
step = fullframe.tile(net, loss=lambda x, y: (x - y).square().mean(), budget="1 GB")
loss = step(image, torch.zeros(1, 2, 22, 18))
loss.backward()
torch.testing.assert_close(loss, expected)
for p, g in zip(net.parameters(), wanted):
    torch.testing.assert_close(p.grad, g)
print("same")
"""


@pytest.mark.rest
def test_other_names_have_substitutes_that_give_the_same_numbers():
    done = run(SUBSTITUTED, STEP)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("on", [True, False])
def test_cudnn_is_as_it_was(on):
    before = torch_compat.cudnn_enabled(on)
    assert torch_compat.cudnn_enabled(before) == on
    assert torch.backends.cudnn.enabled == before
