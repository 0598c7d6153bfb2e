"""Random changes between the steps of one tiled network: each takes effect, or is refused by name.

The twin, a copy that runs plainly, is changed in the same way by the same choices.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import random_losses as losses
import torch
from random_draws import Draws, nd
from random_norms import activation
from random_shapes import Topologies
from torch import nn
from torch.utils import _pytree as pytree

import fullframe
from fullframe.oracle import drawn

STEPS = 5
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.3}


@dataclass
class Found:
    """What became of a network whose ``changes`` were made between steps; the last of them in ``detail``."""

    seed: int
    outcome: str = "right"
    detail: str = ""
    changes: int = 0
    refused: int = 0


class Weighted(nn.Module):
    """A criterion with things to change: a weight, a number, a list of terms, a training flag."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 0.5]))
        self.smoothing, self.terms, self.options = 0.0, [nn.functional.cross_entropy], {"gain": 1.0}

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        w = self.weight.to(y.dtype)
        made = sum(term(y, t, weight=w, label_smoothing=self.smoothing) for term in self.terms)
        return made * self.options["gain"] * (2 if self.training else 1)


@dataclass
class Side:
    """One of the twins, and the surroundings of its next step (made by ``around``)."""

    net: nn.Module
    loss: Any
    around: Callable[[], Any] = nullcontext


Change = Callable[[Draws, Side], None]


def modules(side: Side, *kinds: type) -> list[nn.Module]:
    return [m for m in side.net.modules() if isinstance(m, kinds or nn.Module)]


def convs(side: Side) -> list[Any]:
    return modules(side, nn.modules.conv._ConvNd)


def training(p: Draws, s: Side) -> None:
    m = p.pick(modules(s))
    m.train(not m.training)


def whole_training(p: Draws, s: Side) -> None:
    s.net.train(not s.net.training)
    if isinstance(s.loss, nn.Module):
        s.loss.train(p.chance(50))


def attribute(p: Draws, s: Side) -> None:
    """A number or flag of a layer."""
    m = p.pick(modules(s))
    names = [
        k
        for k in ("eps", "momentum", "negative_slope", "alpha", "beta", "p", "threshold", "size")
        if isinstance(getattr(m, k, None), float)
    ]
    if names:
        name = p.pick(names)
        setattr(m, name, getattr(m, name) * 0.5 + 0.1)
    elif isinstance(m, nn.modules.conv._ConvNd) and p.chance(50):
        m.padding_mode = "zeros"


def join(p: Draws, s: Side) -> None:
    """How a block of the network joins its input."""
    blocks = [m for m in s.net.modules() if getattr(m, "join", None) in ("none", "sum", "gate")]
    if blocks:
        p.pick(blocks).join = p.pick(["none", "sum", "gate"])


def forward_hook(p: Draws, s: Side) -> None:
    p.pick(convs(s)).register_forward_hook(lambda m, i, o: o * 1.5)


def pre_hook(p: Draws, s: Side) -> None:
    p.pick(convs(s)).register_forward_pre_hook(lambda m, i: (i[0] + 0.5, *i[1:]))


def backward_hook(p: Draws, s: Side) -> None:
    p.pick(convs(s)).register_full_backward_hook(lambda m, gi, go: tuple(g if g is None else g * 2 for g in gi))


def gradient_hook(p: Draws, s: Side) -> None:
    """A hook of a parameter itself, which scales its gradient."""
    found = [q for q in s.net.parameters() if q.requires_grad]
    if found:
        p.pick(found).register_hook(lambda g: g * 3)


def remove_hooks(p: Draws, s: Side) -> None:
    for m in s.net.modules():
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
        m._backward_hooks.clear()


def frozen(p: Draws, s: Side) -> None:
    q = p.pick(list(s.net.parameters()))
    if q.is_leaf:
        q.requires_grad_(not q.requires_grad)


def replaced_parameter(p: Draws, s: Side) -> None:
    m = p.pick(convs(s))
    if "weight" in m._parameters and m.weight is not None:
        m.weight = nn.Parameter(m.weight.detach() * 0.5 + 0.01)


def parameter_data(p: Draws, s: Side) -> None:
    q = p.pick(list(s.net.parameters()))
    q.data = q.data * 0.7


def bias_taken_away(p: Draws, s: Side) -> None:
    p.pick(convs(s)).bias = None


def loaded(p: Draws, s: Side) -> None:
    s.net.load_state_dict({k: v * 0.9 if v.is_floating_point() else v for k, v in s.net.state_dict().items()})


def assigned(p: Draws, s: Side) -> None:
    state = {k: v * 0.9 if v.is_floating_point() else v.clone() for k, v in s.net.state_dict().items()}
    s.net.load_state_dict(state, assign=True)


