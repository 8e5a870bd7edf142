"""How much memory this process holds, now and at its peak, in MiB."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress

_MIB = 1 << 20


def resident_mb() -> float:
    """Return the resident memory of this process."""
    if sys.platform == "linux":
        # Read directly: cheap enough for several samples per second.
        with suppress(OSError, ValueError, IndexError), open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MIB
    import psutil

    return float(psutil.Process().memory_info().rss) / _MIB


def peak_resident_mb() -> float:
    """Return the highest resident memory that the system saw in this process.

    Linux counts into ``ru_maxrss`` what the parent held when it started us, so the
    high-water mark of our own address space comes first.
    """
    with suppress(OSError, ValueError, IndexError), open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB
