"""Keeps what native libraries and their Python halves write to stderr away from the user's terminal.

Compilers and runtimes log to the file descriptor itself, with no switch to turn that off. The descriptor is
pointed at a temporary file for as long as the work lasts; progress goes to a copy of the real one.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TextIO

_SHOWN_LINES = 15


@contextmanager
def kept_from_terminal() -> Iterator[TextIO]:
    """Yield the real stderr, while descriptor 2 leads to a file; its end is shown if an unforeseen error passes."""
    from slm_export.errors import SlmExportError

    sys.stderr.flush()
    try:
        real = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    except OSError:  # closed by a daemon: nothing to protect
        yield sys.stderr
        return
    with real, tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield real
        except Exception as error:
            if not isinstance(error, SlmExportError):
                _show_end(log, real)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(real.fileno(), 2)


@contextmanager
def off_stdout() -> Iterator[None]:
    """Send to stderr what native code writes to stdout, which belongs to results and to ``--json``."""
    sys.stdout.flush()
    try:
        real = os.dup(1)
    except OSError:  # closed: nothing to protect
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        # C has a buffer of its own, which would otherwise be written after all.
        ctypes.CDLL(None).fflush(None)
        os.dup2(real, 1)
        os.close(real)


def _show_end(log: IO[bytes], real: TextIO) -> None:
    log.seek(0)
    for line in log.read().decode("utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]:
        real.write(f"  | {line}\n")
