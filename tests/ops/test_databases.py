"""PyTorch's own databases of operators and modules: nothing wrong, nothing that ends the process."""

from __future__ import annotations

import os
import signal

import databases
import pytest
import torch
from databases import Record, Tally, Trial, spread, survey


@pytest.mark.rest
def test_a_few_entries():
    tally = survey(["nn.functional.avg_pool2d", "linalg.inv", "softmax", "nn.BatchNorm2d (module)"])
    assert len(tally.of("right")) > 40 and not tally.of("wrong", "crash"), tally


def test_what_has_been_done_is_not_done_again(tmp_path):
    file = tmp_path / "records.jsonl"
    first = survey(["sgn"], checkpoint=file)
    again = survey(["sgn"], checkpoint=file)
    assert again.records == first.records and "sgn" not in str(Tally([Record("sgn", "given 0", "right")]))
    assert len(spread(100)) == len(set(spread(100))) and spread(100)[-1] == 99


def ending():
    """Trials in which the first and the second run of a network end the process: plain PyTorch's and ours."""

    class Ends(torch.nn.Module):
        runs = 0

        def __init__(self, last):
            super().__init__()
            self.last, self.scale = last, torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x):
            Ends.runs += 1
            if Ends.runs == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            return x * self.scale

    for last in (1, 2):
        Ends.runs = 0
        yield f"run {last}", Trial(Ends(last), torch.randn(1, 1, 4, 4, dtype=torch.float64))


def test_a_process_that_ends_is_ours_or_plain_pytorchs(monkeypatch):
    monkeypatch.setattr(databases, "entries", lambda: {"ending": ending})
    told = {r.trial: (r.outcome, r.detail) for r in survey(["ending"]).records}
    assert told["run 1"] == ("unusable", "plain PyTorch's process ends: SIGKILL")
    assert told["run 2"] == ("crash", "the process ends: SIGKILL")


@pytest.mark.slow
def test_all_of_them():
    tally = survey()
    assert not tally.of("wrong", "crash"), tally
