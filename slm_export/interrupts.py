"""Signals that end a command: one unwinds everything, and stays an interrupt whatever a library makes of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLEANING_UP_S = 5.0

_heeded: list[float] = []
"""When a signal interrupted this process, in seconds of the monotonic clock."""


def catch_signals() -> None:
    """Let a signal unwind everything, and those that follow at once not interrupt the cleaning up."""
    for number in _SIGNALS:
        # What is ignored already stays so: `nohup` asks for that.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def ignore_signals() -> None:
    """Let no signal change an outcome that is decided."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def still_an_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt for any error that passes after a signal: torch's tracer makes a TypeError of it."""
    try:
        yield
    except Exception as error:
        if _heeded:
            raise KeyboardInterrupt from error
        raise


def _interrupt(number: int, frame: object) -> None:
    if not _heeded or time.monotonic() - _heeded[-1] >= _CLEANING_UP_S:
        _heeded.append(time.monotonic())
        raise KeyboardInterrupt
