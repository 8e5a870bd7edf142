"""Temporary files go with the command that made them, also where it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from slm_export.bundles.held import Held, reclaim
from slm_export.bundles.scratch import scratch

CHILD = """
import tempfile, time
from slm_export.bundles.scratch import scratch
with scratch():
    tempfile.mkdtemp()
    print("here", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_temporary_files_lie_inside_and_go_at_the_end(tmp_path: Path) -> None:
    with scratch() as folder:
        mine = Path(tempfile.mkdtemp())
        theirs = subprocess.run(
            [sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert mine.parent == Path(theirs.stdout.strip()).parent == folder
        assert folder.stat().st_mode & 0o777 == 0o700
    assert os.listdir(tmp_path) == []
    assert Path(tempfile.mkdtemp()).parent == tmp_path


def test_what_a_killed_command_left_is_removed_by_the_next_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "slm-export-mine").mkdir()
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE) as child:
        assert child.stdout
        assert child.stdout.readline() == b"here\n"
        with scratch() as folder:
            assert len(os.listdir(tmp_path)) == 3, "one that lives is left alone"
        child.send_signal(signal.SIGKILL)
    assert len(os.listdir(tmp_path)) == 2
    with scratch() as folder:
        assert sorted(os.listdir(tmp_path)) == sorted(["slm-export-mine", folder.name])


def test_a_folder_goes_with_the_last_who_holds_it(tmp_path: Path) -> None:
    one, two = Held(tmp_path / "shared"), Held(tmp_path / "shared")
    one.leave(remove=True)
    reclaim(tmp_path / "shared")
    assert two.folder.exists()
    two.leave(remove=True)
    assert not two.folder.exists()


def test_what_is_no_folder_is_not_reclaimed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    reclaim(tmp_path / "link")
    reclaim(tmp_path / "missing")
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
