"""How long a network's convolutions alone would take: the faster of whole map and best tile, for each.

Forward and both gradients, no halo, buffers warm, all cores; times are the best of a few.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from rivals import Case
from torch import nn

from fullframe.native import weight_gradient as gradient

Convolution = nn.Conv2d | nn.ConvTranspose2d


class Form(NamedTuple):
    """One convolution: shapes, geometry, and whether its input needs a gradient."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    more: tuple[int, ...]
    groups: int
    inner: bool


def forms_of(case: Case) -> Counter[Form]:
    """The convolutions of a network, counted, from a run without data."""
    net, _, image, _ = case
    found: Counter[Form] = Counter()

    def note(module: Convolution, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        turned = isinstance(module, nn.ConvTranspose2d)
        assert not isinstance(module.padding, str)
        found[Form(
            tuple(inputs[0].shape), tuple(module.weight.shape), tuple(module.stride), tuple(module.padding),
            tuple(module.dilation), turned, tuple(module.output_padding), module.groups, inputs[0].requires_grad,
        )] += 1  # fmt: skip

    net = net.to("meta")
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(note)
    net(image.to("meta"))
    return found


def _calls(form: Form, rows: int, half: bool) -> tuple[list[Callable[[], object]], Callable[[], object] | None]:
    """Forward and gradients on so many rows of the input; and our own weight gradient where it is used."""
    kind = torch.bfloat16 if half else torch.float32
    last = torch.channels_last
    x = torch.randn(*form.x[:2], rows, form.x[3]).to(kind).contiguous(memory_format=last)
    w = torch.randn(form.w).to(kind).contiguous(memory_format=last)
    rest = (form.stride, form.padding, form.dilation, form.transposed, form.more, form.groups)
    g = torch.randn_like(torch.convolution(x, w, None, *rest))
    back = torch.ops.aten.convolution_backward.default
    calls: list[Callable[[], object]] = [
        lambda: torch.convolution(x, w, None, *rest),
        lambda: back(g, x, w, None, *rest, [False, True, False]),
    ]
    if form.inner:
        calls.append(lambda: back(g, x, w, None, *rest, [True, False, False]))
    thin, wide = (x, g) if form.transposed else (g, x)

    def own() -> object:
        return gradient.weight_grad(thin, wide, form.w, form.stride, form.padding, form.dilation, form.groups)

    return calls, own if own() is not None else None


def _best(call: Callable[[], object], seconds: float) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best


def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes over the process's number once, when it first asks: now, not later


def seconds_of(form: Form, half: bool, cores: int, pool: ThreadPoolExecutor) -> tuple[float, float]:
    """Best time of one convolution's three calls: the library's alone, and with our weight gradient."""
    width = max(form.x[1] * form.x[3], form.w[0] * form.x[3]) * (2 if half else 4)
    heights = {max(4, min(form.x[2], size // width)) for size in (1 << 19, 3 << 20)}
    whole, own = _calls(form, form.x[2], half)
    torch.set_num_threads(cores)
    times = [_best(call, 0.05) for call in whole]
    ours = times[1]
    for rows in sorted(heights - {form.x[2]}):
        sets = [_calls(form, rows, half) for _ in range(cores)]
        share = form.x[2] / rows / cores

        def together(calls: list[Callable[[], object]], share: float = share) -> float:
            return share * max(pool.map(lambda call: _best(call, 0.05), calls))

        for k in range(len(times)):
            times[k] = min(times[k], together([calls[k] for calls, _ in sets]))
        if own is not None:
            ours = min(ours, together([made for _, made in sets if made is not None]))
    return sum(times), sum(times) - times[1] + min(times[1], ours)


def limit(case: Case, half: bool) -> tuple[float, float]:
    """Seconds for all convolutions of a step: by the library, and with our weight gradient."""
    cores = torch.get_num_threads()
    total = [0.0, 0.0]
    forms = forms_of(case)  # with gradients, so that those of the inputs are seen
    with torch.no_grad(), ThreadPoolExecutor(cores, initializer=_one_thread) as pool:
        for form, count in forms.items():
            for k, seconds in enumerate(seconds_of(form, half, cores, pool)):
                total[k] += count * seconds
    return total[0], total[1]
