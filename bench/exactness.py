"""UResNet at 3 x 320 x 512: the tiled step against plain PyTorch, both against float64.

    python bench/exactness.py

Scale is the largest gradient in the network; the relative L2 error is over all gradients together. Two inputs:
a dense image (standard normal), and an event, almost all zeros, on which the untrained network multiplies
rounding errors by a million. There plain PyTorch's own float64 batch norm, which adds up its statistics
naively, is what differs: the table also compares with plain PyTorch where batch norm is written with
`torch.mean`, and plain PyTorch with itself in the two memory layouts.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from record import setting, write
from torch import Tensor, nn
from uresnet import event, network

import fullframe

Result = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


def step_of(net: nn.Module, criterion: nn.Module, image: Tensor, label: Tensor, *, tiled: bool, half: bool) -> Result:
    """Loss, gradients and buffers after one step of a copy of the network."""
    net = copy.deepcopy(net).to(image.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        run = fullframe.tile(net, loss=criterion, tile=48) if tiled else lambda x, y: criterion(net(x), y)
        loss = run(image, label)
    loss.backward()
    grads = {k: p.grad.double() for k, p in net.named_parameters() if p.grad is not None}
    return loss.detach().double(), grads, {k: b.detach().double() for k, b in net.named_buffers()}


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[k] - b[k]).abs().max()) for k in b)


def l2(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    apart = sum(float((a[k] - b[k]).square().sum()) for k in b)
    return (apart / sum(float(t.square().sum()) for t in b.values())) ** 0.5


def worst_ratio(tiled: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """Largest ratio of a tensor's error to plain PyTorch's, errors counted from 1e-6 of the scale."""
    floor = 1e-6 * max(float(t.abs().max()) for t in truth.values())
    ratios = {
        k: max(float((tiled[k] - t).abs().max()), floor) / max(float((plain[k] - t).abs().max()), floor)
        for k, t in truth.items()
    }
    name = max(ratios, key=ratios.__getitem__)
    return ratios[name], name


def careful_batch_norm(x: Tensor, mean: Tensor, var: Tensor, *rest: object) -> Tensor:
    """Batch norm in training mode in torch's own words, with statistics summed in pairs."""
    weight, bias, _, momentum, eps = rest
    m = x.mean((0, 2, 3), keepdim=True)
    v = (x - m).square().mean((0, 2, 3), keepdim=True)
    n = x.numel() / x.shape[1]
    with torch.no_grad():
        mean.lerp_(m.flatten(), momentum)
        var.lerp_(v.flatten() * (n / (n - 1)), momentum)
    return (x - m) * torch.rsqrt(v + eps) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def apart(name: str, made: Result, truth: Result) -> str:
    scale = max(float(g.abs().max()) for g in truth[1].values())
    buffers = max(float((made[2][k] - b).abs().max() / b.abs().max().clamp(min=1e-300)) for k, b in truth[2].items())
    return (
        f"- float64, {name}: loss apart by {abs(float(made[0] - truth[0])):.1e}, gradients by "
        f"{largest(made[1], truth[1]) / scale:.1e} of scale, buffers by {buffers:.1e} of their own"
    )


def double(net: nn.Module, criterion: nn.Module, image: Tensor, label: Tensor) -> tuple[list[str], Result]:
    """The float64 comparisons, and the truth."""
    x = image.double()
    plain = step_of(net, criterion, x, label, tiled=False, half=False)
    tiled = step_of(net, criterion, x, label, tiled=True, half=False)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    other = step_of(last, criterion, x.to(memory_format=torch.channels_last), label, tiled=False, half=False)
    usual, F.batch_norm = F.batch_norm, careful_batch_norm
    try:
        careful = step_of(net, criterion, x, label, tiled=False, half=False)
    finally:
        F.batch_norm = usual
    lines = [
        apart("tiled against plain", tiled, plain),
        apart("plain channels_last against plain", other, plain),
        apart("tiled against plain with careful batch norm", tiled, careful),
    ]
    return lines, careful


def single(net: nn.Module, criterion: nn.Module, image: Tensor, label: Tensor, truth: Result) -> list[str]:
    """Errors in float32 and bfloat16 beside plain PyTorch's."""
    lines = []
    for kind in ("float32", "bfloat16"):
        half = kind == "bfloat16"
        plain = step_of(net, criterion, image, label, tiled=False, half=half)
        tiled = step_of(net, criterion, image, label, tiled=True, half=half)
        ratio, name = worst_ratio(tiled[1], plain[1], truth[1])
        a, b = l2(tiled[1], truth[1]), l2(plain[1], truth[1])
        lines.append(
            f"- {kind}: relative L2 error of all gradients {a:.2e}, plain PyTorch {b:.2e}, ratio {a / b:.2f}; "
            f"worst tensor {ratio:.2f} times plain ({name.replace('main_module.', '')}); "
            f"loss apart by {float((tiled[0] - truth[0]).abs()):.1e}, plain {float((plain[0] - truth[0]).abs()):.1e}"
        )
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    net, criterion = network()
    image, label, source = event(2)
    lines = [f"UResNet, 3 x {image.shape[2]} x {image.shape[3]}, tile 48 x 48"]
    for name, x in (("dense", torch.randn_like(image)), (f"{source} shrunk by 4", image)):
        found, truth = double(net, criterion, x, label)
        lines += ["", f"Input: {name}", "", *found, *single(net, criterion, x, label, truth)]
        print("\n".join(lines), flush=True)
    write("exactness", "\n".join(lines) + f"\n\nbench/exactness.py, {setting()}")


if __name__ == "__main__":
    main()
