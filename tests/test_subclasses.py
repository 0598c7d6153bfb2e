"""Subclasses of Tensor: outputs are of the class, and carry the attributes, that they have in plain PyTorch."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fullframe


class Kept(torch.Tensor):
    """Of the class that torch gives to results by itself."""

    gain = 1.0

    def doubled(self) -> torch.Tensor:
        return self * 2

    def plain(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


class Narrower(Kept):
    pass


class Other(torch.Tensor):
    pass


class Named(torch.Tensor):
    """Carries copies of the first argument's attributes, and what was done to it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        source = next((a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Named)), None)
        one: Any
        for one in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(one, Named) and source is not None and one is not source:
                one.__dict__ = copy.deepcopy(source.__dict__)
                one.done = (*getattr(one, "done", ()), getattr(func, "__name__", "?"))
        return made


class Unwrapping(torch.Tensor):
    """Of its class are only copies of it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **(kwargs or {}))
        return made.as_subclass(cls) if func is torch.Tensor.clone else made


class Closed(torch.Tensor):
    __torch_function__: Any = torch._C._disabled_torch_function_impl


class Scaling(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        return made * 2 if func is F.relu else made


class Writing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        return made.mul_(2) if func is torch.sum else made


class Circular(torch.Tensor):
    """Calls a function with other arguments."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = (-args[0],) if func is F.relu else args
        return super().__torch_function__(func, types, args, kwargs or {})


