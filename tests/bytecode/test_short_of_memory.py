"""An allocation that fails in the middle of a step: an error, nothing changed, and the next call works."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

resource = pytest.importorskip("resource")

STEP = """
import resource, sys
import torch, fullframe
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
loss = (lambda y, t: (y - t).square().mean()) if sys.argv[1] == "step" else None
tiled = fullframe.tile(net, tile=64, workers=int(sys.argv[2]), loss=loss)
x = torch.randn(1, 1, 512, 512)


def call():
    (tiled(x, x) if loss else tiled(x).square().mean()).backward()


def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()


for _ in range(3):
    call()
kept = [*net.parameters(), *net.buffers()]
errors = 0
for more in range(0, 24 << 20, 3 << 20):
    before = [t.clone() for t in kept], [p.grad.clone() for p in net.parameters()]
    if (more >> 20) % 2:
        tiled._fullframe["pool"].clear()
    resource.setrlimit(resource.RLIMIT_AS, (used() + more, -1))
    try:
        call()
        failed = False
    except (MemoryError, RuntimeError):
        failed = True
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    after = kept, [p.grad for p in net.parameters()]
    if failed:
        errors += 1
        assert all(torch.equal(a, b) for old, new in zip(before, after) for a, b in zip(old, new))
assert errors
call()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit on a process's memory, as Linux has it")
@pytest.mark.parametrize("kind, workers", [("step", 2), ("module", 1)])
@pytest.mark.rest
def test_a_limit_on_the_memory_of_the_process(kind, workers):
    made = subprocess.run(
        [sys.executable, "-c", STEP, kind, str(workers)], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