def buffer(p: Draws, s: Side) -> None:
    """A buffer in place, replaced, or of another shape (an extra axis of one)."""
    found = [
        (m, k) for m in s.net.modules() for k, b in m._buffers.items() if b is not None and b.is_floating_point()
    ]
    if found:
        m, k = p.pick(found)
        how = p.pick(["in place", "replaced"])
        if how == "in place":
            m._buffers[k].mul_(1.3)
        else:
            setattr(m, k, getattr(m, k) * 0.5 + 0.2)


def extra_buffer(p: Draws, s: Side) -> None:
    """A buffer read by a hook; its shape changes each time."""
    m = p.pick(convs(s))
    rank = s.net.rank
    count = 1 if getattr(m, "extra", None) is None or m.extra.shape[1] > 1 else m.out_channels
    m.register_buffer("extra", torch.full((1, count, *[1] * rank), 1.25, dtype=torch.float64))
    m.register_forward_hook(lambda m, i, o: o * m.extra.to(o.dtype) if m.extra.shape[1] in (1, o.shape[1]) else o)


def replaced_module(p: Draws, s: Side) -> None:
    found = [(m, k) for m in s.net.modules() if isinstance(m, nn.Sequential) for k, c in m.named_children()
             if type(c).__module__.endswith("activation")]  # fmt: skip
    if found:
        m, k = p.pick(found)
        setattr(m, k, p.pick([nn.Tanh, nn.SiLU, nn.GELU, nn.Softplus])())


def forward_method(p: Draws, s: Side) -> None:
    m = p.pick(convs(s))
    kind = type(m)
    m.forward = lambda x, *rest: kind.forward(m, x, *rest).tanh()


def precision(p: Draws, s: Side) -> None:
    s.net.to(p.pick([torch.float32, torch.float64]))


def memory_format(p: Draws, s: Side) -> None:
    rank = s.net.rank
    if rank > 1:
        s.net.to(memory_format=torch.channels_last if rank == 2 else torch.channels_last_3d)


def autocast(p: Draws, s: Side) -> None:
    s.around = lambda: torch.autocast("cpu", dtype=torch.bfloat16)


def no_grad(p: Draws, s: Side) -> None:
    s.around = p.pick([torch.no_grad, torch.inference_mode])


def criterion(p: Draws, s: Side) -> None:
    if not isinstance(s.loss, Weighted):
        return
    how = p.pick(["smoothing", "weight", "replaced", "terms", "gain"])
    if how == "smoothing":
        s.loss.smoothing = 0.2
    elif how == "weight":
        s.loss.weight.mul_(torch.tensor([2.0, 1.0, 1.0]))
    elif how == "replaced":
        s.loss.weight = torch.tensor([3.0, 1.0, 0.2])
    elif how == "terms":
        s.loss.terms.append(lambda y, t, **_: y.square().mean())
    else:
        s.loss.options["gain"] = 0.5


def nothing(p: Draws, s: Side) -> None:
    """Only the weights move, as an optimiser moves them."""
    with torch.no_grad():
        for q in s.net.parameters():
            q.mul_(0.95)


CHANGES: list[Change] = [
    nothing, training, whole_training, attribute, join, forward_hook, pre_hook, backward_hook, gradient_hook, remove_hooks,
    frozen, replaced_parameter, parameter_data, bias_taken_away, loaded, assigned, buffer, extra_buffer, replaced_module,
    forward_method, precision, memory_format, autocast, no_grad, criterion,
]  # fmt: skip


# A network and its steps ---------------------------------------------------------------------------


class Net(nn.Module):
    """A body and a head; ``rank`` spatial axes."""

    def __init__(self, stem: nn.Module, body: nn.Module, head: nn.Module, rank: int):
        super().__init__()
        self.stem, self.body, self.head, self.rank = stem, body, head, rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)))


def made(seed: int) -> tuple[Draws, Side, Side]:
    """A small network, twice, with or without a criterion."""
    t = Topologies(random.Random(seed))
    p, d = t.p, t.d

    def net() -> nn.Module:
        torch.manual_seed(seed)
        stem = nn.Sequential(nd("Conv", d)(1, 2, 3, padding=1), nd("BatchNorm", d)(2), activation(p, d, 2))
        return Net(stem, t.block(2, 2), nd("Conv", d)(2, 3, 1), d).double()

    first = net()
    second = copy.deepcopy(first)
    loss = Weighted() if p.chance(60) else None
    return p, Side(first, loss), Side(second, copy.deepcopy(loss))


