"""The tiled module and the tiled step have the semantics of plain PyTorch."""

from __future__ import annotations

import copy
import io
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import Mean, agree, batch, close, cross_entropy, grads, plain_net
from torch import nn

import fullframe

TILE = 7


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def both(net, loss=None, **options):
    """The net, and a tiled copy of it."""
    twin = copy.deepcopy(net)
    return net, twin, fullframe.tile(twin, loss=copy.deepcopy(loss), **{"tile": TILE, **options})


# The two forms, and what goes in and out ---------------------------------------------------------


def test_step_equals_plain():
    agree(plain_net(), *batch(), cross_entropy, tile=TILE)


def test_module_equals_plain_and_differentiates_its_input():
    image, _ = batch()
    agree(plain_net(), image.requires_grad_(), tile=TILE)


class Magnitude(nn.Module):
    """Of complex numbers, whose parts are no axis."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, dtype=torch.complex128))

    def forward(self, x):
        return x * self.scale, (x * self.scale).abs()


def test_tiles_of_complex_images():
    agree(Magnitude(), torch.randn(2, 3, 17, dtype=torch.complex128), tile=(5,))


class Ins(nn.Module):
    """Nested containers in and out."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, inputs, scale=1.0):
        x, (y, z) = inputs["x"], inputs["rest"]
        u, v = self.a(x) * scale, self.b(y + z[0])
        return {"sum": u + v, "parts": [u, (v, "a name", None)], "count": 3}


def test_nested_inputs_and_outputs():
    image = batch()[0]
    inputs = {"x": image, "rest": (image + 1, [image * 2])}
    agree(Ins(), inputs, tile=TILE)
    net, _, tiled = both(Ins().double())
    a, b = net(inputs, scale=2.0), tiled(inputs, scale=2.0)
    assert list(a) == list(b) and b["count"] == 3 and b["parts"][1][1:] == ("a name", None)
    assert isinstance(b["parts"], list) and isinstance(b["parts"][1], tuple)
    assert close([a["sum"], a["parts"][0]], [b["sum"], b["parts"][0]])


def test_nested_targets():
    image, labels = batch()

    def loss(output, target):
        return cross_entropy(output["sum"], target["labels"] % 2) + (output["parts"][0] * target["weights"][0]).mean()

    agree(Ins(), {"x": image, "rest": (image, [image])}, {"labels": labels, "weights": [image]}, loss, tile=TILE)


