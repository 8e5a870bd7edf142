"""`slm-export delegate` as a process, with a real bundle, killed, and with a real endpoint."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from conftest import command, environment
from forked import Forked
from serving import UNQUANTIZED, save_chat_model, serving

from slm_export.delegates.state import State
from slm_export.generation import Sampling
from slm_export.opened import open_bundle

DEADLINE_S = 240
LINES = """
[delegates.writer]
bundle   = "tiny-host"
trigger  = { stdin = true }
sampling = { max_tokens = 3 }
output   = { file = "out.jsonl" }
"""
ANSWERS = 12


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, quick_cli: Forked) -> Path:
    folder = tmp_path_factory.mktemp("delegates")
    save_chat_model(folder / "tiny")
    done = quick_cli("tiny", *UNQUANTIZED, "--format", "onnx", "--out", "tiny-host", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "tiny-host"


@pytest.fixture
def work(bundle: Path, tmp_path: Path) -> Path:
    (tmp_path / "tiny-host").symlink_to(bundle, target_is_directory=True)
    (tmp_path / "delegates.toml").write_text(LINES)
    return tmp_path


def started(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("delegate", "run", *options),
        cwd=folder,
        env=environment({"OUR_TOKEN": "secret"}),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def until(state: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not state():
        assert time.monotonic() < end
        time.sleep(0.05)


def counts(folder: Path) -> dict[str, int]:
    if not (folder / "delegates.sqlite").exists():
        return {}
    with closing(State(folder / "delegates.sqlite", reading=True)) as state:
        return state.counts("writer")


def written(folder: Path) -> list[dict[str, object]]:
    out = folder / "out.jsonl"
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_killed_in_the_midst_nothing_is_lost_or_done_twice(work: Path) -> None:
    with started(work) as running:
        assert running.stdin
        # It stays open: the end of the input would be the end of the run.
        print("\n".join(f"def f{n}():" for n in range(ANSWERS)), file=running.stdin, flush=True)
        until(lambda: sum(counts(work).values()) == ANSWERS and counts(work).get("done", 0) >= 2)
        running.kill()
    done = counts(work).get("done", 0)
    with started(work) as running:
        running.communicate(timeout=DEADLINE_S)
    assert running.returncode == 0
    assert counts(work) == {"done": ANSWERS}
    lines = written(work)
    assert [line["id"] for line in lines] == list(range(1, ANSWERS + 1))
    assert 2 <= done <= ANSWERS
    with closing(open_bundle(work / "tiny-host")) as opened:
        for number, line in enumerate(lines):
            assert line["answer"] == "".join(opened.text(f"def f{number}():", 3, Sampling()))


@pytest.mark.slow
def test_it_ends_when_it_is_told_to(work: Path) -> None:
    with started(work) as running:
        assert running.stdin
        print("def f():", file=running.stdin, flush=True)
        until(lambda: counts(work) == {"done": 1})
        running.send_signal(signal.SIGTERM)
        assert running.wait(DEADLINE_S) == 0


def test_files_that_change_while_it_runs_are_seen(work: Path) -> None:
    (work / "inbox").mkdir()
    text = LINES.replace("stdin = true", 'watch = "inbox"')
    (work / "delegates.toml").write_text(text)
    with started(work) as running:
        until(lambda: (work / "delegates.sqlite").exists() and _begun(work))
        for number in range(2):
            (work / "inbox" / f"{number}.part").write_text(f"def f{number}():")
            shutil.move(work / "inbox" / f"{number}.part", work / "inbox" / f"{number}.txt")
            until(lambda number=number: any(str(w["path"]).endswith(f"{number}.txt") for w in written(work)))  # type: ignore[misc]
        running.terminate()
        assert running.wait(DEADLINE_S) == 0


def _begun(work: Path) -> bool:
    with closing(State(work / "delegates.sqlite", reading=True)) as state:
        return bool(state.marks("writer"))


@pytest.mark.slow
def test_a_bundle_that_is_served_elsewhere_answers_for_it(work: Path) -> None:
    with serving(work / "tiny-host", "--token-env", "OUR_TOKEN", extra={"OUR_TOKEN": "secret"}) as served:
        text = LINES.replace(
            'bundle   = "tiny-host"',
            'bundle = "tiny-host"\nwhere = "local-then-remote"\nrule = { longer_than = 8 }\n'
            f'remote = {{ url = "{served.url}", model = "{served.model}", token_env = "OUR_TOKEN" }}',
        )
        (work / "delegates.toml").write_text(text)
        with started(work, "--once") as running:
            running.communicate("def f():\ndef add(first, second, third):\n", timeout=DEADLINE_S)
        assert running.returncode == 0
    host = served.url.removeprefix("http://").removesuffix("/v1")
    assert [line["place"] for line in written(work)] == ["local", host]
    with closing(open_bundle(work / "tiny-host")) as opened:
        expected = "".join(opened.text("def add(first, second, third):", 3, Sampling()))
    assert written(work)[1]["answer"] == expected


def test_what_is_shown_and_checked(work: Path, quick_cli: Forked) -> None:
    done = quick_cli("delegate", "check", cwd=work)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "delegates.toml: 1 delegate, all well\n"
    done = quick_cli("delegate", "list", "--json", cwd=work)
    (row,) = json.loads(done.stdout)["delegates"]
    assert (row["delegate"], row["trigger"], row["where"], row["done"]) == ("writer", "stdin", "local", 0)

    text = LINES.replace('file = "out.jsonl"', 'command = ["no-such-program"]')
    (work / "delegates.toml").write_text(text)
    with started(work, "--once") as running:
        running.communicate("x\n", timeout=DEADLINE_S)
    assert running.returncode == 4
    done = quick_cli("delegate", "list", cwd=work)
    assert "no-such-program cannot be started" in " ".join(done.stdout.split())
    done = quick_cli("delegate", "check", cwd=work)
    assert done.returncode == 2
    assert "output.command: no-such-program is not there" in done.stderr
    (work / "delegates.toml").write_text(text.replace("stdin", "stdn"))
    done = quick_cli("delegate", "run", cwd=work)
    assert done.returncode == 2
    assert "unknown key 'delegates.writer.trigger.stdn'; did you mean 'stdin'?" in done.stderr
