"""Small integers: every sum is exact, so tiled equals untiled to the last bit where the step is linear.

Also the fast paths of resampling, which must give what the taps give.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from footprints import evaluated
from rule_cases import PLANE, graph_of
from torch import nn
from usage_cases import CASES

import fullframe
from fullframe.ir import region as box
from fullframe.ops.builder.builder import RULES
from fullframe.ops.numerics import interpolate as taps
from fullframe.ops.numerics.interpolate import Spec
from fullframe.ops.primitives import resize as resample
from fullframe.ops.primitives.elementwise import Pointwise
from fullframe.runtime import fused as fused
from fullframe.testing import combines, regions, sufficient

INEXACT = {
    "aten._softmax.default": "exponentials",
    "aten._log_softmax.default": "exponentials",
    "aten._softmax_backward_data.default": "exponentials",
    "aten._log_softmax_backward_data.default": "exponentials",
    "aten.linspace.default": "fractions",
    "tile.moments": "means are fractions",
}
"""Rules whose results are no whole numbers; the networks prove them within rounding."""
EXACT = {name for name, rule in RULES.items() if type(rule) is not Pointwise} - set(INEXACT)
CLASSES = {"Pointwise", "Table", "Along"}  # and classes of rules of functions of our own


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    build = fused.build_many
    monkeypatch.setattr(fused, "build_many", lambda groups, **_: build(groups, compile=False))


def integers(tensor: torch.Tensor, random: Random) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    return torch.randint(-4, 5, tensor.shape, generator=generator).to(tensor.dtype)


@pytest.mark.rest
def test_rules_are_exact_on_integers() -> None:
    """By construction: every rule that adds, multiplies, compares or moves whole numbers, bit for bit."""
    seen: Counter[str] = Counter()
    for name in CASES:
        wanted = {op for op in graph_of(name).ops if _kinds(op, seen)}
        if not wanted:
            continue
        for op, tensors in evaluated(graph_of(name)):
            kinds = _kinds(op, seen) if op in wanted else []
            seen.update(kinds)
            if kinds:
                random = Random(op.target)
                whole = [integers(t, random) for t in tensors]
                if op.rule.kind == "reduce":
                    assert combines(op, whole, random, tolerance=0), op
                else:
                    assert all(sufficient(op, whole, r, tolerance=0) for r in regions(op.output.shape, random)), op
    assert not (left := (EXACT | CLASSES) - set(seen)), left


def _kinds(op: Any, seen: Counter[str]) -> list[str]:
    """What an op would prove that has been proven fewer than six times; nothing where fractions come in."""
    if op.target.startswith("tile.resample") and not all(map(_whole, op.args[1])):
        return []
    kinds = [k for k in (op.target, type(op.rule).__name__) if k in EXACT | CLASSES and seen[k] < 6]
    return kinds if op.target in EXACT or op.target in MOVES else []


MOVES = {
    "aten.add.Tensor",
    "aten.mul.Tensor",
    "aten.relu.default",
    "aten.maximum.default",
    "tile.gathered",
    "tile.picked",
    "tile.put",
    "tile.sort_0",
    "tile.summed",
    "tile.looked_up",
}


def _whole(spec: Spec) -> bool:
    """Whether the weights of a resampling are sums of powers of two."""
    if spec.mode in ("nearest", "nearest-exact", "reflect", "replicate"):
        return True
    if spec.mode == "linear":
        return resample.factor(spec) == 2
    return (
        spec.mode == "average" and spec.kernel in (1, 2, 4) and spec.counted and not spec.divisor and not spec.padding
    )


class Lattice(nn.Module):
    """Convolutions, strided, transposed and dilated, relu, pooling and skips; whole-number weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1)
        self.out = nn.Conv2d(8, 2, 1)
        for p in self.parameters():
            p.data = torch.randint(-1, 2, p.shape).to(p.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.a(x))
        z = F.relu(self.wide(self.down(F.max_pool2d(y, 3, 1, 1))))
        return self.out(torch.cat([y, self.up(z)[:, :, : y.shape[2], : y.shape[3]]], 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tile", [1, 3, (4, 5), (2, 20)])
def test_step_is_exact_on_integers(dtype: torch.dtype, tile: Any) -> None:
    torch.manual_seed(1)
    net = Lattice().to(dtype)
    x, target = (torch.randint(-2, 3, (2, 2, 9, 10)).to(dtype) for _ in range(2))

    def loss(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (y * t).sum()

    loss(net(x), target).backward()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    step = fullframe.tile(net, loss=loss, tile=tile, workers=1)
    made = step(x, target)
    made.backward()
    assert torch.equal(made, loss(net(x), target))
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, net.parameters(), strict=True))  # type: ignore[arg-type]


QUICK = [
    Spec("linear", 9, 18), Spec("linear", 9, 18, scale=2.0), Spec("linear", 7, 21), Spec("nearest", 9, 18),
    Spec("nearest", 5, 20), Spec("average", 9, 4, kernel=2, stride=2), Spec("average", 12, 4, kernel=3, stride=3),
    Spec("average", 8, 4, kernel=2, stride=2, divisor=1),
]  # fmt: skip


@pytest.mark.parametrize("spec", QUICK)
@pytest.mark.parametrize("target", ["tile.resample", "tile.resample_grad"])
def test_fast_path_equals_taps(spec: Spec, target: str) -> None:
    rule: Any = RULES[target]
    source, made = (spec.source, spec.target) if target == "tile.resample" else (spec.target, spec.source)
    random = Random(str(spec))
    taken = 0
    for region in regions((1, 3, made, made), random, 20):
        op = _resampling(target, spec, source, made)
        (read,) = rule.footprint(op, region)
        window = torch.rand(1, 3, source, source, dtype=torch.float64)[box.slices(read)]
        window = window.contiguous(memory_format=torch.channels_last)
        quick = rule.quick(window, (spec, spec), region[2:]) if window.numel() else None
        if quick is not None:
            taken += 1
            assert quick.shape == box.shape_of(region)
            torch.testing.assert_close(quick, rule.by_taps(op, region, window), rtol=1e-12, atol=1e-12)
    assert taken or (target == "tile.resample_grad" and spec.source % spec.kernel)


def _resampling(target: str, spec: Spec, source: int, made: int) -> Any:
    from fullframe.ir.graph import Op, Ref, Value

    x = Value("x", (1, 3, source, source), torch.float64, 8)
    y = Value("y", (1, 3, made, made), torch.float64, 8)
    return Op(target, (x,), (Ref(0), (spec, spec)), {}, y, RULES[target], torch.clone)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest_positions_are_atens(mode: str) -> None:
    """ATen computes positions in float32; every pair of sizes up to 40 must agree."""
    for n in range(1, 41):
        x = torch.arange(n, dtype=torch.float64).view(1, 1, 1, n)
        for m in range(1, 41):
            spec = Spec(mode, n, m)
            expected = F.interpolate(x, size=(1, m), mode=mode)[0, 0, 0].long().tolist()
            assert [taps.taps_at(spec, i)[0][0] for i in range(m)] == expected, (n, m)


def test_channels_stay_innermost() -> None:
    """Windows with channels innermost are what convolutions want; no rule may lose that."""
    x = torch.rand(1, 8, 12, 10).contiguous(memory_format=torch.channels_last)
    spec = Spec("cubic", 12, 12, scale=1.5)
    made = [
        taps.apply(x, 2, taps.forward_table(spec, 2, 7, x.dtype, x.device), 5),
        resample.enlarged(x, (Spec("linear", 12, 24), Spec("linear", 10, 20)), ((0, 24), (0, 20))),
        F.pad(x, (1, 0, 0, 2)),
        torch.cat([x, x], 1),
    ]
    assert all(t is not None and t.stride(1) == 1 for t in made), [t.stride() for t in made if t is not None]
    assert len(PLANE) == 4