class Criterion(nn.Module):
    """A criterion with a parameter, a class weight and a buffer that counts its calls."""

    def __init__(self, classes=3):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("weight", torch.arange(1.0, classes + 1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, output, target):
        self.calls += 1
        loss = F.cross_entropy(output * self.temperature, target, weight=self.weight)
        return loss, {"logits": output, "accuracy": (output.argmax(1) == target).double().mean()}


def test_criterion_module_with_extras():
    image, labels = batch()
    agree(plain_net(), image, labels, Criterion(), tile=TILE)
    criterion = Criterion().double()
    step = fullframe.tile(plain_net(), loss=criterion, tile=TILE)
    loss, extras = step(image, labels)
    loss.backward()
    assert loss.requires_grad and extras["logits"].requires_grad and not extras["accuracy"].requires_grad
    assert criterion.temperature.grad is not None and criterion.calls == 1
    assert not any("temperature" in k for k in step.state_dict())


def test_same_tensor_twice():
    class Twice(nn.Module):
        def forward(self, x):
            y = F.avg_pool2d(x, 3, 1, 1)
            return y, y, x

    agree(Twice(), batch()[0].requires_grad_(), tile=TILE)
    image = batch()[0]
    step = fullframe.tile(plain_net(classes=1), loss=F.mse_loss, tile=TILE)
    step(image, image).backward()


# Autograd ----------------------------------------------------------------------------------------


def test_scaled_backward_and_accumulation():
    image, labels = batch()
    net, twin, step = both(plain_net(), cross_entropy)
    for factor in (3, 0.5):
        (factor * cross_entropy(net(image), labels)).backward()
        (factor * step(image, labels)).backward()
    assert close(grads(net), grads(twin))


def test_parameter_hooks():
    image, labels = batch()
    net, twin, step = both(plain_net(), cross_entropy)
    seen = []
    for model in (net, twin):
        model[0].weight.register_hook(lambda g: 2 * g)
        model[4].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    cross_entropy(net(image), labels).backward()
    step(image, labels).backward()
    assert close(grads(net), grads(twin)) and len(seen) == 2 and close(seen[0], seen[1])


def test_frozen_and_unused_parameters():
    net = plain_net()
    net[0].weight.requires_grad_(False)
    net.register_parameter("spare", nn.Parameter(torch.ones(3)))
    agree(net, *batch(), cross_entropy, tile=TILE)
    _, twin, step = both(net, cross_entropy)
    step(*batch()).backward()
    assert twin[0].weight.grad is None and twin.spare.grad is None and twin[4].weight.grad is not None


def test_nothing_to_differentiate():
    image, labels = batch()
    net, _, step = both(plain_net().requires_grad_(False), cross_entropy)
    loss = step(image, labels)
    assert not loss.requires_grad and close(loss, cross_entropy(net(image), labels))


def test_retain_graph():
    image, labels = batch()
    net, twin, step = both(plain_net(), cross_entropy)
    plain, tiled = cross_entropy(net(image), labels), step(image, labels)
    for loss in (plain, tiled):
        loss.backward(retain_graph=True)
        loss.backward()
    assert close(grads(net), grads(twin))
    with pytest.raises(RuntimeError, match="second time"):
        tiled.backward()
    output = fullframe.tile(plain_net(), tile=TILE)(image).sum()
    output.backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


class Overwritten(nn.Module):
    """A head on a map, and the map changed in place afterwards, which the head's backward needs as it was."""

    def __init__(self, alone: bool):
        super().__init__()
        self.conv, self.head, self.alone = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 1), alone

    def forward(self, x):
        y = self.conv(x)
        early = self.head(y)
        y.mul_(0.5)
        return early if self.alone else (early, y * y)


@pytest.mark.parametrize("alone", [False, True])
def test_an_output_whose_backward_fails_fails_only_when_asked(alone):
    net, twin, tiled = both(Overwritten(alone).double())
    image = torch.randn(1, 1, 15, 17, dtype=torch.float64)
    made, expected = tiled(image), net(image)
    for mine, plain in zip((made,) if alone else made, (expected,) if alone else expected, strict=True):
        assert close(mine, plain)
        assert mine.requires_grad
    if not alone:
        made[1].sum().backward()
        expected[1].sum().backward()
        for mine, plain in zip(twin.parameters(), net.parameters(), strict=True):
            assert (mine.grad is None) == (plain.grad is None)
            if plain.grad is not None:
                assert close(mine.grad, plain.grad)
    for module in (net, tiled):
        found = module(image)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (found if alone else found[0]).sum().backward()


def test_two_forwards_before_two_backwards():
    first, second = batch(18)[0], batch(18)[0] * 2
    net, twin, tiled = both(plain_net())
    for model in (net, tiled):
        a, b = model(first), model(second)
        a.square().mean().backward()
        b.mean().backward()
    assert close(grads(net), grads(twin))


def test_inside_a_larger_module():
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.stem, self.inner, self.head = nn.Conv2d(1, 1, 1), inner, nn.Conv2d(3, 1, 1)

        def forward(self, x):
            return self.head(self.inner(self.stem(x)))

    inner = plain_net()
    plain = Outer(inner).double()
    partly = copy.deepcopy(plain)
    partly.inner = fullframe.tile(partly.inner, tile=TILE)
    assert list(plain.state_dict()) == list(partly.state_dict())
    partly.load_state_dict(plain.state_dict())
    image = batch()[0]
    for model in (plain, partly):
        model(image).square().mean().backward()
    assert close(grads(plain), grads(partly))
    agree(partly, image, tile=TILE)  # a tiled part inside a tiled whole


