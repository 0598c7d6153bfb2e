"""Whatever a step reads and is changed between two calls takes effect; what cannot be recorded is refused by name."""

from __future__ import annotations

import functools
import os
import random
from collections import OrderedDict
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from networks import batch, close, plain_net
from torch import nn

import fullframe
from fullframe.frontend.guards import GuardSnapshot
from fullframe.frontend.inputs import Call, Pair

GLOBAL = 1.0
TABLE = {"gain": 1.0}
WEIGHT = torch.ones(1)
TILE = 7


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def double(x):
    return 2 * x


def triple(x):
    return 3 * x


def reads_global(x):
    return x * GLOBAL


class Net(nn.Module):
    """Reads of everything that could change between two steps."""

    level = 1.0

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.drop_skip = False
        self.factors = [1.0, 2.0]
        self.options = {"gain": 1.0, "inner": SimpleNamespace(power=1)}
        self.function = double
        self.partial = functools.partial(torch.mul, other=1.0)
        self.config = SimpleNamespace(deep=SimpleNamespace(offset=0.0))
        self.scale = torch.ones(1)
        self.scales = (torch.ones(1), [torch.ones(2, 1, 1)])
        self.array = numpy.ones(1, dtype=numpy.float32)
        shared = {"bias": 0.0}
        weight = torch.ones(1)
        self.closed = shared
        self.closed_weight = weight
        self.closure = lambda x: x * weight + shared["bias"]

    def forward(self, x):
        y = self.norm(self.conv(x))
        if not self.drop_skip:
            y = y + x
        y = self.function(y) * self.factors[1] * self.options["gain"] ** self.options["inner"].power
        y = self.partial(y) + self.config.deep.offset + self.level
        y = self.closure(y * self.scale * self.scales[0] + self.scales[1][0]) * torch.from_numpy(self.array)
        return reads_global(y) * TABLE["gain"] * WEIGHT


def nothing(net):
    pass


def set_global(net):
    globals()["GLOBAL"] = 1.5


def set_class(net):
    type(net).level = 2.0


def bigger(net):
    net.scale = torch.tensor([1.0, 2.0])[:, None, None]


CHANGES = {
    "flag": lambda n: setattr(n, "drop_skip", True),
    "training": lambda n: n.norm.eval(),
    "list": lambda n: n.factors.__setitem__(1, 3.0),
    "dict": lambda n: n.options.update(gain=2.0),
    "object in dict": lambda n: setattr(n.options["inner"], "power", 3) or n.options.update(gain=2.0),
    "nested object": lambda n: setattr(n.config.deep, "offset", 1.0),
    "function": lambda n: setattr(n, "function", triple),
    "lambda": lambda n: setattr(n, "function", lambda x: x * 5),
    "partial": lambda n: setattr(n, "partial", functools.partial(torch.mul, other=4.0)),
    "partial's keywords": lambda n: n.partial.keywords.update(other=4.0),
    "class attribute": set_class,
    "global": set_global,
    "global dict": lambda n: TABLE.update(gain=3.0),
    "global tensor": lambda n: WEIGHT.fill_(2.0),
    "replaced tensor": lambda n: setattr(n, "scale", torch.full((1,), 3.0)),
    "tensor in place": lambda n: n.scale.fill_(4.0),
    "tensor of another shape": bigger,
    "tensor in a tuple": lambda n: n.scales[0].fill_(4.0),
    "tensor in a list": lambda n: n.scales[1].__setitem__(0, torch.full((2, 1, 1), 5.0)),
    "array in place": lambda n: n.array.fill(2.0),
    "closure over a dict": lambda n: n.closed.update(bias=1.0),
    "closure over a tensor": lambda n: n.closed_weight.fill_(2.0),
    "parameter data": lambda n: setattr(n.conv.weight, "data", n.conv.weight.data * 2),
    "parameter replaced": lambda n: setattr(n.conv, "weight", nn.Parameter(torch.ones(2, 1, 3, 3))),
    "module replaced": lambda n: setattr(n, "norm", nn.GroupNorm(1, 2)),
    "eps": lambda n: setattr(n.norm, "eps", 1.0),
    "momentum": lambda n: setattr(n.norm, "momentum", 0.5),
    "buffer": lambda n: n.norm.eval() and n.norm.running_mean.fill_(3.0),
    "padding mode": lambda n: setattr(n.conv, "padding", (0, 0)) or setattr(n, "drop_skip", True),
    "forward hook": lambda n: n.conv.register_forward_hook(lambda m, i, o: o * 2),
    "forward pre-hook": lambda n: n.norm.register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
    "backward hook": lambda n: n.norm.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,)),
    "forward method": lambda n: setattr(n.conv, "forward", lambda x: torch.cat([x, x], 1)),
    "frozen": lambda n: n.conv.weight.requires_grad_(False),
}


