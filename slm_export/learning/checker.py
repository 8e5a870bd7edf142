"""Solutions judged by a user's own command, in a child process that can do little.

The command is started without a shell in an empty folder of its own, with bounds on processor time, memory, files and
processes, and on a system with namespaces (Linux) without network; when its time is over it is killed with everything
that it started. On standard input it gets one JSON object: ``{"problem", "answer", "solution", "given"}``, ``answer``
the known one or null, ``given`` the one found in the solution or null. Exit code 0 says right, 1 wrong; any other end
rejects the solution too, and is counted under its own name. It can read what its user can read: this keeps accidents
and generated programs in bounds, not an enemy.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from slm_export.errors import InputError
from slm_export.learning import confine
from slm_export.learning.judging import answer_in
from slm_export.learning.problems import Problem

_LONGEST_WORDS = 200


@dataclass(frozen=True)
class Limits:
    """What one check may take."""

    seconds: float = 10.0
    """Of the clock, and, rounded up, of a processor."""
    memory: int = 1 << 30
    """Bytes of address space of each process."""
    file: int = 16 << 20
    """Bytes of each file that it writes."""
    open: int = 64
    """Files open at a time in each process."""
    processes: int = 64
    """Counted only where namespaces are."""


class Checker:
    """Runs the user's command on solutions; see `Judge`."""

    def __init__(self, command: str, limits: Limits | None = None) -> None:
        """Find the command's program and try what the system gives.

        Raises:
            InputError: the command is empty, badly quoted, or its program is not there.
        """
        self.words = _resolved(command)
        self.limits = limits or Limits()
        self.last_words = ""
        """The last line that it wrote on standard error when it was last asked."""
        self.network_is_off = self._run(["true"], "", namespaces=True)[0] == 0
        """Whether checks run without network; False where the system has no namespaces or refuses them."""

    def __call__(self, problem: Problem, solution: str) -> str | None:
        """Return None for a solution that the command accepts, else why it is rejected."""
        given = {
            "problem": problem.text,
            "answer": problem.answer,
            "solution": solution,
            "given": answer_in(solution),
        }
        code, self.last_words = self._run(self.words, json.dumps(given), namespaces=self.network_is_off)
        if code in (0, 1):
            return None if code == 0 else "wrong"
        return _ending(code)

    def try_out(self, problem: Problem) -> None:
        """Check an empty solution; InputError where the command fails rather than rejects it."""
        given = {"problem": problem.text, "answer": problem.answer, "solution": "", "given": None}
        code, words = self._run(self.words, json.dumps(given), namespaces=self.network_is_off)
        if code not in (0, 1):
            said = f"; it says: {words}" if words else ""
            raise InputError(
                f"the checker fails on an empty solution ({_ending(code)}){said}; it must exit with 0 for right and "
                "1 for wrong"
            )
        if code == 0:
            raise InputError(
                "the checker accepts an empty solution; it must exit with 1 for what is not right"
            )

    def _run(self, command: list[str], text: str, *, namespaces: bool) -> tuple[int | None, str]:
        """Return the exit code, None where the time was over, and the last line on standard error."""
        with tempfile.TemporaryDirectory(prefix="check-") as home, tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", confine.__file__, self._bounds(namespaces), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=home,
                env=_environment(home),
                start_new_session=True,
            )
            late = False
            try:
                child.communicate(text.encode(), timeout=self.limits.seconds)
            except subprocess.TimeoutExpired:
                late = True
            finally:
                _kill_group(child)
            errors.seek(0)
            lines = errors.read(1 << 16).decode("utf-8", "replace").strip().splitlines()
        return (None if late else child.returncode), (lines[-1][:_LONGEST_WORDS] if lines else "")

    def _bounds(self, namespaces: bool) -> str:
        limits = self.limits
        bounds = {
            "cpu_s": max(1, round(limits.seconds + 0.5)),
            "memory": limits.memory,
            "file": limits.file,
            "open": limits.open,
            "processes": limits.processes,
            "namespaces": int(namespaces),
        }
        return json.dumps(bounds)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """End the command and what it left behind; a process group outlives its first process."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:
        with suppress(OSError):
            child.stdin.close()


def _environment(home: str) -> dict[str, str]:
    """Return what a program needs to start, and nothing that is the user's secret."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    return {**kept, "HOME": home, "TMPDIR": home, "PYTHONDONTWRITEBYTECODE": "1"}


def _resolved(command: str) -> list[str]:
    """Return the words of a command; those that name files of the current folder by their whole path."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--checker: {error}: {command}") from None
    if not words:
        raise InputError("--checker: an empty command")
    program = shutil.which(words[0])
    if program is None:
        raise InputError(f"--checker: {words[0]}: no such program")
    whole: Callable[[str], str] = lambda word: str(Path(word).absolute()) if Path(word).is_file() else word  # noqa: E731
    return [str(Path(program).absolute()), *map(whole, words[1:])]


def _ending(code: int | None) -> str:
    if code is None:
        return "checker: out of time"
    if code > 128 or code < 0:
        number = code - 128 if code > 128 else -code
        with suppress(ValueError):
            return f"checker: {signal.Signals(number).name}"
    return f"checker: exit code {code}"