def test_plain_tensors_that_require_grad():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gains = [torch.tensor(2.0, requires_grad=True)]

        def forward(self, x):
            return F.avg_pool2d(x, 3, 1, 1) * self.gains[0]

    image = batch()[0].float()
    net, tiled = Gain(), fullframe.tile(Gain(), tile=TILE)
    for model in (net, tiled):
        model(image).square().sum().backward()
    assert close(net.gains[0].grad, tiled.gains[0].grad, 1e-5)


# Buffers -----------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One block called three times: its buffers are updated three times, in order."""

    def __init__(self, **options):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1, **options)

    def forward(self, x):
        for _ in range(3):
            x = torch.relu(self.norm(self.conv(x)))
        return x


@pytest.mark.parametrize("momentum", [0.1, None])
def test_shared_modules_update_buffers_once_per_call(momentum):
    net, twin, step = both(Shared(momentum=momentum).double(), Mean())
    for size in (18, 13):
        image = batch(size)[0]
        net(image).square().mean().backward()
        step(image, None).backward()
    assert twin.norm.num_batches_tracked == 6
    assert close(list(net.buffers()), list(twin.buffers())) and close(grads(net), grads(twin))


def test_buffers_of_other_kinds():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("average", torch.zeros(1, 1, 1, 1), persistent=False)
            self.plain = torch.zeros(())

        def forward(self, x):
            self.seen += 1
            self.plain += 2
            self.average = 0.9 * self.average + 0.1 * x.detach().mean((0, 2, 3), keepdim=True)
            return x * self.seen + self.average * self.plain

    image = batch()[0].float()
    net, twin, tiled = both(Counter())
    for _ in range(3):
        assert close(net(image), tiled(image), 1e-5)
    assert twin.seen == 3 and twin.plain == 6 and close(net.average, twin.average, 1e-5)
    assert len(tiled._fullframe["programs"]) == 1


def test_eval_and_no_grad():
    image, labels = batch()
    net, twin, step = both(plain_net(), cross_entropy)
    before = copy.deepcopy(twin.state_dict())
    step.eval()
    assert not twin[1].training
    agree(net.eval(), image, labels, cross_entropy, tile=TILE)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            loss = step(image, labels)
            assert not loss.requires_grad and close(loss, cross_entropy(net(image), labels))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), twin.state_dict().values(), strict=True))
    step.train()
    assert twin[1].training
    with torch.inference_mode():  # trains the running statistics all the same
        step(image, labels)
    step(image, labels).backward()
    assert twin[1].num_batches_tracked == 2


# The rest of nn.Module -----------------------------------------------------------------------------


def test_hooks_on_loading_as_part_of_another():
    net, loaded = plain_net(), []
    net.register_load_state_dict_post_hook(lambda module, keys: loaded.append(keys))
    for outer in (nn.ModuleDict({"inner": net}), nn.ModuleDict({"inner": fullframe.tile(net)})):
        outer.load_state_dict(outer.state_dict())
    assert len(loaded) == 2


def test_state_dict_round_trip():
    net, _twin, tiled = both(plain_net())
    assert list(net.state_dict()) == list(tiled.state_dict())
    file = io.BytesIO()
    torch.save(tiled.state_dict(), file)
    file.seek(0)
    fresh = fullframe.tile(plain_net(), tile=TILE)
    image = batch()[0]
    tiled(image)
    assert not close(fresh.eval()(image), tiled.eval()(image))
    fresh.load_state_dict(torch.load(file))
    plain_net().load_state_dict(tiled.state_dict())
    assert close(fresh.eval()(image), net.eval()(image))
    norm = fullframe.tile(nn.BatchNorm2d(1))
    norm.load_state_dict(nn.BatchNorm2d(1).state_dict())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_stand_alone(how):
    image, labels = batch()
    step = fullframe.tile(plain_net(), loss=cross_entropy, tile=TILE)
    loss = step(image, labels)
    other = how(step)
    with torch.no_grad():
        for p in step.parameters():
            p.zero_()
    assert close(other(image, labels), loss)
    other(image, labels).backward()
    assert all(p.grad is not None for p in other.parameters()) and all(p.grad is None for p in step.parameters())
    assert other.module[0].weight is next(other.parameters())


