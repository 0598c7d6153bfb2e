"""The script of the application's faults: its cases end as they must, and killed trainings go on bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cosmictagger.__main__ import main
from cosmictagger.atomic import part_of_file, swept

sys.path.append(
    str(Path(__file__).resolve().parents[2] / "bench")
)  # last: a script there has the name of a package here
import application_faults as faults
from application_cases import CASES, materials


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, str]:
    return materials(tmp_path_factory.mktemp("faults") / "in")


@pytest.mark.parametrize("what", [what for kind in CASES.values() for what in kind])
def test_what_a_user_gets_wrong_is_one_line_and_leaves_nothing(what, names, tmp_path, monkeypatch):
    """In this process, which is quicker; the script runs each as a program."""

    def here(arguments, **_):
        with pytest.MonkeyPatch.context() as patched:
            said, told = Told(), Told()
            patched.setattr(sys, "stderr", said)
            patched.setattr(sys, "stdout", told)
            return subprocess.CompletedProcess(arguments, main(arguments[3:]), "", said.text)

    text, wanted = next(kind[what] for kind in CASES.values() if what in kind)
    monkeypatch.setattr(faults.subprocess, "run", here)
    given = names | {"tmp": str(tmp_path), "out": str(tmp_path / "result")}
    before = faults.contents(Path(names["inputs"]))
    said, right = faults.seen(faults.command(text, given), tmp_path)
    assert right and wanted in said, said
    assert faults.contents(Path(names["inputs"])) == before


class Told:
    """Standard error that keeps what it is told."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def test_a_command_ends_so_as_a_program(names, tmp_path):
    said, right = faults.seen(
        faults.command(CASES["weights"]["weights with code"][0], names | {"out": "o"}), tmp_path
    )
    assert right and "might be code" in said


@pytest.mark.rest
@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
def test_a_killed_training_goes_on_bit_for_bit(monkeypatch):
    monkeypatch.setattr(faults, "STEPS", 8)
    rows = list(faults.killed(3))
    assert len(rows) == 3 and all(right for *_, right in rows), rows


@pytest.mark.rest
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting takes root")
def test_a_disk_that_is_full():
    rows = list(faults.full())
    if "not tried" in rows[-1][1]:
        pytest.skip(rows[-1][1])
    assert all(right for *_, right in rows), rows


def test_parts_of_files_that_a_killed_process_left_go_and_nothing_else(tmp_path):
    for name in (".log.jsonl.abcd_123.part", ".mine.abcd_123.part", "log.jsonl", ".log.jsonl.part"):
        (tmp_path / name).write_text("")
    assert part_of_file(tmp_path / ".log.jsonl.abcd_123.part") == "log.jsonl"
    swept(tmp_path, {"log.jsonl"})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".log.jsonl.part", ".mine.abcd_123.part", "log.jsonl"]
