"""Calls of a vendor's tool on this machine, each with a limit on its time."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_export.errors import MachineError, MissingComponentError

ANSWER_S = 30.0
"""Seconds within which a device answers a question."""
COPY_BYTES_PER_S = 500_000
"""A device that takes files more slowly than this is given up."""
_LOOK_S = 0.2


@dataclass(frozen=True)
class Said:
    """What a tool answered."""

    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """What went wrong, in the tool's words: the first line that speaks of an error, or else the last."""
        lines = [line.strip() for line in (*self.out.splitlines(), *self.err.splitlines()) if line.strip()]
        of_errors = [line for line in lines if "error" in line.lower()]
        return (of_errors[:1] or lines[-1:] or [f"exit code {self.code}"])[0]


def find_tool(name: str, get: str) -> str:
    """Return the path of a tool; MissingComponentError that says where to get it."""
    found = shutil.which(name)
    if found is None:
        raise MissingComponentError(f"{name} is not installed; {get}")
    return found


def call_tool(
    command: Sequence[str],
    doing: str,
    timeout_s: float,
    stdin: Path | None = None,
    stop: threading.Event | None = None,
) -> Said:
    """Run a tool to its end; MachineError where it takes too long. ``doing`` says what it was at.

    ``stop`` is for a thread, which no signal reaches: once it is set, the tool is ended with a KeyboardInterrupt.
    """
    with (
        open(stdin or "/dev/null", "rb") as given,
        subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running,
    ):
        try:
            done = _said(running, time.monotonic() + timeout_s, stop)
        except BaseException:
            running.kill()
            raise
    if done is None:
        raise MachineError(f"{doing}: no answer within {timeout_s:.0f} s")
    out, err = (text.decode("utf-8", errors="replace") for text in done)
    return Said(running.returncode, out, err)


def _said(
    running: subprocess.Popen[bytes], until: float, stop: threading.Event | None
) -> tuple[bytes, bytes] | None:
    """Return what a tool writes until it ends; None where it takes too long, and it is ended then."""
    while True:
        if stop is not None and stop.is_set():
            raise KeyboardInterrupt
        left = max(0.0, until - time.monotonic())
        try:
            return running.communicate(timeout=left if stop is None else min(left, _LOOK_S))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= until:
                running.kill()
                return None


def copy_timeout(path: Path, patience_s: float = ANSWER_S) -> float:
    """Return how long copying a file may take."""
    return patience_s + path.stat().st_size / COPY_BYTES_PER_S