@pytest.fixture
def restore_globals():
    yield
    globals()["GLOBAL"] = 1.0
    TABLE["gain"] = 1.0
    WEIGHT.fill_(1.0)
    Net.level = 1.0


@pytest.mark.rest
def test_functions_of_torchs_that_are_replaced(monkeypatch, recordings):
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(1, 2))
    net.append(nn.Identity())
    net[3].forward = lambda x: F.normalize(x, dim=1).sigmoid()  # type: ignore[method-assign]
    tiled, image = fullframe.tile(net, tile=TILE), batch(11)[0].float()
    for owner, name in ((F, "relu"), (F, "normalize"), (torch.Tensor, "sigmoid"), (torch, "conv2d")):
        assert close(net(image), tiled(image), 1e-5)
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, lambda x, *_, **__: x * 3)
            assert close(net(image), tiled(image), 1e-5), name
    assert close(net(image), tiled(image), 1e-5)
    assert len(recordings) == 5


def test_the_environment_of_a_function_that_reads_it(monkeypatch):
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1))
    net[0].register_forward_hook(lambda m, i, o: o * float(os.environ.get("GAIN", 1)))
    tiled, image = fullframe.tile(net, tile=TILE), batch(11)[0].float()
    for gain in ("1", "2", "1"):
        monkeypatch.setenv("GAIN", gain)
        assert close(net(image), tiled(image), 1e-5)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_effect(change, restore_globals):
    image = batch(11)[0].float()
    torch.manual_seed(3)
    plain = Net()
    torch.manual_seed(3)
    twin = Net()
    tiled = fullframe.tile(twin, tile=TILE)
    results = []
    for step in range(2):
        if step:
            CHANGES[change](plain)
            if "global" not in change and change != "class attribute":
                CHANGES[change](twin)
        for p in (*plain.parameters(), *twin.parameters()):
            p.grad = None
        a, b = plain(image), tiled(image)
        a.square().mean().backward()
        b.square().mean().backward()
        results.append(a.detach())
        assert close(a, b, 1e-5), change
        assert close([p.grad for p in plain.parameters()], [p.grad for p in twin.parameters()], 1e-4), change
        assert close(list(plain.buffers()), list(twin.buffers()), 1e-5), change
    # The change was a change.
    if change not in ("momentum", "backward hook", "frozen"):
        assert results[0].shape != results[1].shape or not torch.equal(results[0], results[1])


def test_autocast_and_default_dtype():
    net = plain_net().float()
    tiled = fullframe.tile(net, tile=TILE)
    image = batch()[0].float()
    assert tiled(image).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiled(image).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert tiled(image).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.float16):
        assert tiled(image).dtype == torch.float16

    class Maker(nn.Module):
        def forward(self, x):
            return x * torch.ones(1)

    maker = fullframe.tile(Maker(), tile=TILE)
    assert maker(image).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert maker(image).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.smoothing, self.terms = torch.tensor([1.0, 1.0, 1.0]).double(), 0.0, [F.cross_entropy]

    def forward(self, output, target):
        kwargs = {"weight": self.weight, "label_smoothing": self.smoothing}
        return sum(term(output, target, **kwargs) for term in self.terms)


def test_criterion_changes_take_effect():
    image, labels = batch()
    criterion = Weighted()
    net = plain_net().eval()
    step = fullframe.tile(net, loss=criterion, tile=TILE)
    changes = [
        lambda: None,
        lambda: setattr(criterion, "weight", torch.tensor([1.0, 2.0, 9.0]).double()),
        lambda: criterion.weight.mul_(torch.tensor([3.0, 1.0, 1.0]).double()),
        lambda: criterion.terms.append(lambda y, t, **_: y.square().mean()),
    ]
    found = []
    for change in changes:
        change()
        found.append(step(image, labels).item())
        assert found[-1] == pytest.approx(criterion(net(image), labels).item(), rel=1e-9)
    assert len(set(found)) == len(found)


def test_a_function_criterion_is_read_through_its_closure():
    image, labels = batch()
    weights = {"ce": 1.0}
    step = fullframe.tile(plain_net(), loss=lambda y, t: weights["ce"] * F.cross_entropy(y, t), tile=TILE)
    first = step(image, labels).item()
    weights["ce"] = 2.0
    assert step(image, labels).item() == pytest.approx(2 * first)


def test_a_replaced_tensor_needs_no_new_recording():
    net = Net()
    tiled = fullframe.tile(net, tile=TILE)
    image = batch(11)[0].float()
    for k in range(3):
        net.scale = torch.full((1,), float(k))
        tiled(image)
    assert len(tiled._fullframe["programs"]) == 1


