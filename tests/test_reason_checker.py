"""A user's command judges solutions, in a child process that can do little."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from slm_export.errors import InputError
from slm_export.learning.checker import Checker, Limits
from slm_export.learning.problems import Problem

PROBLEM = Problem("1 + 1", "2", "p:1")
PATIENT = Limits(seconds=120)


def checker(folder: Path, source: str, limits: Limits = PATIENT) -> Checker:
    file = folder / "check it.py"
    file.write_text(source, encoding="utf-8")
    return Checker(f"'{sys.executable}' -I -S '{file}'", limits)


def test_exit_codes_say_right_and_wrong_of_what_is_on_stdin(tmp_path: Path) -> None:
    judge = checker(
        tmp_path,
        "import json, sys\nasked = json.load(sys.stdin)\n"
        "assert set(asked) == {'problem', 'answer', 'solution', 'given'}\n"
        "sys.exit(asked['given'] != asked['answer'] or asked['problem'] != '1 + 1')",
    )
    assert judge(PROBLEM, "two\nAnswer: 2") is None
    assert judge(PROBLEM, "Answer: 3") == "wrong"
    judge.try_out(PROBLEM)


@pytest.mark.parametrize(
    ("source", "limits", "reason"),
    [
        ("import sys; sys.exit(3)", PATIENT, "checker: exit code 3"),
        ("import os; os.abort()", PATIENT, "checker: SIGABRT"),
        ("import time; time.sleep(3600)", Limits(seconds=1), "checker: out of time"),
        ("while True: pass", Limits(seconds=1), "checker: out of time"),
        ("import time, os; os.fork(); time.sleep(3600)", Limits(seconds=1), "checker: out of time"),
        ("x = bytearray(1 << 29)", Limits(seconds=120, memory=1 << 28), "wrong"),
        ("open('file', 'wb').write(bytes(1 << 21))", Limits(seconds=120, file=1 << 20), "wrong"),
        ("open('file', 'wb').write(bytes(1 << 19))", Limits(seconds=120, file=1 << 20), None),
        ("for n in range(99): open(str(n), 'w').close()", PATIENT, None),
        ("files = [open(str(n), 'w') for n in range(99)]", PATIENT, "wrong"),
    ],
)
def test_a_check_is_kept_in_bounds(tmp_path: Path, source: str, limits: Limits, reason: str | None) -> None:
    assert checker(tmp_path, source, limits)(PROBLEM, "Answer: 2") == reason


def test_a_check_starts_in_an_empty_folder_of_its_own_without_our_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_SOMEBODY", "x")
    judge = checker(
        tmp_path,
        "import os, sys\n"
        "assert os.listdir('.') == [] and os.environ['HOME'] == os.environ['TMPDIR'] == os.getcwd()\n"
        "assert 'SECRET_OF_SOMEBODY' not in os.environ\n"
        "open('left', 'w').write('behind')\nprint('a lot' * 100000)",
    )
    assert judge(PROBLEM, "x") is None
    assert judge(PROBLEM, "x") is None


def test_a_check_has_no_network(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        judge = checker(tmp_path, f"import socket\nsocket.create_connection(('127.0.0.1', {port})).close()")
        if not judge.network_is_off:
            pytest.skip("this system gives no namespaces")
        assert judge(PROBLEM, "x") == "wrong"
        assert "Error" in judge.last_words


def test_nothing_that_a_check_started_outlives_it(tmp_path: Path) -> None:
    """A daemon in a session of its own holds a pipe open; its end is seen when the system has ended the daemon."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    judge = checker(
        tmp_path,
        "import os, time\nready, say = os.pipe()\n"
        "if os.fork() == 0:\n    os.setsid()\n"
        f"    file = os.open({str(pipe)!r}, os.O_WRONLY)\n    os.write(file, b'x')\n    os.write(say, b'x')\n"
        "    time.sleep(3600)\nos.read(ready, 1)",
    )
    if not judge.network_is_off:
        pytest.skip("this system gives no namespaces")
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert judge(PROBLEM, "x") is None
        assert os.read(end, 1) == b"x"
        deadline = time.monotonic() + 120
        while not _is_at_its_end(end):
            assert time.monotonic() < deadline, "the daemon is alive"
            time.sleep(0.05)
    finally:
        os.close(end)


def _is_at_its_end(file: int) -> bool:
    try:
        return os.read(file, 1) == b""
    except BlockingIOError:
        return False


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "empty command"),
        ("'unclosed", "No closing quotation"),
        ("no-such-program-of-ours --x", "no-such-program-of-ours: no such program"),
    ],
)
def test_a_command_that_is_none_is_refused(command: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Checker(command)


def test_a_command_that_cannot_judge_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"exit code 7.*it says: no such file"):
        checker(tmp_path, "import sys\nprint('no such file', file=sys.stderr)\nsys.exit(7)").try_out(PROBLEM)
    with pytest.raises(InputError, match="accepts an empty solution"):
        checker(tmp_path, "").try_out(PROBLEM)


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    file = tmp_path / "check.py"
    file.write_text("import sys\nsys.exit(sys.argv[1:] != ['$HOME', ';', 'exit', '0'])")
    assert Checker(f"'{sys.executable}' '{file}' $HOME ; exit 0", PATIENT)(PROBLEM, "x") is None
