"""Several processes that make one step: loss, gradients and buffers as of one process, to the last bit."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranking
import torch
import torch.multiprocessing
from ranking import CASES, WORLD, Case

import fullframe
from fullframe.bytecode.libtorch import bytecode_available
from fullframe.compiler.agreement import axis_of

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What one process makes with the same tiles. It goes first, so that the kernels are there for the others."""
    found = {}
    for name, case in CASES.items():
        net, image, target = ranking.made(case)
        found[name] = ranking.steps(ranking.tiled(case, net), net, image, target, case.steps)
    return found


@pytest.fixture(scope="module")
def folder(alone: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the processes of a world have left what they found; they are started once."""
    path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = [context.Process(target=ranking.work, args=(r, port, str(path))) for r in range(WORLD)]
    for process in started:
        process.start()
    monkeypatch.undo()
    for process in started:
        process.join(300)
    assert [process.exitcode for process in started] == [0, 3, 0, 0]  # one is killed by the last test
    yield path


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.rest
def test_bits_are_those_of_one_process(name: str, found: Found, alone: dict[str, dict[str, Any]]) -> None:
    case, one = CASES[name], alone[name]
    for rank in case.ranks:
        _assert_same(found[rank][name], one)
    axis = 0 if case.axis == "data" else 2
    parts = [found[rank][name]["image"] for rank in case.ranks]
    assert torch.equal(torch.cat(parts, axis), one["image"])
    for k, whole in enumerate(one["outputs"]):
        assert torch.equal(torch.cat([found[rank][name]["outputs"][k] for rank in case.ranks], axis), whole)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.net is not ranking.Far])
@pytest.mark.rest
def test_numbers_are_those_of_plain_pytorch(name: str, alone: dict[str, dict[str, Any]]) -> None:
    """Of the one process, which the ranks are equal to; dropout's are drawn otherwise."""
    case: Case = CASES[name]
    net, image, target = ranking.made(case)
    loss = case.loss
    step = net if loss is None else lambda x, y: loss(net(x), y)
    plain = ranking.steps(step, net, image, target, case.steps)
    torch.testing.assert_close(alone[name]["outputs"], plain["outputs"], rtol=1e-9, atol=1e-12)
    for kind in ("gradients", "buffers"):
        for tensor, number in alone[name][kind].items():
            torch.testing.assert_close(number, plain[kind][tensor], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alone[name]["image"], plain["image"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alone[name]["losses"], plain["losses"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("at", [0, 7, 1000])
@pytest.mark.rest
def test_a_fault_on_one_rank_is_told_on_all_and_nothing_changes(at: int, found: Found) -> None:
    for rank, there in enumerate(found):
        faults = there["faults"]
        if at == 1000:  # there are not so many tiles
            assert faults[f"fault {at}"] == ""
            continue
        wanted = "ArithmeticError: a fault" if rank == 2 else "RankError: the step has failed on another rank"
        assert faults[f"fault {at}"].startswith(wanted)
        assert "a fault in a tile" in faults[f"fault {at}"] and (rank == 2 or "rank 2" in faults[f"fault {at}"])
        assert faults[f"fault {at} changed"] == []
        assert faults[f"fault {at} took"] < 10


@pytest.mark.rest
def test_the_step_after_faults_is_right(found: Found) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found[0]["faults"]["after"]["losses"],
                                                 found[3]["faults"]["after"]["losses"], strict=True))  # fmt: skip


@pytest.mark.rest
def test_a_fault_while_tiles_are_replayed_is_told_on_all(found: Found) -> None:
    for rank, there in enumerate(found):
        faults = there["faults"]
        wanted = "ArithmeticError: a fault" if rank == 2 else "RankError: the step has failed on another rank"
        assert faults["replayed"] == "" and faults["fault late"].startswith(wanted) and faults["again"] == ""
        assert faults["in Python"] == 0 or not bytecode_available()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("shape", ["RankError: ranks differ: input 0", "on rank 1", "axis 2"]),
        ("no image", ["without elements"]),
        ("network", ["RankError: ranks differ: the network's weight is float64[3, 2, 3, 3] on rank 0", "rank 3"]),
        ("budget", ["BudgetError: the step does not fit in a budget of 1,000 bytes"]),
        ("attribute", ["RankError: ranks differ: a tensor of shape [1, 3, 1, 1]", "on rank 1", "buffer"]),
        ("step", ["RankError: ranks have recorded different steps", "tanh", "relu"]),
    ],
)
@pytest.mark.rest
def test_what_differs_is_named_on_all_ranks(what: str, says: list[str], found: Found) -> None:
    for there in found:
        assert all(text in there["faults"][what] for text in says), there["faults"][what]


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "axis"),
    [
        ("domain", (1, 3, 9, 9), torch.float32, 2),
        ("domain", (1, 9, 9), torch.int64, 1),
        ("domain", (1, 9, 9), torch.float32, 1),
        ("domain", (1, 3, 1, 1), torch.float32, None),
        ("domain", (1, 5), torch.float32, None),
        ("domain", (1,), torch.int64, None),
        ("data", (1,), torch.int64, 0),
        ("data", (), torch.float32, None),
    ],
)
def test_inputs_come_in_shards_as_the_image_does(name: str, shape: Any, dtype: torch.dtype, axis: int | None) -> None:
    assert axis_of(name, torch.zeros(shape, dtype=dtype), torch.zeros(1, 3, 9, 9)) == axis


