"""Tensors that a forward leaves in attributes, lists, dictionaries and closures lie there after every tiled step."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fullframe
import fullframe.tiled
from fullframe.frontend.guards import GuardSnapshot
from fullframe.frontend.side_effects import recorded

TILES = (4, 7, 13)


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield


class Net(nn.Module):
    """Two convolutions; ``what`` sees the map between them and returns what goes on."""

    def __init__(self, what: Callable[[Any, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.what = what
        self.first, self.norm, self.last = (
            nn.Conv2d(2, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 2, 3, padding=1),
        )
        self.feature: Any = None
        self.items: list[Any] = [None, None]
        self.named: dict[Any, Any] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.what(self, self.norm(self.first(x))))


def images(count: int = 4, size: tuple[int, int] = (13, 11)) -> list[torch.Tensor]:
    return [torch.randn(2, 2, *size, dtype=torch.float64) for _ in range(count)]


def sides(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    plain, other = make().double(), make().double()
    other.load_state_dict(plain.state_dict())
    return plain, other


def left_in(net: nn.Module) -> list[torch.Tensor]:
    """The tensors in reach that are no parameters or buffers."""
    known = {id(t) for t in (*net.parameters(), *net.buffers())}
    return [t for t in GuardSnapshot([net]).tensors if id(t) not in known]


def clean(net: nn.Module) -> bool:
    return not any(recorded(t) for t in GuardSnapshot([net]).tensors)


def same(a: Any, b: Any) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(y.detach(), x.detach(), rtol=1e-10, atol=1e-10)


def compare(
    make: Callable[[], nn.Module], tile: int = 5, steps: int = 4, between: Any = lambda net: None
) -> nn.Module:
    """Some training steps of a tiled module against the plain one: all that is left, and every gradient."""
    plain, other = sides(make)
    tiled = fullframe.tile(other, tile=tile)
    for x in images(steps):
        found = []
        for net, run in ((plain, plain), (other, tiled)):
            y = run(x)
            kept = left_in(net)
            loss = y.square().mean()
            for t in kept:
                if t.requires_grad:
                    loss = loss + t.square().mean() * 0.3
            net.zero_grad()
            loss.backward()
            found.append([y, loss, *kept, *(p.grad for p in net.parameters()), *net.buffers()])
            between(net)
        same(*found)
        assert [t.requires_grad for t in left_in(plain)] == [t.requires_grad for t in left_in(other)]
        assert clean(other)
        with torch.no_grad():
            for p, q in zip(plain.parameters(), other.parameters(), strict=True):
                p -= 0.01 * p.grad
                q.copy_(p)
    return other


# What a forward leaves ---------------------------------------------------------------------------------


def in_attribute(net, y):
    net.feature = y * 2
    return net.feature + 1


def in_list(net, y):
    net.items[1] = y[:, :2]
    return y.relu()


def in_dict(net, y):
    net.named["a", 1] = y
    net.named["b"] = y.mean((2, 3))
    return y


def in_new_containers(net, y):
    net.feature = {"x": [y, 3, (y.square(), None)], "y": OrderedDict(z=y)}
    return y


def changed_afterwards(net, y):
    net.feature = y * 3
    net.items[0] = net.feature[:, 1:]
    z = net.feature.add(1)
    net.feature.clamp_(min=0)
    return z


def by_module(net, y):
    net.named[net.first] = y.tanh()
    return y


def emptied_and_filled(net, y):
    net.items.clear()
    net.items.extend([y, y + 1])
    return y


def on_another_object(net, y):
    net.last.note = y.detach().mean()
    return y


def in_a_buffer_too(net, y):
    net.feature = net.norm.running_mean
    net.items[0] = y.detach().clone()
    return y


def without_gradients(net, y):
    net.feature, net.items = y > 0, [y.argmax(1), y.detach()[..., ::2]]
    net.named.update(count=(y > 0).sum(), wide=y.detach().mean((2, 3), keepdim=True).expand_as(y))
    return y


class Box:
    __slots__ = ("inside",)


class Shared:
    feature: Any = None


BOX = Box()
FEATURE: Any = None


def in_slots(net, y):
    BOX.inside = y
    return y


def in_class(net, y):
    Shared.feature = y.exp()
    return y


def in_global(net, y):
    global FEATURE
    FEATURE = y
    return y + FEATURE.mean()


CASES = (in_attribute, in_list, in_dict, in_new_containers, changed_afterwards, by_module, emptied_and_filled,
         on_another_object, in_a_buffer_too, without_gradients)  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_left_as_in_plain_pytorch(what, recordings):
    compare(lambda: Net(what))
    assert len(recordings) <= 2  # of places still empty, and of places that hold a former step's tensors


@pytest.mark.parametrize("tile", TILES)
def test_tiles_of_several_sizes(tile):
    compare(lambda: Net(in_attribute), tile=tile, steps=2)


def hooked(keep: Callable[..., None]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = Net(lambda net, y: y)
        net.first.register_forward_hook(lambda m, args, out: keep(net, out))
        return net

    return make


@pytest.mark.parametrize("keep", [
    lambda net, out: net.named.update(layer=out), lambda net, out: net.items.__setitem__(0, out),
    lambda net, out: setattr(net, "feature", out), lambda net, out: setattr(net, "feature", out.detach()),
])  # fmt: skip
def test_hooks_that_keep_features(keep, recordings):
    compare(hooked(keep))
    assert len(recordings) <= 2


def test_a_variable_of_a_closure():
    def make() -> nn.Module:
        net, kept = Net(lambda net, y: y), None

        def keep(module: Any, args: Any, out: torch.Tensor) -> None:
            nonlocal kept
            kept = out

        net.first.register_forward_hook(keep)
        return net

    compare(make)


def test_a_dictionary_replaced_between_the_calls(recordings):
    net = Net(in_dict).double()
    tiled = fullframe.tile(net, tile=5)
    for x in images(3):
        net.named = {}
        tiled(x).sum().backward()
        assert list(net.named) == [("a", 1), "b"]
        same([net.norm(net.first(x)).detach().mean((2, 3))], [net.named["b"]])
    assert len(recordings) == 1


def test_the_same_objects_as_plain():
    def what(net, y):
        net.feature = net.named["again"] = y
        net.items[0] = net.items
        return y

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(what)
            self.out = self.given = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.given, self.out = x, self.net(x)
            return self.out

    outer = Outer().double()
    tiled = fullframe.tile(outer, tile=5)
    for x in images(3):
        out = tiled(x)
        assert outer.out is out and outer.given is x and outer.net.feature is outer.net.named["again"]
        assert outer.net.items[0] is outer.net.items
        out.sum().backward()


def test_evaluation_and_no_grad(recordings):
    plain, other = sides(lambda: Net(in_attribute))
    tiled = fullframe.tile(other, tile=5)
    for k, x in enumerate(images(8)):
        grad = k % 4 < 2
        for net in (plain, tiled):
            net.train(grad)
        with torch.set_grad_enabled(grad):
            same([plain(x), plain.feature], [tiled(x), other.feature])
        assert plain.feature.requires_grad == other.feature.requires_grad == grad
    assert len(recordings) == 3  # at first, in evaluation, and again where the attribute is no longer None


def test_sizes_that_alternate_are_recorded_once_each(recordings):
    plain, other = sides(lambda: Net(in_dict))
    tiled = fullframe.tile(other, tile=5)
    for size in ((13, 11), (9, 8), (10, 12)) * 3:
        for x in images(1, size):
            same([plain(x), plain.named["b"]], [tiled(x), other.named["b"]])
    assert len(recordings) == 4


@pytest.mark.parametrize("what", [in_slots, in_class, in_global])
def test_places_outside_the_module(what):
    places: dict[Any, Any] = {
        in_slots: lambda net: BOX.inside,
        in_class: lambda net: Shared.feature,
        in_global: lambda net: FEATURE,
    }
    plain, other = sides(lambda: Net(what))
    tiled = fullframe.tile(other, tile=5)
    for x in images(4):
        a, kept = plain(x), places[what](plain).detach()
        same([a, kept], [tiled(x), places[what](other)])
        places[what](other).sum().backward()


# A step with its loss ----------------------------------------------------------------------------------


class Criterion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, torch.Tensor] = {}
        self.last: Any = None

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.parts["error"] = (output - target).abs()
        self.last = self.parts["error"].mean() + output.square().mean()
        return self.last


@pytest.mark.parametrize("what", CASES)
def test_a_step_leaves_tensors_without_a_graph(what, recordings):
    plain, other = sides(lambda: Net(what))
    losses = Criterion(), Criterion()
    step = fullframe.tile(other, loss=losses[1], tile=5)
    for x in images(4):
        target = torch.randn(2, 2, 13, 11, dtype=torch.float64)
        loss, found = losses[0](plain(x), target), step(x, target)
        kept = left_in(plain), left_in(other)
        assert not any(t.requires_grad for t in kept[1]) and clean(other)
        assert losses[1].last is found
        assert not losses[1].parts["error"].requires_grad
        plain.zero_grad(), other.zero_grad(), loss.backward(), found.backward()
        same([loss, *kept[0], losses[0].parts["error"], *(p.grad for p in plain.parameters())],
             [found, *kept[1], losses[1].parts["error"], *(p.grad for p in other.parameters())])  # fmt: skip
        copy.deepcopy(other)
    assert len(recordings) <= 2


def test_gradients_kept_by_a_hook_of_the_backward():
    def make() -> nn.Module:
        net = Net(lambda net, y: y)
        net.last.register_full_backward_hook(lambda m, into, out: net.named.update(gradient=into[0]))
        return net

    plain, other = sides(make)
    step = fullframe.tile(other, loss=F.mse_loss, tile=5)
    for x in images(3):
        F.mse_loss(plain(x), x).backward()
        step(x, x).backward()
        same([plain.named["gradient"]], [other.named["gradient"]])
    with pytest.raises(fullframe.CaptureError, match=r"'gradient' of module \(Net\)"):
        fullframe.tile(make().double(), tile=5)(images()[0])


# States carried to the next call -----------------------------------------------------------------------


def recurrent(net, y):
    state = y if net.feature is None else y + 0.5 * net.feature
    net.feature = state.detach()
    return state


def average(net, y):
    now = y.detach().mean((0, 2, 3), keepdim=True)
    net.feature = now if net.feature is None else 0.9 * net.feature + 0.1 * now
    return y - net.feature


def cached(net, y):
    if "grid" not in net.named or net.named["grid"].shape[-2:] != y.shape[-2:]:
        net.named["grid"] = torch.linspace(0, 1, y.shape[-1], dtype=y.dtype).expand(y.shape[-2:])
    return y * net.named["grid"]


def shifted(net, y):
    net.items[:] = [y.detach(), net.items[0]]
    net.feature, net.named["before"] = y.detach().mean(), net.feature
    return y if net.items[1] is None else y + net.items[1]


def read_detached(net, y):
    net.feature = y if net.feature is None else y + 0.5 * net.feature.detach()
    return net.feature


def updated_in_place(net, y):
    if net.feature is None:
        net.feature = y.detach().clone()
    else:
        net.feature.mul_(0.5).add_(y.detach())
    return y + net.feature.mean()


@pytest.mark.parametrize("what", [recurrent, average, cached, shifted, read_detached, updated_in_place])
def test_a_state_carried_to_the_next_call(what, recordings):
    compare(lambda: Net(what), steps=5)
    assert len(recordings) <= 3
    plain, other = sides(lambda: Net(what))
    step = fullframe.tile(other, loss=F.mse_loss, tile=5)
    for x in images(5):
        same([F.mse_loss(plain(x), x), *left_in(plain)], [step(x, x), *left_in(other)])


def test_a_state_carried_with_its_graph():
    def what(net, y):
        net.feature = y if net.feature is None else (y + 0.5 * net.feature).tanh()
        return net.feature

    plain, other = sides(lambda: Net(what))
    tiled = fullframe.tile(other, tile=5)
    xs = images(3)
    for run in (plain, tiled):
        sum(run(x).square().mean() for x in xs).backward()  # through all three calls
    same([p.grad for p in plain.parameters()], [p.grad for p in other.parameters()])
    net = Net(what).double()
    step = fullframe.tile(net, loss=F.mse_loss, tile=5)
    step(xs[0], xs[0])
    kept = net.feature
    with pytest.raises(fullframe.CaptureError, match=r"left under 'feature' of module \(Net\).*detach"):
        step(xs[1], xs[1])
    assert net.feature is kept
    net.feature = net.feature.detach()  # as one does in plain PyTorch
    step(xs[1], xs[1])


def test_a_list_emptied_between_the_calls(recordings):
    def what(net, y):
        net.items.append(y)
        return y

    compare(lambda: Net(what), between=lambda net: net.items.clear())
    assert len(recordings) == 2  # with the two entries it was made with, and empty


def test_modules_that_share_a_dictionary():
    kept: dict[int, torch.Tensor] = {}

    def reads_other(number):
        def what(net, y):
            kept[number] = y
            return y + kept[1 - number].detach().mean() if 1 - number in kept else y

        return lambda: Net(what)

    pairs = [sides(reads_other(k)) for k in (0, 1)]
    runs = [plain for plain, _ in pairs], [fullframe.tile(other, tile=5) for _, other in pairs]
    xs = images(3)
    found = []
    for side in runs:
        kept.clear()
        found.append([run(x) for x in xs for run in side])
    same(*found)


def test_a_list_that_grows_is_refused_in_the_end():
    def what(net, y):
        net.items.append(y.detach())
        return y

    plain, other = sides(lambda: Net(what))
    tiled = fullframe.tile(other, tile=5)
    for x in images(4):
        same([plain(x), *plain.items[2:]], [tiled(x), *other.items[2:]])
    kept = list(other.items)
    with pytest.raises(
        fullframe.CaptureError, match=r"adds a tensor to the list 'items' of module.*empty it between"
    ):
        tiled(images()[0])
    assert all(a is b for a, b in zip(kept, other.items, strict=True)) and clean(other)


# Errors, copies, memory --------------------------------------------------------------------------------


def test_an_error_leaves_everything_as_it_was():
    def what(net, y):
        net.feature, net.items[0], net.named["b"] = y, y, y
        net.items.append(y)
        net.items.insert(0, y)
        return y * y.mean().item()

    net = Net(what).double()
    net.named["a"] = kept = torch.ones(1)
    with pytest.raises(fullframe.CaptureError, match="depends on the data"):
        fullframe.tile(net)(images()[0])
    assert net.feature is None and net.items == [None, None] and net.named == {"a": kept} and clean(net)


def in_set(net, y):
    net.feature = {y}
    return y


def as_parameter(net, y):
    net.weight = net.first.weight
    return y


def with_its_gradient(net, y):
    net.feature = y * 2
    net.feature.retain_grad()
    return net.feature


@pytest.mark.parametrize("what", [in_set, as_parameter])
def test_what_cannot_be_put_back_is_refused_by_name(what):
    net = Net(what).double()
    with pytest.raises(fullframe.CaptureError, match=r"stores a tensor|another parameter"):
        fullframe.tile(net)(images()[0])
    assert clean(net)


def test_a_gradient_that_is_to_be_retained_is_refused():
    net = Net(with_its_gradient).double()
    with pytest.raises(fullframe.CaptureError, match=r"retain_grad.*register_hook"):
        fullframe.tile(net)(images()[0])
    assert clean(net)

    def hooked(net: nn.Module, y: torch.Tensor) -> torch.Tensor:
        y.register_hook(lambda g: net.named.update(gradient=g))
        return y

    plain, other = sides(lambda: Net(hooked))
    step = fullframe.tile(other, loss=F.mse_loss, tile=5)
    for x in images(3):
        F.mse_loss(plain(x), x).backward()
        step(x, x)
        same([plain.named["gradient"]], [other.named["gradient"]])


def test_copies_after_a_step():
    net = Net(in_dict).double()
    tiled = fullframe.tile(net, loss=F.mse_loss, tile=5)
    x = images()[0]
    tiled(x, x)
    for again in (
        copy.deepcopy(tiled),
        pickle.loads(pickle.dumps(fullframe.tile(Keeps().double()))),
        copy.deepcopy(net),
    ):
        assert clean(again)
    same([copy.deepcopy(tiled)(x, x)], [tiled(x, x)])


class Keeps(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(2, 2, 3, padding=1)
        self.kept: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = super().forward(x)
        return self.kept.relu()


def test_a_step_survives_pickling():
    net = fullframe.tile(Keeps().double(), loss=F.mse_loss, tile=5)
    x = images()[0]
    loss = net(x, x)
    again = pickle.loads(pickle.dumps(net))
    same([net.kept, loss], [again.kept, again(x, x)])
    assert not again.kept.requires_grad


def test_check_compares():
    net = Net(in_dict)
    assert fullframe.check(net, torch.randn(1, 2, 13, 11)).passed
    assert fullframe.check(net, torch.randn(1, 2, 13, 11), torch.randn(1, 2, 13, 11), F.mse_loss).passed


def test_steps_without_a_backward_keep_nothing_of_the_former_ones():
    net = Net(in_attribute).double()
    tiled = fullframe.tile(net, tile=5)
    seen = []
    for x in images(4):
        tiled(x)
        seen.append(weakref.ref(net.feature))
    gc.collect()
    assert [r() is not None for r in seen] == [False, False, False, True]


def test_the_budget_counts_what_is_left():
    def what(net, y):
        net.feature = y * 2
        return y

    x = torch.randn(1, 2, 64, 64)
    with_it, without = (
        fullframe.tile(Net(w), loss=F.mse_loss).plan(x, x).bytes.outputs for w in (what, lambda net, y: y)
    )
    assert with_it - without == 2 * 3 * 64 * 64 * 4  # this step's, and the former's until then


# A published network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [8, 13])
@pytest.mark.rest
def test_deep_supervision_of_dynunet(tile, recordings):
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")

    def make() -> nn.Module:
        return nets.DynUNet(2, 1, 2, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=[4, 6, 8, 8], norm_name="batch",
                            deep_supervision=True, deep_supr_num=2)  # fmt: skip

    def criterion(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return sum(F.cross_entropy(y, target) / 2**k for k, y in enumerate(output.unbind(1)))

    plain, other = sides(make)
    step = fullframe.tile(other, loss=criterion, tile=tile)
    for _ in range(3):
        x, target = torch.randn(1, 1, 24, 32, dtype=torch.float64), torch.randint(2, (1, 24, 32))
        pairs = [(plain, criterion(plain(x), target)), (other, step(x, target))]
        for net, loss in pairs:
            net.zero_grad()
            loss.backward()
        same(*([loss, *net.heads, *(p.grad for p in net.parameters()), *net.buffers()] for net, loss in pairs))
    assert len(recordings) == 2
