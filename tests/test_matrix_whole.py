"""A matrix by its command, in processes as a user has them: on this machine, interrupted, and on a Dask cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Cli, command, environment
from test_matrix import EXAMPLE, save_model

pytestmark = pytest.mark.slow

DEADLINE_S = 600
HOST = """
models = ["a", "b"]
devices = ["host", "x86-edge-8gb"]
formats = ["onnx"]
recipes.int8.bits = 8
verify = false
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, width in (("a", 32), ("b", 64)):
        save_model(tmp_path / name, width)
    (tmp_path / "matrix.toml").write_text(HOST)
    return tmp_path


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def begun(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("matrix", "matrix.toml", "--json", *options),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=open(folder / "stderr", "w"),
        text=True,
    )


def test_the_example_of_the_page(cli: Cli, tmp_path: Path) -> None:
    save_model(tmp_path / "pycode-5m", 32)
    save_model(tmp_path / "chat-5m", 64)
    # Between the two models' files.
    (tmp_path / "matrix.toml").write_text(EXAMPLE.replace("6_000_000", "250_000"))
    done = cli("matrix", "matrix.toml", "--jobs", "2", "--json", timeout=DEADLINE_S)
    document = json.loads(done.stdout)
    assert {cell["name"]: cell["outcome"] for cell in document["cells"]} == {
        "pycode-5m.int8.raspberry-pi-5": "made",
        "pycode-5m.int4.raspberry-pi-5": "made",
        "chat-5m.int8.raspberry-pi-5": "made",
        "chat-5m.int4.raspberry-pi-5": "failed",
    }
    assert done.returncode == document["exit_code"] == 1
    gates = [column["gate"] for column in document["comparisons"]["chat-5m"]["columns"]]
    assert gates == ["pass", "fail"]


def test_an_interrupted_matrix_goes_on_with_what_it_finished(project: Path, cli: Cli) -> None:
    running = begun(project, "--jobs", "1")
    bundles = project / "matrix" / "bundles"
    until(lambda: len([*bundles.glob("[!.]*")]) == 1 and running.poll() is None, "the first bundle")
    until(lambda: [*(project / "matrix" / "cells").glob("*/cell.json")], "its record")
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert not [
        one for one in psutil.process_iter(["cmdline"]) if str(bundles) in " ".join(one.info["cmdline"] or ())
    ]
    # nothing in half
    assert len([*bundles.iterdir()]) == 1
    done = cli("matrix", "matrix.toml", "--jobs", "2", "--json", timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert [cell["outcome"] for cell in cells] == ["kept", "made", "made", "made"]
    # The second device's weights are those that the first one's export had finished.
    second = json.loads((project / "matrix" / "cells" / "a.int8.x86-edge-8gb" / "export.json").read_text())
    assert any("weights were finished by" in note for note in second["notes"])


@pytest.fixture
def cluster(project: Path) -> Iterator[str]:
    """A scheduler, and two workers that take one task at a time."""
    pytest.importorskip("distributed")
    address = project / "scheduler.json"
    quiet = {"env": environment(), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask = [sys.executable, "-m", "distributed.cli"]
    with open(project / "cluster.log", "wb") as log:
        quiet |= {"stdout": log, "stderr": log}
        programs = [
            [
                *dask[:2],
                "distributed.cli.dask_scheduler",
                "--port",
                "0",
                "--no-dashboard",
                "--host",
                "127.0.0.1",
            ]
        ]
        programs += [
            [*dask[:2], "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
            for _ in range(2)
        ]
        started = [
            subprocess.Popen([*program, "--scheduler-file", str(address)], **quiet)  # type: ignore[call-overload]
            for program in programs
        ]
        try:
            until(address.exists, "the scheduler")
            yield str(json.loads(address.read_text())["address"])
        finally:
            for process in started:
                process.kill()
                process.wait()


def test_on_a_cluster_all_cells_end_though_a_worker_is_killed(project: Path, cluster: str, cli: Cli) -> None:
    cells = project / "matrix" / "cells"
    running = begun(project, "--scheduler", cluster)

    def exports() -> list[psutil.Process]:
        """Return the workers that are at an export whose weights are read."""
        found = []
        for one in psutil.process_iter(["cmdline"]):
            line = " ".join(one.info["cmdline"] or ())
            if "slm_export.matrix.guard" in line and str(project) in line:
                found.append(one)
        return found

    at_work = until(exports, "a first export")
    until(
        lambda: any("read the model" in log.read_text() for log in cells.glob("*/log.txt")), "its first stage"
    )
    worker = at_work[0].parent()
    assert worker is not None
    assert "dask_worker" in " ".join(worker.cmdline())
    os.kill(worker.pid, signal.SIGKILL)
    printed, _ = running.communicate(timeout=DEADLINE_S)
    assert running.returncode == 0, (project / "stderr").read_text()
    document = json.loads(printed)
    assert [cell["outcome"] for cell in document["cells"]] == ["made"] * 4
    # Every bundle is whole.
    again = cli("matrix", "matrix.toml", "--json", timeout=DEADLINE_S)
    assert [cell["outcome"] for cell in json.loads(again.stdout)["cells"]] == ["kept"] * 4


def test_a_scheduler_that_is_not_there_is_said(project: Path, cli: Cli) -> None:
    pytest.importorskip("distributed")
    done = cli("matrix", "matrix.toml", "--scheduler", "tcp://127.0.0.1:1")
    assert done.returncode == 2
    assert "no scheduler answers" in done.stderr
