"""On an NVIDIA GPU: the same plan, the same numbers as plain PyTorch there; recorded runs; maps on the host."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fuzz_plans import PLENTY, away
from fuzzing import judged
from randomnets import draw
from test_plan import Residual
from torch import nn
from torch.utils import _pytree as pytree

import fullframe
from fullframe.compiler import agreement
from fullframe.device import DEVICES
from fullframe.oracle import drawn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def case(seed=0, rows=70, columns=92):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 1, rows, columns, dtype=torch.float64, generator=generator)
    return image.cuda(), torch.randint(0, 3, (2, rows, columns), generator=generator).cuda()


def same(ours, plain, tolerance=1e-11):
    scale = max(float(p.grad.abs().max()) for p in plain.parameters())
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=tolerance * scale)
    for p, q in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def both(ours, plain, step, image, label, run=None):
    for p in (*ours.parameters(), *plain.parameters()):
        p.grad = None
    a, b = step(image, label), (run or (lambda x, y: F.cross_entropy(plain(x), y)))(image, label)
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    same(ours, plain)


@pytest.mark.parametrize("tile", [None, 16, (70, 13)])
def test_steps_give_the_numbers_of_plain_pytorch(tile):
    torch.manual_seed(0)
    ours = Residual().double().cuda()
    plain = copy.deepcopy(ours)
    step = fullframe.tile(ours, loss=F.cross_entropy, tile=tile)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (ours, plain)]
    for seed in range(4):  # from the second on a recorded run, with other images and weights
        both(ours, plain, step, *case(seed))
        for optimizer in optimizers:
            optimizer.step()


def test_a_step_is_recorded_once_and_then_replayed():
    net = Residual().cuda()
    step = fullframe.tile(net, loss=F.cross_entropy)
    image, label = case()
    losses = [step(image.float(), label).detach() for _ in range(3)]
    replay = step._fullframe["replays"]._replay
    assert replay is not None
    assert len({float(x) for x in losses[1:]}) == 1
    assert len({x.data_ptr() for x in losses}) == 3, "what a step gave must stay"
    step(image.float()[..., :60], label[..., :60])  # another size lets go of it
    assert step._fullframe["replays"]._replay is None


def test_weights_that_move_are_read_where_they_are():
    torch.manual_seed(0)
    ours = Residual().double().cuda()
    plain = copy.deepcopy(ours)
    step = fullframe.tile(ours, loss=F.cross_entropy)
    for seed in range(5):
        both(ours, plain, step, *case(seed))
        with torch.no_grad():
            for net in (ours, plain):
                for p in net.parameters():
                    p.data = p.data * 1.01  # in new memory


def test_dropout_draws_anew_at_every_step():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Dropout(0.5), nn.Conv2d(8, 3, 3)).double().cuda()
    plain = copy.deepcopy(net)
    step = fullframe.tile(net, loss=F.cross_entropy)
    image, label = case()

    def run(x, y):
        with drawn():
            return F.cross_entropy(plain(x), y)

    found = []
    for seed in range(4):
        for p in (*net.parameters(), *plain.parameters()):
            p.grad = None
        torch.manual_seed(seed)
        a = step(image, label[:, 2:-2, 2:-2])
        torch.manual_seed(seed)
        b = run(image, label[:, 2:-2, 2:-2])
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
        same(net, plain)
        found.append(float(a))
    assert len(set(found)) == 4


def test_a_module_and_its_backward():
    torch.manual_seed(0)
    ours = Residual().double().cuda()
    plain = copy.deepcopy(ours)
    tiled = fullframe.tile(ours, tile=24)
    for seed in range(3):
        both(ours, plain, lambda x, y: F.cross_entropy(tiled(x), y), *case(seed))


def test_another_stream():
    torch.manual_seed(0)
    ours = Residual().double().cuda()
    plain = copy.deepcopy(ours)
    step = fullframe.tile(ours, loss=F.cross_entropy)
    stream = torch.cuda.Stream()
    for seed in range(4):
        image, label = case(seed)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream if seed % 2 else torch.cuda.current_stream()):
            both(ours, plain, step, image, label)
        torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("half", [False, True])
def test_rounding_is_that_of_plain_pytorch(half):
    torch.manual_seed(0)
    truth = Residual(32).double().cuda()
    image, label = case(0, 128, 192)
    F.cross_entropy(truth(image), label).backward()
    exact = torch.cat([p.grad.flatten() for p in truth.parameters()])

    def error(run, net):
        for _ in range(3):
            for p in net.parameters():
                p.grad = None
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                loss = run(image.float(), label)
            loss.backward()
        return float((torch.cat([p.grad.flatten() for p in net.parameters()]).double() - exact).norm() / exact.norm())

    nets = [copy.deepcopy(truth).float() for _ in range(2)]
    step = fullframe.tile(nets[0], loss=F.cross_entropy)
    ours, plain = error(step, nets[0]), error(lambda x, y: F.cross_entropy(nets[1](x), y), nets[1])
    assert ours < 1.5 * plain, (ours, plain)


@pytest.mark.parametrize("tile", [None, 16, (70, 13)])
def test_maps_on_the_host(tile, monkeypatch):
    torch.manual_seed(0)
    ours = Residual().double().cuda()
    plain = copy.deepcopy(ours)
    step = fullframe.tile(ours, loss=F.cross_entropy, tile=tile)
    monkeypatch.setattr(agreement, "plan", away)
    assert step.plan(*case()).offloaded
    for seed in range(3):
        both(ours, plain, step, *case(seed))


@pytest.mark.parametrize("seed", range(200, 260))
def test_random_networks(seed, monkeypatch):
    case = draw(seed)
    if case is None:
        pytest.skip("no network")
    move = lambda t: t.detach().cuda().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t  # noqa: E731
    case.net.cuda()
    case.input, case.target = pytree.tree_map(move, case.input), pytree.tree_map(move, case.target)
    if isinstance(case.loss, nn.Module):
        case.loss.cuda()
    monkeypatch.setattr(DEVICES["cuda"], "windows", PLENTY)  # cut as on the processor
    record = judged(case, seed, compiled=seed % 4 == 0)
    if record.outcome == "unusable":
        pytest.skip(record.detail or "no network")
    assert record.outcome in ("right", "ill-conditioned", "PyTorch wrong"), record.detail