def test_to_dtype_and_attributes():
    net = plain_net()
    net.threshold = 3
    tiled = fullframe.tile(net, tile=TILE)
    assert tiled.float() is tiled and net[1].running_mean.dtype == torch.float32
    assert tiled(batch()[0].float()).dtype == torch.float32
    assert tiled.threshold == 3
    tiled.threshold = 4
    assert net.threshold == 4 and not hasattr(tiled, "no_such_name")
    assert tiled[0] is net[0] if hasattr(type(tiled), "__getitem__") else True


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.Adam(p, 0.01)]
)
def test_optimisers(make):
    image, labels = batch()
    net, twin, step = both(plain_net(), cross_entropy)
    one, two = make(net.parameters()), make(step.parameters())
    for _ in range(3):
        one.zero_grad()
        two.zero_grad()
        cross_entropy(net(image), labels).backward()
        step(image, labels).backward()
        one.step()
        two.step()
    assert close(list(net.parameters()), list(twin.parameters()), 1e-7)


@pytest.mark.parametrize(
    "kind", ["weight_norm", "spectral_norm", "old_spectral_norm", "old_weight_norm", "orthogonal"]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrisations(kind):
    make = {
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
        "orthogonal": nn.utils.parametrizations.orthogonal,
        "old_weight_norm": nn.utils.weight_norm,
        "old_spectral_norm": nn.utils.spectral_norm,
    }[kind]
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), make(nn.Conv2d(3, 2, 3, padding=1))).double()
    image = batch()[0]
    net, twin, step = both(net, Mean()) if "old" not in kind else (net, None, None)
    if step is None:
        agree_old(kind)
        return
    for _ in range(2):
        net(image).square().mean().backward()
        step(image, None).backward()
    assert close(grads(net), grads(twin)) and close(list(net.buffers()), list(twin.buffers()))


def agree_old(kind):
    """The hook based forms cannot be deep-copied once used: two nets from one seed instead."""
    make = nn.utils.weight_norm if kind == "old_weight_norm" else nn.utils.spectral_norm
    image = batch()[0]
    pair = []
    for _ in range(2):
        torch.manual_seed(1)
        pair.append(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), make(nn.Conv2d(3, 2, 3, padding=1))).double())
    step = fullframe.tile(pair[1], loss=Mean(), tile=TILE)
    for _ in range(2):
        pair[0](image).square().mean().backward()
        step(image, None).backward()
    assert close(grads(pair[0]), grads(pair[1])) and close(list(pair[0].buffers()), list(pair[1].buffers()))


def test_forward_hooks_of_submodules_and_of_the_tiled_module():
    image = batch()[0]
    net, twin, tiled = both(plain_net())
    tiled(image)
    for model in (net, twin):
        model[2].register_forward_hook(lambda m, i, o: o * 2)
        model[4].register_forward_pre_hook(lambda m, i: (i[0] + 1,))
        model[4].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    for model in (net, tiled):
        model.register_forward_hook(lambda m, i, o: o + 1)
    a, b = net(image), tiled(image)
    a.square().mean().backward()
    b.square().mean().backward()
    assert close(a, b) and close(grads(net), grads(twin))


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    image, labels = batch()
    net, twin, step = both(plain_net(), cross_entropy)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(step)
        for _ in range(2):
            parallel(image, labels).backward()
            cross_entropy(net(image), labels).backward()
    finally:
        dist.destroy_process_group()
    assert close(grads(net), grads(twin))


# Kinds of networks and inputs ----------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3])
def test_one_to_three_dimensions(d):
    conv, up = getattr(nn, f"Conv{d}d"), getattr(nn, f"ConvTranspose{d}d")
    pool, norm = getattr(nn, f"MaxPool{d}d"), getattr(nn, f"BatchNorm{d}d")
    net = nn.Sequential(
        conv(1, 3, 3, padding=1, stride=2), norm(3), nn.LeakyReLU(), pool(2), conv(3, 4, 3, padding=2, dilation=2),
        up(4, 2, 3, stride=2, padding=1, output_padding=1), nn.GELU(), up(2, 2, 2, stride=2), conv(2, 1, 1),
    )  # fmt: skip
    agree(net, torch.randn(2, 1, *[22, 19, 17][:d]).requires_grad_(), tile=5)


