"""PyTorch's own databases of operators and modules, tiled against plain in float64.

`op_db` and `module_db` of `torch.testing._internal` hold samples of every public operator and module. Each sample is
made part of a small network: an operator runs on its own numbers, scaled by what a convolution says of an image
("given"), on a convolved image in place of its first tensor ("image") or in place ("in place"); a module has
convolutions around it. Outputs, every gradient and every buffer are compared, of two calls. The trials of one entry
run in a process of their own, so that one which ends its process is counted, too.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy
import torch
from fuzzing import MARGIN, NOISE, TOLERANCE, uncompiled
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import fullframe
from fullframe.check import twin
from fullframe.oracle import drawn

SAMPLES = 8  # of an entry and form, evenly spread
SECONDS = 120  # that one trial may take
DRAWS = 4  # of a change in the last bits, where a trial is to be found wrong
IMAGE = (2, 3, 8, 9)
OUTCOMES = ("right", "wrong", "crash", "refused", "ill-conditioned", "unusable")
PLAIN = "plain"  # what a process says between its two runs of a trial
UNSET = ("empty", "resize")  # in names of operators whose numbers nobody has set
Trials = Iterator[tuple[str, "Trial"]]


@dataclass
class Record:
    """What became of a trial: one of `OUTCOMES`; 'unusable' where plain PyTorch cannot run it."""

    entry: str
    trial: str
    outcome: str
    detail: str = ""


@dataclass
class Trial:
    """A network, its input, and whether the numbers of its outputs mean anything."""

    net: nn.Module
    input: torch.Tensor
    meant: bool = True


# Networks ------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A call with tensors as parameters and buffers, of which the first is made from the image."""

    def __init__(self, call: Callable[..., Any] | None, arguments: Any, form: str):
        super().__init__()
        self.call, self.form = call, form
        leaves, self.spec = pytree.tree_flatten(arguments)
        self.plain: list[Any] = []
        self.hot: int | None = None
        known: dict[int, str] = {}
        for k, leaf in enumerate(leaves):
            name = f"t{k}"
            if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
                self.plain.append(leaf)
                continue
            self.plain.append(known.setdefault(id(leaf), name))
            if self.plain[-1] != name:
                continue
            if leaf.is_floating_point() or leaf.is_complex():
                self.hot = k if self.hot is None else self.hot
                setattr(self, name, nn.Parameter(leaf.detach().clone(), leaf.requires_grad))
            else:
                self.register_buffer(name, leaf.detach().clone())
        self.names = frozenset(known.values())
        self.conv = nn.Conv2d(IMAGE[1], IMAGE[1], 3, padding=1, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(0.97, dtype=torch.float64))
        hot = None if self.hot is None else getattr(self, self.plain[self.hot])
        self.shape = None if hot is None else hot.shape
        self.direct = hot is not None and form != "image" and hot.dim() >= 3 and hot.numel() > 0

    def image(self) -> torch.Tensor:
        """What it is given: the first tensor itself if that may be an image."""
        if self.direct:
            return getattr(self, f"t{self.hot}").detach().clone().requires_grad_()
        return torch.randn(IMAGE, dtype=torch.float64, requires_grad=True)

    def forward(self, x: torch.Tensor, call: Callable[..., Any] | None = None) -> Any:
        leaves = [getattr(self, n) if isinstance(n, str) and n in self.names else n for n in self.plain]
        if self.direct:
            leaves[self.hot] = x * self.scale
        elif self.form == "image":
            made = self.conv(x)
            for k, leaf in enumerate(leaves):
                if isinstance(leaf, nn.Parameter) and leaf.shape == self.shape and not leaf.is_complex():
                    leaves[k] = 0.5 + 0.4 * torch.tanh(made * (1 + k))
        elif self.hot is not None:
            leaves[self.hot] = leaves[self.hot] * (1 + 0.05 * torch.tanh(self.conv(x).mean()))
        arguments, keywords = pytree.tree_unflatten(leaves, self.spec)
        function = call or self.call
        assert function is not None
        return function(*arguments, **keywords)


class Between(nn.Module):
    """A module between convolutions of one pixel."""

    def __init__(self, module: nn.Module, arguments: Any):
        super().__init__()
        self.inner = Around(None, arguments, "given")
        self.module = module
        shape = self.inner.shape if self.inner.direct else ()
        self.scales = nn.Parameter(torch.linspace(0.9, 1, shape[1] if shape else 1, dtype=torch.float64))

    def image(self) -> torch.Tensor:
        return self.inner.image()

    def forward(self, x: torch.Tensor) -> Any:
        if self.inner.direct:
            kernel = self.scales.view(-1, 1, *[1] * (x.dim() - 2))
            x = _convolve(x, kernel)
        made = self.inner(x, self.module)
        return made * self.scales.mean() if isinstance(made, torch.Tensor) and made.is_floating_point() else made


