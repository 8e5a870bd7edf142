"""A folder that lives as long as somebody uses it, whoever made it and however they end.

Whoever uses it holds a shared lock on the folder itself. A lock goes with its process, so what nobody holds any more is
dead, whatever process id stands in its name.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path


class Held:
    """A folder, made if it is not there, that nobody removes before `leave`; an OSError where it cannot be made."""

    def __init__(self, folder: Path, mode: int = 0o777) -> None:
        self.folder = folder
        while True:
            folder.mkdir(mode, parents=True, exist_ok=True)
            self._file = _opened(folder)
            with suppress(OSError):  # a file system without locks: as good as it can be had there
                fcntl.flock(self._file, fcntl.LOCK_SH)
            if _same(self._file, folder):
                return
            os.close(self._file)  # removed while this waited for its lock

    def leave(self, *, remove: bool) -> None:
        """Let go of the folder, and remove it unless others hold it."""
        if remove and try_lock(self._file) is not False:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._file)


def reclaim(folder: Path) -> None:
    """Remove a folder that nobody holds; where that cannot be told, it stays."""
    with suppress(OSError):
        file = _opened(folder)
        try:
            if try_lock(file) and _same(file, folder):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(file)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def try_lock(file: int) -> bool | None:
    """True: locked. False: somebody else holds it. None: this file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _same(file: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(folder))
    except FileNotFoundError:
        return False
