"""Which programs a tiled module keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fullframe.frontend.reads import EVERYTHING
from fullframe.runtime.execution_paths import keep


def test_the_latest_used_is_last_and_what_was_not_used_for_longest_goes():
    programs: dict[Any, Any] = {}
    made: Any = {name: SimpleNamespace(answers=()) for name in "abc"}
    for name in "abaacc":
        keep(programs, (EVERYTHING, name), made[name], 2)
    assert [key[1] for key in programs] == ["a", "c"]


def test_the_last_one_is_replaced_by_another_program_and_keeps_its_other_ways():
    programs: dict[Any, Any] = {}
    key = EVERYTHING, "a"
    one, other, way = (SimpleNamespace(answers=answers) for answers in ((), (), (True,)))
    for program in (one, other, way, way, other):
        keep(programs, key, program, 1)  # type: ignore[arg-type]
    assert list(programs) == [(*key, (True,)), (*key, ())]
    assert programs[*key, ()] is other and programs[*key, (True,)] is way
