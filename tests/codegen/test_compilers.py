"""Whatever compiler a machine has makes the same kernels: groups, convolutions, and the interpreter of tiles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fullframe.codegen.toolchain import cxx

KINDS = ("g++", "clang++", "zig")
STEP = """
import sys
import torch
import fullframe
from fullframe.bytecode.libtorch import entries
from fullframe.codegen.toolchain import cxx
from fullframe.native.loader import own
found = cxx.find()
assert found.command == cxx.commands()[0] and len(cxx.commands()) == 1
assert entries() is not None
assert all(own(name, source) for name, source in
           (("convolution", ""), ("gradient", ""), ("winograd", "convolution"), ("winograd_gradient", "gradient")))

class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.GELU(),
                         torch.nn.Conv2d(8, 8, 3, stride=2, padding=1), torch.nn.SiLU(), torch.nn.AvgPool2d(2),
                         torch.nn.Conv2d(8, 3, 5, padding=2), torch.nn.Sigmoid())

torch.manual_seed(0)
net, image, target = Net(), torch.randn(1, 2, 48, 40), torch.rand(1, 3, 12, 10)
truth, worse = Net().double(), Net()
truth.load_state_dict(net.state_dict())
worse.load_state_dict(net.state_dict())
loss = torch.nn.functional.mse_loss
expected = loss(truth(image.double()), target.double())
expected.backward()
loss(worse(image), target).backward()
step = fullframe.tile(net, loss=loss, budget="1 GB", tile=16, workers=2)
for _ in range(3):  # in Python, then recorded, then replayed
    net.load_state_dict(worse.state_dict())
    net.zero_grad()
    made = step(image, target)
    made.backward()
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, plain, true in zip(net.parameters(), worse.parameters(), truth.parameters()):
        error, plain_error = ((p.grad.double() - true.grad).abs().max() for p in (ours, plain))
        assert error <= 3 * plain_error + 1e-6, (error, plain_error)
print(found.name, found.version)
"""


def only(kind: str, folder: Path) -> Path:
    """A folder to be the path, on which there is no other compiler; skips where there is none of this kind."""
    if kind == "zig":
        if find_spec("ziglang") is None:
            pytest.skip("no ziglang here; pip install fullframe[compiler]")
        return folder
    path = shutil.which(kind)
    if path is None:
        pytest.skip(f"no {kind} here")
    (folder / kind).symlink_to(path)
    for tool in ("as", "ld"):
        if (found := shutil.which(tool)) is not None:
            (folder / tool).symlink_to(found)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.rest
def test_a_step_by_each_compiler(kind, tmp_path):
    path = tmp_path / "bin"
    path.mkdir()
    # Without the extra's package, which comes last where there is another compiler.
    hide = "" if kind == "zig" else "import importlib.util as u; f = u.find_spec\n"
    hide += (
        "" if kind == "zig" else "u.find_spec = lambda name, *more: None if name == 'ziglang' else f(name, *more)\n"
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zig"
    env = os.environ | {
        "PATH": str(only(kind, path)),
        "XDG_CACHE_HOME": str(tmp_path),
        "ZIG_GLOBAL_CACHE_DIR": str(cache),
    }
    code = f"import sys; sys.path[:0] = {sys.path!r}\n{hide}{STEP}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0 and kind.removesuffix("++") in done.stdout, done.stderr


def test_the_flags_are_those_that_a_compiler_knows(monkeypatch):
    for kind in ("g++", "clang++"):
        path = shutil.which(kind)
        if path is not None:
            monkeypatch.setattr(cxx, "commands", lambda path=path: [(path,)])
            found = cxx.for_isa("native")
            assert found.name == kind and found.version
            assert ("-fpeel-loops" in found.flags) == ("__clang__" not in found.identity)
            assert not {"-ffast-math", "-ffp-contract=fast", "-Ofast"} & set(found.flags)


def test_a_compiler_that_refuses_is_named(monkeypatch):
    monkeypatch.setattr(cxx, "commands", lambda: [("/bin/false",)])
    with pytest.raises(cxx.BuildError, match=r"no C.. compiler found .*pip install fullframe.*: /bin/false"):
        cxx.for_isa("native")
