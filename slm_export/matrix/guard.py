"""Runs a command that ends when whoever started it is gone: ``python -m slm_export.matrix.guard COMMAND...``.

The starter holds the other end of stdin. When that is closed, by a stop or because the starter was killed, the command
is interrupted, as by Ctrl-C, and killed if that does not end it. What it leaves running is killed with it. The exit
code is the command's, or 128 and the number of the signal that ended it, as in a shell.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

CLEANING_UP_S = 20.0
"""How long an interrupted command may clean up."""


def main(command: list[str]) -> int:
    """Run a command to its end, or to that of stdin."""
    # Descriptors are inherited: a lock that the starter passed on is the command's too.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, close_fds=False)
    over = threading.Event()
    threading.Thread(target=_end_with_stdin, args=(child, over), daemon=True).start()
    code = child.wait()
    over.set()
    _kill_group(child)
    return code if code >= 0 else 128 - code


def _end_with_stdin(child: subprocess.Popen[bytes], over: threading.Event) -> None:
    os.read(0, 1)
    if not over.is_set():
        child.send_signal(signal.SIGINT)
    if not over.wait(CLEANING_UP_S):
        _kill_group(child)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # The thread that reads stdin would be waited for.
    os._exit(code)
