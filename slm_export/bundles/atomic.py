"""System calls that Python does not offer: durable writes, and the exchange of two folders."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
from pathlib import Path

_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV})


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders of one file system in one step; False where the system cannot."""
    # name of the call, "relative to the current folder", the flag that asks for an exchange
    name, here, swap = ("renameatx_np", -2, 2) if sys.platform == "darwin" else ("renameat2", -100, 2)
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call is None:
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if call(here, os.fsencode(first), here, os.fsencode(second), swap) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk, not only in its cache."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # macOS's fsync leaves the data in the drive's own cache.
        if hasattr(fcntl, "F_FULLFSYNC") and path.is_file():
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
        else:
            os.fsync(file)
    except OSError as error:
        # Some network file systems cannot sync a folder; a file that cannot be synced is an error.
        if error.errno not in _UNSUPPORTED or path.is_file():
            raise
    finally:
        os.close(file)


def sync_tree(folder: Path) -> None:
    """Sync every file below a folder, then every folder, the outermost last."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(place, name)
            if not path.is_symlink():
                sync(path)
        sync(Path(place))
