"""PyTorch's own databases of operators and modules: nothing wrong, nothing that ends the process."""

from __future__ import annotations

import pytest
from databases import Record, Tally, spread, survey


def test_a_few_entries():
    tally = survey(["nn.functional.avg_pool2d", "linalg.inv", "softmax", "nn.BatchNorm2d (module)"])
    assert len(tally.of("right")) > 40 and not tally.of("wrong", "crash"), tally


def test_what_has_been_done_is_not_done_again(tmp_path):
    file = tmp_path / "records.jsonl"
    first = survey(["sgn"], checkpoint=file)
    again = survey(["sgn"], checkpoint=file)
    assert again.records == first.records and "sgn" not in str(Tally([Record("sgn", "given 0", "right")]))
    assert len(spread(100)) == len(set(spread(100))) and spread(100)[-1] == 99


@pytest.mark.slow
def test_all_of_them():
    tally = survey()
    assert not tally.of("wrong", "crash"), tally
