"""The walks of docs/federated.md, typed as they stand there; and the tables of its file."""

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

pytest.importorskip("flwr")
pytest.importorskip("ray")

from federating import free_port
from test_federated_simulation import changed

from slm_export.federated.settings import Federation
from slm_export.federated.updates import Reason

PAGE = (ROOT / "docs" / "federated.md").read_text(encoding="utf-8")
FOLDERS = ("examples", "slm_export")


def walk(name: str) -> str:
    found = re.findall(rf"<!-- walk: {name} -->\n```\n(.*?)```\n<!-- end -->", PAGE, re.DOTALL)
    assert len(found) == 1, name
    return str(found[0])


def typed(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a walk in a folder in which the repository's files lie; what it leaves in the background ends."""
    for each in FOLDERS:
        (folder / each).symlink_to(ROOT / each)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    made = environment({"PATH": path, "SLM_EXPORT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"})
    out, err = folder / "stdout", folder / "stderr"
    with out.open("w") as to_out, err.open("w") as to_err:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=folder,
            env=made,
            stdout=to_out,
            stderr=to_err,
            start_new_session=True,
        )
    try:
        code = shell.wait(timeout=3600)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(shell.args, code, out.read_text(), err.read_text())


@pytest.mark.slow
def test_from_a_shipped_bundle_to_a_delegate_that_has_learned(tmp_path: Path) -> None:
    done = typed(walk("simulation"), tmp_path)
    assert done.returncode == 0, done.stderr
    weeks = [
        json.loads((tmp_path / week / "federation.json").read_text())["federation"]
        for week in ("week-1", "week-2")
    ]
    for told in weeks:
        assert told["rounds"]["that_changed"] == 2
        assert 0 < told["privacy"]["spent"]["epsilon"] <= 8.0
    assert weeks[0]["began_with"] is None
    assert weeks[1]["began_with"]["privacy"] == weeks[0]["privacy"]
    adapters = json.loads((tmp_path / "shipped" / "manifest.json").read_text())["adapters"]
    assert [each["name"] for each in adapters] == ["week-1", "week-2"]
    learned = json.loads((tmp_path / "merged" / "manifest.json").read_text())["model"]["learned"]
    assert learned["settings"]["privacy"] == weeks[1]["privacy"]
    (answer,) = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(answer)["delegate"] == "coder"
    assert json.loads(answer)["answer"]
    assert answer in done.stdout


@pytest.mark.slow
def test_server_and_clients(tmp_path: Path) -> None:
    done = typed(walk("deployment").replace("9092", str(free_port())), tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "adapter" / "federation.json").read_text())["federation"]
    assert told["rounds"]["that_changed"] == 1
    assert changed(tmp_path / "adapter")


def test_the_tables_name_every_key_and_every_reason() -> None:
    file = PAGE[PAGE.index("## The file") : PAGE.index("## What the server lets in")]
    for name, field in Federation.model_fields.items():
        kinds = [kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if kind]
        tables = [kind for kind in kinds if hasattr(kind, "model_fields")]
        assert f"`[{name}]`" in file or not tables, name
        for table in tables:
            for key in table.model_fields:
                assert f"`{key}`" in file, f"{name}.{key}"
    screen = PAGE[PAGE.index("## What the server lets in") : PAGE.index("## Privacy")]
    for reason in Reason.__args__:
        assert f"`{reason}`" in screen, reason
