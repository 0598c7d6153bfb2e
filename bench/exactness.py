"""UResNet at 3 x 320 x 512: the tiled step against plain PyTorch, for loss, gradients and running statistics.

    python bench/exactness.py [--events 3] [--steps 24] [--held]

Two states of the default network: as initialised, and trained on real events at this size. Scale is the largest
gradient in the network.

float64: how far the tiled step is from plain PyTorch, and the floors below which agreement means nothing: plain
PyTorch from itself in its other memory layout, and from itself after one rounding of every weight. PyTorch's
float64 batch norm adds up its statistics one by one; "careful" is plain PyTorch with batch norm summed in pairs.

float32 and bfloat16 (autocast): errors against careful float64, those of plain PyTorch beside them. A tensor's error
is the root mean square over its elements, counted from 1e-6 of scale. An error of a few roundings that a network
has multiplied is a random number: a pixel at the bend of a leaky ReLU that falls on the other side is worth more than
all others, and the ratio of two errors of one image is 3 or a third now and then. So every event is taken as it is
and mirrored, and the rows of all cases together compare means over the cases: root mean squares, which a single such
pixel decides, and geometric means, which what happens in most cases decides. The same is done for plain PyTorch
against itself as controls: on one thread or with careful batch norm; in bfloat16 in its other layout.

`--held` leaves chance out: in every run each leaky ReLU takes the side, and each maximum the pixel, that careful
float64 took (bends.py), and what is left is rounding alone. Then single cases can be compared, in float32; bfloat16's
errors are no smaller for it, and as scattered, so it is left out.

What it does badly: on a processor without bfloat16 instructions most of the time goes into bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from bends import Held, recorded, replaced
from record import setting, write
from torch import Tensor, nn
from uresnet import event, network

import fullframe
from cosmictagger.model import UResNet

STEPS = 24
RATE = 1e-3
EVENTS = 3
TILE = (120, 200)  # divides neither side
FLOOR = 1e-6
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}
LAST = torch.channels_last


@dataclass(frozen=True, eq=False)
class Case:
    """A state of the network, and an event."""

    name: str
    state: dict[str, Tensor]
    image: Tensor
    label: Tensor
    masks: tuple[Tensor, ...] = ()  # decisions to hold, if any

    def input(self, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Any:
        image = self.image.to(dtype, memory_format=layout)
        return (image, *(m.contiguous(memory_format=layout) for m in self.masks)) if self.masks else image


@dataclass(frozen=True)
class Result:
    """Loss, gradients and buffers after one step, all float64."""

    loss: float
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @property
    def scale(self) -> float:
        return max(float(g.abs().max()) for g in self.grads.values())


class CarefulNorm(torch.autograd.Function):
    """Batch norm in training mode over (batch, rows, columns), all sums in pairs (`torch.mean`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, *how: float) -> Tensor:
        momentum, eps = how
        m = x.mean((0, 2, 3), keepdim=True)
        v = (x - m).square_().mean((0, 2, 3), keepdim=True)
        n = x.numel() / x.shape[1]
        mean.lerp_(m.flatten(), momentum)
        var.lerp_(v.flatten() * (n / (n - 1)), momentum)
        invstd = torch.rsqrt(v + eps)
        ctx.save_for_backward(x, m, invstd, weight)
        return ((x - m) * (invstd * weight.view(1, -1, 1, 1))).add_(bias.view(1, -1, 1, 1))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, m, invstd, weight = ctx.saved_tensors
        n = x.numel() / x.shape[1]
        hat = (x - m).mul_(invstd)
        first = g.sum((0, 2, 3), keepdim=True)
        second = (g * hat).sum((0, 2, 3), keepdim=True)
        dx = (g - first / n).sub_(hat.mul_(second / n)).mul_(invstd * weight.view(1, -1, 1, 1))
        return dx, None, None, second.flatten(), first.flatten(), None, None


def careful_norm(x: Tensor, mean: Tensor, var: Tensor, *rest: Any) -> Tensor:
    weight, bias, training, momentum, eps = rest
    assert training
    return CarefulNorm.apply(x, mean, var, weight, bias, momentum, eps)  # type: ignore[no-any-return]


class Lab:
    """The network in each dtype, tiled and not; recorded and planned once. `held`: with decisions held."""

    def __init__(self, *, held: bool = False) -> None:
        net, self.criterion = network()
        self.held = held
        self.nets: dict[torch.dtype, UResNet] = {torch.float32: net, torch.float64: UResNet(net.config).double()}
        self.steps = {k: fullframe.tile(self._model(n), loss=self.criterion, tile=TILE) for k, n in self.nets.items()}

    def _model(self, net: UResNet) -> nn.Module:
        return Held(net) if self.held else net

    def decided(self, case: Case) -> Case:
        """The case, with the decisions of careful float64 where they are held."""
        masks: list[Tensor] = []
        if self.held:
            net = self.nets[torch.float64]
            net.load_state_dict(case.state)
            with recorded(masks), replaced(batch_norm=careful_norm), torch.no_grad():
                net(case.input(torch.float64))
        return replace(case, masks=tuple(masks))

    def tiled(self, case: Case, kind: str) -> Result:
        dtype = DTYPES[kind]
        return _run(case, kind, self.nets[dtype], self.steps[dtype])

    def plain(self, case: Case, kind: str, *, layout: torch.memory_format = torch.contiguous_format,
              careful: bool = False) -> Result:  # fmt: skip
        net = self.nets[DTYPES[kind]]
        if layout is LAST:  # a copy: there is no way back to the same strides
            net = copy.deepcopy(net).to(memory_format=LAST)
        model = self._model(net)
        with replaced(**{"batch_norm": careful_norm} if careful else {}):
            return _run(case, kind, net, lambda x, y: self.criterion(model(x), y), layout)


