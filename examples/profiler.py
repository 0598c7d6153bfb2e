"""`torch.profiler` around tiled steps, and what `step.explain()` and `step.plan()` add to it.

    python examples/profiler.py

A tiled forward is one entry, `TiledFunction`; of a step with a loss, gradients are made in it too. What its tiles do
happens in threads of their own, mostly outside of Python and of torch's dispatcher, and is not told apart by the
profiler; `explain` says how the last call ran, and printing the plan says which stage takes what. Numbers are the
same while it looks on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import fullframe

TILED = {"budget": "1 GB", "tile": 24}  # tile= so that this small picture is cut at all; leave it out for large ones


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    image, target = torch.randn(1, 1, 64, 64), torch.randint(2, (1, 64, 64))
    step = fullframe.tile(net, loss=F.cross_entropy, **TILED)
    before = step(image, target)  # the first call records and plans; leave it out of a profile
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(2):
            with record_function("one step"):
                loss = step(image, target)
                loss.backward()
    assert torch.equal(before, loss)
    calls = {entry.key: entry.count for entry in found.key_averages()}
    assert calls["one step"] == calls["TiledFunction"] == calls["TiledFunctionBackward"] == 2
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")  # for a browser's tracing page
        found.export_chrome_trace(str(trace))
        assert "TiledFunction" in trace.read_text()
    text = step.explain()
    assert "tiles:" in text and "ops run whole: none" in text
    print(text)


if __name__ == "__main__":
    main()