@pytest.mark.rest
def test_a_rank_that_dies_ends_the_step_on_the_others(folder: Path) -> None:
    for rank in (0, 2, 3):
        said, took, changed, again = torch.load(folder / f"killed{rank}.pt")
        assert said.startswith("RankError: a rank of the domain is gone"), said
        assert again.startswith("RankError: a rank of the domain was lost before"), again
        assert changed == [] and took < 10


def _assert_same(ours: dict[str, Any], one: dict[str, Any]) -> None:
    assert all(map(torch.equal, ours["losses"], one["losses"]))
    for kind in ("gradients", "buffers"):
        different = [name for name, t in one[kind].items() if not torch.equal(t, ours[kind][name])]
        assert not different


@pytest.mark.rest
def test_the_example_runs_under_torchrun() -> None:
    example = Path(__file__).parents[2] / "examples" / "ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(example)]
    ran = subprocess.run(
        [*command, "--rows=32", "--columns=32", "--steps=1"], capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    assert "step 0: loss 0." in ran.stdout and "ranks: rank 0 of 2" in ran.stdout


def test_one_folder_alone_talks_to_processes() -> None:
    source = Path(fullframe.__file__).parent
    users = {f.relative_to(source).parts[0] for f in source.rglob("*.py") if "import torch.distributed" in f.read_text()
             or "from torch.distributed" in f.read_text()}  # fmt: skip
    assert users == {"distributed"}


@pytest.mark.rest
def test_replicas_of_other_images_are_averaged_around_it(found: Found) -> None:
    """DistributedDataParallel over the other dimension of the mesh."""
    case = CASES["group norm, 3 ranks"]
    net, image, target = ranking.made(case)
    assert case.loss is not None
    case.loss(net(image), target).backward()  # the mean over both images is that of their means
    for there in found:
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(there["replicas"][name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.rest
def test_the_smallest_budget_is_enough_on_every_rank(found: Found) -> None:
    """Maps are made again, and take no more than a rank's rows of them."""
    net, image, target = ranking.deep()
    torch.nn.functional.cross_entropy(net(image), target).backward()
    whole = fullframe.tile(net, loss=torch.nn.functional.cross_entropy, tile=64, budget="1 GB", workers=1)
    arena = whole.plan(image, target).bytes.arena
    for there in found:
        small = there["small"]
        assert small["again"] > 0 and small["projected"] <= small["least"]
        assert small["arenas"][0] < small["arenas"][1] < 1.15 * arena / WORLD
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(small["gradients"][name], parameter.grad, rtol=1e-9, atol=1e-12)
