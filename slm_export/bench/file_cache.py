"""Files that the system keeps in memory: let go of, so that the next reader waits for the disk.

Linux drops a file's clean pages on ``posix_fadvise(POSIX_FADV_DONTNEED)``, without rights over the machine; whether it
did is asked with ``mincore`` (both: Linux manual pages). Other systems have no such call.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

_REMAINING = 0.02
"""Share of a file's pages that may have stayed for a load to count as cold."""


def evict(path: Path) -> bool:
    """Let go of an artifact (a file with the data beside it, or a folder); return whether the system did."""
    if sys.platform != "linux":
        return False
    files = (
        [file for file in path.rglob("*") if file.is_file()]
        if path.is_dir()
        else [path, *path.parent.glob(f"{path.name}.data*")]
    )
    for file in files:
        with open(file, "rb") as opened:
            # Pages that were never written cannot be dropped.
            os.fdatasync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return all(resident_share(file) <= _REMAINING for file in files)


def resident_share(path: Path) -> float:
    """Return what share of a file's pages is in memory."""
    size = path.stat().st_size
    if not size:
        return 0.0
    pages = -(-size // mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        held = ctypes.c_char.from_buffer(mapped)
        seen = (ctypes.c_ubyte * pages)()
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(held)), ctypes.c_size_t(size), seen)
        del held
        if failed:
            return 1.0
    return sum(byte & 1 for byte in bytes(seen)) / pages
