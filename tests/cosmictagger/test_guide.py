"""The commands that README and the guide give are run as they stand there, on small events and for two steps."""

import re
import shlex
from pathlib import Path

import pytest

from cosmictagger.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["docs/cosmictagger.md", "README.md"])
@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_a_newcomer_gets_through(page, engine, small, small_events, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    commands = [shlex.split(line)[1:] for line in re.findall(r"^cosmictagger .*$", text, re.MULTILINE)]
    assert {words[0] for words in commands} >= {"simulate", "train", "evaluate", "predict"}
    for words in commands:
        if words[0] == "simulate":
            Path(words[1]).write_bytes(small_events.read_bytes())
            continue
        if "--steps" in words:
            words[words.index("--steps") + 1] = "2"
        assert main(words) == 0, f"{' '.join(words)}: {capsys.readouterr().err}"
    code = re.findall(r"(?:^    .*\n|^\n)+", text[text.find("In Python:") :] if "In Python:" in text else "", re.M)
    if code:
        names: dict = {}
        exec("\n".join(line[4:] for line in code[0].splitlines()), names)
        assert names["number"] == 2 and names["neutrino"] >= 0