def _convolve(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    convolve = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}.get(x.dim())
    return x * kernel[:, 0] if convolve is None else convolve(x, kernel, groups=x.shape[1])


def operator_trials(info: Any) -> Trials:
    """Every form of every chosen sample of an operator, by name."""
    kind = torch.float64 if torch.float64 in info.supported_dtypes("cpu") else None
    kind = kind or (torch.complex128 if torch.complex128 in info.supported_dtypes("cpu") else torch.int64)
    if kind not in info.supported_dtypes("cpu"):
        return
    _seed()
    samples = list(info.sample_inputs("cpu", kind, requires_grad=info.supports_autograd and kind != torch.int64))
    forms = {"given": info.get_op(), "image": info.get_op(), "in place": info.get_inplace()}
    for form, call in forms.items():
        for k in spread(len(samples)):
            if call is None or (form == "in place" and samples[k].broadcasts_input):
                continue

            def run(*args: Any, call: Any = call, sample: Any = samples[k], form: str = form, **kwargs: Any) -> Any:
                args = (args[0].clone(), *args[1:]) if form == "in place" else args
                return sample.output_process_fn_grad(call(*args, **kwargs))

            _seed()
            net = Around(run, ((samples[k].input, *samples[k].args), samples[k].kwargs), form)
            yield f"{form} {k}", Trial(net, net.image(), not any(u in info.name for u in UNSET))


def module_trials(info: Any) -> Trials:
    """Every chosen sample of a module, in training and evaluation."""
    for training in (True, False):
        _seed()
        samples = list(
            info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)
        )
        for k in spread(len(samples)):
            _seed()
            made, given = samples[k].constructor_input, samples[k].forward_input
            module = info.module_cls(*made.args, **made.kwargs).double()
            net = Between(module, (given.args, given.kwargs)).train(training)
            yield f"{'training' if training else 'evaluation'} {k}", Trial(net, net.image())