class Dispatching(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.utils._mode_utils.no_dispatch():
            return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """A convolution, and what ``then`` makes of it and of the arguments."""

    def __init__(self, then: Any):
        super().__init__()
        self.conv, self.then, self.last = nn.Conv2d(1, 2, 3, padding=1).double(), then, None

    def forward(self, x: torch.Tensor, *more: Any) -> Any:
        return self.then(self, x, F.relu(self.conv(x)), *more)


def image(cls: Any = torch.Tensor, channels: int = 1, **attributes: Any) -> Any:
    made = torch.randn(1, channels, 8, 8, dtype=torch.float64).as_subclass(cls)
    vars(made).update(attributes)
    return made


def agree(plain: Any, tiled: Any) -> None:
    """The same classes, attributes, numbers and graphs."""
    one, two = pytree.tree_flatten(plain), pytree.tree_flatten(tiled)
    assert one[1] == two[1]
    for a, b in zip(one[0], two[0], strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert vars(a) == vars(b) and a.requires_grad == b.requires_grad
            torch.testing.assert_close(a.detach().as_subclass(torch.Tensor), b.detach().as_subclass(torch.Tensor))


def scalar(made: Any) -> torch.Tensor:
    found = [t for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor) and t.requires_grad]
    return torch.stack([t.as_subclass(torch.Tensor).square().sum() for t in found]).sum()


def both(then: Any, *inputs: Any, tile: Any = 4, **options: Any) -> list[Any]:
    """Compares plain and tiled, gradients too, in two calls; returns the tiled module's outputs."""
    net = Net(then)
    twin = copy.deepcopy(net)
    tiled = fullframe.tile(twin, tile=tile, **options)
    found = []
    for given in (inputs, inputs):
        plain = net(*given)
        found.append(tiled(*given))
        agree(plain, found[-1])
        scalar(plain).backward()
        scalar(found[-1]).backward()
        for a, b in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
            assert type(a.grad) is type(b.grad)
    return found


@pytest.mark.parametrize("cls", [Kept, Narrower, Named, Unwrapping, Closed])
def test_outputs_are_of_the_class_that_plain_pytorch_gives(cls: Any):
    both(lambda net, x, y: (y, {"a": [y.clone(), y.detach()]}, y.mean(1, keepdim=True)), image(cls, title="a"))


@pytest.mark.parametrize("cls", [Kept, Named])
@pytest.mark.parametrize(
    "then",
    [
        lambda net, x, y: (y.as_subclass(torch.Tensor) * 2, y),
        lambda net, x, y: (torch.max(y, dim=1), y.split(1, 1), y.sum()),
        lambda net, x, y: torch.cat([y, y.detach() + net.conv.bias.view(1, -1, 1, 1)], 1),
        lambda net, x, y: (net.conv.weight * 2, x, y[:, 0]),
        lambda net, x, y: torch.zeros_like(y.as_subclass(torch.Tensor)).add_(y),
        lambda net, x, y: (lambda z: torch.stack([z.mul_(2).exp(), z], 0))(y.clone()),
        lambda net, x, y: checkpoint(lambda z: net.conv(z).tanh(), x, use_reentrant=False),
        lambda net, x, y: (y.shape, y.new_zeros(3), torch.ones(2) * net.conv.bias),
        lambda net, x, y: y if isinstance(x, (Kept, Named)) else y * 3,
        lambda net, x, y: F.interpolate(y, scale_factor=2),
        lambda net, x, y: F.max_pool2d(F.instance_norm(y), 2),
    ],
)
def test_what_a_forward_makes_of_a_subclass(cls: Any, then: Any):
    both(then, image(cls, title=["a"]))


def test_a_plain_tensor_beside_one_of_a_subclass():
    both(lambda net, x, y, z: (y + z, z.exp(), z + y, y), image(), image(Named, title="z"))
    both(lambda net, x, y, z: (lambda u: (z + u, u.add_(z), u))(y.clone()), image(), image(Kept))


def test_two_inputs_of_subclasses():
    then = lambda net, x, y, z: (y + z, z + y, z * 2, y)  # noqa: E731
    both(then, image(Named, title="x"), image(Named, title="z"))
    both(then, image(Kept), image(Narrower))
    net = Net(then).double()
    inputs = image(Kept), image(Other)
    for one in (net, fullframe.tile(net, tile=4)):
        with pytest.raises(TypeError):
            one(*inputs)


def test_methods_and_class_attributes():
    both(lambda net, x, y: (x.doubled(), y.doubled(), y.plain(), y * x.gain * y.gain), image(Kept))
    both(lambda net, x, y: (y.as_subclass(Kept) * 2, y.as_subclass(Kept), y), image())
    both(lambda net, x, y: y.as_subclass(type(x)), image(Kept))


def test_a_loss_of_a_target_of_a_subclass():
    net = nn.Conv2d(1, 1, 3, padding=1).double()
    step = fullframe.tile(copy.deepcopy(net), loss=F.mse_loss, tile=4)
    for k in range(2):
        x, y = image(), image(Named, title=k)
        plain, loss = F.mse_loss(net(x), y), step(x, y)
        agree(plain, loss)
        plain.backward()
        loss.backward()
        torch.testing.assert_close(net.weight.grad, step.weight.grad)
    assert len(step._fullframe["programs"]) == 1


def test_attributes_that_nothing_reads_are_no_reason_to_record_anew():
    net = Net(lambda net, x, y: y)
    tiled = fullframe.tile(net, tile=4)
    for k in range(4):
        x: Any = image(Named, title=f"{k}.nii", place=torch.eye(4), history=[k])
        made: Any = tiled(x)
        plain = net(x)
        assert type(made) is Named and made.title == f"{k}.nii" and made.done == plain.done
        assert made.history == [k] and made.history is not x.history
    assert len(tiled._fullframe["programs"]) == 1


def test_an_attribute_that_the_forward_reads():
    net = Net(lambda net, x, y: y * x.scale)
    tiled = fullframe.tile(net, tile=4)
    for scale in (2.0, 3.0, 2.0):
        x = image(Kept, scale=scale)
        agree(net(x), tiled(x))


def test_gradients_of_an_input_of_a_subclass():
    net = Net(lambda net, x, y: y)
    x = image(Named, title="a").requires_grad_()
    y = x.detach().clone().requires_grad_()
    net(x).sum().backward()
    fullframe.tile(net, tile=4)(y).sum().backward()
    assert type(x.grad) is type(y.grad)
    torch.testing.assert_close(x.grad, y.grad)


def test_a_tensor_of_a_subclass_left_behind():
    def then(net: Any, x: Any, y: Any) -> Any:
        net.last = y.detach()
        return y

    net = Net(then)
    twin = copy.deepcopy(net)
    tiled = fullframe.tile(twin, tile=4)
    for k in range(3):
        x = image(Named, title=k)
        net(x)
        tiled(x)
        agree(net.last, twin.last)


def test_buffers_and_attributes_of_a_subclass():
    net = Net(lambda net, x, y: (y * net.shade, y + net.tint))
    net.register_buffer("shade", image(Kept, 2))
    net.tint = image(Kept, 2)
    agree(net(image().zero_()), fullframe.tile(net, tile=4)(image().zero_()))


def test_outputs_can_be_worked_with():
    tiled = fullframe.tile(Net(lambda net, x, y: (y * 2, y.detach())), tile=4)
    made, other = tiled(image(Named, title="a"))
    made.mul_(2).sum().backward()
    other.add_(1)
    assert tiled.conv.weight.grad is not None


def test_without_gradients():
    net = Net(lambda net, x, y: y)
    with torch.no_grad():
        for k in range(2):
            x = image(Named, title=k)
            agree(net(x), fullframe.tile(net, tile=4)(x))


@pytest.mark.parametrize("cls", [Scaling, Circular])
def test_a_class_that_computes_is_refused(cls: Any):
    with pytest.raises(fullframe.CaptureError, match=f"the __torch_function__ of {cls.__name__} changes what relu"):
        fullframe.tile(Net(lambda net, x, y: y), tile=4)(image(cls))


def test_a_class_that_writes_is_refused():
    with pytest.raises((fullframe.CaptureError, RuntimeError)):
        fullframe.tile(Net(lambda net, x, y: torch.sum(y)), tile=4)(image(Writing))


def test_a_class_that_computes_by_an_attribute_is_refused_when_it_does():
    class Sometimes(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = super().__torch_function__(func, types, args, kwargs or {})
            return made * args[0].gain if func is F.relu and getattr(args[0], "gain", 1) != 1 else made

    tiled = fullframe.tile(nn.ReLU(), tile=4)
    x = image(Sometimes, gain=1)
    assert torch.equal(tiled(x), x.relu())
    with pytest.raises(fullframe.CaptureError, match="Sometimes changes what relu"):
        tiled(image(Sometimes, gain=2))


@pytest.mark.parametrize(
    "then",
    [
        lambda net, x, y: y * len(y.title),
        lambda net, x, y: y * len(vars(y)["title"]),
        lambda net, x, y: setattr(y, "title", "b") or y,
        lambda net, x, y: setattr(y, "__dict__", {}) or y,
    ],
)
def test_what_an_intermediate_carries_is_refused(then: Any):
    with pytest.raises(fullframe.CaptureError, match="of a Named that it has made"):
        fullframe.tile(Net(then), tile=4)(image(Named, title="a"))


def test_a_class_that_is_called_in_the_forward_is_refused():
    with pytest.raises(fullframe.CaptureError, match=r"as_subclass"):
        fullframe.tile(Net(lambda net, x, y: Kept(y)), tile=4)(image())


def test_a_class_with_a_dispatch_of_its_own_is_refused():
    with pytest.raises(fullframe.CaptureError, match="Dispatching computes by a __torch_dispatch__"):
        fullframe.tile(nn.ReLU(), tile=4)(image(Dispatching))