def _run(case: Case, kind: str, net: UResNet, step: Callable[[Any, Tensor], Tensor],
         layout: torch.memory_format = torch.contiguous_format) -> Result:  # fmt: skip
    net.load_state_dict(case.state)
    net.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
        loss = step(case.input(DTYPES[kind], layout), case.label)
    loss.backward()
    grads = {k: p.grad.double() for k, p in net.named_parameters() if p.grad is not None}
    return Result(
        loss.item(),
        grads,
        {k: b.to(torch.float64, copy=True) for k, b in net.named_buffers() if b.is_floating_point()},
    )


def train(lab: Lab, events: list[tuple[Tensor, Tensor]], steps: int) -> dict[str, Tensor]:
    """The state after so many steps of Adam, the events in turn."""
    net = lab.nets[torch.float32]
    step = fullframe.tile(net, loss=lab.criterion, budget="3 GB")
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    for k in range(steps):
        optimizer.zero_grad()
        loss = step(*events[k % len(events)])
        loss.backward()
        optimizer.step()
        print(f"training step {k + 1} of {steps}: loss {loss.item():.4f}", flush=True)
    return copied(net)


def copied(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def one_rounding(case: Case) -> Case:
    """The case with each weight moved by up to one rounding of float64."""
    draw = torch.Generator().manual_seed(0)
    state = {
        k: v.double() * (1 + (torch.rand(v.shape, generator=draw, dtype=torch.float64) - 0.5) * 2**-51)
        for k, v in case.state.items()
        if v.is_floating_point()
    }
    return replace(case, state=case.state | state)


def l2(a: Result, b: Result) -> float:
    apart = sum(float((a.grads[k] - g).square().sum()) for k, g in b.grads.items())
    return (apart / sum(float(g.square().sum()) for g in b.grads.values())) ** 0.5


def apart(made: Result, truth: Result) -> tuple[float, float, float]:
    """How far: loss relative to it, gradients to scale, buffers each to its largest element."""
    grads = max(float((made.grads[k] - g).abs().max()) for k, g in truth.grads.items())
    buffers = max(float((made.buffers[k] - b).abs().max() / b.abs().max()) for k, b in truth.buffers.items())
    return abs(made.loss / truth.loss - 1), grads / truth.scale, buffers


Errors = dict[str, float]


def errors(made: Result, truth: Result) -> Errors:
    """Each tensor's error: root mean square over elements, in parts of scale."""
    return {k: float((made.grads[k] - g).square().mean().sqrt()) / truth.scale for k, g in truth.grads.items()}


def ratios(made: Errors, plain: Errors) -> Errors:
    return {k: max(made[k], FLOOR) / max(plain[k], FLOOR) for k in plain}


def worst(found: Errors) -> str:
    name = max(found, key=found.__getitem__)
    return f"{found[name]:.2f} ({name.replace('main_module.', '')})"


def squares(numbers: Sequence[float]) -> float:
    """Root mean square."""
    return (sum(n * n for n in numbers) / len(numbers)) ** 0.5


MEANS = {"root mean squares": squares, "geometric means": statistics.geometric_mean}


def pooled(found: Sequence[Errors], mean: Callable[[Sequence[float]], float]) -> Errors:
    """Means over the cases, by name."""
    return {k: mean([max(e[k], FLOOR) for e in found]) for k in found[0]}


def double(lab: Lab, case: Case, *, full: bool) -> tuple[list[str], Result]:
    """Rows of the float64 table, and the careful result."""
    careful = lab.plain(case, "float64", careful=True)
    if not full:
        return [], careful
    tiled, plain = lab.tiled(case, "float64"), lab.plain(case, "float64")
    other = lab.plain(case, "float64", layout=LAST)
    moved = lab.plain(one_rounding(case), "float64", careful=True)
    rows = [
        ("tiled", "plain", tiled, plain),
        ("plain, channels last", "plain", other, plain),
        ("tiled", "careful plain", tiled, careful),
        ("careful plain, weights moved by a rounding", "careful plain", moved, careful),
    ]
    cells = [(a, b, *(f"{x:.1e}" for x in apart(made, truth))) for a, b, made, truth in rows]
    return [f"| {case.name} | {' | '.join(row)} |" for row in cells], careful


@dataclass(frozen=True)
class Outcome:
    """Errors of one case: of all gradients together, and of each tensor."""

    whole: float
    tensors: Errors


Pool = dict[str, list[tuple[Outcome, Outcome]]]  # of each way to run: its outcome and plain PyTorch's, case by case


def single(lab: Lab, case: Case, kind: str, truth: Result, pool: Pool) -> list[str]:
    """Rows of the table of errors."""
    plain = lab.plain(case, kind)
    made = {"tiled": lab.tiled(case, kind)}
    if kind == "bfloat16":
        made["plain, channels last"] = lab.plain(case, kind, layout=LAST)
    else:
        made["plain, careful norm"] = lab.plain(case, kind, careful=True)
        with one_thread():
            made["plain, one thread"] = lab.plain(case, kind)
    beside = Outcome(l2(plain, truth), errors(plain, truth))
    rows = []
    for name, result in made.items():
        found = Outcome(l2(result, truth), errors(result, truth))
        pool.setdefault(name, []).append((found, beside))
        rows.append(f"| {kind} | {case.name} | {name} | {compared(found, beside)} |")
    return rows


def compared(made: Outcome, plain: Outcome) -> str:
    """The cells of a row: both errors of the whole, their ratio, and that of the worst tensor."""
    tensors = worst(ratios(made.tensors, plain.tensors))
    return f"{made.whole:.2e} | {plain.whole:.2e} | {made.whole / plain.whole:.2f} | {tensors}"


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def pooled_rows(kind: str, state: str, pool: Pool) -> list[str]:
    rows = []
    for (name, found), (title, mean) in product(pool.items(), MEANS.items()):
        sides = [
            Outcome(mean([o.whole for o in side]), pooled([o.tensors for o in side], mean))
            for side in zip(*found, strict=True)
        ]
        rows.append(f"| {kind} | **{state}, {title} of {len(found)} cases** | {name} | {compared(*sides)} |")
    return rows


def mirrored(case: Case) -> Iterator[Case]:
    """The case itself, then with rows, columns and both the other way round."""
    for how, axes in (("", ()), (" rows", (2,)), (" columns", (3,)), (" both", (2, 3))):
        yield Case(f"{case.name}{', mirrored' * bool(axes)}{how}", case.state, case.image.flip(axes),
                   case.label.flip(axes))  # fmt: skip


def measure(lab: Lab, state: str, cases: list[Case]) -> tuple[list[str], list[str]]:
    """Rows of both tables for one state of the network."""
    exact: list[str] = []
    rounded: list[str] = []
    pools: dict[str, Pool] = {"float32": {}} if lab.held else {"float32": {}, "bfloat16": {}}
    for k, case in enumerate(lab.decided(c) for one in cases for c in mirrored(one)):
        found, truth = double(lab, case, full=k == 0)
        exact += found
        print(*found, sep="\n", flush=True)
        for kind, pool in pools.items():
            made = single(lab, case, kind, truth, pool)
            rounded += made
            print(*made, sep="\n", flush=True)
    for kind, pool in pools.items():
        rounded += pooled_rows(kind, state, pool)
    return exact, rounded


def page(heading: str, exact: list[str], rounded: list[str]) -> str:
    return "\n".join(
        (
            heading,
            "",
            "float64: apart by (loss relative, gradients in parts of the largest, running statistics relative)",
            "",
            "| network, input | | against | loss | gradients | statistics |",
            "|---|---|---|---|---|---|",
            *exact,
            "",
            "Errors against careful float64: relative L2 over all gradients, and the worst tensor beside plain "
            "PyTorch's (root mean square over its elements, counted from 1e-6 of scale); of several cases as the "
            "row says",
            "",
            "| dtype | network, input | | L2 | plain | ratio | worst tensor, times plain |",
            "|---|---|---|---|---|---|---|",
            *rounded,
            "",
            f"bench/exactness.py, {setting()}",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--events", type=int, default=EVENTS, choices=range(1, EVENTS + 1))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--held", action="store_true", help="hold the decisions of careful float64 in every run")
    given = parser.parse_args()
    lab = Lab(held=given.held)
    found = [event(2, k) for k in range(given.events)]
    events, source = [(image, label) for image, label, _ in found], found[0][2]
    rows, columns = events[0][0].shape[2:]
    heading = (
        f"UResNet, 3 x {rows} x {columns}, loss light, tile {TILE[0]} x {TILE[1]}; input: {source} shrunk by 4; "
        f"trained: {given.steps} steps of Adam on these events, learning rate {RATE}"
        f"{'; bends and maxima held as careful float64 has them' * given.held}"
    )
    untrained = copied(lab.nets[torch.float32])
    trained = train(lab, events, given.steps)
    exact: list[str] = []
    rounded: list[str] = []
    for name, state in (("trained", trained), ("untrained", untrained)):
        a, b = measure(lab, name, [Case(f"{name}, event {k}", state, *e) for k, e in enumerate(events)])
        exact, rounded = exact + a, rounded + b
        write("exactness-held" if given.held else "exactness", page(heading, exact, rounded))


if __name__ == "__main__":
    main()