def test_a_counter_in_the_forward_is_followed():
    class Alternating(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.calls = False, 0

        def forward(self, x):
            self.odd, self.calls = not self.odd, self.calls + 1
            return F.avg_pool2d(x, 3, 1, 1) * (2 if self.odd else 3)

    net, twin = Alternating(), Alternating()
    tiled = fullframe.tile(twin, tile=TILE)
    for _ in range(4):
        assert close(net(batch()[0]), tiled(batch()[0]))
    assert twin.calls == 4


# Refusals --------------------------------------------------------------------------------------------


class Bad(nn.Module):
    """A convolution followed by something that cannot be recorded."""

    def __init__(self, what):
        super().__init__()
        self.stem = nn.Conv2d(1, 1, 3, padding=1)
        self.block = Block(what)

    def forward(self, x):
        return self.block(self.stem(x))


class Block(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(self, x)


def keep(self, x):
    self.features = {x * 2}
    return x


HIDDEN = torch.ones(1, requires_grad=True)
REFUSED = {
    "item": (lambda s, x: x * x.mean().item(), "block"),
    "float": (lambda s, x: x * float(x.mean()), "block"),
    "tolist": (lambda s, x: x * x.mean().tolist(), "block"),
    "numpy": (lambda s, x: x * float(x.detach().numpy().mean()), "block"),
    "nonzero": (lambda s, x: x[x > 0].mean() * x, "block"),
    "unique": (lambda s, x: x * len(torch.unique(x)), "block"),
    "python random": (lambda s, x: x * random.random(), "Python's or NumPy's random"),
    "numpy random": (lambda s, x: x * numpy.random.rand(), "Python's or NumPy's random"),
    "kept tensor": (keep, "features"),
    "kept in a set": (lambda s, x: s.__dict__.setdefault("kept", set()).add(x * 2) or x, "stores a tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    what, words = REFUSED[name]
    tiled = fullframe.tile(Bad(what), tile=TILE)
    image = batch()[0].float()
    for _ in range(2):
        with pytest.raises(fullframe.CaptureError, match=words):
            tiled(image)
    assert not any(hasattr(m, "features") for m in tiled.modules())
    Bad(lambda s, x: x * 2)(image)  # the refusal leaves no mode behind


def test_control_flow_on_shapes_works():
    class Shapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            while min(x.shape[2:]) > 10:
                x = F.max_pool2d(self.conv(x), 2)
            return F.pad(x, (x.shape[3] % 2, 0)) if x.numel() > 20 else x

    net, twin = Shapes(), Shapes()
    twin.load_state_dict(net.state_dict())
    tiled = fullframe.tile(twin, tile=TILE)
    for size in (9, 23, 37):
        assert close(net(batch(size)[0].float()), tiled(batch(size)[0].float()), 1e-5)


def test_the_module_that_made_an_op_is_named():
    step = fullframe.tile(plain_net(), loss=F.cross_entropy, tile=TILE)
    ops = step.plan(*batch()).graph.ops
    paths = {(op.target, op.path) for op in ops}
    assert ("tile.conv", "0 (Conv2d)") in paths and ("tile.conv_weight_grad", "6 (Conv2d)") in paths
    assert ("tile.max_pool_grad", "3 (MaxPool2d)") in paths


def test_a_snapshot_that_names_its_places_sees_the_same():
    """Without names the snapshot takes shortcuts, which must not change what it sees."""
    net = plain_net()
    net.settings = {"gain": 1.5, (1, "a"): [True, None, 2, b"x"], "table": OrderedDict(k=torch.float32)}
    net.register_forward_hook(lambda module, args, made: made * TABLE["gain"])
    net.places = SimpleNamespace(shape=torch.Size([2, 3]), device=torch.device("cpu"), numbers={1, 2}, pair=(1, "b"))
    first = GuardSnapshot([net, batch()])
    assert first.key == GuardSnapshot([net, batch()], named=("net", "batch")).key
    for change in ("net.settings['gain'] = 2.5", "net[0].padding = (0, 0)", "net.places.pair = (1, 'c')",
                   "net.settings['table']['k'] = torch.float64", "net.settings['table'].extra = 1",
                   "net[0].bias.requires_grad_(False)", "net.eval()"):  # fmt: skip
        exec(change)
        changed = GuardSnapshot([net, batch()])
        assert changed.key != first.key, change
        assert changed.key == GuardSnapshot([net, batch()], named=("net", "batch")).key
        first = changed


def test_parameters_and_buffers_are_those_that_torch_lists():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(1, 1, 3, bias=False), nn.BatchNorm2d(1)
            self.again, self.none = self.first, None
            self.shared = self.first.weight
            self.register_buffer("gone", None)
            self.register_buffer("seen", self.norm.running_mean)

    for criterion in (F.cross_entropy, nn.CrossEntropyLoss(weight=torch.ones(3)), None):
        pair = Pair(nn.Sequential(Odd(), Odd()), criterion)
        args = (torch.zeros(1, 1, 5, 5),) if criterion is None else batch()
        call = Call(pair, args, {})
        for found, listed in ((call.parameters, pair.named_parameters()), (call.buffers, pair.named_buffers())):
            expected = list(listed)
            assert list(found) == [name for name, _ in expected]
            assert all(found[name] is tensor for name, tensor in expected)
