"""Numbers of small buffers and attributes that a step reads in Python: read when recorded, and again when they
change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
import fullframe.tiled

TILE = 5


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield


class Net(nn.Module):
    """A convolution, and what ``what`` makes of the net and its output."""

    def __init__(self, what: Callable[[Any, torch.Tensor], torch.Tensor], **buffers: torch.Tensor):
        super().__init__()
        self.conv, self.what = nn.Conv2d(1, 4, 3, padding=1).double(), what
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.what(self, self.conv(x))


def agrees(
    what: Callable[[Any, torch.Tensor], torch.Tensor], steps: int = 3, between: Any = None, **buffers: Any
) -> Net:
    """A few training steps, tiled and plain: outputs, gradients and buffers."""
    plain, other = (Net(what, **{k: t.clone() for k, t in buffers.items()}) for _ in range(2))
    other.load_state_dict(plain.state_dict())
    tiled = fullframe.tile(other, tile=TILE)
    for k in range(steps):
        x = torch.randn(2, 1, 8, 9, dtype=torch.float64)
        for net, run in ((plain, plain), (other, tiled)):
            if between is not None and k:
                between(net, k)
            net.zero_grad()
            net.made = run(x)  # type: ignore[assignment]
            net.made.square().sum().backward()
        found = [[n.made, *(p.grad for p in n.parameters()), *n.buffers()] for n in (plain, other)]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a)
        plain.made = other.made = None  # type: ignore[assignment]
    return other


MASK = torch.tensor([True, False, True, True])


@pytest.mark.parametrize(
    "what",
    [
        lambda net, y: y[:, net.mask], lambda net, y: y[:, ~net.mask], lambda net, y: y[:, net.mask.clone()],
        lambda net, y: y.movedim(1, 0)[net.mask].movedim(0, 1), lambda net, y: y[:, net.mask, 1:, ::2],
        lambda net, y: y[:, torch.nonzero(net.mask)[:, 0]], lambda net, y: y[:, torch.where(net.mask)[0]],
        lambda net, y: torch.masked_select(y, net.mask[:, None, None]).view(2, -1, 1, 1) * y.mean(),
        lambda net, y: y * int(net.mask.sum()), lambda net, y: y * sum(net.mask.tolist()),
        lambda net, y: y if net.mask.all() else 2 * y, lambda net, y: y if net.mask[0] and not net.mask[1] else 2 * y,
        lambda net, y: y * len(net.mask[net.mask]), lambda net, y: y * (1 in net.mask),
        lambda net, y: y * net.mask.float().mean().item(), lambda net, y: y * float(net.mask.numpy().sum()),
        lambda net, y: y if torch.equal(net.mask, net.mask.flip(0)) else 2 * y,
    ],
)  # fmt: skip
def test_a_mask_in_a_buffer(what, recordings):
    agrees(what, between=lambda net, k: net.mask.__setitem__(0, k != 2), mask=MASK)
    assert len(recordings) == 2


def test_masks_assigned_to(recordings):
    def what(net, y):
        y = y * 1.0
        y[:, net.mask] = 0.5 * y[:, net.mask]
        y[:, ~net.mask] = 0.0
        return y

    agrees(what, mask=MASK)
    assert len(recordings) == 1


def test_a_mask_in_an_attribute_and_in_a_closure(recordings):
    mask = MASK.clone()
    agrees(lambda net, y: y[:, mask], between=lambda net, k: mask.__setitem__(0, k != 2))
    assert len(recordings) == 2
    net = Net(lambda net, y: y[:, net.mask])
    net.mask = MASK
    tiled, x = fullframe.tile(net, tile=TILE), torch.randn(1, 1, 8, 9, dtype=torch.float64)
    for keep in (MASK, MASK.flip(0), MASK):
        net.mask = keep
        torch.testing.assert_close(tiled(x), net(x))
    assert len(recordings) == 4


def contrastive(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    z = F.normalize(output.mean((2, 3)), dim=1)
    z = torch.cat([z, z.flip(0)])
    n = len(z)
    similar = z @ z.T
    mask = ~torch.eye(n, dtype=torch.bool)
    positives = similar[torch.eye(n, dtype=torch.bool).roll(n // 2, 0)]
    return (similar[mask].view(n, n - 1).logsumexp(1) - positives).mean()


def test_a_contrastive_loss(recordings):
    net = nn.Conv2d(1, 4, 3).double()
    step = fullframe.tile(net, loss=contrastive, tile=TILE)
    for _ in range(3):
        x = torch.randn(3, 1, 8, 9, dtype=torch.float64)
        loss, expected = step(x, x), contrastive(net(x), x)
        torch.testing.assert_close(loss, expected)
        grads = [torch.autograd.grad(v, list(net.parameters())) for v in (loss, expected)]
        torch.testing.assert_close(*grads)
    assert len(recordings) == 1


def queue(net: Any, y: torch.Tensor) -> torch.Tensor:
    """A queue as MoCo keeps one."""
    keys = F.normalize(y.mean((2, 3)), dim=1)
    out = y * (1 + (keys @ net.queue.clone().detach()).mean())
    with torch.no_grad():
        place = int(net.place)
        net.queue[:, place : place + len(keys)] = keys.T
        net.place[0] = (place + len(keys)) % net.queue.shape[1]
    return out


def queue_by_tensors(net: Any, y: torch.Tensor) -> torch.Tensor:
    keys = y.mean((2, 3)).detach()
    net.queue[:, net.place[0] : net.place[0] + 2] = keys.T
    net.place.add_(2).remainder_(6)
    assert int(net.place) % 2 == 0
    return y * net.queue.mean()


@pytest.mark.parametrize("what", [queue, queue_by_tensors])
@pytest.mark.filterwarnings("ignore:.*place")
def test_a_queue_with_its_pointer_in_a_buffer(what, recordings):
    buffers = {"queue": torch.randn(4, 6, dtype=torch.float64), "place": torch.zeros(1, dtype=torch.long)}
    agrees(what, 7, **buffers)
    assert len(recordings) == 3  # the pointer has three values


def initialised(net: Any, y: torch.Tensor) -> torch.Tensor:
    """As ActNorm takes its first batch for its scale."""
    if net.flag.item() == 0:
        with torch.no_grad():
            net.shift.copy_(-y.mean((0, 2, 3), keepdim=True))
        net.flag.fill_(1)
    return y + net.shift


def assigned(net: Any, y: torch.Tensor) -> torch.Tensor:
    if not net.flag:
        net.shift = -y.detach().mean((0, 2, 3), keepdim=True)
        net.flag = torch.tensor(1, dtype=torch.uint8)
    return y + net.shift


def counted(net: Any, y: torch.Tensor) -> torch.Tensor:
    net.flag += 1
    return y * 2 if net.flag >= 2 else y


@pytest.mark.parametrize("what", [initialised, assigned, counted])
def test_a_flag(what, recordings):
    buffers = {"shift": torch.zeros(1, 4, 1, 1, dtype=torch.float64), "flag": torch.tensor(0, dtype=torch.uint8)}
    agrees(what, 3, **buffers)
    assert len(recordings) == (3 if what is counted else 2)


def test_a_pointer_in_an_attribute_assigned_anew(recordings):
    def what(net, y):
        net.place = (net.place + 1) % 3
        return y.roll(int(net.place), 3)

    net, twin = Net(what), Net(what)
    twin.load_state_dict(net.state_dict())
    net.place = twin.place = torch.tensor(0)
    tiled = fullframe.tile(twin, tile=TILE)
    for _ in range(6):
        x = torch.randn(1, 1, 8, 9, dtype=torch.float64)
        torch.testing.assert_close(tiled(x), net(x))
        assert net.place == twin.place


def test_numbers_that_the_step_itself_makes_are_refused():
    def what(net, y):
        net.total.add_(y.detach().sum())
        return y * net.total.item()

    with pytest.raises(fullframe.CaptureError, match="depends on the data"):
        fullframe.tile(Net(what, total=torch.zeros((), dtype=torch.float64)), tile=TILE)(
            torch.ones(1, 1, 8, 9).double()
        )
    with pytest.raises(fullframe.CaptureError, match="depends on the data"):
        fullframe.tile(nn.Conv2d(1, 1, 3), loss=lambda y, t: y[t > 0].mean(), tile=TILE)(
            torch.ones(1, 1, 8, 9), torch.ones(1, 1, 6, 7)
        )


def test_conditions_on_numbers_that_the_step_itself_makes_are_looked_at():
    def what(net, y):
        net.total.add_(y.detach().sum())
        return y * 2 if net.total > 0 else y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for start in (-100.0, 0.0, 100.0):
            agrees(what, 5, total=torch.tensor(start, dtype=torch.float64))


def test_where_to_split_may_be_the_numbers_of_a_buffer(recordings):
    def moved(net, k):
        net.places[0] = 1 + k

    agrees(lambda net, y: torch.cat(y.tensor_split(net.places, 3)[::2], 3), 4, moved, places=torch.tensor([2, 5]))
    assert len(recordings) == 3
    agrees(lambda net, y: y.tensor_split(net.place, 3)[1], 2, place=torch.tensor(4))


def test_a_text_may_have_the_number_of_a_buffer():
    def what(net, y):
        return y * len(f"{net.width:03d}")

    agrees(what, 2, width=torch.tensor(7))


def test_views_see_what_is_written():
    def what(net, y):
        view = net.table.view(4)
        net.table[1, 0] = 5
        y = y * view.tolist()[2]
        net.table.mul_(y.detach().mean().sign().abs().long())
        return y

    agrees(what, 2, table=torch.arange(4).view(2, 2))

    def unknown(net, y):
        view = net.table.view(4)
        net.table.mul_(y.detach().mean().long())
        return y * view.tolist()[2]

    with pytest.raises(fullframe.CaptureError, match="depends on the data"):
        agrees(unknown, table=torch.arange(4).view(2, 2))


def test_a_large_mask_is_refused_by_name():
    what = lambda net, y: y * int(net.table.sum().item() > 0)  # noqa: E731
    net = Net(what, table=torch.ones(1 << 19))
    with pytest.raises(fullframe.CaptureError, match=r"depends on the data|numbers of table"):
        fullframe.tile(net, tile=TILE)(torch.ones(1, 1, 8, 9).double())
    net = Net(lambda net, y: y[:, :, net.mask], mask=torch.ones(1 << 21, dtype=torch.bool))
    with pytest.raises(fullframe.CaptureError, match="numbers of mask"):
        fullframe.tile(net, tile=TILE)(torch.ones(1, 1, 1 << 21, 1).double())


def test_counters_that_nobody_reads_stay_out_of_the_key(recordings):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
    tiled = fullframe.tile(net, tile=TILE)
    for _ in range(3):
        tiled(torch.randn(1, 1, 8, 9))
    assert len(recordings) == 1 and net[1].num_batches_tracked == 3