def test_changed_input_size_and_memory_format():
    net, twin, tiled = both(plain_net())
    images = [batch(s)[0] for s in (18, 26, 18)]
    images += [
        images[0].contiguous(memory_format=torch.channels_last),
        images[1].transpose(2, 3),
        images[1][:, :, ::2],
    ]
    images += [images[1].expand(2, 1, 26, 26)[:, :, 3:21, 4:24]]
    for image in images:
        a, b = net(image), tiled(image)
        a.mean().backward()
        b.mean().backward()
        assert close(a, b) and close(grads(net), grads(twin))


def test_mixed_dtypes():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1).double()

        def forward(self, x, mask, index):
            return torch.where(mask, self.b(self.a(x).double()), index)

    net, _, tiled = both(Mixed())
    image = batch()[0].float()
    arguments = (image, image > 0, torch.arange(18)[None, None, None])
    assert close(net(*arguments), tiled(*arguments), 1e-6)


def test_autocast_no_further_from_the_truth_than_plain():
    image, labels = batch(34)
    truth, half, twin = plain_net(16), plain_net(16), plain_net(16)
    for model in (half, twin):
        model.load_state_dict(truth.state_dict())
        model.float()
    step = fullframe.tile(twin, loss=cross_entropy, tile=TILE)
    exact = cross_entropy(truth(image), labels)
    exact.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, tiled = cross_entropy(half(image.float()), labels), step(image.float(), labels)
    plain.backward()
    tiled.backward()

    def error(model):
        pairs = list(zip(grads(model), grads(truth), strict=True))
        return sum(float((a.double() - b).square().sum()) for a, b in pairs) ** 0.5

    assert 0 < error(twin) <= 1.5 * error(half)
    assert abs(tiled.item() - exact.item()) < 0.02 and twin[0].weight.grad.dtype == torch.float32


# Refusals --------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    step = fullframe.tile(plain_net(), loss=cross_entropy, tile=TILE)
    with pytest.raises(ValueError, match=r"input 0 has shape \(0, 1, 18, 18\)"):
        step(torch.zeros(0, 1, 18, 18, dtype=torch.float64), torch.zeros(0, 18, 18, dtype=torch.long))
    with pytest.raises(ValueError, match="the criterion must return a loss"):
        fullframe.tile(plain_net(), loss=lambda y, t: None)(*batch())
    with pytest.raises(ValueError, match="spatial axes"):
        fullframe.tile(plain_net(), loss=cross_entropy, tile=(3, 3, 3))(*batch())
    with pytest.raises(TypeError, match="input and a target"):
        step(batch()[0])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8 GB", 8 * 10**9), ("7.5 GiB", int(7.5 * 2**30)), ("100", 100), (2048, 2048), (" 64mib ", 64 << 20), ("1e9", None),
     ("-3 GB", None), ("8 Gb ram", None), (0, None), (True, None), (1.5e9, 1_500_000_000), (float("nan"), None)],
)  # fmt: skip
def test_budgets(text, nbytes):
    from fullframe.budget import parse_bytes

    if nbytes is None:
        with pytest.raises(ValueError, match="budget"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == nbytes


def test_a_budget_too_small_names_one_that_does():
    image, labels = batch(66)
    with pytest.raises(fullframe.BudgetError, match="smallest") as caught:
        fullframe.tile(plain_net(), loss=cross_entropy, budget=1000).plan(image, labels)
    smallest = caught.value.smallest
    net, twin, step = both(plain_net(), cross_entropy, budget=smallest, tile=None)
    assert step.plan(image, labels).projected_bytes <= smallest
    cross_entropy(net(image), labels).backward()
    step(image, labels).backward()
    assert close(grads(net), grads(twin))


def test_errors_pickle():
    errors = [fullframe.BudgetError("b", 3), fullframe.CaptureError("c"), fullframe.UnsupportedOpError("u")]
    again = pickle.loads(pickle.dumps(errors))
    assert [type(e) for e in again] == [type(e) for e in errors] and [str(e) for e in again] == ["b", "c", "u"]
    assert again[0].smallest == 3 and all(isinstance(e, fullframe.FullframeError) for e in again)


def test_check_reports_in_words():
    found = fullframe.check(plain_net(), *batch(), cross_entropy)
    assert found.passed and "the same in float64" in str(found) and len(found.of("gradient")) == 7
    wrong = fullframe.check(plain_net(), *batch(), cross_entropy, tolerance=0.0)
    assert not wrong.passed and "beyond the tolerance" in str(wrong)


def test_check_draws_the_same_numbers_both_ways_and_leaves_the_random_state():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.3), nn.utils.weight_norm(nn.Conv2d(4, 3, 1)))
    before = torch.get_rng_state()
    found = fullframe.check(net, *batch(), cross_entropy)
    assert found.passed and "dropout" in str(found), found
    assert torch.equal(before, torch.get_rng_state())
    named = [d.name for d in found.of("gradient")]
    assert sorted(named) == ["0.bias", "0.weight", "2.bias", "2.weight_g", "2.weight_v"]
    assert all(name in str(found) for name in named)


