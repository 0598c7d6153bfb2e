"""Where compiled kernels are kept when the user's own folders cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fullframe.codegen.toolchain import kept_files


@pytest.fixture(autouse=True)
def temporary(monkeypatch, tmp_path):
    """No folder for caches, and a temporary folder of the test's own."""
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    kept_files.directory.cache_clear()
    yield folder
    kept_files.directory.cache_clear()


def asked_anew() -> Path:
    kept_files.directory.cache_clear()
    return kept_files.directory()


def test_one_private_folder_for_each_user(temporary):
    found = asked_anew()
    assert found == temporary / f"fullframe-{os.geteuid()}" == asked_anew()
    assert found.stat().st_mode & 0o777 == 0o700 and list(temporary.iterdir()) == [found]


def test_a_folder_that_others_may_write_is_not_used(temporary):
    own = temporary / f"fullframe-{os.geteuid()}"
    own.mkdir()
    own.chmod(0o777)
    assert asked_anew() != own
    own.rmdir()
    own.symlink_to(temporary)
    assert asked_anew() != own
    own.unlink()
    own.write_text("")
    assert asked_anew() != own


def test_a_folder_of_one_process_goes_with_it(temporary):
    (temporary / f"fullframe-{os.geteuid()}").write_text("")
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from fullframe.codegen.toolchain import kept_files
folder = kept_files.directory()
(folder / "made").write_text("")
if os.fork() == 0:
    sys.exit()
os.wait()
assert (folder / "made").exists()
print(folder)
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    folder = Path(made.stdout.strip())
    assert folder.parent == temporary and not folder.exists()