def stale(seed: int) -> Found:
    """Several steps with a change before each but the first; stops where both sides refuse or differ."""
    torch.set_num_threads(1)
    found = Found(seed)
    try:
        p, plain, twin = made(seed)
        _image(Draws(random.Random(0)), plain, seed)
        tiled = fullframe.tile(twin.net, loss=twin.loss, tile=p.pick([4, 5, 7]), workers=1)
    except (RuntimeError, ValueError):
        return found
    for step in range(STEPS):
        change = p.pick(CHANGES) if step else nothing
        choices = p.whole(0, 1 << 30)
        plain.around = twin.around = nullcontext
        found.detail += f" {change.__name__}"
        for side in (plain, twin):
            change(Draws(random.Random(choices)), side)
        ended = _compared(found, plain, twin, tiled, choices)
        if ended:
            return found
        found.changes += 1
    return found


def _image(p: Draws, side: Side, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    d: int = side.net.rank  # type: ignore[assignment]
    size = [p.whole(8, 11) for _ in range(d)]
    generator = torch.Generator().manual_seed(seed)
    dtype = next(side.net.parameters()).dtype
    x = torch.randn(p.pick([2, 1, 3]), 1, *size, generator=generator, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        shape = copy.deepcopy(side.net)(x).shape if not any(m._forward_hooks for m in side.net.modules()) else x.shape
    return x, losses.labels((shape[0], *shape[2:]), generator, False)


def _compared(found: Found, plain: Side, twin: Side, tiled: Any, seed: int) -> bool:
    """Whether the comparison ends the sequence: by an error on both sides, a refusal, or a difference."""
    p = Draws(random.Random(seed))
    d: int = plain.net.rank  # type: ignore[assignment]
    size, n = [p.whole(8, 11) for _ in range(d)], p.pick([2, 1, 3])
    dtype = next(plain.net.parameters()).dtype
    x = torch.randn(n, 1, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    x.requires_grad_(p.chance(50))

    def run(side: Side, call: Callable[..., Any], oracle: bool) -> dict[str, Any]:
        image = x.detach().requires_grad_(x.requires_grad)
        torch.manual_seed(seed)
        for q in side.net.parameters():
            q.grad = None
        with ExitStack() as stack:
            stack.enter_context(side.around())
            if oracle:
                stack.enter_context(drawn())
            y = call(image)
        leaf = next(t for t in pytree.tree_leaves(y) if isinstance(t, torch.Tensor))
        if leaf.requires_grad:
            (leaf if leaf.dim() == 0 else (leaf.double() * torch.linspace(-1, 2, leaf.shape[-1])).mean()).backward()
        return {
            "output": leaf.detach(),
            **_grads(side, image),
            **{f"buffer {k}": b.clone() for k, b in side.net.named_buffers()},
        }

    try:
        with torch.no_grad():
            shape = copy.deepcopy(plain.net)(x.detach()).shape
        t = losses.labels((shape[0], *shape[2:]), torch.Generator().manual_seed(seed), False)
        expected = run(
            plain, (lambda i: plain.net(i)) if plain.loss is None else lambda i: plain.loss(plain.net(i), t), True
        )
    except (RuntimeError, ValueError, TypeError):
        return True  # not a network any more
    try:
        made = run(twin, tiled if twin.loss is None else lambda i: tiled(i, t), False)
    except fullframe.FullframeError as error:
        found.refused += 1
        found.detail += f": refused, {str(error)[:100]}"
        return True
    except Exception as error:
        found.outcome, found.detail = "wrong", f"{found.detail}: {type(error).__name__}: {str(error)[:200]}"
        return True
    worst = max(_gaps(expected, made), default=(0.0, ""))
    with plain.around():  # a criterion may give float32 of what autocast made in bfloat16
        low = [torch.get_autocast_dtype("cpu")] * torch.is_autocast_enabled("cpu")
    dtypes = [x.dtype, expected["output"].dtype, *low]
    tolerance = max(TOLERANCE.get(d, 0.0) for d in dtypes) if worst[0] < float("inf") else 0.0
    if not worst[0] <= tolerance:
        found.outcome, found.detail = "wrong", f"{found.detail}: {worst}"
        return True
    return False


def _grads(side: Side, image: torch.Tensor) -> dict[str, Any]:
    grads = {f"gradient {k}": q.grad for k, q in side.net.named_parameters()}
    return grads | {"gradient of the image": image.grad}


def _gaps(expected: dict[str, Any], found: dict[str, Any]) -> Iterator[tuple[float, str]]:
    if expected.keys() != found.keys():
        yield float("inf"), "names differ"
        return
    scale = max(
        (float(t.abs().max()) for k, t in expected.items() if t is not None and k.startswith("grad")), default=0.0
    )
    for name, a in expected.items():
        b = found[name]
        if a is None or b is None:
            yield (0.0 if a is b else float("inf")), f"{name}: None on one side"
        elif (a.shape, a.dtype) != (b.shape, b.dtype):
            yield float("inf"), f"{name}: {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}"
        else:
            gap = float((a.double() - b.double()).abs().max())
            own = scale if name.startswith("grad") else float(a.abs().max())
            yield (gap / own if own > 1e-9 else gap), name