def test_check_takes_the_corner_of_a_large_image():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 3, padding=1))
    image, labels = torch.randn(1, 1, 640, 1000), torch.randint(0, 3, (1, 320, 500))
    found = fullframe.check(net, {"x": image}["x"], labels, cross_entropy)
    assert found.passed and "first 256 x 256 pixels" in str(found), found
    rigid = nn.Sequential(nn.MaxPool2d(20), nn.Flatten(), nn.Linear(1600, 2))
    with pytest.raises(ValueError, match="small instance"):
        fullframe.check(rigid, image)


def test_workers_are_as_asked_for_where_the_system_does_not_tell_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    net, image = nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 64, 64)
    assert fullframe.tile(net, workers=1).plan(image).workers == 1
    assert fullframe.tile(net).plan(image).workers == os.cpu_count()


# Other ways of torch's ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_operators_of_the_users_own_that_change_their_arguments():
    @torch.library.custom_op("fullframe_tests::grow_", mutates_args={"x"})
    def grow_(x: torch.Tensor, factor: float) -> None:
        x.mul_(factor)

    @grow_.register_fake
    def _(x, factor):
        return None

    @torch.library.custom_op("fullframe_tests::count", mutates_args={"seen"})
    def count(seen: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.add_(1)
        return y * seen

    @count.register_fake
    def _(seen, y):
        return torch.empty_like(y)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            y = self.conv(x)
            z = y.detach().clone()
            grow_(z, 0.5)
            return y * z + count(self.seen, z)

    net, twin, tiled = both(Net().double())
    for k in range(1, 5):
        image = batch()[0] * k
        plain, made = net(image), tiled(image)
        plain.square().mean().backward(), made.square().mean().backward()
        assert close(plain, made) and close(grads(net), grads(twin)) and twin.seen == net.seen == k


def test_torch_compile_leaves_a_tiled_module_as_it_is():
    """What is around it is compiled; of the engine, nothing is."""
    net, twin, tiled = both(plain_net())
    compiled = []

    def backend(graph, _inputs):
        compiled.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    image, labels = batch()
    step = fullframe.tile(twin, loss=cross_entropy, tile=TILE)
    around = torch.compile(lambda x: tiled(x.sin()).cos().sum(), backend=backend)
    for model, made in ((net, net(image.sin()).cos().sum()), (twin, around(image))):
        assert close(made, net(image.sin()).cos().sum())
        made.backward()
        assert grads(model)[0] is not None
    assert close(grads(net), grads(twin)) and {"sin", "cos"} <= set(compiled) and len(compiled) < 6, compiled
    assert close(torch.compile(tiled, backend=backend)(image), net(image))
    assert close(torch.compile(step, backend=backend)(image, labels), cross_entropy(net(image), labels))
    step.compile(backend=backend)
    assert close(step(image, labels), cross_entropy(net(image), labels))
    assert len(compiled) < 6, compiled
