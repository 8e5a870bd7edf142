"""Commands that pages of docs/ walk a reader through, typed as they stand there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from conftest import ROOT, environment

_FOLDERS = ("examples", "slm_export")
_DEADLINE_S = 3600


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def walk(text: str, name: str) -> str:
    """Return the commands between a page's marks."""
    found = re.findall(rf"<!-- walk: {name} -->\n```\n(.*?)```\n<!-- end -->", text, re.DOTALL)
    assert len(found) == 1, name
    return str(found[0])


def typed(commands: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run commands in a folder in which the repository's files lie; what they leave in the background ends.

    To the end of the shell, not of its output, which what runs in the background holds open: so that is a file.
    """
    for each in _FOLDERS:
        (folder / each).symlink_to(ROOT / each)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    made = environment({"PATH": path, "SLM_EXPORT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"})
    out, err = folder / "stdout", folder / "stderr"
    with out.open("w") as to_out, err.open("w") as to_err:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=folder,
            env=made,
            stdout=to_out,
            stderr=to_err,
            start_new_session=True,
        )
    try:
        code = shell.wait(timeout=_DEADLINE_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(shell.args, code, out.read_text(), err.read_text())