def spread(count: int) -> list[int]:
    """Numbers of the samples that are tried."""
    return list(range(count)) if count <= SAMPLES else [k * (count - 1) // (SAMPLES - 1) for k in range(SAMPLES)]


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


# One trial -----------------------------------------------------------------------------------------

Results = dict[str, Any]


def results(trial: Trial, net: nn.Module, run: Callable[[torch.Tensor], Any], noise: int = 0) -> Results:
    """What a call and its backward leave behind; ``noise``: the number of a change in the last bits before it."""
    x = trial.input.detach().clone()
    if noise:
        generator = torch.Generator().manual_seed(noise)
        with torch.no_grad():
            for t in (x, *net.parameters()):
                if t.is_floating_point():
                    t.mul_(1 + NOISE * torch.randn(t.shape, generator=generator, dtype=t.dtype))
    x.requires_grad_(x.is_floating_point() or x.is_complex())
    for p in net.parameters():
        p.grad = None
    torch.manual_seed(1)
    made = run(x)
    leaves = pytree.tree_leaves(made)
    found: Results = {f"output {k}": t.detach() if isinstance(t, torch.Tensor) else t for k, t in enumerate(leaves)}
    tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
    found |= {f"requires_grad of output {k}": t.requires_grad for k, t in enumerate(tensors)}
    total = weighted(tensors)
    if total.requires_grad:
        total.backward()
    found |= {f"gradient of {n}": p.grad for n, p in [*net.named_parameters(), ("the image", x)]}
    found |= {f"buffer {n}": b.detach().clone() for n, b in net.named_buffers()}
    return found


def weighted(outputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """A scalar that every number of every output reaches, each with another weight."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for t in outputs:
        if t.requires_grad:
            t = torch.view_as_real(t) if t.is_complex() else t
            t = t.to_dense() if t.layout is not torch.strided else t
            weight = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            total = total + (t.double() * weight).sum() / max(1, t.numel()) ** 0.5
    return total


def worst_of(expected: Results, found: Results, meant: bool) -> tuple[float, str]:
    """The largest difference, relative to the largest gradient or to the tensor's own largest number, and where."""
    gaps = [(0.0, "nothing")]
    largest = max((_largest(t) for n, t in expected.items() if n.startswith("gradient")), default=0.0)
    for name in expected.keys() | found.keys():
        a, b = (side.get(name, "missing") for side in (expected, found))
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if not (a is b or (type(a) is type(b) and (a == b or (a != a and b != b)))):
                gaps.append((float("inf"), f"{name}: {_shown(a)} is {_shown(b)}"))
        elif (a.shape, a.dtype) != (b.shape, b.dtype):
            gaps.append((float("inf"), f"{name}: {a.dtype}{list(a.shape)} is {b.dtype}{list(b.shape)}"))
        elif a.numel() and a.layout is torch.strided and (meant or not name.startswith("output")):
            scale = max(largest if name.startswith("gradient") else _largest(a), 1e-6)
            gaps.append((_largest(_apart(a, b)) / scale, name))
    return max(gaps, key=lambda g: float("inf") if g[0] != g[0] else g[0])


def _shown(thing: Any) -> str:
    return "a tensor" if isinstance(thing, torch.Tensor) else str(thing)[:60]


def _real(t: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(t.resolve_conj()).double() if t.is_complex() else t.double()


def _apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = _real(a), _real(b)
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, a - b).nan_to_num(float("inf"), float("inf"), float("-inf"))


def _largest(t: Any) -> float:
    if not isinstance(t, torch.Tensor) or t.numel() == 0 or t.layout is not torch.strided:
        return 0.0
    return float(_real(t).abs().nan_to_num(0.0, 0.0, 0.0).max()) if not t.isinf().all() or t.isnan().any() else 1.0


def judged(trial: Trial, plain_runs: Callable[[], None] = lambda: None) -> tuple[str, str]:
    """Run a trial both ways: what became of it, and why. ``plain_runs`` is told once plain PyTorch has come through."""

    def plain(noise: int = 0) -> Results:
        net = twin(trial.net)

        def run(x: torch.Tensor) -> Any:
            with drawn():
                return net(x)

        return results(trial, net, run, noise)

    expected: Results = {}
    unknown = ""
    grad = torch.enable_grad()
    for attempt in (torch.enable_grad(), torch.no_grad()):  # an operator may have no derivative
        grad = attempt
        try:
            with grad:
                expected = plain()
        except Exception as error:
            unknown = _first(error)
        if expected:
            break
        if "this oracle" in unknown:
            try:
                with grad, torch.no_grad():
                    twin(trial.net)(trial.input)
            except Exception as error:
                return "unusable", _first(error)
            break
    if not expected and "this oracle" not in unknown:
        return "unusable", unknown
    plain_runs()
    net = twin(trial.net)
    step = fullframe.tile(net, tile=tuple(-(-n // 2) for n in trial.input.shape[2:]), workers=1)
    before = copy.deepcopy(net.state_dict())
    worst, where = 0.0, ""
    try:
        for _ in range(2):
            net.load_state_dict(before)
            with grad:
                found = results(trial, net, step)
            worst, where = max((worst, where), worst_of(expected or found, found, trial.meant))
    except fullframe.FullframeError as error:
        return "refused", _first(error)
    except Exception as error:
        beyond = _first(error) == _of_shapes(trial)
        return "unusable" if beyond else "crash", _first(error)
    if not expected:
        return "unusable", unknown
    if worst <= TOLERANCE:
        return "right", f"{worst:.1e}"
    with grad:
        own = max(worst_of(expected, plain(k + 1), trial.meant)[0] for k in range(DRAWS))
    bad = not worst <= MARGIN * own
    return "wrong" if bad else "ill-conditioned", f"{worst:.2g} at {where}; plain PyTorch moves by {own:.2g}"


def _of_shapes(trial: Trial) -> str:
    """What PyTorch's own rules of shapes object to: some kernels read past the end of a tensor instead."""
    net = twin(trial.net)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            tensors = {n: mode.from_tensor(t) for n, t in [*net.named_parameters(), *net.named_buffers()]}
            made = torch.func.functional_call(net, tensors, (mode.from_tensor(trial.input),))
            total = sum(t.sum() for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor) and t.requires_grad)
            if isinstance(total, torch.Tensor):
                total.abs().backward()
    except Exception as error:
        return _first(error)
    return ""


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# All trials ----------------------------------------------------------------------------------------


def entries() -> dict[str, Callable[[], Trials]]:
    """Every operator and module, by name, and its trials."""
    from torch.testing._internal import common_methods_invocations as invocations
    from torch.testing._internal.common_modules import module_db

    invocations.wrapper_set_seed = lambda call, *args, **kwargs: call(*args, **kwargs)  # a step's seed is its own
    operators = {f"{i.name} {i.variant_test_name}".strip(): i for i in invocations.op_db}
    modules = {f"{i.name} (module)": i for i in module_db}
    return {n: lambda i=i: operator_trials(i) for n, i in operators.items()} | {
        n: lambda i=i: module_trials(i) for n, i in modules.items()
    }


def _child(out: Connection, entry: Callable[[], Trials], done: frozenset[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # what a library says as it aborts
    with uncompiled():
        try:
            for name, trial in entry():
                if name not in done:
                    out.send((name, None))
                    out.send((name, judged(trial, lambda name=name: out.send((name, PLAIN)))))
        except Exception as error:
            out.send(("samples", None))
            out.send(("samples", ("unusable", _first(error))))
    out.close()


@dataclass
class _Running:
    name: str
    process: Any
    connection: Connection
    since: float
    trial: str = ""
    plain: bool = False  # whether plain PyTorch has come through


def tried(names: Sequence[str], done: dict[str, set[str]], processes: int = 1) -> Iterator[Record]:
    """The records of these entries but for the trials that are done, as they come."""
    known, queue, running = entries(), list(names), []
    fork = multiprocessing.get_context("fork")
    while queue or running:
        while queue and len(running) < processes:
            name = queue.pop(0)
            ours, theirs = fork.Pipe(duplex=False)
            past = frozenset(done.setdefault(name, set()))
            process = fork.Process(target=_child, args=(theirs, known[name], past), daemon=True)
            process.start()
            theirs.close()
            running.append(_Running(name, process, ours, time.monotonic()))
        ready = wait([r.connection for r in running], timeout=5)
        for r in list(running):
            if r.connection in ready:
                ended = yield from _heard(r, done)
            else:
                ended = time.monotonic() - r.since > SECONDS
                if ended:
                    r.process.kill()
            if ended:
                r.process.join()
                running.remove(r)
                if r.trial:
                    code = r.process.exitcode
                    why = signal.Signals(-code).name if code < 0 else f"exit {code}"
                    done[r.name].add(r.trial)
                    queue.insert(0, r.name)
                    outcome, whose = ("crash", "the process") if r.plain else ("unusable", "plain PyTorch's process")
                    yield Record(r.name, r.trial, outcome, f"{whose} ends: {why}")


def _heard(r: _Running, done: dict[str, set[str]]) -> Iterator[Record]:
    """Take one message; returns whether it was the last."""
    try:
        trial, verdict = r.connection.recv()
    except EOFError:
        return True
    r.plain, r.since = verdict == PLAIN, time.monotonic()
    r.trial = "" if verdict and not r.plain else trial
    if not r.trial:
        done[r.name].add(trial)
        yield Record(r.name, trial, *verdict)
    return False


@dataclass
class Tally:
    """Counts over records."""

    records: list[Record] = field(default_factory=list)

    def of(self, *outcomes: str) -> list[Record]:
        return [r for r in self.records if r.outcome in outcomes]

    def __str__(self) -> str:
        counts = Counter(r.outcome for r in self.records)
        tried = len({r.entry for r in self.records})
        lines = [f"{len(self.records)} trials of {tried} entries: " + ", ".join(f"{counts[o]} {o}" for o in OUTCOMES)]
        lines += [f"{r.outcome}: {r.entry}, {r.trial}: {r.detail}" for r in self.of("wrong", "crash")]
        return "\n".join(lines)

    def table(self) -> str:
        """Per entry the counts, where anything is not right; and why what is refused is refused."""
        rows = [f"| entry | {' | '.join(OUTCOMES)} |", "|---" * (1 + len(OUTCOMES)) + "|"]
        for entry in sorted({r.entry for r in self.of("wrong", "crash", "refused", "ill-conditioned")}):
            counts = Counter(r.outcome for r in self.records if r.entry == entry)
            rows.append(f"| {entry} | {' | '.join(str(counts[o] or '') for o in OUTCOMES)} |")
        reasons: dict[str, Counter[str]] = {}
        for r in self.of("refused"):
            reasons.setdefault(r.detail, Counter())[r.entry] += 1
        told = sorted(reasons.items(), key=lambda item: -sum(item[1].values()))
        lines = [f"- {sum(c.values())} of {', '.join(sorted(c))}: {why}" for why, c in told]
        return "\n".join([*rows, "", "Refused:", "", *lines])


def read(checkpoint: Path) -> list[Record]:
    """The records of an earlier run; a line that was cut off is left out."""
    records = []
    if checkpoint.exists():
        for line in checkpoint.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                records.append(Record(**json.loads(line)))
    return records


def survey(names: Sequence[str] | None = None, checkpoint: Path | None = None, processes: int = 1) -> Tally:
    """Try all entries, or those named; a run that was stopped goes on where its checkpoint ends."""
    records = read(checkpoint) if checkpoint else []
    done: dict[str, set[str]] = {}
    for r in records:
        done.setdefault(r.entry, set()).add(r.trial)
    for record in tried(list(names or entries()), done, processes):
        records.append(record)
        if checkpoint:
            with checkpoint.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")
    return Tally(records)
