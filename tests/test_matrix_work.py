"""Which exports run beside each other, and that none outlives whoever asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_export.matrix import needs
from slm_export.matrix.engine import Local
from slm_export.matrix.schedule import Job, Room, startable
from slm_export.matrix.work import ANSWER, LOG, Ended, Work, ending, lives, run_work, stop

GB = 10**9


def job(name: str, size: int | None = 1, *stages: str) -> Job:
    return Job(name, None if size is None else size * GB, stages)


def chosen(
    waiting: Sequence[Job], running: Sequence[Job], room: Room, finished: Sequence[str] = ()
) -> str | None:
    found = startable(waiting, running, set(finished), room)
    return None if found is None else found.name


# --- the order ---------------------------------------------------------------------------------------


def test_jobs_are_bounded_by_their_number() -> None:
    assert chosen([job("b")], [job("a")], Room(2)) == "b"
    assert chosen([job("b")], [job("a")], Room(1)) is None


def test_jobs_are_bounded_by_their_memory() -> None:
    room = Room(9, 10 * GB)
    assert chosen([job("b", 4)], [job("a", 6)], room) == "b"
    assert chosen([job("b", 5)], [job("a", 6)], room) is None
    assert chosen([job("b", 5), job("c", 4)], [job("a", 6)], room) == "c"


def test_what_nobody_can_predict_runs_alone() -> None:
    room = Room(9, 10 * GB)
    assert chosen([job("b", None)], [], room) == "b"
    assert chosen([job("b", None)], [job("a", 1)], room) is None
    assert chosen([job("b", 1)], [job("a", None)], room) is None


def test_what_is_larger_than_all_there_is_never_starts() -> None:
    room = Room(9, 10 * GB)
    assert room.never(job("a", 11))
    assert not room.never(job("a", 10))
    assert not room.never(job("a", None))
    assert not Room(9).never(job("a", 11))


def test_a_job_waits_for_weights_that_another_is_making() -> None:
    a, b = job("a", 1, "rotate", "int4"), job("b", 1, "rotate", "int8")
    assert chosen([b, job("c")], [a], Room(9)) == "c"
    assert chosen([b], [a], Room(9), ["rotate"]) == "b"
    assert chosen([job("d", 1, "rotate", "int4")], [a], Room(9), ["rotate"]) is None


@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from(["x", "y", "z"])), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_every_order_ends_within_its_bounds(sizes: list[tuple[int, str]], jobs: int) -> None:
    room = Room(jobs, 12 * GB)
    waiting = [job(str(at), size, stage) for at, (size, stage) in enumerate(sizes)]
    running: list[Job] = []
    finished: set[str] = set()
    ended = 0
    while waiting or running:
        while one := startable(waiting, running, finished, room):
            waiting.remove(one)
            running.append(one)
        making = [one.stages[0] for one in running if one.stages[0] not in finished]
        assert 1 <= len(running) <= jobs
        assert sum(one.bytes or 0 for one in running) <= 12 * GB
        assert len(making) == len(set(making))
        finished.update(running.pop(0).stages)
        ended += 1
    assert ended == len(sizes)


def test_a_container_has_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(needs, "_CGROUP", tmp_path)
    whole = needs.available_bytes()
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert needs.available_bytes() == 1_800_000
    (tmp_path / "memory.max").write_text("max\n")
    assert needs.available_bytes() > whole / 2 > 1_800_000


def ended(pid: int) -> bool:
    """Return whether a process has ended; one that nobody waits for stays as a zombie."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def gone(pid: int) -> bool:
    """Wait until a process has ended: a signal was sent, and the kernel takes its time to carry it out."""
    deadline = time.monotonic() + 60
    while not ended(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return ended(pid)


# --- processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -KILL $$", 137)])
def test_a_guard_ends_as_its_command_does(script: str, code: int) -> None:
    guarded = subprocess.Popen(
        [sys.executable, "-m", "slm_export.matrix.guard", "sh", "-c", script], stdin=subprocess.PIPE
    )
    assert guarded.wait() == code
    assert guarded.stdin
    guarded.stdin.close()


def test_a_command_ends_with_whoever_started_it() -> None:
    """As the starter closes its pipe by dying, so does this test; what the command itself started ends too."""
    script = "trap 'echo cleaned; exit 130' INT; sleep 1000 & echo $!; wait"
    guarded = subprocess.Popen(
        [sys.executable, "-m", "slm_export.matrix.guard", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert guarded.stdin
    assert guarded.stdout
    grandchild = int(guarded.stdout.readline())
    guarded.stdin.close()
    assert guarded.stdout.read() == "cleaned\n"
    assert guarded.wait() == 130
    assert gone(grandchild)


def work(folder: Path, *arguments: str, run: str = "r") -> Work:
    folder.mkdir(exist_ok=True)
    return Work(run, folder, arguments, {"SLM_EXPORT_CACHE": str(folder)})


def test_work_leaves_what_it_printed_in_its_folder(tmp_path: Path) -> None:
    assert run_work(work(tmp_path, "devices", "host", "--json")).code == 0
    assert '"name": "host"' in (tmp_path / ANSWER).read_text()
    assert run_work(work(tmp_path, "devices", "hosst")).code == 2
    assert "did you mean 'host'?" in (tmp_path / LOG).read_text()


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Python that runs guards as ever, and in place of an export waits until it is ended."""
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\ncase "$2" in *guard) exec {sys.executable} "$@";; esac\necho $$ >&2\nexec sleep 1000\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    return tmp_path / "cell"


def started(log: Path) -> int:
    """Return the process id that an endless export writes, once it is there."""
    ready = threading.Event()
    for _ in range(600):
        if log.exists() and log.read_text().endswith("\n"):
            return int(log.read_text())
        ready.wait(0.05)
    raise AssertionError(log)


def test_a_stop_ends_what_runs_of_one_command_alone(endless: Path) -> None:
    engine = Local("mine", 1)
    engine.start("cell", work(endless, run="mine"), None)
    pid = started(endless / LOG)
    stop("theirs")
    assert engine.ended(0.5) is None
    assert lives("mine")
    engine.stop()
    over = engine.ended(10)
    assert over is not None
    assert over[0] == "cell"
    assert ending(over[1].code) == "killed by SIGINT" or over[1].code == 130
    assert not lives("mine")
    assert gone(pid)
    assert run_work(work(endless, run="mine")) == Ended(130, 0.0)


def test_an_export_that_is_killed_says_so(endless: Path) -> None:
    engine = Local("other", 1)
    engine.start("cell", work(endless, run="other"), None)
    os.kill(started(endless / LOG), signal.SIGKILL)
    over = engine.ended(60)
    assert over is not None
    assert over[1].code == -signal.SIGKILL
    assert over[1].machine
    engine.stop()


def test_a_second_attempt_waits_for_the_end_of_the_first(endless: Path) -> None:
    first, second = Local("first", 1), Local("second", 1)
    first.start("cell", work(endless, run="first"), None)
    before = started(endless / LOG)
    second.start("cell", work(endless, run="second"), None)
    assert second.ended(0.3) is None
    assert started(endless / LOG) == before
    first.stop()
    stop("second")
    over = second.ended(30)
    assert over is not None
    assert over[1].code in (130, -signal.SIGINT)
    second.stop()


def test_what_cannot_be_started_is_the_machines_fault(tmp_path: Path) -> None:
    engine = Local("nowhere", 1)
    engine.start("cell", Work("nowhere", tmp_path / "missing", (), {}), None)
    over = engine.ended(10)
    assert over is not None
    assert over[1].machine
    assert "could not be started" in over[1].reason
    engine.stop()
