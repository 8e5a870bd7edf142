"""When the machine is at fault: a full or failing disk, too little memory."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slm_export.errors import MachineError, SlmExportError

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
MACHINE_ERRNOS = _DISK_FULL | {
    errno.EIO,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.EROFS,
    errno.ESTALE,
}
# Native libraries raise types of their own, with the system's words somewhere inside.
_DISK_WORDS = re.compile(
    r"no space left on device|os error 28|disk quota exceeded|file too large|os error 27", re.IGNORECASE
)
_MEMORY_WORDS = re.compile(
    r"can.?t allocate memory|cannot allocate memory|std::bad_alloc|out of memory", re.IGNORECASE
)


@contextmanager
def machine_errors(doing: str, where: Path | None = None) -> Iterator[None]:
    """Turn a full disk, a failing disk or a lack of memory into a MachineError; let all else pass.

    ``doing`` completes "cannot ...": "write the bundle", "load the model".
    """
    try:
        yield
    except SlmExportError:
        raise
    except Exception as error:
        message = _message(error, doing, where)
        if message is None:
            raise
        raise MachineError(message) from error


def _message(error: Exception, doing: str, where: Path | None) -> str | None:
    code = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if code in _DISK_FULL or _DISK_WORDS.search(text):
        return _disk_full(doing, where)
    if code == errno.ENOMEM or isinstance(error, MemoryError) or _MEMORY_WORDS.search(text):
        return f"cannot {doing}: out of memory; close other programs, or use a machine with more memory"
    if isinstance(error, OSError) and code in MACHINE_ERRNOS:
        place = error.filename or where or "this machine"
        return f"cannot {doing}: {place}: {error.strerror}; check the machine and try again"
    return None


def _disk_full(doing: str, where: Path | None) -> str:
    place = where or Path.cwd()
    free = ""
    with suppress(OSError):
        free = f", {shutil.disk_usage(_existing(place)).free / 1e6:,.0f} MB free"
    return f"cannot {doing}: disk full ({place}{free}); free some space, or choose an --out on another disk"


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
