"""The walks of docs/distillation.md for adapt and reason, typed as they stand there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, environment

PAGE = (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8")
FOLDERS = ("examples", "slm_export")


def walk(name: str) -> str:
    found = re.findall(rf"<!-- walk: {name} -->\n```\n(.*?)```\n<!-- end -->", PAGE, re.DOTALL)
    assert len(found) == 1, name
    return str(found[0])


def typed(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a walk in a folder of its own, in which the repository's files lie; what it leaves in the background ends."""
    for each in FOLDERS:
        (folder / each).symlink_to(ROOT / each)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    made = environment({"PATH": path, "SLM_EXPORT_CACHE": str(folder / "cache")})
    shell = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", walk(name)],
        cwd=folder,
        env=made,
        stdout=subprocess.PIPE,
        stderr=open(folder / "stderr", "w"),  # noqa: SIM115 - a pipe would be held open by what runs on
        text=True,
        start_new_session=True,
    )
    try:
        # To the end of the shell, not of the pipe: the endpoint in the background writes to that.
        code = shell.wait(timeout=3600)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert shell.stdout
    return subprocess.CompletedProcess(shell.args, code, shell.stdout.read(), (folder / "stderr").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "out"), [("adapt", "prose"), ("reason", "sums")])
def test_a_walk_does_what_it_says(name: str, out: str, tmp_path: Path) -> None:
    done = typed(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "child after" in done.stdout
    learned = json.loads((tmp_path / out / "learning.json").read_text())["learned"]
    assert learned["by"] == name
    if name == "reason":
        manifest = json.loads((tmp_path / "sums-android" / "manifest.json").read_text())
        assert manifest["model"]["learned"]["by"] == "reason"
        assert re.search(r"Held-out problems, solved by the artifact\n +executorch: \d+ of 60", done.stdout)


def test_every_option_on_the_page_is_one() -> None:
    from slm_export.cli import cli

    known = {option for command in cli.commands.values() for each in command.params for option in each.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) - {"--port", "--out"}
    assert named
    assert named <= known | {"--nproc-per-node", "--standalone"}, named - known
