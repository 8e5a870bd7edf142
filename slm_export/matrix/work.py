"""One export as a process of its own, from its start to what it came to; on this machine or on a worker.

A cell has a folder, and the process runs there:

    slm-export.toml   what to export; `slm-export` typed there does the same again
    log.txt           its progress
    export.json       what it printed: the report, or the error
    lock              locked while it lives, so that a second attempt waits for the end of a first
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from slm_export.errors import MachineError

SETTINGS, LOG, ANSWER, _LOCK = "slm-export.toml", "log.txt", "export.json", "lock"
INTERRUPTED = 130

_living: dict[subprocess.Popen[bytes], str] = {}
_stopped: set[str] = set()


@dataclass(frozen=True)
class Work:
    """What to run, and where."""

    run: str
    """Which command asked for it: one that is interrupted stops its own alone."""
    folder: Path
    arguments: tuple[str, ...]
    """Of ``slm-export``."""
    environment: Mapping[str, str]
    """Added to the worker's own."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """Exit code; below 0: the signal that ended it."""
    seconds: float
    reason: str = ""
    """Why it could not be run at all."""

    @property
    def machine(self) -> bool:
        """Whether the machine failed, and another try may go well."""
        return self.code < 0 or self.code == MachineError.exit_code


def run_work(work: Work) -> Ended:
    """Run an export to its end."""
    began = time.monotonic()
    with (
        _locked(work.folder / _LOCK) as lock,
        open(work.folder / LOG, "wb") as log,
        open(work.folder / ANSWER, "wb") as answer,
    ):
        if work.run in _stopped:
            return Ended(INTERRUPTED, 0.0)
        command = [sys.executable, "-m", "slm_export", *work.arguments]
        child = subprocess.Popen(
            [sys.executable, "-m", "slm_export.matrix.guard", *command],
            cwd=work.folder,
            env={**os.environ, **work.environment},
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=log,
            pass_fds=() if lock is None else (lock,),
            # Ctrl-C reaches us alone, and we tell the others.
            start_new_session=True,
        )
        _living[child] = work.run
        if work.run in _stopped:  # meanwhile, and `stop` did not see this one
            _let_go(child)
        try:
            code = child.wait()
        finally:
            del _living[child]
            _let_go(child)
    if code > 128 and code != INTERRUPTED:
        code = 128 - code
    return Ended(code, time.monotonic() - began)


def stop(run: str) -> None:
    """Interrupt every export of a command in this process, and let no other of it begin."""
    _stopped.add(run)
    for child, of in tuple(_living.items()):
        if of == run:
            _let_go(child)


def lives(run: str) -> bool:
    """Return whether an export of a command is still at work in this process."""
    return run in _living.values()


def ending(code: int) -> str:
    """Return what ended a process, in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
    hint = ", as systems do when memory runs out" if -code == signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def _let_go(child: subprocess.Popen[bytes]) -> None:
    """Close the pipe that the guard watches."""
    assert child.stdin
    with suppress(OSError):
        child.stdin.close()


@contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """Wait for a lock on a file; None where the file system has none."""
    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield None
        else:
            yield file
    finally:
        os.close(file)
