"""What a step asks of its data: conditions that only raise, branches, and the checks of torch's linear algebra."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuzzing import uncompiled
from torch import nn

import fullframe
import fullframe.tiled
from fullframe.capture.conditions import MAX_PATHS

L = torch.linalg


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with uncompiled():
        yield


class Net(nn.Module):
    """A function of the module and of a convolution of the image."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.k = nn.Parameter(torch.tensor([[2.0, 0.3], [0.1, 1.5]]))
        self.calls = 0
        self.double()

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, self.norm(self.conv(x)))


def image(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(1, 2, 10, 9, dtype=torch.float64) * scale


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def both(function: Callable[..., Any], images: list[torch.Tensor]) -> fullframe.Tiled:
    """Run some images both ways; errors must be of the same type and text, and change nothing of the tiled one."""
    plain, tiled = Net(function), Net(function)
    tiled.load_state_dict(plain.state_dict())
    step = fullframe.tile(tiled, tile=4)
    for x in images:
        outcomes = []
        before = state(tiled)
        for run in (plain, step):
            leaf = x.clone().requires_grad_()
            try:
                made = run(leaf)
            except (ValueError, RuntimeError, AssertionError) as error:
                outcomes.append((type(error), str(error)))
                continue
            made.square().sum().backward()
            grads = [p.grad for p in (plain if run is plain else tiled).parameters()]
            outcomes.append([made.detach(), leaf.grad, *(g if g is None else g.clone() for g in grads)])
        if isinstance(outcomes[0], tuple):
            assert outcomes[0] == outcomes[1], outcomes
            after = state(tiled)
            assert all(torch.equal(before[k], after[k]) for k in before)
            plain.load_state_dict(before)
        else:
            assert isinstance(outcomes[1], list), outcomes[1]
            largest = max(float(t.abs().max()) for t in outcomes[0] if t is not None)
            for a, b in zip(*outcomes, strict=True):
                assert (a is b is None) or torch.allclose(a, b, 1e-9, 1e-11 * max(1.0, largest), equal_nan=True)
            torch.testing.assert_close(state(tiled), state(plain), rtol=1e-9, atol=1e-11)
        assert plain.calls == tiled.calls
        for p in (*plain.parameters(), *tiled.parameters()):
            p.grad = None
    return step


def raising(bad: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    def function(net: Any, h: torch.Tensor) -> torch.Tensor:
        if bad(h):
            raise ValueError("the image is bad")
        return h * 2

    return function


def asserting(good: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    def function(net: Any, h: torch.Tensor) -> torch.Tensor:
        if not good(h):  # pytest would write an assert anew
            raise AssertionError
        return h * 2

    return function


BAD = torch.full((1, 2, 10, 9), float("nan"), dtype=torch.float64)
CHECKS: dict[str, Callable[..., Any]] = {
    "any": raising(lambda h: torch.any(torch.isnan(h))),
    "any item": raising(lambda h: torch.isnan(h).any().item()),
    "not all": raising(lambda h: not torch.isfinite(h).all()),
    "sum": raising(lambda h: torch.isnan(h).sum()),
    "comparison": raising(lambda h: not h.max() < 1e9),
    "assert": asserting(lambda h: (h < 1e9).all()),
    "assert of a number": asserting(lambda h: h.max() < 1e9),
    "torch._assert": lambda net, h: (torch._assert((h < 1e9).all(), "bad"), h * 3)[1],
    "allclose": asserting(lambda h: torch.allclose(h, h)),
    "equal": asserting(lambda h: torch.equal(h, h + 0)),
    "in turn": lambda net, h: raising(lambda h: h.max() > 1e9)(net, asserting(lambda h: (h == h).all())(net, h)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_condition_that_only_raises_is_looked_at_in_every_step(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = both(CHECKS[name], [image(), image(), BAD, image(), BAD])
    assert len(step._fullframe["programs"]) == 1


def test_a_bad_image_at_first():
    both(CHECKS["any"], [BAD, image(), BAD])
    both(CHECKS["assert"], [BAD, image(), BAD])


def test_an_assertion_of_the_device():
    step = fullframe.tile(Net(lambda net, h: (torch._assert_async((h < 1e9).all(), "bad numbers"), h * 3)[1]), tile=4)
    step(image())
    before = state(step.module)
    with pytest.raises(RuntimeError, match="bad numbers"):
        step(BAD)
    assert all(torch.equal(v, before[k]) for k, v in state(step.module).items())


def branch(net: Any, h: torch.Tensor) -> torch.Tensor:
    return h.sin() if net.k.sum() + h[:, :, 0, 0].mean() * 20 > 0 else net.conv(h) * h


def test_a_branch_is_taken_as_the_data_fall_and_told_of_once():
    images = [image() for _ in range(6)]
    with pytest.warns(UserWarning, match=r"depends on the data at test_conditions.py:\d+ .*net.k.sum") as told:
        step = both(branch, images)
    assert len(told) == 1
    assert len(step._fullframe["programs"]) == 2


def test_the_random_numbers_of_a_step_that_goes_another_way_are_its_first():
    def function(net: Any, h: torch.Tensor) -> torch.Tensor:
        return F.dropout(h, 0.5) if h[0, 0, 0, 0] > 0 else F.dropout(h, 0.5) * 2

    net, x = Net(function).eval(), image()
    step = fullframe.tile(net, tile=4)
    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sign in (1, -1, 1, -1):
            torch.manual_seed(3)
            with torch.no_grad():
                net.norm.weight.fill_(sign)
            made.append((step(x), torch.rand(())))
    assert torch.equal(made[0][0] != 0, made[1][0] != 0) and torch.equal(made[1][0], made[3][0])
    assert len({float(after) for _, after in made}) == 1


def test_a_counter_goes_on_by_one_whatever_way_is_taken():
    def function(net: Any, h: torch.Tensor) -> torch.Tensor:
        net.calls += 1
        return h if h[0, 0, 0, 0] > 0 else h * net.calls

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both(function, [image() for _ in range(5)])


def signed(images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Images of which every other one makes ``negative`` hold."""
    return [x.abs() * (1 - 2 * (k % 2)) for k, x in enumerate(images)]


def negative(x: torch.Tensor) -> bool:
    return bool((x < 0).any())


class Signs(nn.Module):
    """Does ``what`` with a convolution of an image that has a negative number; looks at no name."""

    def __init__(self, what: Callable[..., torch.Tensor]):
        super().__init__()
        self.conv, self.what, self.scale = nn.Conv2d(2, 2, 3, padding=1).double(), what, 3.0
        self.calls: int = 0
        self.register_buffer("place", torch.tensor(1))

    def forward(self, x: torch.Tensor, name: str = "") -> Any:
        y = self.conv(x)
        return self.what(self, y) if negative(x) else y


def counting(net: Any, y: torch.Tensor) -> torch.Tensor:
    net.calls += 1
    return y * net.calls


# What the other way reads, what changes it between the steps, and how often eight steps are recorded.
READ: dict[str, tuple[Callable[..., torch.Tensor], Callable[[Any, int], Any], int]] = {
    "an attribute": (lambda net, y: y * net.scale, lambda net, k: setattr(net, "scale", float(k // 4)), 3),
    "a number of a buffer": (lambda net, y: y * int(net.place), lambda net, k: net.place.fill_(k // 4), 3),
    "nothing": (lambda net, y: y * 2, lambda net, k: (setattr(net, "scale", float(k)), net.place.fill_(k)), 2),
    "a counter": (counting, lambda net, k: None, 5),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.filterwarnings("ignore:the course of the computation", "ignore:calls, which the step itself")
def test_what_only_one_way_reads_belongs_to_its_own_key(name, monkeypatch):
    what, between, expected = READ[name]
    made: list[Any] = []
    compiled = fullframe.tiled.compile_call
    monkeypatch.setattr(fullframe.tiled, "compile_call", lambda *a, **k: (made.append(a), compiled(*a, **k))[1])
    plain, other = Signs(what), Signs(what)
    other.load_state_dict(plain.state_dict())
    step = fullframe.tile(other, tile=4)
    for k, x in enumerate(signed([image() for _ in range(8)])):
        between(plain, k)
        between(other, k)
        torch.testing.assert_close(step(x), plain(x), rtol=1e-9, atol=1e-11)
        assert plain.calls == other.calls
    assert len(made) == expected


@pytest.mark.filterwarnings("ignore:the course of the computation")
def test_names_that_nobody_reads_need_no_recording_of_their_own_on_any_way(monkeypatch):
    made: list[Any] = []
    compiled = fullframe.tiled.compile_call
    monkeypatch.setattr(fullframe.tiled, "compile_call", lambda *a, **k: (made.append(a), compiled(*a, **k))[1])
    net = Signs(lambda net, y: y * 2)
    step = fullframe.tile(net, tile=4)
    for k, x in enumerate(signed([image() for _ in range(12)])):
        torch.testing.assert_close(step(x, f"image {k}"), net(x), rtol=1e-9, atol=1e-11)
    assert len(made) <= 4


@pytest.mark.filterwarnings("ignore:the course of the computation")
def test_what_a_condition_compares_with_stays_out_of_the_key():
    class Limited(Signs):
        def forward(self, x: torch.Tensor, name: str = "") -> Any:
            y = self.conv(x)
            return y * 2 if (y * 1e9).max() > self.place else y

    net = Limited(negative)
    step = fullframe.tile(net, tile=4)
    for k in range(4):
        net.place.fill_(k)
        x = image()
        torch.testing.assert_close(step(x), net(x), rtol=1e-9, atol=1e-11)
    assert len(step._fullframe["programs"]) <= 2


@pytest.mark.rest
def test_more_ways_than_a_few_are_refused():
    def function(net: Any, h: torch.Tensor) -> torch.Tensor:
        for k in range(2 * MAX_PATHS):
            if h.flatten()[k] > 0:
                h = h * 1.5
        return h

    step = fullframe.tile(Net(function), tile=4)
    with (
        warnings.catch_warnings(),
        pytest.raises(fullframe.CaptureError, match=r"test_conditions.py:\d+ .*torch.where"),
    ):
        warnings.simplefilter("ignore")
        for _ in range(4 * MAX_PATHS):
            step(image())


def test_a_loop_that_goes_on_until_something_holds_is_refused():
    def function(net: Any, h: torch.Tensor) -> torch.Tensor:
        while (h == h).all():
            h = h * 0.9
        return h

    with pytest.raises(fullframe.CaptureError, match="a fixed number of turns"):
        fullframe.tile(Net(function), tile=4)(image())


def test_a_number_in_a_message_is_no_refusal_and_elsewhere_is():
    def bad(net: Any, h: torch.Tensor) -> torch.Tensor:
        if h.max() > 1e9 or torch.isnan(h).any():
            raise ValueError(f"the largest number is {h.max():.3f} of {h}")
        return h

    step = fullframe.tile(Net(bad), tile=4)
    step(image())
    with pytest.raises(ValueError, match="the largest number is <float64 tensor"):
        step(BAD)
    named = fullframe.tile(Net(lambda net, h: {f"{h.max():.3f}": h}), tile=4)
    with pytest.raises(fullframe.CaptureError, match=r"test_conditions.py:\d+ .*into a text"):
        named(image())


def test_a_condition_in_the_backward_is_refused():
    class Checked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            if torch.isnan(g).any():
                raise ValueError("bad gradient")
            return g * 2

    net = Net(lambda net, h: Checked.apply(h))
    with pytest.raises(fullframe.CaptureError, match=r"the backward checks .* in the forward"):
        fullframe.tile(net, tile=4)(image())
    with pytest.raises(fullframe.CaptureError, match=r"the backward checks .* in the forward"):
        fullframe.tile(net, loss=lambda y, t: (y * t).sum(), tile=4)(image(), torch.ones(()))


def test_distributions_check_their_arguments(monkeypatch):
    # torch.compile, once it is used, turns the checks off for the whole process.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)

    class Draws(nn.Module):
        def __init__(self, offset: float):
            super().__init__()
            self.conv, self.offset = (
                nn.Conv2d(2, 4, 3, padding=1).double(),
                nn.Parameter(torch.tensor(offset).double()),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean, scale = self.conv(x).chunk(2, 1)
            made = torch.distributions.Normal(mean, scale.exp() + self.offset)
            return made.rsample() + torch.distributions.kl_divergence(made, torch.distributions.Normal(0.0, 1.0))

    assert fullframe.check(Draws(0.0), image(), tile=4).passed
    net = Draws(-100.0)
    step = fullframe.tile(net, tile=4)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"Expected parameter scale .Tensor of shape .1, 2, 10, 9.. of distribution"
        ):
            step(image())
    with torch.no_grad():
        net.offset.fill_(0)
    step(image())
    D = torch.distributions
    both(
        lambda net, h: (
            D.Bernoulli(logits=h).log_prob((h > 0).double())
            + D.Gamma(h.exp(), h.exp()).entropy()
            + D.Categorical(logits=h.movedim(1, -1)).log_prob(torch.zeros(1, 10, 9)).unsqueeze(1)
        ),
        [image()],
    )
    both(
        lambda net, h: (
            D.Independent(D.Laplace(h, h.exp()), 1).log_prob(h * 0.5)
            + D.MultivariateNormal(h.mean((0, 2, 3)), net.k @ net.k.T).log_prob(h.movedim(1, -1)).sum()
        ),
        [image()],
    )


def test_losses_that_check_their_arguments():
    both(lambda net, h: F.gaussian_nll_loss(h, h * 0.5, h.exp()), [image()])
    step = fullframe.tile(Net(lambda net, h: F.gaussian_nll_loss(h, h * 0.5, h)), tile=4)
    with pytest.raises(ValueError, match="var has negative"):
        step(image())


@pytest.mark.rest
def test_losses_of_monai_that_check_their_weights():
    losses = pytest.importorskip("monai.losses")

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
            self.parts = nn.ModuleList(
                [
                    losses.DiceLoss(weight=weight),
                    losses.FocalLoss(weight=weight),
                    losses.DiceCELoss(weight=weight, softmax=True),
                ]
            )

        def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return sum(part(y.sigmoid(), t) for part in self.parts)  # type: ignore[return-value]

    net = nn.Conv2d(2, 2, 3, padding=1)
    target = (torch.rand(1, 2, 10, 9) > 0.5).double()
    assert fullframe.check(net, image(), target, Loss(), tile=4, tolerance=1e-6).passed  # parts of it are float32


def test_a_covariance_asks_for_a_truth_that_does_not_hold(recordings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        both(lambda net, h: h * torch.cov(h.flatten(2)[0]).sum() + torch.corrcoef(h.flatten(2)[0]).sum(), [image()])
    assert len(recordings) == 1 and not caught


# Linear algebra -----------------------------------------------------------------------------------


def near(k: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Matrices, near ``k``, that follow from the map; a batch of them."""
    return k * (1 + 0.1 * h.mean((2, 3)).tanh())[..., None].expand(1, 2, 2, 2).contiguous()


def positive(m: torch.Tensor) -> torch.Tensor:
    return m @ m.mT + torch.eye(2, dtype=m.dtype)


ALGEBRA: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "inv": L.inv,
    "inverse": torch.inverse,
    "det": L.det,
    "slogdet": lambda m: L.slogdet(m)[1],
    "pinv": L.pinv,
    "cholesky": lambda m: L.cholesky(positive(m)),
    "torch.cholesky": lambda m: torch.cholesky(positive(m)),
    "cholesky_inverse": lambda m: torch.cholesky_inverse(L.cholesky(positive(m))),
    "cholesky_solve": lambda m: torch.cholesky_solve(m, L.cholesky(positive(m))),
    "solve": lambda m: L.solve(m, m[..., 0]),
    "solve right": lambda m: L.solve(m, m.mT, left=False),
    "eigh": lambda m: L.eigh(positive(m))[1].abs(),
    "eigvalsh": lambda m: L.eigvalsh(positive(m)),
    "svd": lambda m: L.svd(m)[0].abs(),
    "svdvals": L.svdvals,
    "qr": lambda m: L.qr(m)[1].abs(),
    "matrix_exp": L.matrix_exp,
    "lu": lambda m: L.lu(m)[2],
    "lu_solve": lambda m: L.lu_solve(*L.lu_factor(m), m),
    "cond": L.cond,
    "solve_triangular": lambda m: L.solve_triangular(m.tril(), m, upper=False),
    "inv_ex": lambda m: L.inv_ex(m)[0],
    "power": lambda m: L.matrix_power(m, -2) + L.matrix_power(m, 0) + L.matrix_power(m, 3),
    "tensorinv": lambda m: L.tensorinv(m[0, 0], 1),
    "multi_dot": lambda m: L.multi_dot([m[0, 0], m[0, 1], m[0, 0]]),
    "logdet": lambda m: torch.logdet(positive(m)),
    "norms": lambda m: L.matrix_norm(m, 2) + L.matrix_norm(m, "nuc") + L.norm(m, 1, dim=(-2, -1)),
}


@pytest.mark.parametrize("name", ALGEBRA)
def test_small_matrices_are_made_whole(name):
    def function(net: Any, h: torch.Tensor) -> torch.Tensor:
        made = ALGEBRA[name](near(net.k, h))
        return h * made.sum() + made.square().mean()

    both(function, [image()])


PARTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "corner": lambda h: h[0, :, :3, :3],
    "columns": lambda h: h[0, 0, :3, :3].T,
    "every other": lambda h: h[0, 0, :5:2, :3],
    "expanded": lambda h: h[0, 0, :3, :3].expand(2, 3, 3),
    "of channels": lambda h: h[:, :, :2, :1].transpose(1, 3),
}


@pytest.mark.parametrize("part", PARTS)
def test_determinants_of_matrices_that_lie_in_a_map(part):
    def function(_: Any, h: torch.Tensor) -> torch.Tensor:
        m = PARTS[part](h)
        return h * (L.det(m) + L.slogdet(m)[1]).sum()

    both(function, [image()])


def test_eigenvalues_that_need_a_check_in_the_backward():
    net = Net(lambda net, h: h * L.eigvals(near(net.k, h)).real.sum())
    with pytest.raises(fullframe.CaptureError, match=r"the backward checks the numbers of a tensor"):
        fullframe.tile(net, tile=4)(image())


def test_a_matrix_that_cannot_be_inverted_raises_as_in_plain_pytorch():
    def function(net: Any, h: torch.Tensor) -> torch.Tensor:
        m = net.k * (h.abs().max() < 1e9)
        return torch.einsum("cd,bdhw->bchw", L.inv(m) + L.cholesky(positive(net.k)), h)

    both(function, [image(), BAD, image()])
    for bad in (L.inv, L.cholesky, lambda m: L.solve(m, m), lambda m: L.eigh(m / 0)[0], torch.inverse):
        both(lambda net, h, bad=bad: h * bad(-net.k.detach() * 0).sum(), [image()])
